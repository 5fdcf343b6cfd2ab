"""The front's half of a request: what of it goes into a frame, what lies in the arena.

A tensor of less than LARGE bytes goes into the frame. A larger one is named by its place where it
lies in this host's arena already (a body that was received there), and is copied there where it does
not: one copy in memory instead of two through the socket. Where the arena is full it goes into the
frame, and nobody waits. If the answer to the last request of the same form was large, the next one
offers a room of that size for its answer.

One Asking for all channels of one host. It does no I/O and trusts nothing that a worker says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from repository.forms import Form, form_of
from repository.hosts import frames
from repository.hosts.arena import Arena
from repository.hosts.frames import INLINE, MOST_PLACES, PLACE, BrokenFrameError, Header
from repository.messages import InferRequest, InferResponse
from repository.tensors import ALIGN, Buffer

LARGE = 64 * 1024  # bytes from which a tensor is cheaper in the arena (bench/transport.py)
SCRAP = 4096  # parts of a merged tensor below this are copied together wherever they lie
MOST_COPIED = 32 << 20  # bytes of a tensor: nobody else is served while they are copied
MOST_EXPECTED = 256  # forms whose answers' sizes are remembered


class Question(NamedTuple):
    """What is kept of a request until its answer: `kept` are the buffers that the worker reads."""

    meta: bytes
    kept: object = None
    room: memoryview | None = None
    room_at: int = 0


class _Wire(frames.Written):
    """A request's form for the workers of any host."""

    __slots__ = ("question",)

    def __init__(self, form: Form) -> None:
        """Raises TypeError, ValueError and OverflowError for what msgpack cannot say."""
        meta = frames.state(form.blanks, form.outputs, form.parameters)
        super().__init__(meta, [blank.size for blank in form.blanks])
        self.question = Question(meta)  # of all requests that have nothing in the arena


class Asking:
    def __init__(self, arena: Arena | None) -> None:
        self._arena = arena
        self._forms = frames.Forms()
        self._expected: dict[bytes, int] = {}  # metadata -> room that the last answer needed

    def pack(self, number: int, request: InferRequest) -> tuple[list[Buffer], Question]:
        """The frame, and what `open` is to be given with its answer. Raises InvalidTensorError for
        what is too long, TypeError, ValueError and OverflowError for what msgpack cannot say."""
        form = request.form or form_of(request.inputs, request.outputs, request.parameters)
        wire = form.wire
        if wire is None:
            wire = form.wire = _Wire(form)
        blobs = [tensor.data for tensor in request.inputs]
        if (
            wire.largest < LARGE
            and wire.meta not in self._expected
            and list not in map(type, blobs)
        ):
            return wire.frame(frames.INFER, number, blobs), wire.question
        return self._pack_large(number, form, wire.meta, blobs)

    def open(self, question: Question, header: Header, payload: memoryview) -> InferResponse:
        """The answer. Raises BrokenFrameError, msgspec.MsgspecError."""
        length, meta, _, _, _, places, compute_s = header
        read = self._forms[bytes(payload[:meta])]
        form = read.form
        if places:
            data = _placed(question, payload, meta, places, read.sizes)
        else:
            data = frames.blobs_of(payload, read)
        if places or length >= LARGE or question.room is not None:
            self._expect(question.meta, read.sizes)
        return InferResponse(form.tensors(data), form.parameters, 0.0, compute_s, 0, form)

    def hand(
        self, kind: int, number: int, response: InferResponse
    ) -> tuple[list[Buffer], object | None]:
        """An answer for a worker, and what it reads there (None: nothing). Raises as `pack`."""
        form = form_of(response.outputs)
        meta = frames.state(form.blanks, (), response.parameters)
        laid = _Laid(self._arena)
        for blank, tensor in zip(form.blanks, response.outputs, strict=True):
            laid.add(blank.size, tensor.data)
        if not laid.elsewhere or len(laid.places) > MOST_PLACES:
            return frames.pack(kind, number, meta, [t.data for t in response.outputs]), None
        places = b"".join([PLACE.pack(at, size) for at, size in laid.places])
        parts = frames.pack(kind, number, meta, laid.inline, places=places)
        return parts, ([tensor.data for tensor in response.outputs], laid.lots)

    def _pack_large(
        self, number: int, form: Form, meta: bytes, blobs: Sequence[Buffer]
    ) -> tuple[list[Buffer], Question]:
        laid = _Laid(self._arena)
        for blank, data in zip(form.blanks, blobs, strict=True):
            laid.add(blank.size, data)
        expected = self._expected.get(meta, 0)
        room, room_at = laid.take(expected) if expected else (None, 0)
        if room is not None:
            laid.places.append((room_at, expected))
        if not laid.elsewhere or len(laid.places) > MOST_PLACES:
            parts = frames.pack(frames.INFER, number, meta, [_joined(data) for data in blobs])
            return parts, Question(meta)
        places = b"".join([PLACE.pack(at, size) for at, size in laid.places])
        parts = frames.pack(
            frames.INFER, number, meta, laid.inline, places=places, room=room is not None
        )
        return parts, Question(meta, (blobs, laid.lots), room, room_at)

    def _expect(self, meta: bytes, sizes: Sequence[int]) -> None:
        small = max(sizes, default=0) < LARGE or len(meta) > frames.Forms.LONGEST
        if self._arena is None or small:
            self._expected.pop(meta, None)
            return
        if len(self._expected) >= MOST_EXPECTED:
            self._expected.clear()
        self._expected[meta] = sum(size + -size % ALIGN for size in sizes)


