"""Which models fall asleep because nobody asks for them (`sleep_s`). Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from repository.lifecycle.generation import Generation
from repository.lifecycle.residency import in_use
from repository.lifecycle.states import State


def drowsy(
    model: Sequence[Generation], *, now: float, may_sleep: Callable[[Generation], bool]
) -> tuple[list[Generation], float | None]:
    """Of one model: those who have idled for their `sleep_s`, and when they will have (None: never, as
    it stands). All of its versions or none: who cannot sleep keeps the others awake, for a model that
    serves only in part is in nobody's interest."""
    awake = [g for g in model if g.state is State.READY and not g.retire_asked.is_set()]
    waits = [s for g in awake if (s := g.spec.config.sleep_s) is not None]
    if not awake or len(waits) < len(awake) or in_use(model) or not all(map(may_sleep, awake)):
        return [], None
    at = max(g.last_used + s for g, s in zip(awake, waits, strict=True))
    return (awake, None) if at <= now else ([], at)
