"""The end of a host, and whether all that it held has surely come back.

A process that is gone has given back its memory, and its host does not return from `stop` before that. A
GPU's driver gives it back a moment later: there the device itself is asked. A thread of the server gives
nothing back that anybody could see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from repository.errors import DeviceSilentError
from repository.hosts.base import Host
from repository.hosts.inline import InlineHost
from repository.lifecycle.generation import Generation
from repository.reports import GpuUse

BACK_S = 2.0  # how long a driver has for it
LOOK_S = 0.05
READ_S = 1.0  # how long one answer of the device is waited for
MOST = 0.9  # of what was measured; other models take and give meanwhile


async def end(
    gen: Generation, host: Host, stop_s: float, *, gpus: Callable[[], Awaitable[GpuUse]]
) -> bool:
    """Stops the host. False where nobody can tell that everything is back."""
    before = await _used(gen, gpus)
    await host.stop(stop_s)
    if isinstance(host, InlineHost):
        return False
    if gen.device == "cpu":
        return True
    return before is not None and await _came_back(gen, before, gpus)


async def _came_back(gen: Generation, before: int, gpus: Callable[[], Awaitable[GpuUse]]) -> bool:
    expected = before - int(MOST * sum(gen.measured.values()))
    try:
        async with asyncio.timeout(BACK_S):
            while True:
                used = await _used(gen, gpus)
                if used is None or used <= expected:
                    return used is not None
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        return False


async def _used(gen: Generation, gpus: Callable[[], Awaitable[GpuUse]]) -> int | None:
    """Bytes of the generation's GPU that anybody uses; None: it does not say, or there is none."""
    if gen.device == "cpu":
        return None
    try:
        async with asyncio.timeout(READ_S):
            found = await gpus()
    except (TimeoutError, DeviceSilentError):
        return None
    return next((gpu.used for gpu in found if f"cuda:{gpu.index}" == gen.device), None)
