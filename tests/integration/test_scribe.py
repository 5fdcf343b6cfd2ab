"""Scribes are real processes here: what becomes of them, and of those who wait for them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import psutil
import pytest

from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    QueueFullError,
    WorkerDiedError,
)
from repository.messages import InferResponse
from repository.tensors import ALIGN, Tensor
from server.codecs.v2_plan import Plan, plan_of
from server.scribes import sheets
from server.scribes.pool import Pool
from server.scribes.scribes import LARGE_ANSWER, Scribes, writes_large
from tests.fakes.bodies import body, tensor
from tests.hosting import children, open_files, until_gone


@asynccontextmanager
async def writing(most: int = 1, **options: Any) -> AsyncIterator[Scribes]:
    """Scribes; afterwards no process of theirs is left."""
    before = children()
    scribes = Scribes(Pool(most, **options))
    try:
        yield scribes
    finally:
        await scribes.close()
    assert children() <= before


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0)


def numbers(count: int = 1000) -> bytes:
    return body(tensor("x", [count], "FP32", list(range(count))))[0]


async def begun(scribes: Scribes, text: bytes) -> asyncio.Task[Plan]:
    """A request whose job its scribe cannot finish: it is stopped."""
    await scribes.plan_of(numbers(1))
    (pid,) = scribes.pool.pids
    os.kill(pid, signal.SIGSTOP)
    return asyncio.create_task(scribes.plan_of(text))


async def test_no_scribe_is_started_before_it_is_needed():
    async with writing() as scribes:
        assert scribes.pool.pids == []
        await scribes.plan_of(numbers())
        assert len(scribes.pool.pids) == 1


async def test_the_bytes_of_a_request_live_as_long_as_somebody_has_them():
    async with writing() as scribes:
        before = open_files()
        plan = await scribes.plan_of(numbers(100_000))
        assert open_files() == before + 2  # the socket, and the memory that is mapped
        view = plan.pieces[0].data
        del plan
        await scribes.close()
        assert np.frombuffer(view, "f4")[-1] == 99_999
        with pytest.raises(TypeError):
            view[0] = 1
        del view
        assert open_files() == before


async def test_tensors_are_aligned_whatever_stands_before_them():
    async with writing() as scribes:
        text = body(tensor("ab", [3], "UINT8", [1, 2, 3]), tensor("x", [2], "FP64", [4, 5]))[0]
        plan = await scribes.plan_of(text)
        for piece in plan.pieces:
            at = np.frombuffer(piece.data, np.uint8).__array_interface__["data"][0]
            assert at % ALIGN == 0


async def test_a_scribe_that_dies_fails_its_job_and_is_replaced():
    async with writing() as scribes:
        task = await begun(scribes, numbers())
        (pid,) = scribes.pool.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="ask again"):
            await task
        assert (await scribes.plan_of(numbers())).pieces[0].name == "x"
        assert scribes.pool.pids != [pid]


async def test_a_scribe_that_dies_idle_costs_no_request():
    async with writing() as scribes:
        await scribes.plan_of(numbers())
        (pid,) = scribes.pool.pids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not scribes.pool.pids)
        await scribes.plan_of(numbers())


async def test_those_who_wait_for_a_scribe_that_dies_get_another():
    async with writing() as scribes:
        task = await begun(scribes, numbers())
        others = [asyncio.create_task(scribes.plan_of(numbers(n))) for n in (2, 3)]
        await asyncio.sleep(0)
        os.kill(scribes.pool.pids[0], signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            await task
        plans = await asyncio.gather(*others)
        assert [p.pieces[0].shape for p in plans] == [(2,), (3,)]


async def test_those_who_wait_are_told_when_no_other_scribe_can_be_started(monkeypatch):
    async with writing() as scribes:
        task = await begun(scribes, numbers())
        others = [asyncio.create_task(scribes.plan_of(numbers(n))) for n in (2, 3)]
        await asyncio.sleep(0)
        with monkeypatch.context() as change:
            change.setattr("repository.children.start", no_more_processes)
            os.kill(scribes.pool.pids[0], signal.SIGKILL)
            with pytest.raises(WorkerDiedError):
                await task
        async with asyncio.timeout(10):
            for other in others:
                with pytest.raises(InferenceFailedError, match="no process could be started"):
                    await other
        await scribes.plan_of(numbers())


def no_more_processes(module: str, fd: int) -> subprocess.Popen[bytes]:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


async def test_a_job_that_takes_too_long_costs_its_scribe_the_life():
    async with writing() as scribes:
        await scribes.plan_of(numbers())
        (pid,) = scribes.pool.pids
        os.kill(pid, signal.SIGSTOP)
        scribes.pool.least_limit_s = 0.0
        with pytest.raises(WorkerDiedError, match="took too long"):
            await scribes.plan_of(numbers())
        assert until_gone({pid}) == set()


async def test_answers_are_written_before_requests_are_read():
    response = InferResponse([Tensor.of("y", np.zeros(9, "f4"))])
    async with writing() as scribes:
        task = await begun(scribes, numbers())
        done: list[str] = []
        request = asyncio.create_task(scribes.plan_of(numbers()))
        await asyncio.sleep(0)
        answer = asyncio.create_task(scribes.encode(Plan(()), response, "m", 1))
        await asyncio.sleep(0)
        request.add_done_callback(lambda _: done.append("request"))
        answer.add_done_callback(lambda _: done.append("answer"))
        os.kill(scribes.pool.pids[0], signal.SIGCONT)
        await asyncio.gather(task, request, answer)
    assert done == ["answer", "request"]


async def test_a_client_that_leaves_leaves_a_scribe_that_works_for_others():
    async with writing() as scribes:
        task = await begun(scribes, numbers())
        next_one = asyncio.create_task(scribes.plan_of(numbers(5)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not next_one.done()
        os.kill(scribes.pool.pids[0], signal.SIGCONT)
        assert (await next_one).pieces[0].shape == (5,)


async def test_a_client_that_leaves_takes_its_waiting_job_away():
    async with writing(most_waiting=10) as scribes:
        task = await begun(scribes, numbers())
        waiting = asyncio.create_task(scribes.plan_of(numbers()))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await scribes.plan_of(numbers())
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        again = asyncio.create_task(scribes.plan_of(numbers()))
        await asyncio.sleep(0)
        os.kill(scribes.pool.pids[0], signal.SIGCONT)
        await asyncio.gather(task, again)


async def test_a_client_that_leaves_as_its_turn_comes_passes_it_on():
    async with writing() as scribes:
        pool = scribes.pool
        scribe = await pool._take(pool._rows[sheets.READ], 1)
        leaving = asyncio.create_task(scribes.plan_of(numbers()))
        await asyncio.sleep(0)
        pool._give(scribe)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await scribes.plan_of(numbers())


async def test_what_waits_is_bounded_in_bytes():
    text = numbers()
    async with writing(most_waiting=2 * len(text)) as scribes:
        for _ in range(2):
            task = await begun(scribes, text)
            waiting = [asyncio.create_task(scribes.plan_of(text)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="bytes of JSON are waiting") as caught:
                await scribes.plan_of(text)
            assert caught.value.retry_after_s
            os.kill(scribes.pool.pids[0], signal.SIGCONT)
            await asyncio.gather(task, *waiting)


async def test_a_job_larger_than_the_bound_waits_where_nobody_else_does():
    async with writing(most_waiting=10) as scribes:
        task = await begun(scribes, numbers())
        waiting = asyncio.create_task(scribes.plan_of(numbers()))
        await asyncio.sleep(0)
        os.kill(scribes.pool.pids[0], signal.SIGCONT)
        await asyncio.gather(task, waiting)


async def test_a_scribe_without_work_ends_and_comes_back():
    async with writing(idle_s=0.0) as scribes:
        await scribes.plan_of(numbers())
        await until(lambda: not scribes.pool.pids)
        await scribes.plan_of(numbers())


async def test_a_scribe_that_is_about_to_end_is_given_no_job():
    async with writing() as scribes:
        await scribes.plan_of(numbers())
        pool = scribes.pool
        (scribe,) = pool._free
        pool._end(scribe)
        await scribes.plan_of(numbers())
        assert scribe.dead


async def test_work_is_shared_by_as_many_as_are_allowed():
    async with writing(3) as scribes:
        await asyncio.gather(*[scribes.plan_of(numbers()) for _ in range(8)])
        assert len(scribes.pool.pids) == 3


async def test_closing_fails_what_is_worked_on_and_what_waits():
    async with writing() as scribes:
        tasks = [await begun(scribes, numbers())]
        tasks.append(asyncio.create_task(scribes.plan_of(numbers())))
        await asyncio.sleep(0)
        await scribes.close()
        for task in tasks:
            with pytest.raises(WorkerDiedError):
                await task
        with pytest.raises(WorkerDiedError, match="shutting down"):
            await scribes.plan_of(numbers())


def test_scribes_end_with_the_server_however_it_ends():
    script = """
