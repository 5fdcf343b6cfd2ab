"""POST /v1/models/sleep, /wake, /pin; GET /v1/devices: who is where in memory, said by people.

Nothing of it is PolarGrid's; it looks as their calls do, takes the same three spellings of the model's
name and answers when it is done. Every call may be repeated: what is so already is answered with 200.
Sizes are bytes, times seconds.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from repository.lifecycle.states import State
from repository.lifecycle.status import ModelStatus
from repository.reports import DeviceReport, PinReport, SleepReport
from repository.repository import Repository
from repository.sizes import human
from server.codecs.named_model import NamedModel
from server.codecs.unloaded import Success


class PinRequest(NamedModel, forbid_unknown_fields=True, kw_only=True):
    """`pinned` false takes the pin back, also one that the config has."""

    pinned: bool = True


class SleepReply(msgspec.Struct):
    """`asleep`: something of it sleeps now. `generations`: how many; `unloaded`: how many could not,
    and were unloaded instead, and `why`. `freed`: what came back, by device; `host_bytes`: what those
    who sleep hold of the host tier."""

    model: str
    message: str
    asleep: bool
    generations: int
    unloaded: int
    why: str
    freed_bytes: int
    freed: dict[str, int]
    host_bytes: int
    took_s: float
    status: Success = "success"


class WakeReply(msgspec.Struct):
    """`woken`: it had been asleep; else it was loaded, or (`already`) served. `reserved`: what it holds
    now, by device."""

    model: str
    message: str
    versions: list[int]
    woken: bool
    already: bool
    reserved_bytes: int
    reserved: dict[str, int]
    took_s: float
    status: Success = "success"


class PinReply(msgspec.Struct):
    """`pinned`: what was asked for, and is kept; `honoured`: by all that runs of it now, else `why`
    not."""

    model: str
    message: str
    pinned: bool
    honoured: bool
    why: str
    status: Success = "success"


class DeviceView(msgspec.Struct):
    """`budget`: what models may hold, `reserved` of it they hold. `total`, `used`: as the device says.
    `attributed`: of `used`, what this server's workers say is theirs; `unattributed`: the rest. What is
    not known is null. "host" is the tier of host memory in which models sleep."""

    device: str
    name: str
    budget: int
    reserved: int
    free: int
    total: int | None
    used: int | None
    attributed: int
    unattributed: int | None
    uuid: str | None
    driver: str | None
    utilization: float | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None


class DeviceList(msgspec.Struct):
    devices: list[DeviceView]


@post("/models/sleep", status_code=200, summary="Put a model to sleep", tags=["models"])
async def sleep(data: JSONBody[NamedModel], models: NamedDependency[Repository]) -> SleepReply:
    """Once its last requests have ended its device's memory is given back, and its weights stay in host
    memory: a wake is faster than a load. It sleeps until somebody wakes or loads it. What is not loaded,
    or cannot sleep, is a conflict (409), and stays as it is; where the host tier is full of others it
    is unloaded instead, and `why` says so."""
    report = await models.sleep(data.name)
    return SleepReply(
        model=report.model,
        message=_slept(report),
        asleep=bool(report.generations),
        generations=report.generations,
        unloaded=report.unloaded,
        why=report.why,
        freed_bytes=sum(report.freed.values()),
        freed=dict(report.freed),
        host_bytes=report.host_bytes,
        took_s=round(report.took_s, 6),
    )


@post("/models/wake", status_code=200, summary="Wake a model", tags=["models"])
async def wake(data: JSONBody[NamedModel], models: NamedDependency[Repository]) -> WakeReply:
    """Answers when the model serves. One that does not sleep is loaded, as by a load."""
    report = await models.wake(data.name)
    held = _held(models.status(report.model))
    how = "was awake" if report.already else "woken" if report.woken else "loaded"
    return WakeReply(
        model=report.model,
        message=f"Model {report.model} {how}; it holds {human(sum(held.values()))}",
        versions=sorted(report.versions),
        woken=report.woken,
        already=report.already,
        reserved_bytes=sum(held.values()),
        reserved=held,
        took_s=round(report.took_s, 6),
    )


@post("/models/pin", status_code=200, summary="Pin a model, or take the pin back", tags=["models"])
async def pin(data: JSONBody[PinRequest], models: NamedDependency[Repository]) -> PinReply:
    """A pinned model is driven out neither by others nor by idleness. It is kept across restarts and
    stands above `pin` in the config. Beyond the operator's cap (`--pin-cap`) it is not honoured."""
    report = await models.pin(data.name, data.pinned)
    return PinReply(
        model=report.model,
        message=_pinned(report),
        pinned=report.pinned,
        honoured=report.honoured,
        why=report.why,
    )


@get("/devices", sync_to_thread=False, summary="Devices and their memory", tags=["models"])
def devices(models: NamedDependency[Repository]) -> DeviceList:
    """Every device that models may use, and the host tier: the budget, what of it is reserved, what the
    device itself says, and what of that is this server's."""
    return DeviceList([_device(report) for report in models.devices()])


def _slept(report: SleepReport) -> str:
    name, freed = report.model, human(sum(report.freed.values()))
    if not report.generations:
        return f"Model {name} was unloaded instead: {report.why}; {freed} are free again"
    told = f"Model {name} sleeps with {human(report.host_bytes)} in host memory"
    more = f"; {report.unloaded} of it were unloaded: {report.why}" if report.unloaded else ""
    return f"{told}; {freed} are free again{more}"


def _pinned(report: PinReport) -> str:
    if not report.pinned:
        return f"Model {report.model} is not pinned"
    if report.honoured:
        return (
            f"Model {report.model}: {report.why}"
            if report.why
            else f"Model {report.model} is pinned"
        )
    return f"Model {report.model} is to be pinned, but is not: {report.why}"


def _held(status: ModelStatus) -> dict[str, int]:
    found: dict[str, int] = {}
    for gen in status.generations:
        if gen.state is State.READY:
            for device, n_bytes in gen.held.items():
                found[device] = found.get(device, 0) + n_bytes
    return found


def _device(report: DeviceReport) -> DeviceView:
    return DeviceView(
        device=report.device,
        name=report.name,
        budget=report.budget,
        reserved=report.reserved,
        free=max(0, report.budget - report.reserved),
        total=report.total,
        used=report.used,
        attributed=report.attributed,
        unattributed=report.unattributed,
        uuid=report.uuid or None,
        driver=report.driver or None,
        utilization=report.utilization,
        temperature_c=report.temperature_c,
        power_w=report.power_w,
        power_limit_w=report.power_limit_w,
    )


HANDLERS: list[Any] = [sleep, wake, pin, devices]
router = Router("/v1", route_handlers=HANDLERS)
