"""The folders in `<model>/adapters/`: which are there, and what their headers say.

    adapters/
      french/                       the adapter "french"
        adapter_config.json         the only two files that are read, as PEFT writes them
        adapter_model.safetensors

Rules: an adapter that cannot be used is a source with a problem, never an exception, and concerns
neither the model nor its neighbours; links are followed only while they stay inside; a pickle is never
opened. What has not changed costs its stats, whatever its files hold.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from repository.adapters.orders import AdapterFile
from repository.adapters.peft import CONFIG, WEIGHTS, read_facts
from repository.adapters.sources import AdapterFacts, AdapterSource
from repository.errors import AdapterRefusedError, IncompleteFilesError, InvalidNameError
from repository.folder.opening import open_inside
from repository.folder.stamps import fingerprint, stamp
from repository.folder.walk import ignored
from repository.folder.whole import TensorHead, read_header
from repository.names import check_adapter_name, inside, shown
from repository.spec import FileStamp

log = logging.getLogger("modeldepot.folder")

PICKLE = "adapter_model.bin"
MAX_CONFIG = 1 << 20  # bytes
TICK_S = 0.1  # as in `folder.scan`
NOTHING: Mapping[str, AdapterSource] = MappingProxyType({})

Read = Callable[[bytes, Mapping[str, TensorHead]], AdapterFacts]


class _Flaw(Exception):  # noqa: N818 - a signal, not an error
    pass


class _Look(NamedTuple):
    """What stats say of an adapter. Two looks with equal `key` see the same adapter."""

    path: str
    stamps: tuple[FileStamp, ...]
    flaw: str  # why nothing of it may be opened
    newest_ctime_ns: int

    @property
    def key(self) -> object:
        return self.path, self.flaw, [(s.path, s.size, s.mtime_ns, s.inode) for s in self.stamps]


@dataclass(slots=True)
class _Known:
    key: object
    source: AdapterSource


class AdapterFolders:
    """Looks at models' adapters again and again. Not for several threads at once.

    What is remembered is the same object, also the whole mapping where nothing in it changed.
    """

    def __init__(self, read: Read = read_facts) -> None:
        self._read = read
        self._known: dict[str, dict[str, _Known]] = {}
        self._last: dict[str, Mapping[str, AdapterSource]] = {}

    def look(self, model: str, path: str, root: str, now: float) -> Mapping[str, AdapterSource]:
        """The adapters of one model by name. `path`: of its folder adapters/, real and inside
        `root`, "" where there is none. `now` in seconds since 1970.

        A folder that cannot be listed is as it was: nobody may take it for removed.
        """
        last = self._last.get(model, NOTHING)
        try:
            entries = _entries(path)
        except OSError as error:
            log.warning("%s/adapters cannot be read: %s", model, error.strerror or error)
            return last
        if not entries:
            self._last.pop(model, None)
            self._known.pop(model, None)
            return NOTHING
        before = self._known.get(model, {})
        known = {  # by a name that can be told, whatever bytes it has on the disk
            shown(name): self._remembered(name, place, root, before.get(shown(name)), now)
            for name, place in entries
        }
        self._known[model] = known
        if len(last) == len(known) and all(last.get(n) is k.source for n, k in known.items()):
            return last
        found = MappingProxyType({n: k.source for n, k in known.items()})
        self._last[model] = found
        return found

    def keep(self, models: Mapping[str, object]) -> None:
        """Forgets all others."""
        for model in [m for m in self._known if m not in models]:
            del self._known[model]
            self._last.pop(model, None)

    def _remembered(
        self, name: str, path: str, root: str, known: _Known | None, now: float
    ) -> _Known:
        look = _look(path, root)
        key = look.key
        if known is None or known.key != key:
            known = _Known(key, _source(name, look, root, self._read))
        newest = look.newest_ctime_ns / 1e9
        if newest > now - TICK_S:
            known.key = None  # it may change again without its stamps showing it
        newest = math.inf if newest > now + TICK_S else newest
        if known.source.newest_ctime != newest:
            known.source = replace(known.source, newest_ctime=newest)
        return known


def read_adapter(name: str, path: str, root: str, read: Read = read_facts) -> AdapterSource:
    """One adapter at `path`, real and inside `root`, as it lies there now. Never raises."""
    return _source(name, _look(path, root), root, read)


def _entries(path: str) -> list[tuple[str, str]]:
    """Name and path of each, in no order. Raises OSError but for a folder that is not there."""
    if not path:
        return []
    try:
        with os.scandir(path) as entries:
            return [
                (entry.name, entry.path)
                for entry in entries
                if not ignored(entry.name) and (entry.is_symlink() or entry.is_dir())
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _look(path: str, root: str) -> _Look:
    stamps: list[FileStamp] = []
    newest = 0
    try:
        found = _stat(path, root)
        newest = found.st_ctime_ns
        if not stat.S_ISDIR(found.st_mode):
            raise _Flaw("it is no folder")
        for name in (CONFIG, WEIGHTS):
            try:
                found = _stat(f"{path}/{name}", root)
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(found.st_mode):
                raise _Flaw(f"{name} is no file")
            stamps.append(stamp(name, found))
            newest = max(newest, found.st_ctime_ns)
    except _Flaw as flaw:
        return _Look(path, tuple(stamps), str(flaw), newest)
    except OSError as error:
        return _Look(path, tuple(stamps), _unreadable(error), newest)
    return _Look(path, tuple(stamps), "", newest)


def _stat(path: str, root: str) -> os.stat_result:
    """Of what a link leads to, where that lies in `root`; elsewhere is not even looked at."""
    found = os.lstat(path)
    if not stat.S_ISLNK(found.st_mode):
        return found
    if not inside(root, os.path.realpath(path)):
        name = shown(os.path.basename(path))
        raise _Flaw(f"{name} is a link that leads out of the repository; copy what it points to")
    return os.stat(path)


def _source(name: str, look: _Look, root: str, read: Read) -> AdapterSource:
    facts, problem = None, ""
    try:
        check_adapter_name(name)
        facts = _facts(look, root, read)
    except (_Flaw, InvalidNameError, AdapterRefusedError) as error:
        problem = str(error)
    except IncompleteFilesError as error:
        problem = f"{WEIGHTS}: {error}"
    except OSError as error:
        problem = _unreadable(error)
    except Exception as error:  # the edge between hostile files and the server
        log.exception("adapter %s: looking into it failed", shown(name))
        problem = f"looking into it failed: {type(error).__name__}; the server's log says more"
    return AdapterSource(
        name=shown(name),
        path=Path(os.path.realpath(look.path)),
        fingerprint=fingerprint(look.stamps),
        files=tuple(AdapterFile(s.path, s.size, s.mtime_ns, s.inode) for s in look.stamps),
        facts=facts,
        problem=problem,
        newest_ctime=look.newest_ctime_ns / 1e9,
    )


def _facts(look: _Look, root: str, read: Read) -> AdapterFacts:
    if look.flaw:
        raise _Flaw(look.flaw)
    there = {s.path for s in look.stamps}
    if WEIGHTS not in there and os.path.lexists(f"{look.path}/{PICKLE}"):
        raise _Flaw(f"{PICKLE} is a pickle and never read; save the adapter as {WEIGHTS}")
    for name in (CONFIG, WEIGHTS):
        if name not in there:
            raise _Flaw(f"{name} is missing; copy it, or wait until the copy is done")
    with open(open_inside(root, f"{look.path}/{CONFIG}"), "rb") as file:
        config = file.read(MAX_CONFIG + 1)
    if len(config) > MAX_CONFIG:
        raise _Flaw(f"{CONFIG} has more than {MAX_CONFIG} bytes")
    return read(config, read_header(f"{look.path}/{WEIGHTS}", root))


def _unreadable(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "it is not there any more"
    reason = os.strerror(error.errno) if error.errno else "an input/output error"
    return f"cannot be read: {reason}; let the server's user read it"
