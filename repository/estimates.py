"""What a load will need, as the best that is known: said by its config, measured of an earlier load, or
estimated from its files.

What was measured is remembered for the same content, under the same settings, on the same sort of
device, with the same libraries: copies of a model know of each other, and nothing is believed of
another. It is the most that one instance ever had, and grows while the model works. A load that ran out
of memory raises it, until one succeeds.

It is a memory, not a promise: nothing fails, waits or is refused because it was lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec

from repository.estimatefile import EstimateFile
from repository.folder.layout import APHRODITE, CONFIGS, OF_THE_MODEL
from repository.lifecycle.generation import Generation
from repository.spec import ModelSpec

log = logging.getLogger("modeldepot.memory")

MOST = 10_000  # rows; of more, those that nobody asked for the longest time are forgotten
MIB = 1 << 20
MARGIN = 32  # a thirty-second of it, and at least a MiB: two loads are never quite alike
MORE = 1.25  # of what it had, when that was not enough
LIBRARIES = ("torch", "onnxruntime", "onnxruntime-gpu", "transformers", "modeldepot")
# Settings that change nothing of what one instance takes. All others do, as far as anybody knows.
NO_MATTER = frozenset(
    {"aliases", "checks", "device", "device_share", "devices", "evict_to", "instances", "memory"}
    | {"metric_tags", "pin", "priority", "reload", "sleep_s", "triton", "ttl_s", "version_policy"}
)


class Known(NamedTuple):
    """Of one instance, in bytes. `peak`: the most that was measured; `guess`: so much was too little,
    and more is taken for granted until a load succeeds."""

    peak: int = 0
    guess: int = 0

    @property
    def needed(self) -> int:
        room = self.peak + max(MIB, self.peak // MARGIN) if self.peak else 0
        return max(room, self.guess)


def versions() -> str:
    """Of whatever may decide how much a model takes."""
    found = []
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def key_of(spec: ModelSpec, kind: str, libraries: str) -> str:
    """`kind`: the sort of device. Names and sizes of files count, their times do not, nor where the
    version lies: an overwritten or copied model of the same sizes takes as much. What was estimated
    counts too, since it follows what lies beside the model (its adapters)."""
    config = {
        name: value
        for name, value in msgspec.structs.asdict(spec.config).items()
        if name not in NO_MATTER
    }
    per_instance = spec.bytes_needed // max(1, spec.config.instances)
    estimated = 0 if spec.config.memory is not None else per_instance
    told = (spec.backend, spec.model_file, _content(spec), config, estimated, kind, libraries)
    written = msgspec.json.encode(told, enc_hook=repr, order="deterministic")
    return hashlib.blake2b(written, digest_size=16).hexdigest()


def _content(spec: ModelSpec) -> list[tuple[str, int]]:
    version = ""
    if spec.path.is_relative_to(spec.folder):
        version = spec.path.relative_to(spec.folder).as_posix()
    found = []
    for stamp in spec.files:
        path = PurePosixPath(stamp.path)
        if str(path) in (*CONFIGS, *APHRODITE) or path.parts[0] in OF_THE_MODEL:
            continue  # what they say is in the config, or changes nothing
        if version != "." and path.is_relative_to(version):
            path = path.relative_to(version)
        found.append((str(path), stamp.size))
    return sorted(found)


class Estimates:
    """`kinds`: device -> its sort ("NVIDIA H200"); what is not in it is a sort of its own. Without a
    folder nothing outlasts the server."""

    def __init__(
        self,
        folder: Path | None = None,
        kinds: Mapping[str, str] | None = None,
        *,
        libraries: str | None = None,
        most: int = MOST,
    ) -> None:
        self._file = EstimateFile(folder, most) if folder is not None else None
        self._kinds = dict(kinds or {})
        self._libraries = versions() if libraries is None else libraries
        self._most = most
        self._rows: OrderedDict[str, Known] = OrderedDict()  # the one used last is the last
        self._keys: dict[tuple[str, str, int], str] = {}  # see `_key`
        self._unwritten: dict[str, Known] = {}

    def needs(self, spec: ModelSpec, device: str) -> tuple[int, str]:
        """Bytes for all instances together, were they all on `device`, and how that is known: config,
        measured, estimate."""
        if spec.config.memory is not None:
            return spec.config.memory, "config"
        known = self._rows.get(key := self._key(spec, device))
        if known is None:
            return spec.bytes_needed, "estimate"
        self._rows.move_to_end(key)
        return known.needed * max(1, spec.config.instances), "measured"

    def learn(self, gen: Generation) -> None:
        """From what its workers say that they have; call it when that has changed. Nothing is learned
        of one that has run nothing yet: much of it may not have been touched."""
        if gen.spec.config.warmup == () and not gen.served:
            return
        devices = gen.chosen.devices
        for device, kinds in gen.measured.items():
            instances = devices.count(device)
            if not instances:
                continue  # what a GPU's worker has of host memory is not reserved
            total = sum(kinds.values())
            if gen.loaded is not None and instances == len(devices):
                # Room that was taken and never touched is not seen by who measures.
                total = max(total, sum(gen.loaded.memory.values()))
            if total:
                self._learn(self._key(gen.spec, device), -(-total // instances))

    def _learn(self, key: str, peak: int) -> None:
        known = self._rows.get(key, Known())
        self._keep(key, Known(max(peak, known.peak)))

    def ran_out(self, gen: Generation, most: Mapping[str, int]) -> None:
        """Its load failed for lack of memory: what it was given was too little. `most`: device -> what
        a model can have there at all; more than that is not asked for, or nobody could try again."""
        devices = gen.chosen.devices
        for device, given in gen.chosen.needs.items():
            instances = devices.count(device)
            if not instances:
                continue
            key = self._key(gen.spec, device)
            known = self._rows.get(key, Known())
            guess = max(int(MORE * given / instances), known.guess)
            limit = most.get(device, guess * instances) // instances
            self._keep(key, known._replace(guess=max(min(guess, limit), given // instances)))

    def _keep(self, key: str, known: Known) -> None:
        if self._rows.get(key) != known:
            self._unwritten[key] = known
        self._rows[key] = known
        self._rows.move_to_end(key)
        while len(self._rows) > self._most:
            forgotten, _ = self._rows.popitem(last=False)
            self._unwritten.pop(forgotten, None)

    def _key(self, spec: ModelSpec, device: str) -> str:
        """Planning asks for the same ones again and again. (Adapters change what is estimated, and no
        fingerprint.)"""
        kind = self._kinds.get(device, device)
        short = (spec.fingerprint, kind, spec.bytes_needed)
        found = self._keys.get(short)
        if found is None or not spec.fingerprint:
            if len(self._keys) >= 2 * self._most:
                self._keys.clear()
            found = self._keys[short] = key_of(spec, kind, self._libraries)
        return found

    # what outlasts the server -----------------------------------------------------------------------

    async def open(self, *, forget: bool = False) -> None:
        """Recalls what was learned before, or forgets it. Never raises."""
        if self._file is None:
            return
        rows = await asyncio.to_thread(self._file.open, forget=forget)
        for key, (peak, guess) in rows.items():
            self._rows[key] = Known(peak, guess)

    async def write(self) -> None:
        """What was learned since the last time. Never raises; what cannot be written is tried again."""
        if self._file is None or not self._unwritten:
            return
        rows, self._unwritten = self._unwritten, {}
        if not await asyncio.to_thread(self._file.write, rows, list(self._rows.items())):
            self._unwritten = {**rows, **self._unwritten}
