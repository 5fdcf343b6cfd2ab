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
from typing import Any

import msgspec

from repository.config import ModelConfig, VersionPolicy
from repository.errors import ConfigError
from repository.folder.aphrodite import REQUEST, Said, read_aphrodite
from repository.folder.estimate import devices_for
from repository.folder.files import Files
from repository.folder.flaws import FlawError
from repository.folder.guess import as_triton_means, guess, needs_config
from repository.folder.huggingface import CONFIG, Described, describe, modules_in
from repository.folder.instances import spread
from repository.folder.instead import Instead
from repository.folder.kept import never_kept
from repository.folder.kind import RUNS_CODE
from repository.folder.labels import read_labels
from repository.folder.layering import merge
from repository.folder.layout import APHRODITE, CONFIGS, Found, with_empty
from repository.folder.needs import needs
from repository.folder.parts import Parts, parts_of
from repository.folder.read_pbtxt import read_pbtxt, triton_layer
from repository.folder.read_yaml import read_yaml
from repository.folder.schema import Layer
from repository.folder.stamps import fingerprint, with_override
from repository.folder.telling import Telling, ToldError
from repository.folder.versions import choose, described, missing
from repository.folder.whole import Verdict
from repository.folder.wired import check_wiring
from repository.names import shown
from repository.snapshot import ModelFolder, Problem
from repository.spec import ModelSpec

log = logging.getLogger("modeldepot.folder")

MOST_TOLD = 5  # of things of one kind that are missing
NO_LAYERS: Mapping[str, int] = MappingProxyType({})

Inspect = Callable[[str, str, int], Verdict]  # (real path, where, version)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the server allows. `gpus` None: not known on this machine, refuse nothing for it.
    `config_name`: of files in configs/ that stand in place of config.pbtxt where they are there.
    `completes`: what a config.pbtxt leaves out of inputs and outputs is taken from the model.
    `caches`: it keeps answers of models that want it."""

    trust_code: bool = False
    gpus: Sequence[str] | None = ()
    config_name: str = ""
    completes: bool = True
    caches: bool = False


def assemble(
    found: Found,
    root: Path,
    rules: Rules,
    inspect: Inspect,
    layers: Mapping[str, int] = NO_LAYERS,
    override: Said | Instead | None = None,
) -> ModelFolder:
    """Never raises: what one folder holds must not hide the others. `layers`: those that
    its adapters change, for the room that they will need (`estimate.adapter_layers`). `override`:
    what a request said, in place of the folder's aphrodite_config.yaml, or of all its configs."""
    if isinstance(override, Instead) and not override.holds(_bare(found, None).fingerprint):
        override = None
    try:
        return _Assembly(found, root, rules, inspect, layers, override).folder()
    except Exception as error:  # the edge between hostile files and the server
        log.exception("%s: looking into it failed", found.name)
        message = f"looking into it failed: {type(error).__name__}; the server's log says more"
        problem = Problem(found.name, "internal", message, "change the folder, and report this")
        return replace(_bare(found, override), problems=(*found.notes, problem))


def _bare(found: Found, override: Said | Instead | None) -> ModelFolder:
    stamps = [*found.shared, *(s for own in found.versions.values() for s in own)]
    return ModelFolder(
        name=found.name,
        fingerprint=fingerprint(stamps),
        versions=tuple(sorted(found.versions, reverse=True)),
        override=override.digest if override else "",
        newest_ctime=found.newest_ctime_ns / 1e9,
    )


