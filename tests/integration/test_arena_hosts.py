"""Large tensors between real hosts and their workers, and that nothing of the arena is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import uvloop
from onnx import helper

from repository.errors import InvalidTensorError, WorkerDiedError
from repository.hosts.asking import LARGE
from repository.hosts.process import ProcessHost
from repository.messages import InferRequest
from repository.tensors import Buffer, Tensor
from tests import models
from tests.hosting import SLOW, Waymark, ask, forking, hosted, one, open_files, until_gone

ROOT = Path(__file__).parents[2]
BIG = 3 * LARGE // 4  # FP32 elements
MIB = 1 << 20


def mappings(pid: int | str = "self") -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:modeldepot")


def of(data: Buffer, count: int) -> Tensor:
    return Tensor("x", "FP32", (count,), data)


def ones(host: ProcessHost, value: float, count: int = BIG) -> Tensor:
    """In the host's arena, as a body is that was received there."""
    room = host.room(4 * count)
    assert room is not None
    room[:] = np.full(count, value, np.float32).tobytes()
    return of(room, count)


def adder(folder: Path, instances: int = 1):
    path = models.add_onnx(folder / "m/1/model.onnx", 1.0, (-1,))
    return models.spec_of(path, instances=instances)


def python(folder: Path, source: str):
    return models.spec_of(models.python_model(folder / "m/1", source), "python")


async def test_large_tensors_go_through_the_arena_and_leave_nothing(tmp_path):
    async with forking() as zygotes:
        await zygotes.warm("onnx")
        files = open_files()
        async with hosted(adder(tmp_path), tmp_path / "s", zygotes) as (host, loaded):
            (pid,) = loaded.details["pids"]
            small = await host.infer(ask(of(np.zeros(4, np.float32).tobytes(), 4)))
            assert one(small).tolist() == [1.0] * 4
            assert (mappings(), mappings(pid)) == (0, 0)
            for value in range(5):
                answer = await host.infer(ask(ones(host, value)))
                assert (one(answer) == value + 1).all()
            assert (mappings(), mappings(pid)) == (1, 1)
            assert host._arena.place_of(answer.outputs[0].data) is not None
        assert (one(answer) == 5.0).all()
        assert mappings() == 1
        del answer
        assert mappings() == 0
        assert open_files() == files


async def test_what_lies_elsewhere_is_brought_there(tmp_path):
    x = np.arange(BIG, dtype=np.float32)
    async with forking() as zygotes, hosted(adder(tmp_path), tmp_path / "s", zygotes) as (host, _):
        for data in (x.tobytes(), bytearray(x.tobytes()), memoryview(x.tobytes())):
            assert np.array_equal(one(await host.infer(ask(of(data, BIG)))), x + 1)
        assert host._arena.place_of(data) is None
    elsewhere = tmp_path / "elsewhere"
    async with (
        forking() as zygotes,
        hosted(adder(tmp_path), tmp_path / "s", zygotes) as (host, _),
        hosted(adder(elsewhere), tmp_path / "s", zygotes) as (other, _),
    ):
        assert (one(await host.infer(ask(ones(other, 1.0)))) == 2.0).all()


async def test_a_batch_in_pieces_is_put_together(tmp_path):
    async with forking() as zygotes, hosted(adder(tmp_path), tmp_path / "s", zygotes) as (host, _):
        loose = np.full(BIG, 3, np.float32).tobytes()
        for _ in range(3):
            pieces = [ones(host, 1.0).data, loose, ones(host, 2.0).data]
            merged = of(pieces, 3 * BIG)  # type: ignore[arg-type]
            found = one(await host.infer(ask(merged))).reshape(3, BIG)
            assert [set(row) for row in found.tolist()] == [{2.0}, {4.0}, {3.0}]


async def test_a_batch_in_pieces_reaches_an_inline_model_too(tmp_path):
    async with hosted(adder(tmp_path), tmp_path / "s") as (host, _):
        assert host.room(MIB) is None
        merged = of([bytes(8), bytes(4)], 3)  # type: ignore[arg-type]
        assert one(await host.infer(ask(merged))).tolist() == [1.0] * 3


