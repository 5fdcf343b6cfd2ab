"""Every setting of the server: its type, its default, its help, and how a value is read.

One table (`Settings`), four sources. Rule: flag > MODELDEPOT_* variable > --config file > default;
each value remembers its source. A value may arrive as text or already as its type.
An error names its source ("--port", "MODELDEPOT_PORT", "modeldepot.yaml:3") and what to do.
Relative paths in a config file are relative to that file. Nothing here starts or opens anything.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from repository.errors import ConfigError, RepositoryError
from repository.reports import Options
from repository.sizes import parse_bytes

ENV = "MODELDEPOT_"
# Variables with our prefix that are not settings of the server: the command's own, and those that
# Kubernetes injects for a Service called "modeldepot", MODELDEPOT_PORT=tcp://10.0.0.1:8000 among
# them.
_NOT_OURS = re.compile(r"SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_.*|URL|API_KEY|CONFIG")
_LINK = re.compile(r"(tcp|udp|sctp)://")


# Readers: the value as it was given, and the folder that relative paths start from.


def _text(value: Any, _: Path) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text")
    return value


def _flag(value: Any, _: Path) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    word = str(value).strip().lower()
    if word not in words:
        raise ValueError("must be true or false")
    return words[word]


def _path(value: Any, base: Path) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("must be a path")
    return base / Path(value).expanduser()


def _names(value: Any, _: Path) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
        raise ValueError("must be a list of names")
    return tuple(p.strip() for p in parts if p.strip())


def _paths(value: Any, base: Path) -> tuple[Path, ...]:
    parts = value.split(":") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError("must be a list of paths")
    return tuple(_path(part, base) for part in parts if part)


def _budget(value: Any, _: Path) -> Mapping[str, int]:
    # Here and below: `serve --help` needs this table at once, and neither numpy nor psutil.
    from repository.devices.inventory import parse_budgets

    if isinstance(value, Mapping):
        value = ",".join(f"{device}={size}" for device, size in value.items())
    if not isinstance(value, str):
        raise ValueError('must look like "cpu=2GiB,cuda:0=70GiB"')
    return dict(parse_budgets(value))


def _size(value: Any, _: Path) -> int:
    """ "64MiB", "1GB" or bytes."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError('must be a size, such as "64MiB"')
    return parse_bytes(str(value))


def _one_of(*words: str) -> Callable[[Any, Path], str]:
    def read(value: Any, _: Path) -> str:
        word = str(value).strip().lower()
        # YAML reads a bare `off` as false.
        if value is False and "off" in words:
            word = "off"
        if word not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return word

    return read


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[Any, Path], Any]:
    def read(value: Any, _: Path) -> int | float:
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if isinstance(value, bool) or number is None or not low <= number <= high:
            above = f"at least {low:g}" if high >= _MANY else f"from {low:g} to {high:g}"
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number, {above}")
        return number

    return read


_MANY = 10**9
_seconds = _number(float, 0, _MANY)


class Setting(NamedTuple):
    """What its flag's help says, and how a value is read."""

    help: str
    read: Callable[[Any, Path], Any]


