"""The part of the writer that knows ensembles: which models they need, and whether those carry them
(`repository.reconciler` is the whole).

    an ensemble is wanted → so are the models of its steps, unless somebody unloaded, put to sleep or
                            drove out one of them: then the ensemble is away as long as that is
      → it is queued, and needs no memory: as soon as they all serve, and fit together, it loads
      → one of them stops serving, or changes so that it does not fit: it is retired, and queued again
      → one of them cannot load: it fails with the reason, and is queued again when that is mended

Nothing of this is remembered: it is compared anew at each look. What is remembered are words: that a
model is wanted since an ensemble needs it (`Word.NEEDED`) holds when the ensemble is unloaded, too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from repository.config import Ensemble, EnsembleStep
from repository.errors import (
    ComposingModelError,
    ConfigError,
    NoRoomError,
    RepositoryError,
    WorkerDiedError,
    retold,
)
from repository.hosts.crew import facts_of
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.placement import Placement
from repository.lifecycle.plan import FIRM, Footing, fault_of, staying
from repository.lifecycle.states import TERMINAL, State
from repository.lifecycle.status import text_of
from repository.lifecycle.wishes import Word
from repository.snapshot import ModelFolder
from repository.spec import Key, ModelSpec
from repository.standing import Standing
from repository.wiring import Wiring, models_of

Parts = Mapping[str, frozenset[str]]

MOST_PARTS = 100  # of one ensemble, and so the most that stand on each other
NO_ROOM_NEEDED = (Placement(("cpu",), {}, "config"),)
AWAY = {
    Word.UNLOAD: "was unloaded",
    Word.SLEEP: "was put to sleep",
    Word.EVICTED: "was evicted",
}


class Outlook(NamedTuple):
    """On what a step names: it serves, or is on its way (neither), or why not."""

    gen: Generation | None = None
    why: str = ""
    error: BaseException | None = None


class Composing(Standing):
    """`_ensembles`: models that are one, or have been."""

    _dirty: dict[str, Trigger]
    _ensembles: set[str]
    _drawn: tuple[Parts, Parts] | None  # what each needs, and who needs each
    _fits_of: dict[str, tuple[tuple[object, ...], str]]  # what was found of those that serve now
    _found: dict[Key, Footing] | None  # while one is looked for: what was found below it
    _used: list[Generation]

    @abstractmethod
    def _leave_queue(self, gen: Generation) -> None: ...

    @abstractmethod
    def _admit(self, gen: Generation, where: Placement) -> None: ...

    # who needs whom -------------------------------------------------------------------------------

    def _follow(self, folder: ModelFolder) -> None:
        """It is new, or has changed."""
        if any(spec.config.ensemble is not None for spec in folder.specs.values()):
            self._ensembles.add(folder.name)
        if self._ensembles:
            self._drawn = None

    def _rename(self, aliases: Mapping[str, str], trigger: Trigger) -> None:
        """alias -> model, for all at once."""
        if self.routes.rename(aliases):
            self._drawn = None
            for name in self._ensembles:
                self._dirty.setdefault(name, trigger)

    def parts(self, model: str) -> Collection[str]:
        """All models that it needs, and that those need. Of anything but an ensemble: none."""
        return self._draw()[0].get(model, ()) if self._ensembles else ()

    def users(self, model: str) -> Collection[str]:
        """All ensembles that need it."""
        return self._draw()[1].get(model, ()) if self._ensembles else ()

    def _draw(self) -> tuple[Parts, Parts]:
        if self._drawn is None:
            direct = {name: self._direct(name) for name in self._ensembles}
            parts = {name: frozenset(_reached(name, direct)) for name in direct}
            users: dict[str, set[str]] = {}
            for name, needed in parts.items():
                for part in needed:
                    users.setdefault(part, set()).add(name)
            self._drawn = parts, {part: frozenset(of) for part, of in users.items()}
        return self._drawn

    def _direct(self, model: str) -> set[str]:
        folder = self.folders.get(model)
        specs = [*(folder.specs.values() if folder is not None else ())]
        specs += [g.spec for g in self.register.of(model) if g.state not in TERMINAL]
        return {self.routes.model(name) for spec in specs for name in models_of(spec.config)}

    # what is wanted for it ------------------------------------------------------------------------

    def _need(
        self, model: str, trigger: Trigger, *, asked: bool = False, said: bool = False
    ) -> None:
        """The models that a wanted ensemble needs are wanted. `asked`: somebody asks for it, or `said`
        so by call."""
        for part in self.parts(model):
            if self.wishes.need(part, asked=asked, said=said):
                self._dirty[part] = trigger

    def _ask_for_parts(self, model: str, trigger: Trigger) -> None:
        """Somebody asks for the ensemble at this moment: as if he had asked for what it needs, too."""
        said = trigger is not Trigger.DEMAND
        self._need(model, trigger, asked=True, said=said)
        for part in self.parts(model):
            gens = self.register.of(part)
            if any(g.state is State.READY for g in gens):
                continue
            if said:
                self.register.forgive(part)
            else:
                self._forgive_for_requests(part)
            self._dirty[part] = trigger
            for gen in gens:
                if gen.state is State.QUEUED:
                    gen.asked_for(trigger)

    def away(self, model: str) -> str:
        """Which of its models is not wanted now, and why; "": none."""
        for part in sorted(self.parts(model)):
            if not self.wishes.wants(part):
                why = AWAY.get(self.wishes.word(part) or Word.UNLOAD, "is not loaded")
                return f"its model '{part}' {why}"
        return ""

    def demanded(self) -> Collection[str]:
        """Models that requests wait for, and those that these need."""
        models: Collection[str] = self.demand.models
        if not self._ensembles:
            return models
        return {*models, *(part for model in models for part in self.parts(model))}

    def spare(self, model: str) -> list[str]:
        """It is unloaded: what was wanted only since this needed it is wanted no longer. Which."""
        others = {p for e in self._ensembles if self.wishes.wants(e) for p in self.parts(e)}
        gone = [p for p in sorted(self.parts(model)) if p not in others and self.wishes.spare(p)]
        for part in gone:
            self._dirty[part] = Trigger.API
        return gone

    # what it stands on ----------------------------------------------------------------------------

    def footing(self, spec: ModelSpec) -> Footing:
        """Each below it is looked at once, on however many ways it is needed."""
        if spec.config.ensemble is None:
            return FIRM
        if self._found is not None:
            if spec.key not in self._found:
                self._found[spec.key] = self._stands(spec, spec.config.ensemble)
            return self._found[spec.key]
        self._found = {}
        try:
            return self._stands(spec, spec.config.ensemble)
        finally:
            self._found = None

    def _stands(self, spec: ModelSpec, ensemble: Ensemble) -> Footing:
        parts = self.parts(spec.model)
        if spec.model in parts:
            return Footing(why=f"in ensemble '{spec.model}', its models need it, in a circle")
        if len(parts) > MOST_PARTS:
            why = f"it needs {len(parts)} models, with those that these need; at most {MOST_PARTS}"
            return Footing(why=f"in ensemble '{spec.model}', {why} can be served together")
        outlooks = [self._outlook(step) for step in ensemble.steps]
        for step, found in zip(ensemble.steps, outlooks, strict=True):
            if found.why:
                why = f"in ensemble '{spec.model}', step '{step.model}': {found.why}"
                return Footing(why=why, error=found.error)
        gens = [found.gen for found in outlooks if found.gen is not None]
        if len(gens) < len(outlooks):
            return Footing(coming=True)
        why = self._misfit(spec, gens)
        return Footing(why=why) if why else FIRM

    def _outlook(self, step: EnsembleStep) -> Outlook:
        name = self.routes.model(step.model)
        of_model = self.register.of(name)
        gens = [g for g in staying(of_model) if step.version in (None, g.spec.version)]
        ready = [g for g in gens if g.state is State.READY]
        if ready:
            return Outlook(max(ready, key=lambda g: (g.spec.version, g.serial)))
        folder = self.folders.get(name)
        if gens or (folder is not None and not self.wishes.wants(name)):
            return Outlook()  # who is not wanted is no fault: the ensemble is away
        if folder is None:
            return Outlook(why="there is no such model in the repository")
        wanted = self.wishes.wanted(folder)
        of_step = [w for v, w in wanted.items() if step.version in (None, v)]
        if not of_step:
            return Outlook(why=_without(folder, step.version))
        faults = [
            fault_of(
                want,
                self._versions(want.spec),
                crash_limit=self._crash_limit,
                fits=self._fits,
                footing=self.footing,
            )
            for want in of_step
        ]
        if any(fault is None for fault in faults):
            return Outlook()
        return Outlook(why=text_of(faults[0] or LookupError()), error=faults[0])

    def _misfit(self, spec: ModelSpec, gens: list[Generation]) -> str:
        """Why these do not go together; "": they do."""
        key = (spec.fingerprint, *(gen.serial for gen in gens))
        known = self._fits_of.get(spec.model)
        if known is None or known[0] != key:
            known = self._fits_of[spec.model] = key, _tried(spec, gens)
        return known[1]

    # carrying it out ------------------------------------------------------------------------------

    def _serve_ensembles(self) -> None:
        """Those in the queue whose models serve load now; those whose models cannot, fail."""
        for gen in [g for g in self._queue if g.spec.config.ensemble is not None]:
            found = self.footing(gen.spec)
            if found.firm:
                self._admit(gen, NO_ROOM_NEEDED[0])
            elif found.why:
                self._let_down(gen, found)

    def _let_down(self, gen: Generation, found: Footing) -> None:
        if gen.trigger.asked and isinstance(found.error, NoRoomError):
            # A wish of that moment: neither it nor its models are to come up by surprise some day.
            self.wishes.withdraw(gen.spec.model)
            for part in self.parts(gen.spec.model):
                if self.wishes.word(part) is Word.NEEDED:
                    self.wishes.withdraw(part)
                self._dirty[part] = gen.trigger
        error = ComposingModelError(found.why)
        error.__cause__ = found.error
        self._leave_queue(gen)
        gen.fault(error)

    def _note_users(self) -> None:
        """So that nobody drives out what an ensemble needs, as long as that may not leave."""
        for gen in self._used:
            gen.users = ()
        self._used = []
        for name in self._ensembles:
            if name in self.parts(name):  # in a circle: it never serves
                continue
            for user in staying(self.register.of(name)):
                if user.spec.config.ensemble is None:
                    continue
                for step in user.spec.config.ensemble.steps:
                    for gen in self._carriers(step):
                        gen.users = (*gen.users, user)
                        self._used.append(gen)

    def _carriers(self, step: EnsembleStep) -> list[Generation]:
        gens = staying(self.register.of(self.routes.model(step.model)))
        return [g for g in gens if step.version in (None, g.spec.version)]

    def _in_vain(self, name: str, version: int | None) -> RepositoryError | None:
        model = self.routes.model(name)
        return super()._in_vain(name, version) or self._in_vain_for(model)

    def _in_vain_for(self, model: str) -> RepositoryError | None:
        """The same of what it needs."""
        if model not in self._ensembles:
            return None
        if model not in self.parts(model):
            for part in sorted(self.parts(model)):
                error = super()._in_vain(part, None) or self._baseless(part)
                if error is not None:
                    return retold(error, f"in ensemble '{model}', its model '{part}': {error}")
        return self._baseless(model)

    def _baseless(self, model: str) -> RepositoryError | None:
        """None of its versions has models that could carry it."""
        folder = self.folders.get(model)
        found = [self.footing(spec) for spec in folder.specs.values()] if folder else []
        return ComposingModelError(found[0].why) if found and all(f.why for f in found) else None

    def _forgive_for_requests(self, model: str) -> None:
        """Requests begin to wait for it."""
        self.register.forgive(model, of=NoRoomError)  # that was another moment
        self.register.forgive(model, of=ComposingModelError)
        back = model in self.register.fallback  # then an older one is what comes
        if not back and self._given_up(model):  # it has rested, and gets another chance
            self.register.forgive(model, of=WorkerDiedError)

    def options(self, spec: ModelSpec) -> tuple[Placement, ...]:
        return super().options(spec) if spec.config.ensemble is None else NO_ROOM_NEEDED

    def _pin_parts(self) -> None:
        """What a pinned ensemble needs is pinned with it."""
        self.pins.carried = frozenset(
            part
            for name in self._ensembles
            if any(self.pins.wants(g.spec) for g in staying(self.register.of(name)))
            for part in self.parts(name)
        )


def _reached(name: str, direct: Mapping[str, Iterable[str]]) -> Iterator[str]:
    seen: set[str] = set()
    ahead = list(direct[name])
    while ahead:
        model = ahead.pop()
        if model not in seen:
            seen.add(model)
            yield model
            ahead += direct.get(model, ())


def _tried(spec: ModelSpec, gens: list[Generation]) -> str:
    try:
        Wiring(spec.model, spec.config).fit(facts_of(gens))
    except ConfigError as error:
        return str(error)
    return ""


def _without(folder: ModelFolder, version: int | None) -> str:
    if folder.errors:
        return str(folder.errors[0])
    if version is None:
        return "it has no version that could be loaded"
    return f"its version {version} is not served; there is {_listed(folder.specs)}"


def _listed(versions: Iterable[int]) -> str:
    return ", ".join(str(version) for version in sorted(versions)) or "none"
