"""A whole scan of the repository: every folder, every stamp, and only what changed is looked into.

Synchronous, for a thread. An unchanged model costs its listing and stats: configs, headers and
fingerprints are remembered by the stamps of the files. Remembered folders are the same objects, so
that comparing two snapshots of an unchanged repository is comparing pointers.
"""

from __future__ import annotations

import errno
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
from repository.folder.layout import Found, Layout
from repository.folder.mounts import ByCall, Mount
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

    root        as given: it may be a link that is moved, so it is followed anew each time
    gpus        this machine's ("cuda:0", ...); None: not known, so no config is refused for it
    by_call     what people said of single models; each scan goes by what it is when it begins
    """

    def __init__(
        self,
        root: Path,
        *,
        trust_code: bool,
        gpus: Sequence[str] | None = (),
        by_call: ByCall | None = None,
    ) -> None:
        self.root = root
        self.by_call = by_call or ByCall()
        self._rules = Rules(trust_code, None if gpus is None else tuple(gpus))
        self._known: dict[str, _Known] = {}
        self._last: dict[str, ModelFolder] = {}
        self._adapters = AdapterFolders()
        self._device: int | None = None  # the file system that the models lay on
        self._one_at_a_time = threading.Lock()

    def scan(self, now: float | None = None) -> Snapshot:
        """The whole repository. `now` in seconds since 1970.

        Raises OSError if the repository's folder cannot be listed, or is only the place where it was
        mounted; never for what lies in it.
        """
        with self._one_at_a_time:
            now = time.time() if now is None else now
            by_call = self.by_call
            layout = Layout(os.fspath(self.root))
            models = {
                f.name: self._remembered(f, layout.root, now, by_call.overrides.get(f.name))
                for f in layout.models()
            }
            self._check_mount(layout.root, bool(models))
            for name, mount in by_call.mounts.items():
                folder = self._mounted(mount, models, layout.notes, now, by_call)
                if folder is not None:
                    models[name] = folder
            self._known = {n: k for n, k in self._known.items() if n in models}
            self._adapters.keep(models)
            self._last = settle_aliases(models)
            problems = tuple(sorted(dict.fromkeys(layout.notes), key=lambda p: p.where))
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
            layout = Layout(os.fspath(self.root))
            found = layout.model(name)
            if found is None and name in by_call.mounts:
                layout = Layout(by_call.mounts[name].root)
                found = layout.model(name)
            if found is None:
                return None
            folder = self._remembered(found, layout.root, now, by_call.overrides.get(name))
            return settle_aliases({**self._last, name: folder})[name]

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

    def _check_mount(self, root: str, full: bool) -> None:
        """An unmounted repository looks like an empty one, but lies on another file system."""
        device = os.stat(root).st_dev
        if not full and self._device not in (None, device):
            raise OSError(errno.ENODEV, "it is empty and on another file system than it was")
        if full:
            self._device = device

    def _remembered(
        self, found: Found, root: str, now: float, override: Said | None
    ) -> ModelFolder:
        known = self._known.get(found.name)
        adapters = self._adapters.look(found.name, found.adapters, root, now)
        # Adapters are no part of the model, but it needs room for those that it has.
        same = known is not None and known.folder.adapters is adapters
        layers = known.layers if known is not None and same else adapter_layers(adapters)
        said = override.digest if override else ""
        key = (found.folder, found.shared, found.versions, found.paths, found.notes, layers, said)
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
        override: Said | None,
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


def _wants_adapters(folder: ModelFolder) -> bool:
    """Unless its config says otherwise; one that is broken says nothing."""
    specs = folder.specs.values()
    return not specs or any(spec.config.adapters.enabled for spec in specs)
