"""Beside the loop: what models really have, what devices say, and what strangers use of them.

Every LOOK_S seconds those models that have worked since are asked for their memory (one that goes on
working and takes no more ever less often); who rests is not asked, and costs one comparison. Then the
GPUs are read, in a thread of their own (`devices.readings`): a driver that hangs holds up nobody. What
is used beyond our own goes into the ledgers as `foreign`, so that nobody is given what is not there.

It changes no state. What it finds out it writes where others look: `gen.measured`, the estimates, the
ledgers; and it says when strangers gave room back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from repository.errors import DeviceSilentError, RepositoryError, is_out_of_memory
from repository.estimates import Estimates
from repository.hosts.base import Host
from repository.hosts.ending import end
from repository.lifecycle import footprint
from repository.lifecycle.generation import Generation
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.states import State
from repository.observer import Observer
from repository.reports import GpuReport, GpuUse

log = logging.getLogger("modeldepot.memory")

LOOK_S = 3.0
MOST_LOOK_S = 60.0  # between two questions to one that takes no more
ASK_S = 2.0  # how long one is waited for; who computes answers afterwards
AT_ONCE = 16  # models that are asked at the same time
JUST_NOW_S = 0.5  # older than that, and what was read is of another moment
STALE_S = 5 * LOOK_S  # what a GPU said so long ago is not told any more
FELL = 1 << 20  # bytes; less is no news
GREW = 1 << 20
BASES_S = 60.0  # between two looks at what workers share with those that they were forked from


class Asked(NamedTuple):
    """When it was asked last, and had served so many requests; asked again after `wait_s` at the
    earliest."""

    at: float
    served: int
    wait_s: float


NEVER = Asked(float("-inf"), 0, LOOK_S)


class Measuring(Observer):
    """`generations`: all that live. `room`: told when strangers have given some back. `bases`: bytes of
    host memory that belong to no model alone; it may take milliseconds."""

    def __init__(
        self,
        generations: Callable[[], Iterable[Generation]],
        ledgers: Mapping[str, MemoryLedger],
        estimates: Estimates,
        *,
        gpus: Callable[[], Awaitable[GpuUse]] | None = None,
        room: Callable[[], None] = lambda: None,
        bases: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        self._generations = generations
        self._ledgers = ledgers
        self._estimates = estimates
        self._gpus = gpus
        self._room = room
        self._bases = bases
        self._base, self._base_at = 0, -BASES_S
        self._asked: dict[int, Asked] = {}  # serial -> the last time
        self._use: GpuUse = ()
        self._use_at = 0.0
        self._silent = False

    # what others ask ------------------------------------------------------------------------------

    @property
    def gpu_use(self) -> GpuUse:
        """As the GPUs said last; nothing where that is too long ago to be believed."""
        now = asyncio.get_running_loop().time()
        return self._use if now - self._use_at <= STALE_S else ()

    def ours(self) -> dict[str, int]:
        """Device -> bytes that our processes have there, as well as can be known now."""
        found = dict.fromkeys(self._ledgers, 0)
        living = list(self._generations())
        for gen in living:
            if not gen.held:
                continue  # it has ended, or has not begun
            for device, kinds in gen.measured.items():
                if device in found:
                    found[device] += sum(kinds.values())
        found["cpu"] = found.get("cpu", 0) + self._base
        for gpu in self.gpu_use:
            device = f"cuda:{gpu.index}"
            if device in found:
                least, most = footprint.all_have(living, device, _told(gpu))
                found[device] = min(max(least, gpu.used - self._ledgers[device].foreign), most)
        return found

    async def read(self) -> GpuUse:
        """Reads the GPUs now. Raises DeviceSilentError."""
        if self._gpus is None:
            return ()
        self._use = await self._gpus()
        self._use_at = asyncio.get_running_loop().time()
        return self._use

    # the end of a generation ----------------------------------------------------------------------

    async def end(self, gen: Generation, host: Host, stop_s: float) -> bool:
        """Stops its host (`hosts.ending`). What did not come back is a stranger's from now on, before
        what it had reserved is given to somebody else."""
        sure = await end(gen, host, stop_s, gpus=self.read, others=self._generations)
        if asyncio.get_running_loop().time() - self._use_at <= JUST_NOW_S:
            self._account(without=gen)
        return sure

    # what happens to generations ------------------------------------------------------------------

    def stepped(self, gen: Generation, before: State) -> None:
        """Ready, it has been measured; when it fails, that may have been for lack of memory."""
        if gen.state is State.READY:
            self._estimates.learn(gen)
        elif before in (State.LOADING, State.WARMING) and is_out_of_memory(gen.error):
            self._estimates.ran_out(gen, {d: of.ceiling for d, of in self._ledgers.items()})

    # the rounds -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """One round. Never raises: a mistake in here must not end the measuring, nor the server."""
        try:
            await self._look()
        except Exception:
            log.exception("measuring stumbled; trying again")

    async def _look(self) -> None:
        # Beside each other: workers that compute may take their time, and strangers do not wait.
        await asyncio.gather(self._look_at_gpus(), self._ask_those_that_worked())
        self._account()
        now = asyncio.get_running_loop().time()
        if self._bases is not None and now - self._base_at >= BASES_S:
            self._base, self._base_at = await self._bases(), now
        await self._estimates.write()

    async def _ask_those_that_worked(self) -> None:
        now = asyncio.get_running_loop().time()
        asked: dict[int, Asked] = {}
        due = []
        for gen in self._generations():
            if gen.state is not State.READY:
                continue
            last = self._asked.get(gen.serial, NEVER)
            if last is not NEVER:
                asked[gen.serial] = last
            if (gen.served != last.served or gen.leases) and now - last.at >= last.wait_s:
                due.append(gen)
        self._asked = asked
        for first in range(0, len(due), AT_ONCE):
            await asyncio.gather(*(self._ask(gen) for gen in due[first : first + AT_ONCE]))

    async def _ask(self, gen: Generation) -> None:
        last, served = self._asked.get(gen.serial, NEVER), gen.served
        before = _total(gen)
        host = gen.host
        if host is None:
            return
        try:
            async with asyncio.timeout(ASK_S):
                told = await host.memory()
        except (TimeoutError, RepositoryError):  # it computes, or it dies: others see to that
            told = {}
        if told and gen.state is State.READY:
            gen.measured = told
            self._estimates.learn(gen)
        wait_s = LOOK_S if _total(gen) > before + GREW else min(2 * last.wait_s, MOST_LOOK_S)
        self._asked[gen.serial] = Asked(asyncio.get_running_loop().time(), served, wait_s)

    async def _look_at_gpus(self) -> None:
        try:
            await self.read()
        except DeviceSilentError as error:
            if not self._silent:
                log.warning("%s", error)
            self._silent = True
            return
        if self._silent:
            log.info("the GPUs' driver answers again")
        self._silent = False
        self._account()

    def _account(self, without: Generation | None = None) -> None:
        """Sets what strangers use, and those of ours who have more than they reserved: free is what is
        left beside that and all reservations. `without`: it has ended, whatever its state still says.
        """
        living = [gen for gen in self._generations() if gen is not without]
        fell = False
        for gpu in self.gpu_use:
            device = f"cuda:{gpu.index}"
            ledger = self._ledgers.get(device)
            if ledger is None:
                continue
            before = ledger.foreign
            ours = footprint.within_reserved(living, device, _told(gpu))
            ledger.foreign = footprint.foreign(gpu.used, ours, before)
            fell = fell or ledger.foreign <= before - FELL
        if fell:
            self._room()


def _told(gpu: GpuReport) -> dict[int, int]:
    return {process.pid: process.used for process in gpu.processes if process.used is not None}


def _total(gen: Generation) -> int:
    return sum(sum(kinds.values()) for kinds in gen.measured.values())
