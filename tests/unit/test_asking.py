"""A request's way to a worker and back, both halves of it, without the socket between them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import InferenceFailedError
from repository.forms import form_of
from repository.hosts import frames
from repository.hosts.answering import Answering, Offer
from repository.hosts.arena import PAGE, Arena, Window
from repository.hosts.asking import LARGE, Asking, Question
from repository.hosts.frames import HEADER_SIZE, INLINE, PLACE, REPLY, BrokenFrameError
from repository.messages import InferRequest, InferResponse
from repository.tensors import ALIGN, Buffer, Tensor, address

BIG = LARGE + 12  # bytes


@dataclass
class Way:
    """There and back again. `arena` None: there is none."""

    arena: Arena | None
    asking: Asking
    answering: Answering

    def __init__(self, size: int = 64 * BIG) -> None:
        self.arena = Arena(size) if size else None
        self.asking = Asking(self.arena)
        self.answering = Answering(Window(os.dup(self.arena.fd)) if self.arena else None)

    def there(self, *tensors: Tensor, **more: Any) -> tuple[InferRequest, Offer | None, Question]:
        parts, question = self.asking.pack(1, InferRequest(list(tensors), **more))
        request, offer = self.answering.read(*cut(parts))
        return request, offer, question

    def back(self, question: Question, offer: Offer | None, *outputs: Tensor) -> InferResponse:
        parts = self.answering.write(1, InferResponse(list(outputs)), offer, 0.5)
        return self.asking.open(question, *cut(parts))

    def room(self, size: int) -> memoryview:
        assert self.arena is not None
        found = self.arena.take(size)
        assert found is not None
        return found[0]

    def holds(self, data: Buffer) -> bool:
        return self.arena is not None and self.arena.place_of(data) is not None


def cut(parts: list[Buffer]) -> tuple[frames.Header, memoryview]:
    whole = b"".join(parts)
    header = frames.unpack(whole)
    assert len(whole) == HEADER_SIZE + header[0]
    return header, memoryview(whole)[HEADER_SIZE:]


def on_a_way(test: Callable[[Way], None], size: int = 64 * BIG) -> None:
    async def story() -> None:
        way = Way(size)
        try:
            test(way)
        finally:
            if way.arena is not None:
                way.arena.close()

    asyncio.run(story())


def tensor(data: Any, name: str = "x", datatype: str = "UINT8") -> Tensor:
    return Tensor(name, datatype, (len(data),), data)


def filled(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def test_small_tensors_names_and_parameters_arrive_as_they_were():
    def test(way: Way) -> None:
        sent = [tensor(b"abc"), tensor(b"", "none"), Tensor("t", "BYTES", (1,), b"\1\0\0\0z")]
        request, offer, question = way.there(*sent, outputs=("y",), parameters={"k": [1, None]})
        assert offer is None and question.kept is None
        assert [(t.name, t.datatype, t.shape, bytes(t.data)) for t in request.inputs] == [
            (t.name, t.datatype, t.shape, t.data) for t in sent
        ]
        assert (request.outputs, request.parameters) == (("y",), {"k": [1, None]})
        response = way.back(question, None, tensor(b"answer", "y"))
        assert bytes(response.outputs[0].data) == b"answer"
        assert response.compute_s == 0.5

    on_a_way(test)


def test_requests_and_answers_that_say_the_same_have_the_same_form():
    def test(way: Way) -> None:
        first, _, asked = way.there(tensor(b"abc"))
        second, _, again = way.there(tensor(b"xyz"))
        other, _, _ = way.there(tensor(b"four"))
        assert first.form is second.form is not other.form
        one = way.back(asked, None, tensor(b"12"))
        two = way.back(again, None, tensor(b"34"))
        assert one.form is two.form

    on_a_way(test)


def test_a_form_is_written_once():
    def test(way: Way) -> None:
        form = form_of([tensor(b"abc")])
        way.there(tensor(b"abc"), form=form)
        other = form_of([tensor(b"abc", "renamed")])
        way.there(tensor(b"abc"), form=other)
        form.wire = other.wire
        request, _, _ = way.there(tensor(b"abc"), form=form)
        assert request.inputs[0].name == "renamed"

    on_a_way(test)


def test_forms_that_are_remembered_are_not_too_many():
    forms = frames.Forms()
    for n in range(3 * forms.MOST):
        forms[frames.state([("x", "UINT8", (n,), n)])]
        assert 0 < len(forms) <= forms.MOST


def test_a_long_form_is_not_remembered_on_either_side():
    def test(way: Way) -> None:
        for n in range(3):
            said = {"prompt": f"{n}".zfill(frames.Forms.LONGEST)}
            request, offer, question = way.there(tensor(filled(BIG)), parameters=said)
            assert request.parameters == said
            response = InferResponse([tensor(filled(BIG, n))], said)
            found = way.asking.open(question, *cut(way.answering.write(1, response, offer, 0.5)))
            assert found.parameters == said and found.outputs[0].data == filled(BIG, n)
        assert not way.answering._forms and not way.asking._forms and not way.asking._expected

    on_a_way(test)


def test_a_large_tensor_is_not_in_the_frame_but_in_the_arena():
    def test(way: Way) -> None:
        data = filled(BIG)
        parts, question = way.asking.pack(1, InferRequest([tensor(b"small", "s"), tensor(data)]))
        assert sum(map(len, parts)) < 1024
        request, _ = way.answering.read(*cut(parts))
        assert [bytes(t.data) for t in request.inputs] == [b"small", data]
        arrived = request.inputs[1].data
        assert isinstance(arrived, memoryview) and arrived.readonly
        del request
        lots = way.arena._lots if way.arena else {}
        assert len(lots) == 1
        del question, parts
        assert way.room(64 * BIG - 2 * PAGE)

    on_a_way(test)


def test_what_lies_in_the_arena_already_is_not_copied():
    def test(way: Way) -> None:
        room = way.room(2 * BIG)
        room[:] = filled(2 * BIG)
        request, _, question = way.there(tensor(room[64 : 64 + BIG]))
        assert bytes(request.inputs[0].data) == bytes(room[64 : 64 + BIG])
        room[64] ^= 255
        assert request.inputs[0].data[0] == room[64]
        del room, request
        assert way.arena is not None and way.arena.take(64 * BIG) is None
        del question
        assert len(way.room(60 * BIG)) == 60 * BIG

    on_a_way(test)


def test_what_lies_askew_for_its_datatype_is_copied_straight():
    def test(way: Way) -> None:
        count = BIG // 4
        room = way.room(BIG + 8)
        room[1 : 1 + 4 * count] = np.arange(count, dtype=np.int32).tobytes()
        request, _, _ = way.there(Tensor("x", "INT32", (count,), room[1 : 1 + 4 * count]))
        assert address(request.inputs[0].data) % 4 == 0
        assert request.inputs[0].array().tolist() == list(range(count))

    on_a_way(test)


def test_a_tensor_in_pieces_is_put_together_wherever_they_lie():
    def test(way: Way) -> None:
        near = [way.room(BIG), way.room(BIG)]
        for i, room in enumerate(near):
            room[:] = filled(BIG, i)
        loose, scrap = filled(BIG, 7), b"scrap"
        pieces = [scrap, near[1], loose, bytearray(b""), near[0], near[0][:3], scrap, loose]
        expected = b"".join(bytes(piece) for piece in pieces)
        merged = Tensor("x", "UINT8", (len(expected),), pieces)  # type: ignore[arg-type]
        for _ in range(2):
            request, _, _ = way.there(merged, tensor(b"after", "y"))
            assert [bytes(t.data) for t in request.inputs] == [expected, b"after"]

    on_a_way(test)
    on_a_way(test, 4 * BIG)  # too small for the pieces that are loose


def test_without_an_arena_or_with_a_full_one_everything_goes_through_the_frame():
    def test(way: Way) -> None:
        data = filled(BIG)
        pieces = [data[:100], data[100:]]
        merged = Tensor("y", "UINT8", (BIG,), pieces)  # type: ignore[arg-type]
        for _ in range(2):
            request, offer, question = way.there(tensor(data), merged)
            assert [bytes(t.data) for t in request.inputs] == [data, data]
            assert offer is None
            assert bytes(way.back(question, None, tensor(data)).outputs[0].data) == data

    on_a_way(test, 0)
    on_a_way(test, PAGE)


def test_the_second_request_of_a_form_offers_a_room_as_large_as_the_first_answer():
    def test(way: Way) -> None:
        data = filled(BIG)
        _, offer, question = way.there(tensor(b"small"))
        assert offer is None
        way.back(question, offer, tensor(data), tensor(data, "y"))
        _, offer, question = way.there(tensor(b"small"))
        assert offer is not None
        response = way.back(question, offer, tensor(data), tensor(data, "y"), tensor(b"z", "z"))
        assert [bytes(t.data) for t in response.outputs] == [data, data, b"z"]
        assert [way.holds(t.data) for t in response.outputs] == [True, True, False]
        # Small answers again: no more rooms.
        _, offer, question = way.there(tensor(b"small"))
        way.back(question, offer, tensor(b"y"))
        assert way.there(tensor(b"small"))[1] is None

    on_a_way(test)


def test_an_output_that_was_written_into_the_room_is_not_copied():
    def test(way: Way) -> None:
        _, offer, question = way.there(tensor(b"small"))
        way.back(question, offer, tensor(filled(BIG)), tensor(filled(BIG), "y"))
        _, offer, question = way.there(tensor(b"small"))
        assert offer is not None
        place = offer.room.take(BIG)
        assert place is not None and address(place) % ALIGN == 0
        place[:] = filled(BIG, 1)
        response = way.back(question, offer, tensor(place), tensor(filled(BIG, 2), "y"))
        place[0] ^= 255
        assert response.outputs[0].data == place
        assert response.outputs[1].data == filled(BIG, 2)

    on_a_way(test)


def test_an_answer_that_outgrows_its_room_arrives_whole():
    def test(way: Way) -> None:
        _, offer, question = way.there(tensor(b"small"))
        way.back(question, offer, tensor(filled(BIG)))
        _, offer, question = way.there(tensor(b"small"))
        outputs = [tensor(filled(size, size), str(size)) for size in (3 * BIG, BIG - 100, 0, BIG)]
        response = way.back(question, offer, *outputs)
        assert [bytes(t.data) for t in response.outputs] == [t.data for t in outputs]
        assert [way.holds(t.data) for t in response.outputs] == [False, True, False, False]

    on_a_way(test)


def test_an_answer_is_believed_only_inside_its_own_room():
    def test(way: Way) -> None:
        _, offer, question = way.there(tensor(b"small"))
        way.back(question, offer, tensor(filled(BIG)))
        secret = way.room(BIG)
        _, offer, question = way.there(tensor(b"small"))
        assert offer is not None and way.arena is not None
        room, size = offer.at, len(question.room or b"")
        stranger = way.arena.place_of(secret)
        for at, n, stated in (
            (stranger, BIG, BIG),
            (room - 1, 8, 8),
            (room + size - 7, 8, 8),
            (room, size + 1, size + 1),
            (INLINE - 1, 8, 8),
            (room, 8, 9),
            (INLINE, 8, 8),
        ):
            meta = frames.state([("y", "UINT8", (stated,), stated)])
            places = PLACE.pack(at, n)
            header, payload = cut(frames.pack(REPLY, 1, meta, places=places))
            with pytest.raises(BrokenFrameError):
                way.asking.open(question, header, payload)

    on_a_way(test)


@pytest.mark.parametrize(
    ("sizes", "given"), [((-1,), 0), ((65,), 64), ((64, 2**40), 64), ((64, -64), 64)]
)
def test_an_answer_whose_sizes_are_not_those_of_its_bytes_is_refused(sizes, given):
    def test(way: Way) -> None:
        meta = frames.state([("y", "UINT8", (n,), n) for n in sizes])
        header, payload = cut(frames.pack(REPLY, 1, meta, [bytes(given)] if given else []))
        with pytest.raises(BrokenFrameError):
            way.asking.open(Question(b"asked"), header, payload)

    on_a_way(test)


def test_a_worker_refuses_places_that_are_none():
    def test(way: Way) -> None:
        meta = frames.state([("x", "UINT8", (64,), 64)])
        for places, count in ((PLACE.pack(2**40, 64), 1), (PLACE.pack(0, 63), 1), (b"", 0)):
            header, payload = cut(frames.pack(frames.INFER, 1, meta, places=places))
            assert header[5] == count
            with pytest.raises(BrokenFrameError):
                way.answering.read(header, payload)
        with pytest.raises(BrokenFrameError, match="not there"):
            Answering(None).read(*cut(frames.pack(frames.INFER, 1, meta, places=PLACE.pack(0, 64))))

    on_a_way(test)


def test_an_answer_beyond_the_limit_of_a_frame_is_the_models_fault(monkeypatch):
    monkeypatch.setattr(frames, "_LONGEST", 1000)

    def test(way: Way) -> None:
        with pytest.raises(InferenceFailedError, match="the answer holds"):
            way.answering.write(1, InferResponse([tensor(bytes(300_000))]), None, 0.0)

    on_a_way(test)


SIZES = st.sampled_from([0, 1, 63, 64, 4095, 4096, LARGE - 1, LARGE, LARGE + 1, 2 * LARGE])
PIECE = st.tuples(SIZES, st.sampled_from(["loose", "near", "askew"]))
SENT = st.lists(st.one_of(PIECE, st.lists(PIECE, min_size=1, max_size=5)), max_size=4)


@settings(max_examples=100, deadline=None)
@given(SENT, st.sampled_from([0, 4 * PAGE, 20 * LARGE, 200 * LARGE]))
def test_whatever_is_sent_arrives_and_whatever_is_answered_too(sent, size):
    def test(way: Way) -> None:
        def made(piece: tuple[int, str], seed: int) -> Buffer:
            n, where = piece
            data = filled(n, seed)
            found = way.arena.take(n + 1) if where != "loose" and way.arena else None
            if found is None:
                return data
            view = found[0][1:] if where == "askew" else found[0][:n]
            view[:] = data
            return view

        tensors, expected = [], []
        for i, item in enumerate(sent):
            pieces = [made(p, i) for p in (item if isinstance(item, list) else [item])]
            whole = b"".join(bytes(p) for p in pieces)
            expected.append(whole)
            data: Any = pieces if isinstance(item, list) else pieces[0]
            tensors.append(Tensor(str(i), "UINT8", (len(whole),), data))
        for _ in range(3):
            request, offer, question = way.there(*tensors)
            assert [bytes(t.data) for t in request.inputs] == expected
            response = way.back(question, offer, *request.inputs)
            assert [bytes(t.data) for t in response.outputs] == expected

    on_a_way(test, size)
