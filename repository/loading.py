"""The part of the facade that loads and unloads (`repository.repository` is the whole).

It turns a wish into generations and waits for them: what is wanted is in `wishes`, what happens next in
`plan` and `admission`, who acts in `reconciler`. A load that changes what is known of a model first (its
config, or where it lies) is in `overriding`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from repository.adapting.calls import AdapterCalls
from repository.bringing import UNSAID, Unsaid
from repository.dry_run import foresee
from repository.errors import (
    ConflictError,
    DrainingError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    NotKeptError,
    RepositoryError,
    SupersededError,
)
from repository.folder.mounts import is_path, place_of
from repository.journal import Journal
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.refusals import of_folder, of_generation
from repository.lifecycle.status import text_of
from repository.lookout import Lookout
from repository.names import check_name, shown
from repository.overriding import Overrides
from repository.reconciler import Reconciler
from repository.reports import Brought, DryRun, LoadReport, Options, UnloadAllReport, UnloadReport
from repository.snapshot import ModelFolder, Snapshot

MOST_TOLD = 10  # models that are named in a refusal

log = logging.getLogger("modeldepot.models")


class Ending(NamedTuple):
    """An unload that has begun. `going`: what has still to end; `held`: bytes it had reserved then."""

    model: str
    going: list[Generation]
    held: int
    began: float

    async def over(self) -> UnloadReport:
        for gen in self.going:
            await gen.ended.wait()
        freed = self.held - sum(gen.reserved for gen in self.going)
        took_s = time.perf_counter() - self.began
        return UnloadReport(
            self.model,
            len(self.going),
            freed,
            took_s,
            drain_s=max((gen.drain_s for gen in self.going), default=0.0),
            confirmed=all(gen.confirmed for gen in self.going),
            leaked_bytes=sum(gen.leaked for gen in self.going),
        )


def in_all(reports: Sequence[UnloadReport]) -> UnloadReport:
    """Under the name of the first."""
    return replace(
        reports[0],
        generations=sum(r.generations for r in reports),
        bytes_freed=sum(r.bytes_freed for r in reports),
        took_s=max(r.took_s for r in reports),
        drain_s=max(r.drain_s for r in reports),
        confirmed=all(r.confirmed for r in reports),
        leaked_bytes=sum(r.leaked_bytes for r in reports),
    )


class Loading(AdapterCalls):
    """What the facade brings beside its desk: the one writer, and what looks at the folder."""

    options: Options
    _journal: Journal
    _models: Reconciler
    _lookout: Lookout
    _overrides: Overrides
    _seen: Snapshot  # what was told last of the folder
    _draining: bool
    _unloading: set[asyncio.Task[RepositoryError | None]]

    @abstractmethod
    def names(self) -> list[str]:
        """Every model, by name."""

    async def load(
        self,
        model: str,
        *,
        force: bool = False,
        trigger: Trigger = Trigger.API,
        config: Mapping[str, Any] | Brought | Unsaid | None = UNSAID,
    ) -> LoadReport:
        """Wants `model`; returns once every version that its policy chooses serves.

        Looks at the files first. Joins a load in flight. `force` builds a new generation beside the
        old one even where nothing changed. Raises ModelNotFoundError, LoadFailedError (or a leaf),
        NoRoomError, SupersededError, ModelNotReadyError while its files are still being written.

        `model` may be a path: in the repository, or in an allowed root, where the folder becomes a
        model of the repository. `config` stands in place of the folder's aphrodite_config.yaml and
        stays so; None: the folder's own holds again; not said: nothing of that changes. Its keys are
        Aphrodite's and those of config.yaml. Raises OutOfBoundsError, ConflictError for a name that
        is taken, ConfigError ("request: ..."); after any error the config, the path and what served
        are as they were. But for NotKeptError: then all is done and the model serves, and only a
        restart may not know of it.

        `Brought`, of a name: in Triton's way. Its config stands in place of the folder's, as long as the
        folder's files are those that it was said over; its files stand in place of the folder until a
        load brings none, or the model is unloaded. Raises InvalidRequestError for names of files,
        NoDiskError.
        """
        self._not_draining()
        change = await self._overrides.change(model, config)
        if change.is_none:
            report = await self._load(change.name, force=force, trigger=trigger)
        else:
            report = await self._overrides.carry_out(
                change,
                lambda: self._load(change.name, force=force, trigger=trigger, tentative=True),
            )
        await self._kept(f"'{report.model}' is loaded")
        return report

    async def _kept(self, done: str) -> None:
        """`done`: all the same, if it cannot be kept."""
        try:
            await self._journal.kept()
        except NotKeptError as error:
            raise NotKeptError(f"{done}, but a restart may not know of it: {error}") from error

    async def _load(
        self, model: str, *, force: bool, trigger: Trigger, tentative: bool = False
    ) -> LoadReport:
        """`tentative`: if it fails, its wish is taken back, even where one of the versions serves."""
        began = time.perf_counter()
        name, known = await self._look_at(model)
        known = await self._look_at_parts(name, known)
        folder = self._loadable(name, known)  # from here on no await until it is wanted
        serving = [self._models.routes.find(name, v) for v in folder.specs]
        before = self._models.wishes.now(name)
        gens = self._models.want(name, force=force, trigger=trigger)
        try:
            await self._all_serve(folder, gens)
        except BaseException:
            if tentative:
                self._models.wishes.take_back(name, before)
            raise
        versions = tuple(gen.spec.version for gen in gens)
        source = "uploaded" if folder.override else "model_dir"
        applied = {key: (value, source) for key, value in folder.said.items()}
        took_s = time.perf_counter() - began
        already = serving == gens
        woken = not already and any(gen.woken for gen in gens)
        return LoadReport(name, versions, already, took_s, applied, woken=woken)

    async def _all_serve(self, folder: ModelFolder, gens: list[Generation]) -> None:
        """Returns once all of `gens` have served; raises why that will not be."""
        for gen in gens:
            await gen.settled.wait()
        for gen in gens:
            if gen.error is not None and gen.ready_at is None:
                raise of_generation(gen, gen.error)
        if folder.errors:
            raise of_folder(folder)  # of a version that cannot even be tried
        if not gens or any(gen.ready_at is None for gen in gens):
            self._not_draining()
            raise SupersededError(
                f"the load of '{folder.name}' was overtaken: it was unloaded, or its files changed "
                f"again"
            )

    async def unload(self, model: str, *, unload_dependents: bool = False) -> UnloadReport:
        """Stops wanting it; returns once every generation of now has ended. Idempotent.

        Of an ensemble, `unload_dependents`: also the models that were loaded only because it needs them,
        and that no other needs; the report is of all together.

        Raises ModelNotFoundError; NotKeptError where it is unloaded, and a restart may not know of it.
        """
        ends = [self._end(self._model_of(model))]
        if unload_dependents:
            ends += self._end_parts(ends[0].model)
        report = in_all([await end.over() for end in ends])
        for end in ends:
            await self._overrides.ended(end.model)
        await self._kept(f"'{report.model}' is unloaded")
        return report

    async def unload_soon(
        self, model: str, *, unload_dependents: bool = False, wait_s: float = 0.0
    ) -> None:
        """As `unload`; but whoever asks waits no longer than `wait_s` for what still runs. No request
        that comes after it finds the model."""
        unloading = asyncio.create_task(self._unload_quietly(model, unload_dependents))
        self._unloading.add(unloading)
        unloading.add_done_callback(self._unloading.discard)
        done, _ = await asyncio.wait([unloading], timeout=wait_s)
        if not done:
            return
        error = unloading.result()
        if error is not None:
            raise error

    async def _unload_quietly(self, model: str, dependents: bool) -> RepositoryError | None:
        try:
            await self.unload(model, unload_dependents=dependents)
        except RepositoryError as error:
            if not isinstance(error, NotFoundError):
                log.warning("the unload of '%s': %s", shown(model), error)
            return error
        return None

    async def unload_all(self) -> UnloadAllReport:
        """Every model. What cannot be unloaded is named in `errors`; the others go all the same. Raises
        NotKeptError as `unload`."""
        names = self.names()
        running = [n for n in names if any(not g.ended.is_set() for g in self._of(n))]
        ends: list[Ending] = []
        errors: dict[str, str] = {}
        for name in names:  # all are told before anybody is waited for
            try:
                ends.append(self._end(name))
            except Exception as error:
                log.exception("the unload of '%s' broke off; the others go on", name)
                errors[name] = text_of(error)
        reports = await asyncio.gather(*(end.over() for end in ends))
        for end in ends:
            await self._overrides.ended(end.model)
        await self._kept("all models are unloaded")
        return UnloadAllReport(tuple(r for r in reports if r.model in running), errors)

    async def purge(self, *, force: bool) -> UnloadAllReport:
        """As `unload_all`. Without `force` only where no request runs or waits: raises ConflictError,
        which says what is busy, and nothing has been unloaded. A load in flight is no request: it ends
        as superseded."""
        if not force:
            self._check_idle()  # from here no await until every model has been told
        return await self.unload_all()

    def _check_idle(self) -> None:
        busy = {name: self._busy(name) for name in self.names()}
        told = [f"{name} ({n})" for name, n in busy.items() if n]
        if told:
            more = f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
            raise ConflictError(
                f"nothing was unloaded: {sum(busy.values())} requests run or wait, of "
                f"{', '.join(told[:MOST_TOLD])}{more}; ask again when they are done, or send "
                '"force": true'
            )

    def _busy(self, name: str) -> int:
        """Requests of it that run or wait, also those whose clients have left."""
        asked = sum(max(g.leases, g.work.waiting + g.work.in_flight) for g in self._of(name))
        return asked + self._models.demand.count(name)

    async def lying(self) -> Snapshot:
        """What lies in the repository at this moment, at rest or not; nothing comes of it. What was told
        last, where it cannot be read now."""
        try:
            return await self._lookout.seen()
        except OSError:
            return self._seen

    async def dry_run(self, model: str) -> DryRun:
        """What a load would do now; it does nothing. Raises as `load` does before it starts."""
        name, known = await self._look_at(model, act=False)
        return foresee(self._models, self._loadable(name, known))

    async def _look_at(self, model: str, *, act: bool = True) -> tuple[str, ModelFolder | None]:
        """The model's own name, and its folder as it is now. `act` false: only to know of it."""
        self._not_draining()
        name = self.named(model)
        folder = await self._lookout.fresh(name, act=act)
        self._not_draining()  # the look may have taken seconds
        return name, folder

    async def _look_at_parts(self, name: str, folder: ModelFolder | None) -> ModelFolder | None:
        """At the models that an ensemble needs, too; its own folder as it is after that."""
        seen: set[str] = {name}
        while ahead := [part for part in self._models.parts(name) if part not in seen]:
            for part in ahead:
                seen.add(part)
                with suppress(RepositoryError):  # what is wrong with it is told of the ensemble
                    await self._lookout.fresh(part)
        return folder if len(seen) == 1 else self._models.folders.get(name)

    def _not_draining(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)

    def _loadable(self, name: str, folder: ModelFolder | None) -> ModelFolder:
        if folder is None:
            self._known(name)
            raise ModelNotFoundError(f"the folder of model '{name}' is gone from the repository")
        # What served before is kept as long as its successor is broken: no reason to load that anew.
        if not folder.specs or any(p.version in (None, *folder.specs) for p in folder.errors):
            raise of_folder(folder)
        return folder

    def _end_parts(self, name: str) -> list[Ending]:
        began = time.perf_counter()
        parts = self._models.spare_parts(name)
        return [
            Ending(part, going, sum(gen.reserved for gen in going), began)
            for part, going in parts.items()
        ]

    def _end(self, name: str) -> Ending:
        began = time.perf_counter()
        going = self._models.unwant(name)
        return Ending(name, going, sum(gen.reserved for gen in going), began)

    # names --------------------------------------------------------------------------------------

    def _known(self, name: str) -> ModelFolder | None:
        """Its folder; None if that is gone and something of it still runs."""
        try:
            return self._models.known(name)
        except ModelNotFoundError:
            check_name(name)
            why = self._seen.near(name) or "is there a folder of that name with a model in it?"
            raise ModelNotFoundError(f"no model '{name}' in the repository: {why}") from None

    def _model_of(self, name: str) -> str:
        model = self.named(name)
        self._known(model)
        return model

    def named(self, model: str) -> str:
        """The name of the model that is meant by a name, an alias or a path. It need not exist; a path
        outside of the repository must have become a model by a load.

        Raises InvalidNameError, OutOfBoundsError, ModelNotFoundError.
        """
        if not is_path(model):
            return self._models.routes.model(check_name(model))
        options = self.options
        name, mount = place_of(model, options.roots, options.allowed_roots)
        if mount is not None and self._lookout.by_call.mounts.get(name) != mount:
            raise ModelNotFoundError(
                f"the folder '{name}' of an allowed root is no model yet; load it by its path first"
            )
        return name

    def default(self) -> str:
        """The model that is meant where none is named. Raises InvalidRequestError."""
        if self.options.default_model is not None:
            return self.named(self.options.default_model)
        names = self.names()
        if len(names) == 1:
            return names[0]
        more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
        there = f"there are {', '.join(names[:MOST_TOLD])}{more}" if names else "there is none yet"
        raise InvalidRequestError(
            f"no model is named, and {there}; name one, or start the server with --default-model"
        )
