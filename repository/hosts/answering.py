"""The worker's half of a request: its tensors out of the frame and the arena, its answer back.

Data that lies in the arena in one piece, aligned for its datatype, is used where it lies; a tensor in
several pieces (a batch of bodies that were received one by one) is put together. An output that the
backend has not written into the room already is copied there if it fits and is not tiny; otherwise
it goes into the frame. It does no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from repository.backends.base import Room
from repository.errors import InferenceFailedError, InvalidTensorError
from repository.forms import Form
from repository.hosts import frames
from repository.hosts.arena import Window
from repository.hosts.frames import INLINE, PLACE, REPLY, BrokenFrameError, Header, Written
from repository.messages import InferRequest, InferResponse
from repository.tensors import DATATYPES, Buffer, Shape

SCRAP = 4096  # bytes of an output that are better in the frame


class Offer:
    """A room, and where it lies in the arena."""

    __slots__ = ("at", "room")

    def __init__(self, memory: memoryview, at: int) -> None:
        self.room = Room(memory)
        self.at = at


class Answering:
    def __init__(self, window: Window | None) -> None:
        self._window = window
        self._forms = frames.Forms()
        self._written: dict[tuple[tuple[str, str, Shape, int], ...], Written] = {}

    def read(self, header: Header, payload: memoryview) -> tuple[InferRequest, Offer | None]:
        """Raises BrokenFrameError, msgspec.MsgspecError."""
        _, meta, _, _, room, places, _ = header
        read = self._forms[bytes(payload[:meta])]
        form = read.form
        offer = None
        data: Sequence[Buffer]
        if places:
            data, offer = self._placed(form, payload, meta, places, room)
        else:
            data = frames.blobs_of(payload, read)
        request = InferRequest(form.tensors(data), form.outputs, "", form.parameters, form)
        return request, offer

    def write(
        self,
        number: int,
        response: InferResponse,
        offer: Offer | None,
        compute_s: float,
        kind: int = REPLY,
    ) -> list[Buffer]:
        """The frame. Raises InferenceFailedError for an answer that is too long."""
        blobs: list[Buffer] = [tensor.data for tensor in response.outputs]
        written = self._write(response)
        try:
            if offer is not None:
                places, inline = _settle(blobs, offer)
                return frames.pack(
                    kind, number, written.meta, inline, places=places, compute_s=compute_s
                )
            if written.largest < frames.JOIN_BELOW:
                return written.frame(kind, number, blobs, compute_s)
            return frames.pack(kind, number, written.meta, blobs, compute_s=compute_s)
        except InvalidTensorError as error:  # too long: not what the client sent is at fault
            raise InferenceFailedError(f"the answer holds {error}") from error

    def _write(self, response: InferResponse) -> Written:
        key = tuple([(t.name, t.datatype, t.shape, len(t.data)) for t in response.outputs])
        found = self._written.get(key)
        if found is None or response.parameters:
            meta = frames.state(key, (), response.parameters)
            found = Written(meta, [size for *_, size in key])
            if not response.parameters:
                if len(self._written) >= frames.Forms.MOST:
                    self._written.clear()
                self._written[key] = found
        return found

    def _placed(
        self, form: Form, payload: memoryview, meta: int, count: int, room: int
    ) -> tuple[list[Buffer], Offer | None]:
        places, blobs = frames.places_of(payload, meta, count)
        offer = None
        if room:
            at, size = places.pop()
            offer = Offer(self._view(at, size), at)
        inline = iter(blobs)
        places.reverse()
        data: list[Buffer] = []
        for blank in form.blanks:
            parts: list[Buffer] = []
            left, aligned = blank.size, True
            while left > 0 and places:
                at, size = places.pop()
                left -= size
                if at == INLINE:
                    parts.append(next(inline))
                else:
                    parts.append(self._data(at, size))
                    aligned = at % (DATATYPES[blank.datatype].size or 1) == 0
            if left:
                raise BrokenFrameError(f"the places of tensor '{blank.name}' are not its size")
            data.append(parts[0] if len(parts) == 1 and aligned else b"".join(parts))
        return data, offer

    def _data(self, at: int, size: int) -> Buffer:
        """Part of a tensor that was sent."""
        return self._view(at, size).toreadonly()

    def _view(self, at: int, size: int) -> memoryview:
        if self._window is None:
            raise BrokenFrameError("a place in an arena that is not there")
        try:
            return self._window.view(at, size)
        except ValueError as error:
            raise BrokenFrameError(str(error)) from error


def _settle(blobs: Sequence[Buffer], offer: Offer) -> tuple[bytes, list[Buffer]]:
    """(places, what goes into the frame): all else lies in the room."""
    places: list[bytes] = []
    inline: list[Buffer] = []
    elsewhere = False
    for data in blobs:
        size = len(data)
        if not size:
            continue
        at = None if size < SCRAP else offer.room.bring(data)
        if at is None:
            inline.append(data)
            places.append(PLACE.pack(INLINE, size))
        else:
            elsewhere = True
            places.append(PLACE.pack(offer.at + at, size))
    return (b"".join(places), inline) if elsewhere else (b"", list(blobs))
