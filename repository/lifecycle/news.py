"""What is said, in the log and to listeners, of each thing that happens. Words only, no decisions."""

from __future__ import annotations

import logging

from repository.events import EventBus
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from repository.snapshot import ModelFolder

log = logging.getLogger("modeldepot.models")


def tell_step(events: EventBus, gen: Generation, before: State) -> None:
    step = gen.story[-1]
    log.info(
        "model=%s version=%d gen=%d %s→%s %.3fs%s",
        gen.spec.model,
        gen.spec.version,
        gen.serial,
        before,
        gen.state,
        gen.clock() - gen.born_at,
        f" {step.note}" if step.note else "",
    )
    events.publish(
        "model.state",
        gen.spec.model,
        gen.spec.version,
        gen.serial,
        before=None if step.event is None else before,
        state=gen.state,
        note=step.note,
    )
    if gen.state is State.ASLEEP:
        key = (gen.spec.model, gen.spec.version, gen.serial)
        events.publish("model.asleep", *key, host_bytes=gen.held.get(HOST, 0), note=step.note)
    elif gen.state is State.READY and gen.woken:
        took_s = round(gen.clock() - gen.admitted_at, 6)
        events.publish("model.woken", gen.spec.model, gen.spec.version, gen.serial, took_s=took_s)
    elif gen.state is State.READY and gen.rolled_back:
        events.publish("model.rolled_back", gen.spec.model, gen.spec.version, gen.serial)


def tell_eviction(events: EventBus, gen: Generation, reason: str) -> None:
    events.publish(
        "model.evicted",
        gen.spec.model,
        gen.spec.version,
        gen.serial,
        reason=reason,
        to="asleep" if gen.sleeps else "unloaded",
    )


def tell_pin_refused(events: EventBus, gen: Generation) -> None:
    log.warning("%s is there, but not pinned: %s", gen, gen.pin_refused)
    events.publish(
        "model.pin_refused",
        gen.spec.model,
        gen.spec.version,
        gen.serial,
        message=gen.pin_refused,
    )


def tell_folder(events: EventBus, old: ModelFolder | None, new: ModelFolder) -> None:
    """It came or changed, and what is newly wrong with it."""
    events.publish("model.added" if old is None else "model.changed", new.name)
    if old is None or old.problems != new.problems:
        for problem in new.problems:
            events.publish("model.problem", new.name, rule=problem.rule, message=str(problem))