Mode = Literal["poll", "explicit", "none"]
Watch = Literal["notify", "poll", "off"]
Level = Literal["debug", "info", "warning", "error"]
Budget = Mapping[str, int]
LOAD_SLOTS = max(4, 2 * (os.cpu_count() or 1))
MAX_BODY = 64 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Times in seconds, sizes in bytes."""

    repo: Annotated[Path, Setting("folder of models", _path)] = Path("/models")
    host: Annotated[str, Setting("address to listen on", _text)] = "127.0.0.1"
    port: Annotated[int, Setting("port; 0 takes a free one", _number(int, 0, 65535))] = 8000
    model_control_mode: Annotated[
        Mode,
        Setting(
            "poll: all models, watched; explicit: those asked for; none: all, at start only",
            _one_of("poll", "explicit", "none"),
        ),
    ] = "poll"
    load_model: Annotated[
        tuple[str, ...], Setting("models loaded at start in explicit mode; * is all", _names)
    ] = ()
    watch: Annotated[
        Watch, Setting("how changes of files are seen", _one_of("notify", "poll", "off"))
    ] = "notify"
    settle: Annotated[float, Setting("seconds without a change before files count", _seconds)] = 1.0
    poll_secs: Annotated[
        float, Setting("seconds between two looks with --watch poll", _number(float, 0.05, _MANY))
    ] = 1.5
    api_keys: Annotated[Path | None, Setting("file of API keys", _path)] = None
    insecure: Annotated[bool, Setting("allow a public address without API keys", _flag)] = False
    trust_code: Annotated[bool, Setting("allow models that bring their own code", _flag)] = False
    default_host: Annotated[
        Literal["process", "inline"],
        Setting("where a model runs that does not say", _one_of("process", "inline")),
    ] = "process"
    memory_budget: Annotated[
        Budget, Setting('bytes that models may take, "cpu=2GiB,cuda:0=70GiB"', _budget)
    ] = field(default_factory=dict)
    state_dir: Annotated[Path | None, Setting("folder for snapshots and state", _path)] = None
    forget: Annotated[
        bool, Setting("start clean: what was said by call before counts no more", _flag)
    ] = False
    allowed_root: Annotated[
        tuple[Path, ...],
        Setting("folder beside REPO that models and adapters may be loaded from", _paths),
    ] = ()
    default_model: Annotated[
        str | None, Setting("model of a POST /v1/load_model that names none", _text)
    ] = None
    enable_inline_model_loading: Annotated[
        bool, Setting("a request for a model that is not loaded loads it", _flag)
    ] = False
    demand_timeout: Annotated[
        float,
        Setting("seconds that a request waits for its model to load", _number(float, 0.1, _MANY)),
    ] = 60.0
    demand_queue: Annotated[
        int, Setting("requests that may wait for one model to load", _number(int, 1, _MANY))
    ] = 256
    min_residency: Annotated[
        float,
        Setting(
            "seconds that a model in use stays before a request for another drives it out", _seconds
        ),
    ] = 2.0
    load_slots: Annotated[int, Setting("loads that run at once", _number(int, 1, 1024))] = (
        LOAD_SLOTS
    )
    load_timeout: Annotated[
        float, Setting("seconds that a load may take", _number(float, 0.1, _MANY))
    ] = 600.0
    drain: Annotated[float, Setting("seconds an unload waits for running requests", _seconds)] = (
        30.0
    )
    grace: Annotated[float, Setting("seconds from SIGTERM to the exit", _seconds)] = 30.0
    max_body: Annotated[int, Setting("largest inference request, such as 64MiB", _size)] = MAX_BODY
    max_queue: Annotated[
        int, Setting("requests that may wait for one model", _number(int, 1, _MANY))
    ] = 1024
    keepalive: Annotated[
        float,
        Setting("seconds between signs of life of event streams", _number(float, 0.1, _MANY)),
    ] = 15.0
    fast_path: Annotated[bool, Setting("answer inference below ASGI", _flag)] = True
    server_name: Annotated[str, Setting("name in the server's metadata", _text)] = "modeldepot"
    log_format: Annotated[
        Literal["text", "json"], Setting("how log lines look", _one_of("text", "json"))
    ] = "text"
    log_level: Annotated[
        Level, Setting("least level logged", _one_of("debug", "info", "warning", "error"))
    ] = "info"
    strict_readiness: Annotated[
        bool, Setting("not ready while any wanted model does not serve", _flag)
    ] = False
    exit_on_error: Annotated[bool, Setting("exit 1 if a model fails at start", _flag)] = False


def _fields() -> dict[str, Setting]:
    found = get_type_hints(Settings, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in found.items()}


FIELDS: Mapping[str, Setting] = MappingProxyType(_fields())


@dataclass(frozen=True, slots=True)
class Resolved:
    """`sources`: key -> "--port", "MODELDEPOT_PORT", "modeldepot.yaml:3" or "default"."""

    settings: Settings
    sources: Mapping[str, str]


def resolve(
    flags: Mapping[str, Any], environ: Mapping[str, str], config_path: Path | None = None
) -> Resolved:
    """The settings of one start. A flag that is None was not given.

    Raises ConfigError.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = dict.fromkeys(FIELDS, "default")
    here = Path.cwd()

    def put(key: str, raw: Any, source: str, where: str, base: Path) -> None:
        try:
            values[key] = FIELDS[key].read(raw, base)
        except (ValueError, RepositoryError) as error:
            message = error.message if isinstance(error, ConfigError) else str(error)
            hint = error.hint if isinstance(error, ConfigError) else ""
            text = f"{message} ({hint})" if hint else message
            raise ConfigError(f"{text}; got {_short(raw)}", where=where, hint=hint) from error
        sources[key] = source

    if config_path is not None:
        folder = config_path.resolve().parent
        for key, (raw, where) in _from_file(config_path).items():
            put(key, raw, where, where, folder)
    for key, raw in _from_environ(environ).items():
        variable = ENV + key.upper()
        put(key, raw, variable, variable, here)
    for key, raw in flags.items():
        flag = "--" + key.replace("_", "-")
        if key not in FIELDS:
            raise _unknown(flag, key)
        if raw is not None and raw != ():
            put(key, raw, flag, flag, here)
    settings = Settings(**values)
    if settings.state_dir is None:
        folder = _state_dir(settings.repo, environ)
        settings = dataclasses.replace(settings, state_dir=folder)
    return Resolved(settings, sources)


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    """Key -> the value and where it stands, "modeldepot.yaml:3"."""
    from repository.folder.read_yaml import read_mapping

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", where=path.name) from error
    found = read_mapping(raw, path.name)
    values: dict[str, tuple[Any, str]] = {}
    for name, value in found.values.items():
        where = f"{path.name}:{found.lines.get(str(name), 1)}"
        key = str(name).replace("-", "_")
        if key not in FIELDS:
            raise _unknown(where, str(name))
        if value is not None:
            values[key] = value, where
    return values