class _Laid:
    """Where the tensors of one request lie: `inline` in the frame, or at `places`.

    elsewhere   something does not lie in the frame
    lots        what was taken of the arena for it
    """

    def __init__(self, arena: Arena | None) -> None:
        self._arena = arena
        self.places: list[tuple[int, int]] = []
        self.inline: list[Buffer] = []
        self.lots: list[memoryview] = []
        self.elsewhere = False
        self._first = 0  # place of the tensor that is being laid out

    def take(self, size: int) -> tuple[memoryview | None, int]:
        found = self._arena.take(size) if self._arena is not None else None
        if found is None:
            return None, 0
        self.elsewhere = True
        return found

    def add(self, size: int, data: Buffer | list[Buffer]) -> None:
        if size < LARGE or self._arena is None:
            if size:
                self._add_inline(_joined(data))
            return
        self._first = len(self.places)
        parts = data if isinstance(data, list) else [data]
        found = [self._place_of(part) for part in parts]
        loose = [part for part, at in zip(parts, found, strict=True) if at is None]
        total = sum(map(len, loose))
        lot, at = self.take(total) if 0 < total <= MOST_COPIED else (None, 0)
        if lot is not None:
            self.lots.append(lot)
        end = 0
        for part, where in zip(parts, found, strict=True):
            n = len(part)
            if where is not None:
                self._add_place(where, n)
            elif lot is not None:
                begin, end = end, end + n
                lot[begin:end] = part
                self._add_place(at + begin, n)
            else:
                self._add_inline(part)

    def _place_of(self, part: Buffer) -> int | None:
        if len(part) < SCRAP or self._arena is None:
            return None
        return self._arena.place_of(part)

    def _add_place(self, at: int, size: int) -> None:
        self.elsewhere = True
        if len(self.places) > self._first and sum(self.places[-1]) == at:
            at, before = self.places.pop()
            size += before
        if size:
            self.places.append((at, size))

    def _add_inline(self, part: Buffer) -> None:
        if part:
            self.inline.append(part)
            self.places.append((INLINE, len(part)))


def _placed(
    question: Question, payload: memoryview, meta: int, count: int, sizes: Sequence[int]
) -> list[memoryview]:
    """The data of the outputs of an answer with places: one for each that is not empty."""
    places, blobs = frames.places_of(payload, meta, count)
    if [size for _, size in places] != [size for size in sizes if size]:
        raise BrokenFrameError("the places of an answer are not those of its outputs")
    room, begin = question.room or memoryview(b""), question.room_at
    inline, left = iter(blobs), iter(places)
    found = []
    for size in sizes:
        at = next(left)[0] if size else INLINE
        if not size:
            found.append(payload[:0])
        elif at == INLINE:
            found.append(next(inline))
        elif begin <= at <= begin + len(room) - size:
            found.append(room[at - begin : at - begin + size])
        else:
            raise BrokenFrameError("an answer lies where no room was offered")
    return found


def _joined(data: Buffer | list[Buffer]) -> Buffer:
    return b"".join(data) if isinstance(data, list) else data
