"""One model's folder, as found, becomes a ModelFolder: configured, judged whole, chosen, estimated.

Whatever is wrong becomes a Problem of the model or of one version; the other versions go on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from repository.config import ModelConfig, VersionPolicy
from repository.errors import ConfigError, InvalidNameError
from repository.folder.aphrodite import REQUEST, Said, read_aphrodite
from repository.folder.estimate import devices_for
from repository.folder.files import Files
from repository.folder.flaws import FlawError
from repository.folder.guess import as_triton_means, guess, needs_config
from repository.folder.huggingface import CONFIG, Described, describe, modules_in
from repository.folder.kind import RUNS_CODE
from repository.folder.layering import merge
from repository.folder.layout import APHRODITE, CONFIGS, Found
from repository.folder.needs import needs
from repository.folder.opening import open_inside
from repository.folder.parts import Parts, parts_of
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.read_yaml import MAX_SIZE, read_yaml
from repository.folder.schema import Layer
from repository.folder.stamps import fingerprint, with_override
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
    override: Said | None = None,
) -> ModelFolder:
    """Never raises: what one folder holds must not hide the others. `layers`: those that
    its adapters change, for the room that they will need (`estimate.adapter_layers`). `override`:
    what a request said, in place of the folder's aphrodite_config.yaml."""
    try:
        return _Assembly(found, root, rules, inspect, layers, override).folder()
    except Exception as error:  # the edge between hostile files and the server
        log.exception("%s: looking into it failed", found.name)
        message = f"looking into it failed: {type(error).__name__}; the server's log says more"
        problem = Problem(found.name, "internal", message, "change the folder, and report this")
        return replace(_bare(found, override), problems=(*found.notes, problem))


