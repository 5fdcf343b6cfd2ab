"""One model's folder, as found, becomes a ModelFolder: configured, judged whole, chosen, estimated.

Whatever is wrong becomes a Problem of the model or of one version; the other versions go on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec

from repository.config import ModelConfig, VersionPolicy
from repository.errors import ConfigError, InvalidNameError
from repository.folder.estimate import devices_for
from repository.folder.files import Files
from repository.folder.flaws import FlawError
from repository.folder.guess import as_triton_means, guess, needs_config
from repository.folder.huggingface import CONFIG, Described, describe, modules_in
from repository.folder.kind import RUNS_CODE
from repository.folder.layering import merge
from repository.folder.layout import CONFIGS, Found
from repository.folder.needs import needs
from repository.folder.opening import open_inside
from repository.folder.parts import Parts, parts_of
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.read_yaml import MAX_SIZE, read_yaml
from repository.folder.schema import Layer
from repository.folder.stamps import fingerprint
from repository.folder.versions import choose, described, missing
from repository.folder.whole import Verdict
from repository.names import contain, shown
from repository.snapshot import ModelFolder, Problem
from repository.spec import ModelSpec

log = logging.getLogger("modeldepot.folder")

MOST_TOLD = 5  # of things of one kind that are missing
NO_LAYERS: Mapping[str, int] = MappingProxyType({})

Inspect = Callable[[str, str, int], Verdict]  # (real path, where, version)


class _ToldError(Exception):
    """A version cannot be served, and why is among the problems already."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the server allows. `gpus` None: not known on this machine, refuse nothing for it."""

    trust_code: bool = False
    gpus: Sequence[str] | None = ()


def assemble(
    found: Found,
    root: Path,
    rules: Rules,
    inspect: Inspect,
    layers: Mapping[str, int] = NO_LAYERS,
) -> ModelFolder:
    """Never raises: what one folder holds must not hide the others. `layers`: those that
    its adapters change, for the room that they will need (`estimate.adapter_layers`)."""
    try:
        return _Assembly(found, root, rules, inspect, layers).folder()
    except Exception as error:  # the edge between hostile files and the server
        log.exception("%s: looking into it failed", found.name)
        message = f"looking into it failed: {type(error).__name__}; the server's log says more"
        problem = Problem(found.name, "internal", message, "change the folder, and report this")
        return replace(_bare(found), problems=(*found.notes, problem))


def _bare(found: Found) -> ModelFolder:
    stamps = [*found.shared, *(s for own in found.versions.values() for s in own)]
    return ModelFolder(
        name=found.name,
        fingerprint=fingerprint(stamps),
        versions=tuple(sorted(found.versions, reverse=True)),
        newest_ctime=found.newest_ctime_ns / 1e9,
    )


