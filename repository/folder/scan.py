"""A whole scan of the repository: every folder, every stamp, and only what changed is looked into.

Synchronous, for a thread. An unchanged model costs its listing and stats: configs, headers and
fingerprints are remembered by the stamps of the files. Remembered folders are the same objects, so
that comparing two snapshots of an unchanged repository is comparing pointers.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from repository.folder.adapters import NOTHING, AdapterFolders
from repository.folder.aliases import settle_aliases
from repository.folder.aphrodite import Said
from repository.folder.assemble import Rules, assemble
from repository.folder.estimate import adapter_layers
from repository.folder.instead import Instead
from repository.folder.layout import Found, Layout
from repository.folder.mounts import ByCall, Mount
from repository.folder.roots import Lying, Roots, twice
from repository.folder.whole import Verdict, inspect
from repository.snapshot import ModelFolder, Problem, Snapshot
from repository.spec import FileStamp

# File systems tell time in ticks. A stamp this much ahead is not the future, and a file that changed
# this short ago may change again without its stamp showing it: it is looked into once more.
TICK_S = 0.1


@dataclass(slots=True)
class _Known:
    """What the last look at a model found, and of which files."""

    key: object
    folder: ModelFolder
    verdicts: dict[int, tuple[tuple[FileStamp, ...], dict[str, Verdict]]]
    layers: Mapping[str, int]  # that the model's adapters change


class Scanner:
    """Scans one repository again and again. Callable from several threads; one call at a time runs.

    root        of several folders that are one repository: all of them
    gpus        this machine's ("cuda:0", ...); None: not known, so no config is refused for it
    by_call     what people said of single models; each scan goes by what it is when it begins
    config_name, completes, caches   see `Rules`
    """

    def __init__(
        self,
        root: Path | Sequence[Path],
        *,
        trust_code: bool,
        gpus: Sequence[str] | None = (),
        by_call: ByCall | None = None,
        config_name: str = "",
        completes: bool = True,
        caches: bool = False,
    ) -> None:
        self.roots = Roots((root,) if isinstance(root, Path) else root)
        self.by_call = by_call or ByCall()
        known = None if gpus is None else tuple(gpus)
        self._rules = Rules(trust_code, known, config_name, completes, caches)
        self._known: dict[str, _Known] = {}
        self._last: dict[str, ModelFolder] = {}
        self._adapters = AdapterFolders()
        self._one_at_a_time = threading.Lock()

    def scan(self, now: float | None = None) -> Snapshot:
        """The whole repository. `now` in seconds since 1970.

        Raises OSError if the repository's folder cannot be listed, or is only the place where it was
        mounted; never for what lies in it.
        """
        with self._one_at_a_time:
            now = time.time() if now is None else now
            by_call = self.by_call
            sight = self.roots.look()
            models: dict[str, ModelFolder] = {}
            for name in sight.models.keys() | _brought(by_call):
                folder = self._lying(name, sight.models.get(name, ()), now, by_call)
                if folder is not None:
                    models[name] = folder
            for name, mount in by_call.mounts.items():
                folder = self._mounted(mount, models, sight.notes, now, by_call)
                if folder is not None:
                    models[name] = folder
            self._known = {n: k for n, k in self._known.items() if n in models}
            self._adapters.keep(models)
            self._last = settle_aliases(models)
            problems = tuple(sorted(dict.fromkeys(sight.notes), key=lambda p: p.where))
            return Snapshot(MappingProxyType(dict(sorted(self._last.items()))), problems)

    def scan_model(
        self, name: str, now: float | None = None, by_call: ByCall | None = None
    ) -> ModelFolder | None:
        """Only this model, as it lies there now; None if there is none of that name. `by_call`: as it
        would be if that had been said.

        Its aliases are judged against the last whole scan. Raises InvalidNameError.
        """
        with self._one_at_a_time:
            now = time.time() if now is None else now
            by_call = self.by_call if by_call is None else by_call
            folder = self._lying(name, self.roots.find(name), now, by_call)
            if folder is None and name in by_call.mounts:
                layout = Layout(by_call.mounts[name].root)
                found = layout.model(name)
                if found is not None:
                    override = by_call.overrides.get(name)
                    folder = self._remembered(found, layout.root, now, override)
            return None if folder is None else settle_aliases({**self._last, name: folder})[name]

    def _lying(
        self, name: str, there: Sequence[Lying], now: float, by_call: ByCall
    ) -> ModelFolder | None:
        """What a load brought stands in place of what lies in the repository."""
        brought = by_call.brought(name)
        if brought is not None:
            layout = Layout(brought.root)
            found = layout.model(name)
            there = [] if found is None else [Lying(found, layout.root)]
        if len(there) > 1:
            self._known.pop(name, None)
            known = self._last.get(name)
            seen = twice(name, there)
            return known if known is not None and known == seen else seen
        override = by_call.overrides.get(name)
        return self._remembered(*there[0], now, override) if there else None

    def _mounted(
        self,
        mount: Mount,
        models: Mapping[str, ModelFolder],
        notes: list[Problem],
        now: float,
        by_call: ByCall,
    ) -> ModelFolder | None:
        """What the repository holds itself goes first; a root that cannot be seen now hides what is
        mounted from it, and takes nothing away."""
        if mount.name in models:
            message = "a folder from an allowed root has the same name, and is not served"
            notes.append(Problem(mount.name, "mount", message, "rename one of them", None, True))
            return None
        if not os.path.isdir(mount.root):
            message = "the allowed root that it lies in cannot be seen now"
            notes.append(Problem(mount.name, "io", message, "is it mounted?"))
            return None
        layout = Layout(mount.root)
        found = layout.model(mount.name)
        if found is None:
            notes += layout.notes
            return None
        override = by_call.overrides.get(mount.name)
        return self._remembered(found, layout.root, now, override)

    def _remembered(
        self, found: Found, root: str, now: float, override: Said | Instead | None
    ) -> ModelFolder:
        known = self._known.get(found.name)
        adapters = self._adapters.look(found.name, found.adapters, root, now)
        # Adapters are no part of the model, but it needs room for those that it has.
        same = known is not None and known.folder.adapters is adapters
        layers = known.layers if known is not None and same else adapter_layers(adapters)
        over = override.over if isinstance(override, Instead) else ""  # the files that it holds for
        said = (override.digest, over) if override else ()
        empty = tuple(found.empty)
        key = (
            found.folder,
            found.shared,
            found.versions,
            found.paths,
            found.notes,
            layers,
            said,
            empty,
        )
        if known is None or known.key != key:
            known = self._look_into(found, root, key, known, layers, override)
            self._known[found.name] = known
        known.layers = layers
        newest = found.newest_ctime_ns / 1e9
        if newest > now - TICK_S:
            known.key, known.verdicts = None, {}
        newest = math.inf if newest > now + TICK_S else newest
        if known.folder.newest_ctime != newest:
            known.folder = replace(known.folder, newest_ctime=newest)
        if adapters and not _wants_adapters(known.folder):
            adapters = NOTHING
        if known.folder.adapters is not adapters and (adapters or known.folder.adapters):
            known.folder = replace(known.folder, adapters=adapters)
        return known.folder

    def _look_into(
        self,
        found: Found,
        root: str,
        key: object,
        known: _Known | None,
        layers: Mapping[str, int],
        override: Said | Instead | None,
    ) -> _Known:
        verdicts: dict[int, tuple[tuple[FileStamp, ...], dict[str, Verdict]]] = {}
        for version, stamps in found.versions.items():
            old = known.verdicts.get(version) if known else None
            verdicts[version] = old if old and old[0] == stamps else (stamps, {})

        def judged(path: str, where: str, version: int) -> Verdict:
            made = verdicts[version][1]
            if path not in made:
                made[path] = inspect(path, root, where, version)
            return made[path]

        folder = assemble(found, Path(root), self._rules, judged, layers, override)
        return _Known(key, folder, verdicts, layers)


def _brought(by_call: ByCall) -> set[str]:
    return {name for name in by_call.overrides if by_call.brought(name) is not None}


def _wants_adapters(folder: ModelFolder) -> bool:
    """Unless its config says otherwise; one that is broken says nothing."""
    specs = folder.specs.values()
    return not specs or any(spec.config.adapters.enabled for spec in specs)
