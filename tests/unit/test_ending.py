"""An end is confirmed where it can be: by the processes, and by the GPU itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from repository.errors import DeviceSilentError
from repository.hosts.ending import BACK_S, end
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State
from repository.messages import Loaded
from repository.reports import GpuProcess, GpuReport, GpuUse
from tests.fakes.heart import at, brought, newborn, spec
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


class Gpu:
    """50 of 100 bytes are used; of a model's 40, `back` come back `late_s` after it was asked first.
    `more`: what others have taken by then. `pids`: its processes are told, with 20 bytes each."""

    def __init__(
        self,
        back: int = 40,
        late_s: float = 0.5,
        silent: bool = False,
        more: int = 0,
        pids: tuple[int, ...] = (),
    ) -> None:
        self.back, self.late_s, self.silent = back, late_s, silent
        self.more, self.pids = more, pids
        self.asked = 0
        self.began = 0.0

    async def use(self) -> GpuUse:
        now = asyncio.get_running_loop().time()
        self.began = self.began if self.asked else now
        self.asked += 1
        if self.silent:
            raise DeviceSilentError("the driver hangs")
        late = now - self.began >= self.late_s
        used = 50 - self.back + self.more if late else 50
        there = [] if late and self.back else self.pids
        told = tuple(GpuProcess(pid, None, 20) for pid in there)
        return (GpuReport(0, "a GPU", "uuid", 100, used, 100 - used, processes=told),)


def leaving(device: str = "cuda:0", pids: tuple[int, ...] = ()) -> Generation:
    gen = at(device, brought(newborn(spec(n_bytes=40)), State.UNLOADING))
    gen.measured = {device: {"weights": 30, "context": 10}}
    gen.loaded = Loaded(details={"pids": pids} if pids else {})
    return gen


def other(state: State, n_bytes: int) -> Generation:
    gen = at("cuda:0", brought(newborn(spec("other", n_bytes=n_bytes), 2), state))
    gen.measured = {"cuda:0": {"weights": n_bytes}} if state is State.READY else {}
    return gen


async def ended(
    gpu: Gpu, gen: Generation | None = None, others: Iterable[Generation] = ()
) -> tuple[bool, int]:
    gen, host = gen or leaving(), FakeHost()
    await host.load(gen.spec, [gen.device])
    sure = await end(gen, host, 1.0, gpus=gpu.use, others=lambda: [gen, *others])
    assert host.calls == ["load", "stop"]
    return sure, gen.leaked


async def test_a_gpu_that_has_its_bytes_back_confirms_the_end(looptime: float) -> None:
    assert await ended(Gpu(late_s=0.5)) == (True, 0)
    assert looptime == pytest.approx(0.5, abs=0.1)


async def test_a_gpu_that_keeps_them_does_not_and_is_not_waited_for_long(looptime: float) -> None:
    assert await ended(Gpu(back=10)) == (False, 30)
    assert looptime == pytest.approx(BACK_S, abs=0.1)


async def test_a_gpu_that_says_nothing_confirms_nothing() -> None:
    assert await ended(Gpu(silent=True)) == (False, 0)
    assert await ended(Gpu(), leaving("cuda:7")) == (False, 0)


async def test_a_driver_that_breaks_in_its_own_way_keeps_no_host_from_being_stopped() -> None:
    async def breaks() -> GpuUse:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "the name of a process")

    gen, host = leaving(), FakeHost()
    await host.load(gen.spec, [gen.device])
    assert not await end(gen, host, 5.0, gpus=breaks)
    assert host.calls == ["load", "stop"] and gen.leaked == 0


async def test_a_gpu_that_falls_silent_meanwhile_confirms_nothing_and_is_not_called_a_leak() -> (
    None
):
    gpu = Gpu(back=0)
    gen = leaving()

    async def mute() -> None:
        await asyncio.sleep(0.3)
        gpu.silent = True

    mutes = asyncio.create_task(mute())
    assert await ended(gpu, gen) == (False, 0)
    await mutes


async def test_without_a_gpu_the_end_of_the_processes_will_do() -> None:
    gpu = Gpu()
    assert await ended(gpu, leaving("cpu")) == (True, 0) and not gpu.asked


async def test_what_others_have_all_the_time_changes_nothing() -> None:
    assert await ended(Gpu(), others=[other(State.READY, 10)]) == (True, 0)
    assert await ended(Gpu(back=10), others=[other(State.READY, 10)]) == (False, 30)


async def test_while_another_loads_nobody_can_tell_and_nothing_is_called_a_leak() -> None:
    """It took 20 of the 40 that came back, or 20 did not come back."""
    assert await ended(Gpu(more=20), others=[other(State.LOADING, 30)]) == (False, 0)


async def test_what_is_missing_beyond_all_that_others_can_have_taken_is_a_leak() -> None:
    assert await ended(Gpu(back=0), others=[other(State.LOADING, 15)]) == (False, 25)


async def test_more_room_than_all_others_can_have_left_confirms_it_though_they_move() -> None:
    gpu = Gpu(back=50)
    assert await ended(gpu, others=[other(State.UNLOADING, 10)]) == (True, 0)
    assert await ended(Gpu(back=40), others=[other(State.UNLOADING, 10)]) == (False, 0)


async def test_processes_that_a_gpu_has_no_more_of_confirm_it_though_others_move() -> None:
    gen, gpu = leaving(pids=(7, 8)), Gpu(more=20, pids=(7, 8))
    gen.placement = gen.placement._replace(devices=("cuda:0", "cuda:0"))
    assert await ended(gpu, gen, [other(State.LOADING, 30)]) == (True, 0)


async def test_another_process_of_the_same_number_is_not_believed_to_be_ours() -> None:
    """In a container numbers are others than the machine's: one with far too little is a stranger."""
    gen, gpu = leaving(pids=(7,)), Gpu(more=20, pids=(7,))
    gen.measured = {"cuda:0": {"weights": 400}}
    assert (await ended(gpu, gen, [other(State.LOADING, 30)]))[0] is False


async def test_one_on_two_gpus_has_to_come_back_on_both() -> None:
    async def use() -> GpuUse:
        late = asyncio.get_running_loop().time() >= 0.5
        return tuple(
            GpuReport(n, "a GPU", str(n), 100, used, 100 - used)
            for n, used in enumerate((10 if late else 50, 50))
        )

    gen = leaving()
    gen.held = {"cuda:0": 40, "cuda:1": 40}
    gen.measured = {"cuda:0": {"weights": 40}, "cuda:1": {"weights": 40}}
    host = FakeHost()
    await host.load(gen.spec, ["cuda:0", "cuda:1"])
    assert not await end(gen, host, 1.0, gpus=use) and gen.leaked == 40