class _Assembly(Telling):
    def __init__(
        self,
        found: Found,
        root: Path,
        rules: Rules,
        inspect: Inspect,
        layers: Mapping[str, int],
        override: Said | Instead | None,
    ) -> None:
        super().__init__(found, root)
        self._rules, self._inspect = rules, inspect
        self._layers = layers
        self._override = override
        self._said: Said | None = None
        self._over = Layer("")  # of it, what any backend has
        self._merged: dict[object, tuple[ModelConfig, dict[str, str]]] = {}

    def folder(self) -> ModelFolder:
        layer = self._read_config()
        whole = _bare(self._found, self._override)
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
            layer = self._read_layer()
        except ToldError:
            return None
        if layer.values.get("backend") == "ensemble":
            self._found = with_empty(self._found)
        for problem in layer.problems:
            self._problems.append(replace(problem, where=f"{self._found.name}/{problem.where}"))
        return layer

    def _read_layer(self) -> Layer:
        model, files = self._found.name, self._newest()
        if isinstance(self._override, Instead):
            try:
                return triton_layer(self._override.text, model, files)
            except ConfigError as error:
                self._tell(REQUEST, "config", error.message, error.hint)
                raise ToldError from error
        named = f"configs/{self._rules.config_name}.pbtxt"
        if self._rules.config_name and any(s.path == named for s in self._found.shared):
            with self._reading(named) as text:
                return read_pbtxt(text, model, named, files)
        name = self._one_of(CONFIGS)
        if not name:
            return Layer("config.yaml")
        with self._reading(name) as text:
            return (
                read_yaml(text) if name == "config.yaml" else read_pbtxt(text, model, files=files)
            )

    def _newest(self) -> list[str]:
        """The files of the highest version, relative to its folder."""
        newest = max(self._found.versions, default=0)
        prefix = "" if self._found.flat else f"{newest}/"
        return [s.path.removeprefix(prefix) for s in self._found.versions.get(newest, ())]

    def _read_said(self) -> bool:
        """What is said over the config: by the request that is in force, else by the folder's
        aphrodite_config.yaml. False if that is broken."""
        try:
            if isinstance(self._override, Instead):
                return True
            name = "" if self._override else self._one_of(APHRODITE)
            said = self._override
            if name:
                with self._reading(name) as text:
                    said = read_aphrodite(text, name)
        except ToldError:
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
        except ToldError:
            pass
        return None

    def _spec(self, version: int, layer: Layer, files: Files) -> ModelSpec:
        """Raises FlawError, or ToldError where the Problem is there already."""
        layer = as_triton_means(layer, files.sizes, files.read)
        about, guessed = self._guess(layer, files)
        config, sources = self._merge(layer, guessed)
        self._check_trust(config)
        self._check_said(config, layer)
        self._check_cache(config, sources)
        check_wiring(self._found.name, config)
        try:
            parts = parts_of(config, files, about)
        except ConfigError as error:
            rule = "incomplete" if config.backend else "config"
            raise FlawError(rule, error.message, error.hint) from error
        placed = self._placed(config, sources)
        labels = self._labels(config, sources)
        verdicts = self._look(version, parts, files)
        if placed is None or labels is None:
            raise ToldError
        config, devices = placed
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
            labels=labels,
        )

    def _check_trust(self, config: ModelConfig) -> None:
        if config.backend in RUNS_CODE and not self._rules.trust_code:
            self._tell(
                "",
                "trust",
                f"the backend '{config.backend}' runs code from the model's folder",
                "start the server with --trust-code if you trust this repository",
            )
            raise ToldError

    def _check_said(self, config: ModelConfig, layer: Layer) -> None:
        """What a config in Triton's form must say, as nobody will say it later."""
        if "triton" not in layer.values:
            return
        if config.backend is None:
            raise FlawError(
                "config",
                f"Invalid model name: Could not determine backend for model '{self._found.name}' with "
                "no backend in model configuration. Expected model name of the form "
                "'model.<backend_name>'.",
                "write 'backend' or 'platform', or name the file model.onnx, model.pt or model.py",
            )
        missing = [key for key in ("input", "output") if getattr(config, f"{key}s") is None]
        if missing and (config.backend == "ensemble" or not self._rules.completes):
            why = (
                "an ensemble has no others"
                if config.backend == "ensemble"
                else "the server was started with --disable-auto-complete-config"
            )
            self._tell(
                layer.source,
                "config",
                f"must specify '{missing[0]}' for model '{self._found.name}': {why}",
                f"list them as '{missing[0]} [ {{ name: ... data_type: ... dims: ... }} ]'",
            )
            raise ToldError

    def _check_cache(self, config: ModelConfig, sources: Mapping[str, str]) -> None:
        """Whether its answers will be kept, where it wants that."""
        why = never_kept(config, server=self._rules.caches) if config.response_cache else None
        if why is not None:
            message = f"'response_cache': every request is run, {why[0]}"
            self._tell(sources["response_cache"], "config", message, why[1], warning=True)

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
            return about, guess(files.sizes, about, files.read)
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
                raise ToldError from error
        return self._merged[key]

    def _placed(
        self, config: ModelConfig, sources: Mapping[str, str]
    ) -> tuple[ModelConfig, tuple[str, ...]] | None:
        """Where each instance is to be, if the config says so, and where it may go."""
        try:
            config = spread(config, self._rules.gpus)
            return config, devices_for(config, self._rules.gpus)
        except ConfigError as error:
            key = "device" if config.devices is None else "devices"
            self._tell(sources.get(key, ""), "config", error.message, error.hint)
            return None

    def _labels(
        self, config: ModelConfig, sources: Mapping[str, str]
    ) -> Mapping[str, tuple[str, ...]] | None:
        try:
            return read_labels(config, os.path.realpath(self._root), self._found.folder)
        except ConfigError as error:
            where = next(
                (v for k, v in sources.items() if k.endswith(".labels") and v != "default"), ""
            )
            self._tell(where, "config", error.message, error.hint)
            return None

    def _look(self, version: int, parts: Parts, files: Files) -> dict[str, Verdict]:
        """At every file that must be whole, by its path in the version's folder. Raises ToldError,
        with a Problem for each that is not."""
        prefix = "" if self._found.flat else f"{version}/"
        verdicts = {}
        for path in parts.looked:
            where = shown(f"{self._found.name}/{prefix}{path}", 300)
            verdicts[path] = self._inspect(os.path.join(files.folder, path), where, version)
        broken = [v.problem for v in verdicts.values() if v.problem is not None]
        self._problems += broken
        if broken:
            raise ToldError
        return verdicts