import asyncio, os, sys
from server.scribes.scribes import Scribes
from server.scribes.pool import Pool
from tests.integration.test_scribe import numbers
async def main():
    scribes = Scribes(Pool(1))
    await scribes.plan_of(numbers())
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print(*scribes.pool.pids, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        server.kill()
        # What the server has forked holds its end of the scribe's socket open: no end of the stream.
        assert until_gone({pid}) == set()


async def test_a_scribe_knows_the_codecs_and_no_more():
    loaded = "import server.scribes.child, sys; print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", loaded, stdout=asyncio.subprocess.PIPE
    )
    found = set((await process.communicate())[0].decode().split())
    assert "server.codecs.v2_binary" in found
    assert found.isdisjoint({"litestar", "uvicorn", "torch", "onnxruntime", "asyncio", "yaml"})


async def test_the_servers_keys_do_not_reach_a_scribe(monkeypatch):
    monkeypatch.setenv("MODELDEPOT_API_KEYS", "secret")
    async with writing() as scribes:
        await scribes.plan_of(numbers())
        assert "MODELDEPOT_API_KEYS" not in psutil.Process(scribes.pool.pids[0]).environ()


async def test_a_request_that_says_much_besides_its_data_is_refused():
    text = body(tensor("x", [1], "FP32", [1]), id="i" * (sheets.MOST_TOLD + 1))[0]
    async with writing() as scribes:
        with pytest.raises(InvalidRequestError, match="besides the data"):
            await scribes.plan_of(text)


def test_only_what_becomes_json_makes_an_answer_large():
    wanted = {"name": "b", "parameters": {"binary_data": True}}
    plan = plan_of(body(tensor("x", [1], "FP32", [1]), outputs=[wanted, {"name": "j"}])[0])
    big, small = bytes(LARGE_ANSWER), bytes(8)

    def answer(b: bytes, j: bytes) -> InferResponse:
        return InferResponse([Tensor("b", "UINT8", (1,), b), Tensor("j", "UINT8", (1,), j)])

    assert not writes_large(plan, answer(big, small))
    assert writes_large(plan, answer(small, big))


async def test_nan_and_infinity_make_the_round_trip():
    values = [1.5, float("nan"), float("inf"), float("-inf")] * 10_000
    async with writing() as scribes:
        plan = await scribes.plan_of(body(tensor("x", [40_000], "FP32", values))[0])
        response = InferResponse([Tensor("x", "FP32", (40_000,), plan.pieces[0].data)])
        encoded = await scribes.encode(plan, response, "m", 1)
    found = json.loads(bytes(encoded.buffers[0]))["outputs"][0]["data"]
    assert np.array_equal(found, values, equal_nan=True)
