"""Files that a load brings in place of a model's folder: how they come into force, and go again.

The part of `overriding` that is Triton's. What stands in place of a folder is said by call like any
other override; what it refers to lies in the state folder (`brought`), is there before it is said, and
goes when nothing of it runs any more.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from repository.backends.registry import check_options
from repository.brought import BroughtFiles
from repository.errors import (
    ConfigError,
    ConflictError,
    LoadFailedError,
    ModelNotFoundError,
    ModelNotReadyError,
    SupersededError,
)
from repository.folder.aphrodite import REQUEST, Said
from repository.folder.instead import Instead, read_instead
from repository.folder.mounts import ByCall, Mount
from repository.lifecycle.refusals import of_folder
from repository.lookout import Lookout
from repository.reconciler import Reconciler
from repository.reports import Brought
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec
from repository.turns import Turns

Undo = Callable[[], Awaitable[None]]


class Unsaid(enum.Enum):
    UNSAID = enum.auto()


UNSAID: Final = Unsaid.UNSAID


class Remembers(Protocol):
    """Where it is written down (`repository.journal`)."""

    def override(self, model: str, values: Mapping[str, Any] | None) -> None: ...

    def mount(self, model: str, path: str | None) -> None: ...


@dataclass(frozen=True)
class Change:
    """`said`: the config that is to be in force, None: the folder's own; UNSAID: as it is, or
    what is `brought` comes to. `mount`: where the model lies, if that is to become known."""

    name: str
    said: Said | Instead | Unsaid | None = UNSAID
    mount: Mount | None = None
    brought: Brought | None = None

    @property
    def is_none(self) -> bool:
        return self.said is UNSAID and self.mount is None and self.brought is None


class Bringing:
    """`remembers`: None while nothing is kept."""

    def __init__(self, models: Reconciler, lookout: Lookout, files: BroughtFiles) -> None:
        self.remembers: Remembers | None = None
        self._models = models
        self._lookout = lookout
        self._files = files
        self._turns = Turns()
        self._sweeps: set[asyncio.Task[None]] = set()

    async def over(self) -> None:
        """Returns when no change is under way."""
        await self._turns.over()
        if self._sweeps:
            await asyncio.wait(self._sweeps)

    def bring(self, name: str, brought: Brought) -> Change:
        """What it comes to is seen in its turn: one before it may change that."""
        plain = brought.config is None and not brought.files
        said = self._lookout.by_call.overrides.get(name)
        if plain and not isinstance(said, Instead) and not self._turns.busy(name):
            return Change(name)
        return Change(name, brought=brought)

    async def _seen(self, change: Change) -> Change:
        """With what it brings on the disk. Raises ConfigError, InvalidRequestError, NoDiskError."""
        name, brought = change.name, change.brought
        if brought is None:
            return change
        if brought.config is None:
            if brought.files:
                raise ConfigError("files need a config that they are loaded under", where=REQUEST)
            return replace(change, said=self._plain(name))
        said = await asyncio.to_thread(read_instead, brought.config, name)
        if brought.files:
            store = self._files
            home = store.hold(await asyncio.to_thread(store.digest, name, brought.files))
            try:
                await asyncio.to_thread(store.put, home, name, brought.files)
            except BaseException:
                store.let_go(home)
                raise
            said = replace(said, root=home)
        return replace(change, said=said)

    def _plain(self, name: str) -> Unsaid | None:
        """What a load that brings nothing changes: files that were brought are gone, and a config
        that was said over other files."""
        said, told = self._lookout.by_call.overrides.get(name), self._lookout.told(name)
        if not isinstance(said, Instead):
            return UNSAID
        stale = told is not None and told.override != said.digest
        return None if said.root or stale else UNSAID

    async def _swap(self, name: str, said: Said | Instead | None) -> Undo:
        """Other files: those that a load brings, which are at rest; or the repository's again, at which
        the load looks and waits until they are."""
        lookout = self._lookout
        before, folder = lookout.by_call.overrides.get(name), lookout.told(name)
        if isinstance(said, Instead) and not said.root:
            bare = await lookout.tried(name, lookout.by_call.overridden(name, None))
            said = said.of_files(bare.fingerprint if bare else "")
        tried = await lookout.tried(name, lookout.by_call.overridden(name, said))
        if tried is None and root(said):
            raise ConfigError(
                "the files hold no model",
                where=REQUEST,
                hint="bring them under their places in the model's folder, as 1/model.onnx",
            )
        if tried is None:
            raise gone(name)
        check_loadable(tried)
        by_call = lookout.by_call.overridden(name, said)
        if root(said):
            lookout.put(name, tried, by_call)
        else:
            lookout.say(by_call)

        async def undo() -> None:
            lookout.put(name, folder, lookout.by_call.overridden(name, before))

        return undo

    def _check_in_force(self, change: Change) -> None:
        """Its files may have changed while it loaded, and the config is not for those."""
        told = self._lookout.told(change.name)
        if isinstance(change.said, Instead) and (
            told is None or told.override != change.said.digest
        ):
            raise SupersededError(
                f"the load of '{change.name}' was overtaken: its files changed, and the config that "
                "was brought does not hold for them; load it again"
            )

    def _let_go(self, change: Change, before: str) -> None:
        if before:
            self._files.let_go(before)
        if not isinstance(change.said, Unsaid) and (brought := root(change.said)):
            self._files.let_go(brought)
        self._sweep()

    async def ended(self, name: str) -> None:
        """It was unloaded, and all of it has ended: files that were brought for it go."""
        if self._lookout.by_call.brought(name) is None:
            return

        async def turn() -> None:
            lookout = self._lookout
            tried = await lookout.tried(name, lookout.by_call.overridden(name, None))
            if lookout.by_call.brought(name) is None or self._models.wishes.wants(name):
                return
            lookout.put(name, tried, lookout.by_call.overridden(name, None))
            if self.remembers is not None:
                self.remembers.override(name, None)
            self._sweep()

        with suppress(ModelNotReadyError):  # the repository cannot be read: another time
            await self._turns.take(name, turn)

    def _sweep(self) -> None:
        if not self._files.used:
            return
        task = asyncio.create_task(self._swept(), name="sweep of brought files")
        self._sweeps.add(task)
        task.add_done_callback(self._sweeps.discard)

    async def _swept(self) -> None:
        """Once nothing runs of what is not meant any more."""
        root_of, wanted = self._files.root_of, roots(self._lookout.by_call)
        gens = [gen for of in self._models.generations.values() for gen in of]
        for gen in gens:
            if (home := root_of(str(gen.spec.folder))) and home not in wanted:
                await gen.ended.wait()
        listed = await asyncio.to_thread(self._files.listed)
        running = [gen for of in self._models.generations.values() for gen in of]
        alive = {root_of(str(gen.spec.folder)) for gen in running if not gen.ended.is_set()}
        self._files.doom(listed, roots(self._lookout.by_call) | alive)
        await asyncio.to_thread(self._files.sweep)


def root(said: Said | Instead | None) -> str:
    """Of the files that stand in place of the repository's."""
    return said.root if isinstance(said, Instead) else ""


def same(one: Said | Instead | None, other: Said | Instead | None) -> bool:
    if isinstance(one, Said) and isinstance(other, Said):
        return one.digest == other.digest
    if isinstance(one, Instead) and isinstance(other, Instead):
        return (one.digest, one.over) == (other.digest, other.over)
    return False


def roots(by_call: ByCall) -> set[str]:
    return {root(said) for said in by_call.overrides.values()} - {""}


def gone(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"the folder of model '{name}' is gone from the repository")


def check_loadable(folder: ModelFolder) -> None:
    check_request(folder)
    if not folder.specs or any(p.version in (None, *folder.specs) for p in folder.errors):
        raise of_folder(folder)


def check_request(folder: ModelFolder) -> None:
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
