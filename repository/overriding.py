"""What people say of a model by call over what its folder says: its config, and where it lies.

A change is part of a load: it is in force while the load runs, and stays only if the load succeeds.
Before anything changes it is tried: what is wrong with it is found by a look at the folder as it would
be. Once it is in force its versions have other fingerprints, so a new generation loads beside the old
one, as if the files had changed. If that fails, what was said before is in force again, and the old
generation is again what is wanted: nothing is loaded for it.

One sort of override at a time, and the last one said wins: a config that stands over the folder's
(`Said`), or one that stands in place of it, with files of its own or without (`Instead`).

Changes to one model take turns; a caller that leaves does not leave half a change behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from repository.bringing import (
    Bringing,
    Change,
    Undo,
    Unsaid,
    check_loadable,
    check_request,
    gone,
    root,
    roots,
    same,
)
from repository.brought import BroughtFiles
from repository.errors import (
    ConfigError,
    ConflictError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
)
from repository.folder.aphrodite import REQUEST, Said, read_request
from repository.folder.instead import Instead, recalled
from repository.folder.mounts import ByCall, Mount, check_links, is_path, place_of
from repository.lookout import Lookout
from repository.names import check_name, shown
from repository.reconciler import Reconciler
from repository.reports import Brought, Options
from repository.snapshot import ModelFolder

T = TypeVar("T")

log = logging.getLogger("modeldepot.folder")

LOOKS = 5  # at a folder whose files change between two of them


class Overrides(Bringing):
    def __init__(
        self, options: Options, models: Reconciler, lookout: Lookout, files: BroughtFiles
    ) -> None:
        super().__init__(models, lookout, files)
        self._options = options

    async def recall(
        self,
        overrides: Mapping[str, Mapping[str, Any]],
        mounts: Mapping[str, str],
        words: Mapping[str, str],
    ) -> None:
        """What was said before the start, before the first look. What is no longer understood or allowed
        is left out, and told; files that were brought for a model that was unloaded are too."""
        found = await asyncio.to_thread(self._recalled, overrides, mounts)
        for name in [n for n in found.overrides if found.brought(n) and words.get(n) == "unload"]:
            found = found.overridden(name, None)
        self._lookout.say(found)
        self._files.doom(await asyncio.to_thread(self._files.listed), roots(found))
        await asyncio.to_thread(self._files.sweep)

    def _recalled(
        self, overrides: Mapping[str, Mapping[str, Any]], mounts: Mapping[str, str]
    ) -> ByCall:
        said: dict[str, Said | Instead] = {}
        for name, values in overrides.items():
            try:
                said[name] = recalled(values, name, self._files.home) or read_request(values)
            except ConfigError as error:
                log.warning("the config that a load of '%s' brought is left out: %s", name, error)
        found: dict[str, Mount] = {}
        for name, path in mounts.items():
            try:
                mount = place_of(path, self._options.roots, self._options.allowed_roots).mount
            except RepositoryError as error:
                log.warning("'%s', from an allowed root, is left out: %s", name, error)
            else:
                if mount is not None:
                    found[name] = mount
        return ByCall(MappingProxyType(said), MappingProxyType(found))

    def elsewhere(self, model: str) -> Path | None:
        """The folder of a model, wherever it lies."""
        by_call = self._lookout.by_call
        mount = by_call.brought(model) or by_call.mounts.get(model)
        return self._lookout.home(model) if mount is None else Path(mount.path)

    async def change(
        self, model: str, config: Mapping[str, Any] | Brought | Unsaid | None
    ) -> Change:
        """What a load of `model` (a name, an alias, a path) under `config` would change.

        Raises InvalidNameError, OutOfBoundsError, InvalidRequestError, ConfigError.
        """
        if isinstance(config, Brought):
            return self.bring(self._models.routes.model(check_name(model)), config)
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
        place = place_of(model, options.roots, options.allowed_roots)
        await asyncio.to_thread(check_links, place, options.roots)
        return place.name, None if self._is_mounted(place.mount) else place.mount

    def _is_mounted(self, mount: Mount | None) -> bool:
        return mount is not None and self._lookout.by_call.mounts.get(mount.name) == mount

    async def carry_out(self, change: Change, load: Callable[[], Awaitable[T]]) -> T:
        """Its turn, `load` under it, and the notes. Whatever raises leaves things as they were."""

        async def turn() -> T:
            before = root(self._lookout.by_call.overrides.get(change.name))
            if before:  # it may have to come back
                self._files.hold(os.path.basename(before))
            try:
                now = await self._seen(change)
            except BaseException:
                self._let_go(change, before)
                raise
            try:
                undo = await self._begin(now)
                try:
                    report = await load()
                    self._check_in_force(now)
                except BaseException:
                    await undo()
                    raise
                self._note(now)  # also what was in force: it may have been left out at the start
            finally:
                self._let_go(now, before)
            return report

        return await self._turns.take(change.name, turn)

    def _note(self, change: Change) -> None:
        if self.remembers is None:
            return
        if change.mount is not None:
            self.remembers.mount(change.name, change.mount.path)
        if isinstance(change.said, Unsaid):
            return
        said = self._lookout.by_call.overrides.get(change.name)
        if isinstance(said, Instead):
            self.remembers.override(change.name, said.written())
        else:
            self.remembers.override(change.name, None if said is None else said.written.values)

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
        check_request(folder)
        lookout.say(by_call)

        async def undo() -> None:
            by_call = lookout.by_call.mounted(name, before[0]).overridden(name, before[1])
            lookout.put(name, None, by_call)

        return undo

    # a config by request --------------------------------------------------------------------------

    async def _override(self, name: str, said: Said | Instead | None) -> Undo:
        lookout = self._lookout
        before = lookout.by_call.overrides.get(name)
        if root(before) != root(said):
            return await self._swap(name, said)
        if before is said or (isinstance(said, Said) and same(before, said)):
            return _nothing
        folder, tried, said = await self._try(name, said)
        if same(before, said):
            return _nothing
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

    async def _try(
        self, name: str, said: Said | Instead | None
    ) -> tuple[ModelFolder, ModelFolder, Said | Instead | None]:
        """The folder as it is, and as it would be; of the same files, told and at rest; and what is said
        of these files. Nothing has been awaited since that was so. Raises what is wrong with it."""
        for _ in range(LOOKS):
            fresh = await self._lookout.fresh(name)
            if fresh is None:
                self._models.known(name)
                raise gone(name)
            if isinstance(said, Instead):
                said = said.of_files(fresh.fingerprint)
            by_call = self._lookout.by_call.overridden(name, said)
            tried = await self._lookout.tried(name, by_call)
            told = self._lookout.told(name)
            if tried is not None and told is not None and tried.fingerprint == told.fingerprint:
                check_loadable(tried)
                return told, tried, said
        raise ModelNotReadyError(
            f"the files of '{name}' are still being written; ask again when they are done",
            retry_after_s=1.0,
        )


async def _nothing() -> None:
    pass
