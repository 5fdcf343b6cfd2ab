"""What people say of a model by call over what its folder says: its config, and where it lies.

A change is part of a load: it is in force while the load runs, and stays only if the load succeeds.
Before anything changes it is tried: what is wrong with it is found by a look at the folder as it would
be. Once it is in force its versions have other fingerprints, so a new generation loads beside the old
one, as if the files had changed. If that fails, what was said before is in force again, and the old
generation is again what is wanted: nothing is loaded for it.

Changes to one model take turns; a caller that leaves does not leave half a change behind.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar

from repository.backends.registry import check_options
from repository.errors import (
    ConfigError,
    ConflictError,
    LoadFailedError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
)
from repository.folder.aphrodite import REQUEST, Said, read_request
from repository.folder.mounts import ByCall, Mount, check_links, is_path, place_of
from repository.lifecycle.refusals import of_folder
from repository.lookout import Lookout
from repository.names import check_name, shown
from repository.reconciler import Reconciler
from repository.reports import Options
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec
from repository.turns import Turns

T = TypeVar("T")
Undo = Callable[[], Awaitable[None]]

log = logging.getLogger("modeldepot.folder")

LOOKS = 5  # at a folder whose files change between two of them


class Unsaid(enum.Enum):
    UNSAID = enum.auto()


UNSAID: Final = Unsaid.UNSAID


class Remembers(Protocol):
    """Where it is written down (`repository.journal`)."""

    def override(self, model: str, values: Mapping[str, Any] | None) -> None: ...

    def mount(self, model: str, path: str | None) -> None: ...


@dataclass(frozen=True)
class Change:
    """`said`: the config that is to be in force, None: the folder's own; UNSAID: as it is. `mount`:
    where the model lies, if that is to become known."""

    name: str
    said: Said | Unsaid | None = UNSAID
    mount: Mount | None = None

    @property
    def is_none(self) -> bool:
        return self.said is UNSAID and self.mount is None


class Overrides:
    """`remembers`: None while nothing is kept."""

    def __init__(self, options: Options, models: Reconciler, lookout: Lookout) -> None:
        self.remembers: Remembers | None = None
        self._options = options
        self._models = models
        self._lookout = lookout
        self._turns = Turns()

    async def recall(
        self, overrides: Mapping[str, Mapping[str, Any]], mounts: Mapping[str, str]
    ) -> None:
        """What was said before the start, before the first look. What is no longer understood or allowed
        is left out, and told."""
        self._lookout.say(await asyncio.to_thread(self._recalled, overrides, mounts))

    def _recalled(
        self, overrides: Mapping[str, Mapping[str, Any]], mounts: Mapping[str, str]
    ) -> ByCall:
        said: dict[str, Said] = {}
        for name, values in overrides.items():
            try:
                said[name] = read_request(values)
            except ConfigError as error:
                log.warning("the config that a load of '%s' brought is left out: %s", name, error)
        found: dict[str, Mount] = {}
        for name, path in mounts.items():
            try:
                mount = place_of(path, self._options.root, self._options.allowed_roots).mount
            except RepositoryError as error:
                log.warning("'%s', from an allowed root, is left out: %s", name, error)
            else:
                if mount is not None:
                    found[name] = mount
        return ByCall(MappingProxyType(said), MappingProxyType(found))

    def elsewhere(self, model: str) -> Path | None:
        """The folder of a model that lies outside of the repository."""
        mount = self._lookout.by_call.mounts.get(model)
        return None if mount is None else Path(mount.path)

    async def over(self) -> None:
        """Returns when no change is under way."""
        await self._turns.over()

    async def change(self, model: str, config: Mapping[str, Any] | Unsaid | None) -> Change:
        """What a load of `model` (a name, an alias, a path) under `config` would change.

        Raises InvalidNameError, OutOfBoundsError, InvalidRequestError, ConfigError.
        """
        said = read_request(config) if isinstance(config, Mapping) else config
        name, mount = await self._place(model)
        if isinstance(said, Said) and said.names:
            meant, _ = await self._place(said.names)
            if meant != name:
                raise ConfigError(
                    f"'model' names '{shown(said.names)}', but the load is of '{name}'",
                    where=REQUEST,
                    hint="name one model",
                )
        return Change(name, said, mount)

    async def _place(self, model: str) -> tuple[str, Mount | None]:
        if not is_path(model):
            return self._models.routes.model(check_name(model)), None
        options = self._options
        place = place_of(model, options.root, options.allowed_roots)
        await asyncio.to_thread(check_links, place, options.root)
        return place.name, None if self._is_mounted(place.mount) else place.mount

    def _is_mounted(self, mount: Mount | None) -> bool:
        return mount is not None and self._lookout.by_call.mounts.get(mount.name) == mount

    async def carry_out(self, change: Change, load: Callable[[], Awaitable[T]]) -> T:
        """Its turn, `load` under it, and the notes. Whatever raises leaves things as they were."""

        async def turn() -> T:
            undo = await self._begin(change)
            try:
                report = await load()
            except BaseException:
                await undo()
                raise
            self._note(change)  # also what was in force: it may have been left out at the start
            return report

        return await self._turns.take(change.name, turn)

    def _note(self, change: Change) -> None:
        if self.remembers is None:
            return
        if change.mount is not None:
            self.remembers.mount(change.name, change.mount.path)
        if isinstance(change.said, Said):
            self.remembers.override(change.name, change.said.written.values)
        elif change.said is None:
            self.remembers.override(change.name, None)

    async def _begin(self, change: Change) -> Undo:
        if change.mount is not None and not self._is_mounted(change.mount):
            return await self._mount(change, change.mount)
        if isinstance(change.said, Unsaid):
            return _nothing
        return await self._override(change.name, change.said)

    # a folder from elsewhere ----------------------------------------------------------------------

    async def _mount(self, change: Change, mount: Mount) -> Undo:
        """The load looks at it and waits until its files are at rest, as for any that was dropped."""
        name, lookout = change.name, self._lookout
        before = lookout.by_call.mounts.get(name), lookout.by_call.overrides.get(name)
        if await lookout.tried(name, ByCall()) is not None or name in self._models.folders:
            raise ConflictError(
                f"there is a model '{name}' already, from another folder; rename one of the folders"
            )
        by_call = lookout.by_call.mounted(name, mount)
        if not isinstance(change.said, Unsaid):
            by_call = by_call.overridden(name, change.said)
        folder = await lookout.tried(name, by_call)
        if folder is None:
            raise ModelNotFoundError(
                f"there is no model in the folder '{name}' of the allowed root"
            )
        _check_request(folder)
        lookout.say(by_call)

        async def undo() -> None:
            by_call = lookout.by_call.mounted(name, before[0]).overridden(name, before[1])
            lookout.put(name, None, by_call)

        return undo

    # a config by request --------------------------------------------------------------------------

    async def _override(self, name: str, said: Said | None) -> Undo:
        lookout = self._lookout
        before = lookout.by_call.overrides.get(name)
        if before is said or (before and said and before.digest == said.digest):
            return _nothing
        folder, tried = await self._try(name, said)
        by_call = lookout.by_call.overridden(name, said)
        lookout.put(name, replace(tried, adapters=folder.adapters), by_call)

        async def undo() -> None:
            by_call = lookout.by_call.overridden(name, before)
            told = lookout.told(name)
            if told is not None and told.fingerprint == folder.fingerprint:
                lookout.put(name, replace(folder, adapters=told.adapters), by_call)
                return
            lookout.say(by_call)  # the files have changed too: they are looked at anew
            with suppress(RepositoryError, RuntimeError):
                await lookout.fresh(name)

        return undo

    async def _try(self, name: str, said: Said | None) -> tuple[ModelFolder, ModelFolder]:
        """The folder as it is, and as it would be; of the same files, told and at rest. Nothing has been
        awaited since that was so. Raises what is wrong with it."""
        for _ in range(LOOKS):
            if await self._lookout.fresh(name) is None:
                self._models.known(name)
                raise ModelNotFoundError(
                    f"the folder of model '{name}' is gone from the repository"
                )
            by_call = self._lookout.by_call.overridden(name, said)
            tried = await self._lookout.tried(name, by_call)
            told = self._lookout.told(name)
            if tried is not None and told is not None and tried.fingerprint == told.fingerprint:
                _check_request(tried)
                if not tried.specs or any(p.version in (None, *tried.specs) for p in tried.errors):
                    raise of_folder(tried)
                return told, tried
        raise ModelNotReadyError(
            f"the files of '{name}' are still being written; ask again when they are done",
            retry_after_s=1.0,
        )


def _check_request(folder: ModelFolder) -> None:
    """Raises what is wrong with the request, and not with the folder: ConfigError, ConflictError for
    a second name that another model has."""
    for problem in folder.problems:
        if problem.rule == REQUEST:
            raise ConfigError(problem.message, where=REQUEST, hint=problem.hint)
        if problem.rule == "alias" and problem.where == f"{folder.name}/{REQUEST}":
            raise ConflictError(f"{REQUEST}: {problem.message}; {problem.hint}")
    for spec in folder.specs.values():
        try:
            check_options(spec.backend, _requested(spec))
        except LoadFailedError as error:
            raise ConfigError(str(error), where=REQUEST) from error


def _requested(spec: ModelSpec) -> dict[str, Any]:
    """Those of its backend's options that the request said."""
    said = {
        key.split(".")[1]
        for key, source in spec.sources.items()
        if source == REQUEST and key.startswith("options.")
    }
    return {key: value for key, value in spec.config.options.items() if key in said}


async def _nothing() -> None:
    pass