class _Assembly:
    def __init__(
        self,
        found: Found,
        root: Path,
        rules: Rules,
        inspect: Inspect,
        layers: Mapping[str, int],
    ) -> None:
        self._found, self._root, self._rules, self._inspect = found, root, rules, inspect
        self._layers = layers
        self._problems = list(found.notes)
        self._merged: dict[object, tuple[ModelConfig, dict[str, str]]] = {}

    def folder(self) -> ModelFolder:
        whole = _bare(self._found)
        layer = self._read_config()
        if layer is not None:
            specs, aliases = self._choose(layer)
            whole = replace(whole, specs=MappingProxyType(specs), aliases=aliases)
        problems = sorted(dict.fromkeys(self._problems), key=lambda p: p.warning)
        if any(p.version is None and not p.warning for p in problems):
            whole = replace(whole, specs=MappingProxyType({}))
        return replace(whole, problems=tuple(problems))

    # config -------------------------------------------------------------------------------------

    def _read_config(self) -> Layer | None:
        """The layer of the config file; an empty one where there is none; None if it is broken."""
        there = [s.path for s in self._found.shared if s.path in CONFIGS]
        if len(there) > 1:
            self._tell(
                "", "config", f"both {' and '.join(CONFIGS)} are there", "remove one of them"
            )
            return None
        if not there:
            return Layer("config.yaml")
        name = there[0]
        try:
            path = contain(self._root, Path(self._found.folder, name))
            with open(open_inside(os.path.realpath(self._root), str(path)), "rb") as file:
                text = file.read(MAX_SIZE + 1)
            yaml = name == "config.yaml"
            layer = read_yaml(text) if yaml else read_pbtxt(text, self._found.name)
        except ConfigError as error:
            self._tell(error.where or name, "config", error.message, error.hint)
            return None
        except InvalidNameError as error:
            self._tell(name, "link", str(error))
            return None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "it cannot be read"
            self._tell(name, "io", f"cannot be read: {reason}", "let the server's user read it")
            return None
        for problem in layer.problems:
            self._problems.append(replace(problem, where=f"{self._found.name}/{problem.where}"))
        return layer

    # versions -----------------------------------------------------------------------------------

    def _choose(self, layer: Layer) -> tuple[dict[int, ModelSpec], tuple[str, ...]]:
        policy = msgspec.convert(layer.values.get("version_policy", {"latest": 1}), VersionPolicy)
        specs = {v: s for v in self._found.versions if (s := self._version(v, layer)) is not None}
        # A broken version that would not serve anyway is worth a word, not an error.
        due = choose(policy, self._found.versions)
        self._problems = [
            replace(p, warning=True) if p.version not in (None, *due) else p for p in self._problems
        ]
        for version in missing(policy, self._found.versions)[:MOST_TOLD]:
            message = f"'version_policy' names version {version}, which is not there"
            where = layer.place("version_policy.specific")
            self._tell(where, "version", message, f"add the folder {version}/", warning=True)
        chosen = choose(policy, specs)
        if not chosen:
            self._tell_of_none(described(policy))
        return {v: specs[v] for v in chosen}, tuple(layer.values.get("aliases", ()))

    def _version(self, version: int, layer: Layer) -> ModelSpec | None:
        """Its spec, or None and a Problem."""
        if any(p.version == version and not p.warning for p in self._problems):
            return None  # a link out of the repository, a folder that cannot be read
        prefix = "" if self._found.flat else f"{version}/"
        own = self._found.versions[version]
        sizes = {s.path.removeprefix(prefix): s.size for s in own}
        files = Files(os.path.realpath(self._root), self._found.paths[version], sizes)
        try:
            return self._spec(version, layer, files)
        except FlawError as flaw:
            where = shown((prefix + flaw.name).rstrip("/"), 300)
            self._tell(where, flaw.rule, flaw.message, flaw.hint, version)
        except _ToldError:
            pass
        return None

    def _spec(self, version: int, layer: Layer, files: Files) -> ModelSpec:
        """Raises FlawError, or _ToldError where the Problem is there already."""
        layer = as_triton_means(layer, files.sizes)
        about, guessed = self._guess(layer, files)
        config, sources = self._merge(layer, guessed)
        self._check_trust(config)
        try:
            parts = parts_of(config, files, about)
        except ConfigError as error:
            rule = "incomplete" if config.backend else "config"
            raise FlawError(rule, error.message, error.hint) from error
        devices = self._devices(config, layer)
        verdicts = self._look(version, parts, files)
        if devices is None:
            raise _ToldError
        stamps = tuple(sorted((*self._found.shared, *self._found.versions[version])))
        return ModelSpec(
            model=self._found.name,
            version=version,
            fingerprint=fingerprint(stamps),
            folder=Path(self._found.folder),
            path=Path(files.folder),
            files=stamps,
            config=config,
            sources=MappingProxyType(sources),
            backend=config.backend or "",
            model_file=parts.main,
            bytes_needed=needs(config, parts, files, verdicts, about, self._layers),
            devices=devices,
        )

    def _check_trust(self, config: ModelConfig) -> None:
        if config.backend in RUNS_CODE and not self._rules.trust_code:
            self._tell(
                "",
                "trust",
                f"the backend '{config.backend}' runs code from the model's folder",
                "start the server with --trust-code if you trust this repository",
            )
            raise _ToldError

    def _guess(self, layer: Layer, files: Files) -> tuple[Described | None, Layer]:
        """What config.json says, where it counts, and the layer below that of the config file."""
        said = layer.values.get("backend")
        about = None
        if needs_config(files.sizes, said):
            home = modules_in(files).home if said != "text" else ""
            about = describe(files, home)
        if said is not None:
            return about, Layer("guessed")
        try:
            return about, guess(files.sizes, about)
        except ConfigError as error:
            raise FlawError("config", error.message, error.hint, name=CONFIG) from error

    def _merge(self, layer: Layer, guessed: Layer) -> tuple[ModelConfig, dict[str, str]]:
        key = guessed.values.get("backend"), layer.values.get("backend")
        if key not in self._merged:
            try:
                self._merged[key] = merge([guessed, layer])
            except ConfigError as error:
                where = error.where or layer.source
                self._tell(where, "config", error.message, error.hint)
                raise _ToldError from error
        return self._merged[key]

    def _devices(self, config: ModelConfig, layer: Layer) -> tuple[str, ...] | None:
        try:
            return devices_for(config, self._rules.gpus)
        except ConfigError as error:
            self._tell(layer.place("device"), "config", error.message, error.hint)
            return None

    def _look(self, version: int, parts: Parts, files: Files) -> dict[str, Verdict]:
        """At every file that must be whole, by its path in the version's folder. Raises _ToldError,
        with a Problem for each that is not."""
        prefix = "" if self._found.flat else f"{version}/"
        verdicts = {}
        for path in parts.looked:
            where = shown(f"{self._found.name}/{prefix}{path}", 300)
            verdicts[path] = self._inspect(os.path.join(files.folder, path), where, version)
        broken = [v.problem for v in verdicts.values() if v.problem is not None]
        self._problems += broken
        if broken:
            raise _ToldError
        return verdicts

    # problems -----------------------------------------------------------------------------------

    def _tell(
        self,
        where: str,
        rule: str,
        message: str,
        hint: str = "",
        version: int | None = None,
        *,
        warning: bool = False,
    ) -> None:
        place = f"{self._found.name}/{where}" if where else self._found.name
        self._problems.append(Problem(place, rule, message, hint, version, warning))

    def _tell_of_none(self, policy: str) -> None:
        if not self._found.versions:
            message, hint = (
                "there is no version folder and no model file",
                "add a folder 1/ with one",
            )
        else:
            message = f"no version can be served under the version policy ({policy})"
            hint = "mend the versions named above, or change 'version_policy'"
            if any(p.version is None and not p.warning for p in self._problems):
                return  # the true reason is there already
        self._tell("", "version", message, hint)
