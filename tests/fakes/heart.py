"""Small builders for the heart's tests: specs, folders, generations, a reconciler over fake hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from repository.config import ModelConfig
from repository.errors import LoadFailedError, ModelNotFoundError
from repository.hosts.base import Host
from repository.life import Means
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import HOST, Placement
from repository.lifecycle.states import Event, State
from repository.lifecycle.wishes import Wishes
from repository.messages import Loaded
from repository.reconciler import Reconciler
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec


def spec(
    model: str = "m", version: int = 1, print_: str = "f1", n_bytes: int = 10, **config: Any
) -> ModelSpec:
    return ModelSpec(
        model, version, print_, bytes_needed=n_bytes, config=ModelConfig(**config), backend="fake"
    )


def folder(*specs: ModelSpec, name: str = "", **rest: Any) -> ModelFolder:
    """One model of these versions."""
    return ModelFolder(
        name=name or specs[0].model,
        fingerprint="/".join(s.fingerprint for s in specs),
        specs={s.version: s for s in specs},
        versions=tuple(s.version for s in specs),
        **rest,
    )


def folders(*specs: ModelSpec) -> dict[str, ModelFolder]:
    models: dict[str, list[ModelSpec]] = {}
    for one in specs:
        models.setdefault(one.model, []).append(one)
    return {name: folder(*of) for name, of in models.items()}


def newborn(
    what: ModelSpec | None = None,
    serial: int = 1,
    *,
    clock: Callable[[], float] = lambda: 0.0,
    **rest: Any,
) -> Generation:
    return Generation(
        serial,
        what or spec(),
        on_step=lambda g, s: None,
        on_idle=lambda g: None,
        clock=clock,
        **rest,
    )


WAYS: dict[State, tuple[Event, ...]] = {
    State.QUEUED: (),
    State.LOADING: (Event.ADMIT,),
    State.WARMING: (Event.ADMIT, Event.LOADED),
    State.READY: (Event.ADMIT, Event.LOADED, Event.WARMED),
    State.DRAINING: (Event.ADMIT, Event.LOADED, Event.WARMED, Event.RETIRE),
    State.ASLEEP: (Event.ADMIT, Event.LOADED, Event.WARMED, Event.RETIRE, Event.SLEPT),
    State.UNLOADING: (Event.ADMIT, Event.RETIRE),
    State.GONE: (Event.RETIRE,),
}


def brought(gen: Generation, state: State, error: Exception | None = None) -> Generation:
    """Walks `gen` along the table to `state`; with `error` to FAILING or FAILED."""
    for event in WAYS.get(state, (Event.ADMIT,)):
        if gen.state is State.QUEUED and event is Event.ADMIT:
            gen.placement = gen.options[0]
            gen.held = dict(gen.placement.needs)
        gen.sleeps = event is Event.SLEPT
        gen.step(event)
    if state in (State.FAILING, State.FAILED):
        gen.fault(error or OSError("broken"))
    if state is State.FAILED:
        gen.step(Event.STOPPED)
        gen.held = {}
    return gen


def at(device: str, gen: Generation) -> Generation:
    """The same on another device."""
    where = Placement((device,), {device: gen.spec.bytes_needed})
    gen.options = (where,)
    if gen.held:
        gen.placement, gen.held = where, dict(where.needs)
    return gen


def resident(
    model: str, n_bytes: int, serial: int = 1, *, last_used: float = 0.0, **config: Any
) -> Generation:
    """READY and idle since `last_used`."""
    gen = brought(newborn(spec(model, n_bytes=n_bytes, **config), serial), State.READY)
    gen.last_used = last_used
    gen.pinned = gen.spec.config.pin
    return gen


async def no_rehearsal(host: Host, what: ModelSpec, loaded: Loaded) -> str:
    return ""


async def never_changed(what: ModelSpec) -> bool:
    return True


def means(make_host: Callable[[ModelSpec], Host], **rest: Any) -> Means:
    rest.setdefault("rehearse", no_rehearsal)
    rest.setdefault("unchanged", never_changed)
    rest.setdefault("phase", lambda gen, name, took: None)
    return Means(make_host=make_host, **rest)


def reconciler(
    make_host: Callable[[ModelSpec], Host],
    capacity: int = 100,
    *,
    everything: bool = False,
    lives: dict[str, Any] | None = None,
    devices: Iterable[str] = ("cpu",),
    tier: int | None = None,
    **rest: Any,
) -> Reconciler:
    """Each device has `capacity` bytes, the host tier `tier` (None: there is none)."""
    ledgers = {device: MemoryLedger(device, capacity) for device in devices}
    if tier is not None:
        ledgers[HOST] = MemoryLedger(HOST, tier)
    return Reconciler(
        means(make_host, **(lives or {})),
        ledgers,
        Wishes(everything=everything),
        **rest,
    )


async def settled(gens: Iterable[Generation]) -> None:
    for gen in gens:
        await gen.settled.wait()


async def load(models: Reconciler, name: str, *, force: bool = False) -> Generation:
    """Wants it and waits for the generations that answer; the newest of them."""
    if models.known(name) is None:
        raise ModelNotFoundError(name)
    gens = models.want(name, force=force, trigger=Trigger.API)
    if not gens:
        raise LoadFailedError(f"'{name}' has no version that could be loaded")
    await settled(gens)
    return gens[-1]


async def unload(models: Reconciler, name: str) -> None:
    await asyncio.gather(*[gen.ended.wait() for gen in models.unwant(name)])
