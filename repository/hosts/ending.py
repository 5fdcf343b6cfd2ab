"""The end of a host, and whether all that it held has surely come back.

A process that is gone has given back its memory, and its host does not return from `stop` before that. A
GPU's driver gives it back a moment later: there the device itself is asked, for BACK_S seconds. A thread
of the server gives nothing back that anybody could see.

The device counts everybody's memory. What others of ours took and gave meanwhile is reckoned with as
far as it is known (`lifecycle.footprint`), so the answer is one of three: it is back whatever they did;
it is not back whatever they did (`gen.leaked` bytes are missing); or nobody can tell, which is not
confirmed and not called a leak. Strangers who take memory in those seconds look like a leak: the sum is
the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from repository.errors import DeviceSilentError
from repository.hosts.base import Host
from repository.hosts.inline import InlineHost
from repository.lifecycle import footprint
from repository.lifecycle.footprint import Bounds
from repository.lifecycle.generation import Generation
from repository.reports import GpuReport, GpuUse

log = logging.getLogger("modeldepot.memory")

BACK_S = 2.0  # how long a driver has for it
LOOK_S = 0.05
READ_S = 1.0  # how long one answer of the device is waited for
# Of what it had: where the driver says so of its processes, and where its workers did, a while ago.
EXACT, ROUGH = 0.98, 0.9

Gpus = Callable[[], Awaitable[GpuUse]]
Others = Callable[[], Iterable[Generation]]


class View(NamedTuple):
    """One GPU at one moment, in bytes. `told`: what each process has; `others`: what other generations
    have, as far as that is known."""

    used: int
    told: Mapping[int, int]
    others: Bounds


class Stake(NamedTuple):
    """What a generation had on one GPU when it was told to stop. `back`: so much of it must return."""

    before: View
    had: int
    back: int
    pids: tuple[int, ...]


async def end(
    gen: Generation, host: Host, stop_s: float, *, gpus: Gpus, others: Others = tuple
) -> bool:
    """Stops the host. False where nobody can tell that everything is back; `gen.leaked` then says how
    much surely is not. `others`: all generations that live, this one or not."""
    devices = [d for d in {*gen.held, *gen.measured} if d.startswith("cuda")]
    before = await _look(gen, devices, gpus, others) if devices else {}
    await host.stop(stop_s)
    if isinstance(host, InlineHost):
        return False
    if not devices:
        return True
    stakes = {device: _stake(gen, device, view) for device, view in before.items()}
    return await _until_back(gen, stakes, gpus, others) and len(stakes) == len(devices)


def _stake(gen: Generation, device: str, view: View) -> Stake:
    had = footprint.by_process(gen, device, view.told)
    pids = () if had is None else footprint.processes(gen, device)
    if had is not None:
        return Stake(view, had, int(EXACT * had), pids)
    said = footprint.said(gen, device)
    return Stake(view, said, int(ROUGH * said), pids)


async def _until_back(
    gen: Generation, stakes: Mapping[str, Stake], gpus: Gpus, others: Others
) -> bool:
    """Of the GPUs that could be read before."""
    until = asyncio.get_running_loop().time() + BACK_S
    while True:
        now = await _look(gen, stakes, gpus, others)
        if len(now) < len(stakes):  # one is lost, or silent
            return False
        if all(_is_back(stake, now[device]) for device, stake in stakes.items()):
            return True
        if asyncio.get_running_loop().time() >= until:
            gen.leaked = sum(_missing(stake, now[device]) for device, stake in stakes.items())
            return False
        await asyncio.sleep(LOOK_S)


def _is_back(stake: Stake, now: View) -> bool:
    freed = _freed(stake, now)
    if freed.least >= stake.back:
        return True
    # Others of ours have moved, and its processes have none of this device any more.
    gone = bool(stake.pids) and not any(pid in now.told for pid in stake.pids)
    return gone and freed.most >= stake.back


def _missing(stake: Stake, now: View) -> int:
    """Bytes that surely have not come back."""
    most = _freed(stake, now).most
    return 0 if most >= stake.back else stake.had - max(0, most)


def _freed(stake: Stake, now: View) -> Bounds:
    fell = stake.before.used - now.used
    was, others = stake.before.others, now.others
    return Bounds(fell + others.least - was.most, fell + others.most - was.least)


async def _look(
    gen: Generation, devices: Iterable[str], gpus: Gpus, others: Others
) -> dict[str, View]:
    """Without what cannot be read."""
    try:
        async with asyncio.timeout(READ_S):
            found = {f"cuda:{gpu.index}": gpu for gpu in await gpus()}
    except (TimeoutError, DeviceSilentError):
        return {}
    except Exception:  # whatever a driver's library does, the host has to be stopped
        log.exception("the GPUs cannot be read")
        return {}
    rest = [other for other in others() if other is not gen]
    return {d: _view(found[d], d, rest) for d in devices if d in found}


def _view(gpu: GpuReport, device: str, others: Iterable[Generation]) -> View:
    told = {process.pid: process.used for process in gpu.processes if process.used is not None}
    return View(gpu.used, told, footprint.all_have(others, device, told))
