"""The part of the facade that lets models sleep and wakes them (`repository.repository` is the whole).

A model that sleeps keeps its worker, with the weights in host memory, and is back in the time that it
takes to copy them. What is decided of it is in `resting`.
"""

from __future__ import annotations

import time

from repository.errors import (
    ConflictError,
    ModelNotReadyError,
    NoRoomError,
    RepositoryError,
    SupersededError,
)
from repository.life import bytes_asleep
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import RISING, Event, State
from repository.lifecycle.wishes import Word
from repository.loading import Loading
from repository.reports import LoadReport, SleepReport


class Sleeping(Loading):
    """`sleep` and `wake`."""

    def loads_on_request(self, model: str) -> bool:
        """May a request that names it have it loaded, or woken? Without `on_demand` only where it sleeps
        by itself, because it was idle or others needed its room."""
        if self.options.on_demand:
            return True
        return self._models.loads_on_request(self._models.routes.model(model))

    async def sleep(self, model: str) -> SleepReport:
        """Takes it out of service; returns once its last requests have ended and it sleeps. Stays so,
        also over a restart (then without being loaded), until somebody loads it, or a request does where
        requests may. Idempotent.

        Raises before anything has changed: ModelNotFoundError; ConflictError where nothing of it serves
        or its backend cannot sleep; NoRoomError where the host tier is too small; ModelNotReadyError
        while it loads or leaves. Later: SupersededError; NotKeptError where it sleeps, and a restart may
        not know of it.
        """
        self._not_draining()
        began = time.perf_counter()
        name = self._model_of(model)
        self._check_sleepy(name)  # from here no await until all have been told
        going = self._models.put_to_sleep(name)
        held = {gen: dict(gen.held) for gen in going}
        for gen in going:
            await gen.rested.wait()
        asleep = [gen for gen in going if _slept(gen)]
        if self._models.wishes.said(name) is not Word.SLEEP:
            raise SupersededError(
                f"the sleep of '{name}' was overtaken: it was loaded or unloaded meanwhile, or its "
                f"folder is gone"
            )
        report = SleepReport(
            model=name,
            generations=len(asleep),
            unloaded=len(going) - len(asleep),
            why="; ".join(sorted({_why_not(gen) for gen in going if gen not in asleep})),
            freed=_freed(held),
            host_bytes=sum(gen.held.get(HOST, 0) for gen in asleep),
            took_s=time.perf_counter() - began,
        )
        await self._kept(f"'{name}' sleeps")
        return report

    async def wake(self, model: str) -> LoadReport:
        """As `load`, which wakes what sleeps too: `woken` says whether it did."""
        return await self.load(model)

    def _check_sleepy(self, name: str) -> None:
        gens = self._of(name)
        awake = [g for g in gens if g.state is State.READY and not g.retire_asked.is_set()]
        if any(g.state in RISING for g in gens):
            what = "is being reloaded" if awake else "is still loading"
            raise ModelNotReadyError(
                f"model '{name}' {what}; put it to sleep when that is done, or unload it",
                retry_after_s=1.0,
            )
        if not awake and any(g.sleeps for g in gens):
            return
        if not awake and any(not g.ended.is_set() for g in gens):
            raise ModelNotReadyError(
                f"model '{name}' is being unloaded; load it before it is put to sleep",
                retry_after_s=1.0,
            )
        if not awake:
            raise ConflictError(
                f"model '{name}' is not loaded, so there is nothing to put to sleep; load it first"
            )
        for gen in awake:
            why = self._models.sleepless(gen)
            if why:
                raise self._refused(gen, why)

    def _refused(self, gen: Generation, why: str) -> RepositoryError:
        name, tier = gen.spec.model, self._models.ledgers.get(HOST)
        n_bytes = bytes_asleep(gen)
        text = f"model '{name}' version {gen.spec.version} cannot sleep, and serves on: {why}"
        if "sleep" not in (gen.loaded.abilities if gen.loaded else ()):
            return ConflictError(f"{text}; unload it instead")
        return NoRoomError(
            f"{text}; enlarge the host tier, or unload the model",
            needed=n_bytes,
            free=tier.free if tier is not None else 0,
            device=HOST,
            residents={
                str(g): n
                for of in self._models.generations.values()
                for g in of
                if (n := g.held.get(HOST, 0))
            },
        )


def _slept(gen: Generation) -> bool:
    return any(step.event is Event.SLEPT for step in gen.story)


def _why_not(gen: Generation) -> str:
    """The note of the step with which it ended instead."""
    notes = [step.note for step in gen.story if step.event in (Event.DRAINED, Event.FAULT)]
    return (notes[-1] if notes else "") or gen.retire_why


def _freed(held: dict[Generation, dict[str, int]]) -> dict[str, int]:
    """By device, of what they had held before."""
    freed: dict[str, int] = {}
    for gen, before in held.items():
        for device, n_bytes in before.items():
            if device != HOST and (n := n_bytes - gen.held.get(device, 0)) > 0:
                freed[device] = freed.get(device, 0) + n
    return freed