def test_when_the_arena_is_full_the_rest_goes_through_the_sockets(tmp_path):
    async def story() -> None:
        spec = adder(tmp_path, 2)
        async with (
            forking() as zygotes,
            hosted(spec, tmp_path / "s", zygotes, arena_size=MIB) as (host, _),
        ):
            for _ in range(3):
                sent = [np.full(BIG, i, np.float32).tobytes() for i in range(32)]
                asked = [host.infer(ask(of(data, BIG))) for data in sent]
                for i, answer in enumerate(await asyncio.gather(*asked)):
                    assert (one(answer) == i + 1).all()
            del asked, answer
            await asyncio.sleep(0)  # asyncio itself holds what it has just been given
            assert host.room(MIB) is not None
            assert host.room(2 * MIB) is None

    uvloop.run(story())


async def test_without_an_arena_all_goes_through_the_socket(tmp_path, monkeypatch):
    def refused(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refused)
    async with forking() as zygotes, hosted(adder(tmp_path), tmp_path / "s", zygotes) as (host, _):
        assert host.room(MIB) is None
        for _ in range(2):
            answer = await host.infer(ask(of(np.zeros(BIG, np.float32).tobytes(), BIG)))
            assert (one(answer) == 1.0).all()
        assert mappings() == 0


async def test_outputs_whose_shape_depends_on_the_data_are_right_every_time(tmp_path):
    nodes = [helper.make_node("NonZero", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    path = models._write(
        tmp_path / "m/1/model.onnx",
        nodes,
        [("x", "FP32", (-1,))],
        [("y", "INT64", (1, -1)), ("z", "FP32", (-1,))],
    )
    async with (
        forking() as zygotes,
        hosted(models.spec_of(path), tmp_path / "s", zygotes) as (host, _),
    ):
        for count in (BIG, BIG, BIG - 7, 1, BIG, 0, BIG, BIG):
            x = np.zeros(BIG, np.float32)
            x[:count] = 1
            answer = await host.infer(ask(of(x.tobytes(), BIG)))
            where, minus = (tensor.array() for tensor in answer.outputs)
            assert where.tolist() == [list(range(count))]
            assert np.array_equal(minus, -x)


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16", "INT64", "UINT8", "BOOL"])
async def test_every_datatype_is_the_same_through_the_arena(tmp_path, datatype):
    spec = models.spec_of(models.identity_onnx(tmp_path / "m/1/model.onnx", datatype, (-1, 4)))
    rows = LARGE
    array = np.arange(rows * 4) % 2
    dtypes = {"FP32": "f4", "FP16": "f2", "BF16": "u2", "INT64": "i8", "UINT8": "u1", "BOOL": "?"}
    sent = Tensor.of("x", array.reshape(rows, 4).astype(dtypes[datatype]), datatype)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        for outputs in ((), ("y",), ("y",), ()):
            for _ in range(3):
                answer = await host.infer(ask(sent, outputs=outputs))
                assert bytes(answer.outputs[0].data) == bytes(sent.data)


async def test_a_request_that_does_not_fit_is_refused_as_ever(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx", 1.0, (-1, 4)))
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        good = Tensor("x", "FP32", (BIG // 4, 4), bytes(4 * BIG))
        for _ in range(3):
            assert (one(await host.infer(ask(good))) == 1.0).all()
            with pytest.raises(InvalidTensorError):
                await host.infer(ask(Tensor("x", "FP32", (BIG // 5, 5), bytes(BIG // 5 * 20))))
            with pytest.raises(InvalidTensorError, match="no input 'z'"):
                await host.infer(ask(Tensor("z", "FP32", (BIG // 4, 4), bytes(4 * BIG))))


async def test_what_a_cancelled_request_has_in_the_arena_stays_until_the_worker_is_done(tmp_path):
    mark, go = Waymark(tmp_path / "mark"), Waymark(tmp_path / "go")
    source = f"""
        import pathlib
        import numpy as np
        class Model:
            seen = 0.0
            def infer(self, inputs):
                if inputs["x"].size > 1:
                    pathlib.Path({str(mark.path)!r}).write_text("here")
                    pathlib.Path({str(go.path)!r}).read_text()
                    self.seen = float(inputs["x"].sum())
                return {{"seen": np.array([self.seen])}}
    """
    spec = python(tmp_path, source)
    async with (
        forking() as zygotes,
        hosted(spec, tmp_path / "s", zygotes, arena_size=MIB) as (host, _),
    ):
        asked = host.infer(ask(ones(host, 1.0)))
        await mark.reached()
        asked.cancel()
        del asked
        others = []
        while (room := host.room(LARGE)) is not None:
            room[:] = bytes(len(room))
            others.append(room)
        await asyncio.to_thread(go.path.write_text, "go")
        (seen,) = one(await host.infer(ask(of(bytes(4), 1))))
        assert seen == BIG
        del others, room
        assert host.room(MIB) is not None


async def test_a_model_that_keeps_its_input_harms_nobody(tmp_path):
    source = """
        class Model:
            kept = []
            def infer(self, inputs):
                self.kept.append(inputs["x"])
                assert not inputs["x"].flags.writeable
                return {"x": inputs["x"]}
    """
    spec = python(tmp_path, source)
    async with (
        forking() as zygotes,
        hosted(spec, tmp_path / "s", zygotes, arena_size=2 * MIB) as (host, _),
    ):
        answers = [await host.infer(ask(ones(host, value, LARGE))) for value in range(4)]
        for value, answer in enumerate(answers):
            assert (one(answer) == value).all()


@pytest.mark.parametrize("victim", ["worker", "zygote"])
async def test_a_kill_leaves_neither_memory_nor_files(tmp_path, victim):
    mark = Waymark(tmp_path / "mark")
    spec = python(tmp_path, SLOW.replace("MARK", repr(str(mark.path))))
    async with forking() as zygotes:
        zygote = await zygotes.warm("python")
        await asyncio.sleep(0)
        files = open_files()
        async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
            asked = host.infer(ask(ones(host, 1.0)))
            await mark.reached()
            assert mappings() == 1
            (pid,) = loaded.details["pids"]
            os.kill(pid if victim == "worker" else zygote.pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError):
                await asked
            await host.died
            assert not until_gone({pid})
        del asked
        assert mappings() == 0
        if victim == "worker":
            assert open_files() == files


@pytest.mark.alone  # it looks at what everybody has in /dev/shm
def test_a_killed_server_leaves_no_shared_memory(tmp_path):
    adder(tmp_path)
    program = f"""
        import asyncio, pathlib
        import numpy as np
        from tests.hosting import ask, forking, hosted
        from tests.integration.test_arena_hosts import adder, ones
        async def main():
            home = pathlib.Path({str(tmp_path)!r})
            async with forking() as zygotes, hosted(adder(home), home / "s", zygotes) as (h, told):
                await h.infer(ask(ones(h, 1.0)))
                print(*told.details["pids"], flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    before = set(os.listdir("/dev/shm"))
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE
    )
    with server:
        assert server.stdout is not None
        pids = {int(pid) for pid in server.stdout.readline().split()}
        assert pids and all(mappings(pid) == 1 for pid in (server.pid, *pids))
        server.kill()
        server.wait()
    assert not until_gone(pids)
    assert set(os.listdir("/dev/shm")) <= before


async def test_requests_of_all_sizes_and_forms_find_their_answers(tmp_path):
    path = models.identity_onnx(tmp_path / "m/1/model.onnx", "UINT8", (-1,))
    spec = models.spec_of(path, instances=2)
    rng = np.random.default_rng(5)
    sizes = [0, 1, 63, 4096, LARGE - 1, LARGE, LARGE + 1, 5 * LARGE, 700_000, 3, LARGE]
    async with (
        forking() as zygotes,
        hosted(spec, tmp_path / "s", zygotes, arena_size=4 * MIB) as (host, _),
    ):
        for _ in range(8):
            sent = [rng.integers(0, 256, size, np.uint8).tobytes() for size in sizes * 2]
            requests = [
                InferRequest([Tensor("x", "UINT8", (len(data),), data)], outputs=("y",) * (i % 2))
                for i, data in enumerate(sent)
            ]
            answers = await asyncio.gather(*map(host.infer, requests))
            assert [bytes(answer.outputs[0].data) for answer in answers] == sent