def _bare(found: Found, override: Said | None) -> ModelFolder:
    stamps = [*found.shared, *(s for own in found.versions.values() for s in own)]
    return ModelFolder(
        name=found.name,
        fingerprint=fingerprint(stamps),
        versions=tuple(sorted(found.versions, reverse=True)),
        override=override.digest if override else "",
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
        override: Said | None,
    ) -> None:
        self._found, self._root, self._rules, self._inspect = found, root, rules, inspect
        self._layers = layers
        self._override = override
        self._said: Said | None = None
        self._over = Layer("")  # of it, what any backend has
        self._problems = list(found.notes)
        self._merged: dict[object, tuple[ModelConfig, dict[str, str]]] = {}

    def folder(self) -> ModelFolder:
        whole = _bare(self._found, self._override)
        layer = self._read_config()
        if self._read_said() and layer is not None:
            specs, aliases = self._choose(layer)
            whole = replace(whole, specs=MappingProxyType(specs), aliases=aliases)
        if self._said is not None:
            whole = replace(whole, said=MappingProxyType(self._said.written.values))
        problems = sorted(dict.fromkeys(self._problems), key=lambda p: p.warning)
        if any(p.version is None and not p.warning for p in problems):
            whole = replace(whole, specs=MappingProxyType({}))
        return replace(whole, problems=tuple(problems))

    # config -------------------------------------------------------------------------------------

    def _read_config(self) -> Layer | None:
        """The layer of the config file; an empty one where there is none; None if it is broken."""
        try:
            name = self._one_of(CONFIGS)
            if not name:
                return Layer("config.yaml")
            with self._reading(name) as text:
                yaml = name == "config.yaml"
                layer = read_yaml(text) if yaml else read_pbtxt(text, self._found.name)
        except _ToldError:
            return None
        for problem in layer.problems:
            self._problems.append(replace(problem, where=f"{self._found.name}/{problem.where}"))
        return layer

    def _read_said(self) -> bool:
        """What is said over the config: by the request that is in force, else by the folder's
        aphrodite_config.yaml. False if that is broken."""
        try:
            name = "" if self._override else self._one_of(APHRODITE)
            said = self._override
            if name:
                with self._reading(name) as text:
                    said = read_aphrodite(text, name)
        except _ToldError:
            return False
        self._said = said
        self._over = said.layer(None) if said else Layer("")
        if said is not None and name and said.names not in ("", self._found.name):
            message = (
                f"'model' names '{shown(said.names)}'; here it is not followed: the model is the "
                f"one that the file lies with, '{self._found.name}'"
            )
            place = said.written.place("model")
            self._tell(place, "config", message, "remove the line", warning=True)
        return True

    def _one_of(self, names: Sequence[str]) -> str:
        """The one that is there; "" for none. Raises _ToldError for several."""
        there = [s.path for s in self._found.shared if s.path in names]
        if len(there) > 1:
            self._tell("", "config", f"both {' and '.join(names)} are there", "remove one of them")
            raise _ToldError
        return there[0] if there else ""

    @contextmanager
    def _reading(self, name: str) -> Iterator[bytes]:
        """The text of a file of the model's. What is wrong with it, in the block too, is told, and
        _ToldError raised."""
        try:
            path = contain(self._root, Path(self._found.folder, name))
            with open(open_inside(os.path.realpath(self._root), str(path)), "rb") as file:
                text = file.read(MAX_SIZE + 1)
            yield text
        except ConfigError as error:
            self._tell(error.where or name, "config", error.message, error.hint)
            raise _ToldError from error
        except InvalidNameError as error:
            self._tell(name, "link", str(error))
            raise _ToldError from error
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "it cannot be read"
            self._tell(name, "io", f"cannot be read: {reason}", "let the server's user read it")
            raise _ToldError from error

    def _value(self, key: str, layer: Layer) -> tuple[Any, Layer]:
        """What is said of it, and in which layer; None: nothing."""
        found = self._over.values.get(key)
        over = self._over if found is not None else layer
        return over.values.get(key), over

    # versions -----------------------------------------------------------------------------------

    def _choose(self, layer: Layer) -> tuple[dict[int, ModelSpec], tuple[str, ...]]:
        told, written = self._value("version_policy", layer)
        policy = msgspec.convert({"latest": 1} if told is None else told, VersionPolicy)
        specs = {v: s for v in self._found.versions if (s := self._version(v, layer)) is not None}
        # A broken version that would not serve anyway is worth a word, not an error.
        due = choose(policy, self._found.versions)
        self._problems = [
            replace(p, warning=True) if p.version not in (None, *due) else p for p in self._problems
        ]
        for version in missing(policy, self._found.versions)[:MOST_TOLD]:
            message = f"'version_policy' names version {version}, which is not there"
            where = written.place("version_policy.specific")
            self._tell(where, "version", message, f"add the folder {version}/", warning=True)
        chosen = choose(policy, specs)
        if not chosen:
            self._tell_of_none(described(policy))
        aliases, _ = self._value("aliases", layer)
        return {v: specs[v] for v in chosen}, tuple(aliases or ())

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
        devices = self._devices(config, sources)
        verdicts = self._look(version, parts, files)
        if devices is None:
            raise _ToldError
        stamps = tuple(sorted((*self._found.shared, *self._found.versions[version])))
        return ModelSpec(
            model=self._found.name,
            version=version,
            fingerprint=with_override(
                fingerprint(stamps), self._override.digest if self._override else ""
            ),
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
        said, _ = self._value("backend", layer)
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
        key = guessed.values.get("backend"), self._value("backend", layer)[0]
        if key not in self._merged:
            try:
                over = [self._said.layer(key[1] or key[0])] if self._said else []
                self._merged[key] = merge([guessed, layer, *over])
            except ConfigError as error:
                where = error.where or layer.source
                self._tell(where, "config", error.message, error.hint)
                raise _ToldError from error
        return self._merged[key]

    def _devices(self, config: ModelConfig, sources: Mapping[str, str]) -> tuple[str, ...] | None:
        try:
            return devices_for(config, self._rules.gpus)
        except ConfigError as error:
            self._tell(sources["device"], "config", error.message, error.hint)
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
        if where == REQUEST:
            rule = REQUEST  # no file is to be mended
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
