"""What is said, in the log and to listeners, of each thing that happens. Words only, no decisions."""

from __future__ import annotations

import logging

from repository.events import EventBus
from repository.lifecycle.generation import Generation
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


def tell_eviction(events: EventBus, gen: Generation, reason: str) -> None:
    events.publish("model.evicted", gen.spec.model, gen.spec.version, gen.serial, reason=reason)


def tell_folder(events: EventBus, old: ModelFolder | None, new: ModelFolder) -> None:
    """It came or changed, and what is newly wrong with it."""
    events.publish("model.added" if old is None else "model.changed", new.name)
    if old is None or old.problems != new.problems:
        for problem in new.problems:
            events.publish("model.problem", new.name, rule=problem.rule, message=str(problem))