def _from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """A variable that is nearly a setting is an error; one far from all is somebody else's."""
    values: dict[str, str] = {}
    for variable, raw in environ.items():
        if not variable.startswith(ENV) or raw == "":
            continue
        name = variable[len(ENV) :]
        key = name.lower()
        if _NOT_OURS.fullmatch(name) or (key == "port" and _LINK.match(raw)):
            continue
        if key in FIELDS:
            values[key] = raw
        elif difflib.get_close_matches(key, FIELDS, 1, 0.75):
            raise _unknown(variable, key)
    return values


def _unknown(where: str, key: str) -> ConfigError:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), FIELDS, 1, 0.5)
    hint = f"did you mean '{near[0]}'?" if near else "see `modeldepot serve --help`"
    return ConfigError(f"unknown setting '{key}'; {hint}", where=where, hint=hint)


def _short(raw: Any) -> str:
    text = repr(raw) if isinstance(raw, str) else str(raw)
    return text if len(text) <= 60 else text[:57] + "..."


def _state_dir(repo: Path, environ: Mapping[str, str]) -> Path:
    """One folder per repository, so that two servers on one machine do not meet."""
    base = environ.get("XDG_STATE_HOME") or ""
    # XDG: a relative path there is to be ignored.
    root = (
        Path(base) if base.startswith("/") else Path(environ.get("HOME") or "/tmp") / ".local/state"
    )
    name = hashlib.sha256(os.fsencode(repo.resolve())).hexdigest()[:16]
    return root / "modeldepot" / name


def options_of(settings: Settings) -> Options:
    return Options(
        root=settings.repo,
        mode=settings.model_control_mode,
        load=settings.load_model,
        watch=settings.watch,
        settle_s=settings.settle,
        poll_s=settings.poll_secs,
        trust_code=settings.trust_code,
        default_host=settings.default_host,
        memory_budget=settings.memory_budget,
        state_dir=settings.state_dir,
        load_slots=settings.load_slots,
        load_timeout_s=settings.load_timeout,
        drain_s=settings.drain,
        max_queue=settings.max_queue,
        allowed_roots=settings.allowed_root,
        forget=settings.forget,
        default_model=settings.default_model,
        on_demand=settings.enable_inline_model_loading,
        demand_timeout_s=settings.demand_timeout,
        demand_queue=settings.demand_queue,
        min_residency_s=settings.min_residency,
    )


def check_bind(settings: Settings) -> None:
    """Raises ConfigError for an address that others can reach while nobody is asked for a key."""
    if settings.api_keys is None and not settings.insecure and not is_loopback(settings.host):
        raise ConfigError(
            f"refusing to listen on {settings.host} without API keys: anyone who can reach it "
            "could load and unload models; give --api-keys FILE (see `modeldepot keys new`), "
            "stay on 127.0.0.1, or say --insecure if something in front asks for keys",
            where="--host",
        )


def is_loopback(host: str) -> bool:
    """Names other than localhost are taken for public: what they resolve to may change."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def lines_of(resolved: Resolved) -> list[str]:
    """`--print-config`: key, value and source of every setting. None of them is a secret."""
    rows = [(key, _shown(getattr(resolved.settings, key)), resolved.sources[key]) for key in FIELDS]
    wide = max(len(key) for key, _, _ in rows), max(len(value) for _, value, _ in rows)
    return [f"{key:<{wide[0]}}  {value:<{wide[1]}}  {source}" for key, value, source in rows]


def _shown(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{device}={size}" for device, size in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
