"""What a load would do, asked of the same decision that a real load goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repository.admission import Admit, Decision, Decisions, Evict, Refuse, Waiting, decide
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.placement import NOTHING, Placement
from repository.lifecycle.plan import answers
from repository.lifecycle.states import RISING, State
from repository.lifecycle.wishes import Wanted
from repository.reconciler import Reconciler
from repository.reports import DryRun
from repository.sizes import human
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec

FOREVER = float("inf")
MOST_LOOKS = 64  # at the ends of as many turns


def foresee(models: Reconciler, folder: ModelFolder) -> DryRun:
    """Changes nothing. All versions that would be started are taken together as one request for
    memory, which is what they need in the end."""
    gens = models.generations.get(folder.name, [])
    here = [g for g in gens if g.state in RISING or g.state is State.READY]
    new = [s for s in folder.specs.values() if not any(answers(g, Wanted(s)) for g in here)]
    if not new:
        return _nothing(models, folder, here)
    asked = _asked(models, folder.name, [*_of_parts(models, folder.name), *new])
    asked.wakes = _sleeper(gens, new)
    found, waits = _decided(models, folder, asked)
    return _told(models, asked, found, waits=waits)


def _nothing(models: Reconciler, folder: ModelFolder, here: Sequence[Generation]) -> DryRun:
    device = here[-1].device if here else next(iter(models.ledgers))
    return DryRun(
        model=folder.name,
        would_load=False,
        bytes_needed=0,
        bytes_free=models.ledgers[device].free,
        device=device,
        would_evict=(),
        message=f"Model {folder.name} is loaded or loading already",
        devices=here[-1].chosen.devices if here else (device,),
        source=here[-1].chosen.source if here else "estimate",
    )


def _of_parts(models: Reconciler, name: str) -> list[ModelSpec]:
    """Of an ensemble: what would be started of the models that it needs."""
    found: list[ModelSpec] = []
    for part in sorted(models.parts(name)):
        here = [g for g in models.generations.get(part, []) if g.state in (*RISING, State.READY)]
        folder = models.folders.get(part)
        specs = folder.specs.values() if folder is not None else ()
        found += [s for s in specs if not any(answers(g, Wanted(s)) for g in here)]
    return found


def _asked(models: Reconciler, name: str, new: Sequence[ModelSpec]) -> Generation:
    """One that needs, wherever it goes, what all of them need there."""
    first, *more = new
    options = models.options(first)
    for spec in more:
        others = models.options(spec)
        options = tuple(
            _both(o, next((p for p in others if p.devices == o.devices), others[0]))
            for o in options
        )
    return Generation(
        0,
        replace(first, model=name, bytes_needed=sum(s.bytes_needed for s in new)),
        on_step=lambda gen, before: None,
        on_idle=lambda gen: None,
        clock=lambda: 0.0,
        trigger=Trigger.API,
        options=options,
    )


def _needs_room(gen: Generation) -> bool:
    return gen.spec.config.ensemble is None


def _both(one: Placement, other: Placement) -> Placement:
    needs = dict(one.needs)
    for device, n_bytes in other.needs.items():
        needs[device] = needs.get(device, 0) + n_bytes
    return one._replace(needs=needs)


def _sleeper(gens: Sequence[Generation], new: Sequence[ModelSpec]) -> Generation | None:
    """Who would be woken. Of several versions only some might sleep: then it is told as a load."""
    asleep = [g for g in gens if g.state is State.ASLEEP and not g.retire_asked.is_set()]
    found = [g for g in asleep if len(new) == 1 and g.spec.fingerprint == new[0].fingerprint]
    return max(found, key=lambda g: g.serial, default=None)


def _decided(models: Reconciler, folder: ModelFolder, asked: Generation) -> tuple[Decisions, bool]:
    """What becomes of it behind those who are queued already, and whether it has to wait first, for the
    end of somebody's turn."""
    now, waits = models.now, False
    for _ in range(MOST_LOOKS):
        found = decide(
            [*(g for g in models.queued if g.spec.model != folder.name and _needs_room(g)), asked],
            [g for of in models.generations.values() for g in of],
            models.ledgers,
            load_slots=len(models.generations) + 10**6,
            room_wait_s=FOREVER,
            now=now,
            outgoing=lambda gen: not any(answers(gen, Wanted(s)) for s in folder.specs.values()),
            waiting=Waiting({*models.demanded()} - {folder.name}, models.min_residency_s),
            clock=models.worth,
        )
        found = replace(found, todo=tuple(d for d in found.todo if _is_of(d, asked)))
        if found.todo or found.again_at is None or found.again_at in (now, FOREVER):
            break
        now, waits = found.again_at, True
    return found, waits


def _is_of(decision: Decision, asked: Generation) -> bool:
    return (decision.room_for if isinstance(decision, Evict) else decision.gen) is asked


def _told(models: Reconciler, asked: Generation, found: Decisions, *, waits: bool) -> DryRun:
    name, where, would = asked.spec.model, asked.options[0], True
    leave = [d for d in found.todo if isinstance(d, Evict)]
    evict = tuple(sorted({d.gen.spec.model for d in leave}))
    replaces = any(d.replaced for d in leave)
    match found.todo:
        case [Refuse(_, error)]:
            would, message = False, str(error)
        case [Admit(_, placement)]:
            where, message = placement, ""
        case [Evict(), *_]:
            where, message = leave[0].placement, _after(models, leave)
        case _:
            waits, message = True, ""
    wakes = asked.wakes is not None and where.devices == asked.wakes.placement.devices
    device = where.devices[0]
    if would:
        done = "woken" if wakes else "loaded"
        missing = _missing(models, where, asked.wakes if wakes else None)
        message = f"Model {name} would be {done}{message}{missing}"
        message += (
            "; it would wait: others are busy or leaving, or have only just come" if waits else ""
        )
    return DryRun(
        model=name,
        would_load=would,
        bytes_needed=where.needs.get(device, 0),
        bytes_free=models.ledgers[device].free,
        device=device,
        would_evict=evict,
        message=message,
        devices=where.devices,
        needs=dict(where.needs),
        source=where.source,
        would_replace=replaces,
        would_wake=would and wakes,
        would_wait=would and waits,
    )


def _after(models: Reconciler, leave: Sequence[Evict]) -> str:
    sleep = sorted({d.gen.spec.model for d in leave if not d.replaced and models.may_sleep(d.gen)})
    go = sorted({d.gen.spec.model for d in leave if not d.replaced} - set(sleep))
    told = [f"{', '.join(go)} made room"] if go else []
    if sleep:
        told.append(f"{', '.join(sleep)} fell asleep")
    if any(d.replaced for d in leave):
        told.append("its own older generation left: there would be a gap")
    return f" after {' and '.join(told)}"


def _missing(models: Reconciler, where: Placement, sleeper: Generation | None) -> str:
    has = NOTHING if sleeper is None else sleeper.held
    short = {d: n - has.get(d, 0) - models.ledgers[d].free for d, n in where.needs.items()}
    told = [f"{human(n)} of {device}" for device, n in short.items() if n > 0]
    return f"; {' and '.join(told)} are missing now" if told else ""
