"""Joining and cutting rows, by example and at random through a batcher in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import looptime
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.batching import Batcher
from repository.config import Batching, ModelConfig
from repository.errors import InferenceFailedError
from repository.merging import merge, split
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import Tensor, pack_bytes
from tests.fakes.host import FakeHost


def words(*rows: list[bytes]) -> Tensor:
    array = np.empty((len(rows), len(rows[0])), dtype=object)
    for at, row in enumerate(rows):
        array[at] = row
    return Tensor.of("w", array)


def test_bytes_tensors_are_joined_and_cut_at_their_elements():
    asked = [words([b"a", b"bcd"]), words([b"", b"\x00\xff"], [b"long" * 99, b"e"])]
    whole = merge([InferRequest([t]) for t in asked])
    assert whole.inputs[0].shape == (3, 2)
    parts = split(InferResponse(whole.inputs, {"p": 1}, compute_s=2.0), [1, 2])
    for part, tensor in zip(parts, asked, strict=True):
        assert part.outputs[0].array().tolist() == tensor.array().tolist()
        assert part.parameters == {"p": 1} and part.compute_s == 2.0


def test_cutting_copies_nothing():
    data = bytes(range(12))
    parts = split(InferResponse([Tensor("y", "UINT8", (4, 3), data)]), [1, 3])
    cut = [part.outputs[0].data for part in parts]
    assert all(isinstance(c, memoryview) and c.obj is data for c in cut)
    assert b"".join(cut) == data


def test_a_request_of_no_rows_gets_none_back():
    parts = split(InferResponse([Tensor("y", "INT8", (2, 2), b"abcd")]), [0, 2, 0])
    assert [p.outputs[0].shape for p in parts] == [(0, 2), (2, 2), (0, 2)]


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (
            Tensor("y", "FP32", (1, 2), b"12345678"),
            r"output 'y' has shape \[1, 2\] for a batch of 2",
        ),
        (Tensor("y", "FP32", (), b"1234"), r"output 'y' has shape \[\] for a batch of 2"),
        (Tensor("y", "FP32", (2, 2), b"1234"), "output 'y' has 4 bytes; .* needs 16"),
        (Tensor("y", "BYTES", (2, 1), b"\x01\x00\x00\x00a"), "output 'y': .* before its last"),
        (Tensor("y", "BYTES", (2,), b"\xff\xff\xff\xffa"), "output 'y': .* declares 4294967295"),
        (Tensor("y", "BYTES", (2,), b"\x00" * 12), "output 'y' has 12 bytes; .* needs 8"),
        (Tensor("y", "COMPLEX", (2,), b""), "no datatype 'COMPLEX'"),
    ],
)
def test_an_output_that_cannot_be_cut_fails_everyone_and_is_named(output: Tensor, text: str):
    good = Tensor("ok", "INT8", (2,), b"ab")
    with pytest.raises(InferenceFailedError, match=text):
        split(InferResponse([good, output]), [1, 1])


# whatever comes ---------------------------------------------------------------------------------

SOME = st.fixed_dictionaries(
    {
        "datatype": st.sampled_from(["FP32", "BYTES", "INT8"]),
        "rows": st.integers(0, 4),
        "width": st.integers(1, 2),
        "pause": st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.5]),
        "leaves": st.sampled_from([None, None, None, 0.0, 0.3]),
    }
)


def numbered(serial: int, kind: dict[str, Any]) -> InferRequest:
    shape = (kind["rows"], kind["width"])
    values = np.arange(np.prod(shape)).reshape(shape) + serial * 10
    if kind["datatype"] == "BYTES":
        words = [b"%d" % v * (v % 3) for v in values.reshape(-1).tolist()]
        return InferRequest([Tensor("x", "BYTES", shape, pack_bytes(np.array(words, object)))])
    return InferRequest(
        [Tensor.of("x", values.astype("f4" if kind["datatype"] == "FP32" else "i1"))]
    )


@settings(deadline=None, max_examples=60)
@given(
    kinds=st.lists(SOME, max_size=12),
    most=st.sampled_from([0, 4, 6]),
    slots=st.integers(1, 2),
    infer_s=st.sampled_from([0.0, 0.4]),
    delay_us=st.sampled_from([0, 200_000]),
    preferred=st.sampled_from([(), (4,), (2, 3)]),
)
def test_everyone_gets_exactly_its_own_rows_back(
    kinds: list[dict[str, Any]],
    most: int,
    slots: int,
    infer_s: float,
    delay_us: int,
    preferred: tuple[int, ...],
):
    async def play() -> None:
        loop = asyncio.get_running_loop()
        host = FakeHost(infer_s=infer_s, slots=slots)
        config = ModelConfig(batching=Batching(max_delay_us=delay_us, preferred_sizes=preferred))
        queue = Batcher(host, Loaded(max_batch_size=most), config, max_queue=0, clock=loop.time)
        asked = []
        for serial, kind in enumerate(kinds):
            await asyncio.sleep(kind["pause"])
            request = numbered(serial, kind)
            future = queue.submit(request)
            asked.append((request, future))
            if kind["leaves"] is not None:
                loop.call_later(kind["leaves"], future.cancel)
        await asyncio.wait_for(asyncio.gather(*[f for _, f in asked], return_exceptions=True), 60)
        for request, future in asked:
            if not future.cancelled():
                sent, got = request.inputs[0], future.result().outputs[0]
                assert (got.datatype, got.shape) == (sent.datatype, sent.shape)
                assert bytes(got.data) == bytes(sent.data)
        assert most == 0 or all(r.inputs[0].shape[0] <= most for r in host.batches)
        await asyncio.sleep(1)
        assert (queue.in_flight, queue.queue_length) == (0, 0)

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        runner.run(play())
