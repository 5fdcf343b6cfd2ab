"""A queue in front of real workers: who waits for whom, who is told what, who is run again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from repository.batching import Batcher
from repository.errors import InvalidTensorError, RequestTimeoutError
from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor
from tests import models
from tests.hosting import Waymark, forking, hosted, one

# -1 and -2 say that they are inside, each by its own pipe, and stay there until they are let go.
GATED = """
    import pathlib
    import numpy as np
    class Model:
        def infer(self, inputs):
            x = inputs["x"]
            if (value := int(x.min())) < 0:
                pathlib.Path(FOLDER, f"inside{value}").write_text("here")
                pathlib.Path(FOLDER, f"go{value}").read_text()
            return {"y": x, "rows": np.full((len(x), 1), len(x), np.int64)}
"""


class Gates:
    def __init__(self, folder: Path) -> None:
        self._inside = {n: Waymark(folder / f"inside{n}") for n in (-1, -2)}
        self._go = {n: Waymark(folder / f"go{n}") for n in (-1, -2)}

    async def inside(self, value: int = -1) -> None:
        await self._inside[value].reached()

    async def open(self, value: int = -1) -> None:
        await asyncio.to_thread(self._go[value].path.write_text, "go")


@asynccontextmanager
async def serving(
    tmp_path: Path, clock: Any = None, **config: Any
) -> AsyncIterator[tuple[Batcher, Gates]]:
    gates = Gates(tmp_path)
    source = GATED.replace("FOLDER", repr(str(tmp_path)))
    folder = models.python_model(tmp_path / "m" / "1", source)
    spec = models.spec_of(folder, backend="python", **config)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        told = {} if clock is None else {"clock": clock}
        yield Batcher(host, loaded, spec.config, max_queue=100, **told), gates


def ask(value: float, **parameters: int) -> InferRequest:
    return InferRequest([Tensor.of("x", np.full((1, 1), value, "f4"))], parameters=dict(parameters))


async def test_a_slow_request_in_one_instance_does_not_hold_up_the_other(tmp_path):
    now = [0.0]
    async with serving(tmp_path, lambda: now[0], instances=2) as (queue, gate):
        await asyncio.gather(*[queue.submit(ask(n)) for n in range(20)])
        slow = queue.submit(ask(-1))
        await gate.inside()
        now[0] += 1.0
        for _ in range(3):
            answers = await asyncio.gather(*[queue.submit(ask(n)) for n in range(20)])
            assert [float(a.outputs[0].array()[0, 0]) for a in answers] == list(range(20))
        assert not slow.done() and queue.in_flight == 1
        await gate.open()
        assert float((await slow).outputs[0].array()[0, 0]) == -1


async def test_both_instances_work_at_the_same_time(tmp_path):
    async with serving(tmp_path, instances=2) as (queue, gate):
        both = [queue.submit(ask(-1)), queue.submit(ask(-2))]
        for value in (-1, -2):
            await gate.inside(value)
        for value in (-1, -2):
            await gate.open(value)
        await asyncio.gather(*both)


async def test_who_waits_too_long_is_refused_and_who_runs_is_not(tmp_path):
    async with serving(tmp_path) as (queue, gate):
        runs = queue.submit(ask(-1, timeout=1))
        await gate.inside()
        waits = queue.submit(ask(1, timeout=20_000))
        try:
            await waits
            raise AssertionError("it must not have run")
        except RequestTimeoutError:
            pass
        assert not runs.done()
        await gate.open()
        await runs


async def test_clients_that_leave_a_batch_in_flight_or_in_the_queue_hurt_nobody(tmp_path):
    async with serving(tmp_path, max_batch_size=8) as (queue, gate):
        first = [queue.submit(ask(n)) for n in (-1, 2, 3)]
        await gate.inside()
        second = [queue.submit(ask(n)) for n in (4, 5, 6)]
        first[1].cancel()
        second[0].cancel()
        assert (queue.in_flight, queue.queue_length) == (3, 2)
        await gate.open()
        stay = [first[0], first[2], *second[1:]]
        answers = await asyncio.gather(*stay)
        assert [float(a.outputs[0].array()[0, 0]) for a in answers] == [-1, 3, 5, 6]
        assert [a.batch_size for a in answers] == [3, 3, 2, 2]
        assert [int(a.outputs[1].array()[0, 0]) for a in answers] == [3, 3, 2, 2]


async def test_only_the_request_that_a_real_model_cannot_read_fails(tmp_path):
    path = models.identity_onnx(tmp_path / "m/1/model.onnx", "BYTES", (-1, 1))
    spec = models.spec_of(path, max_batch_size=8)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        queue = Batcher(host, loaded, spec.config, max_queue=100)
        texts = [np.array([[text]], object) for text in (b"a", b"\xff", b"c")]
        found = await asyncio.gather(
            *[queue.submit(InferRequest([Tensor.of("x", text)])) for text in texts],
            return_exceptions=True,
        )
        assert isinstance(found[1], InvalidTensorError) and "UTF-8" in str(found[1])
        good = [f for f in found if isinstance(f, InferResponse)]
        assert [one(answer).tolist() for answer in good] == [[[b"a"]], [[b"c"]]]
