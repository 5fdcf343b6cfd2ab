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
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from repository.errors import ConfigError, RepositoryError
from server.values import (
    MANY,
    budget,
    flag,
    names,
    names_whole,
    number,
    one_of,
    path,
    paths,
    seconds,
    shares,
    size,
    text,
)  # fmt: skip

ENV = "MODELDEPOT_"
# Variables with our prefix that are not settings of the server: the command's own, and those that
# Kubernetes injects for a Service called "modeldepot", MODELDEPOT_PORT=tcp://10.0.0.1:8000 among
# them.
_NOT_OURS = re.compile(r"SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_.*|URL|API_KEY|CONFIG")
_LINK = re.compile(r"(tcp|udp|sctp)://")


class Setting(NamedTuple):
    """What its flag's help says, how a value is read, and how the flag is spelled besides: as users of
    Triton know it."""

    help: str
    read: Callable[[Any, Path], Any]
    also: tuple[str, ...] = ()


Mode = Literal["poll", "explicit", "none"]
Watch = Literal["notify", "poll", "off"]
Level = Literal["debug", "info", "warning", "error"]
Budget = Mapping[str, int]
Shares = Mapping[str, float]
LOAD_SLOTS = max(4, 2 * (os.cpu_count() or 1))
MAX_BODY = 64 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Times in seconds, sizes in bytes."""

    repo: Annotated[Path, Setting("folder of models", path)] = Path("/models")
    model_repository: Annotated[
        tuple[Path, ...], Setting("folder of models; several are one repository", paths)
    ] = ()
    host: Annotated[str, Setting("address to listen on", text, ("http-address",))] = "127.0.0.1"
    port: Annotated[
        int, Setting("port; 0 takes a free one", number(int, 0, 65535), ("http-port",))
    ] = 8000
    allow_grpc: Annotated[bool, Setting("answer gRPC (KServe V2), on a port of its own", flag)] = (
        True
    )
    grpc_port: Annotated[int, Setting("its port; 0 takes a free one", number(int, 0, 65535))] = 8001
    grpc_max_message: Annotated[int, Setting("largest gRPC message, such as 64MiB", size)] = (
        2**31 - 1
    )
    tls_certificate: Annotated[
        Path | None, Setting("certificate chain (PEM); HTTP and gRPC are encrypted then", path)
    ] = None
    tls_key: Annotated[Path | None, Setting("its private key (PEM)", path)] = None
    tls_client_ca: Annotated[
        Path | None, Setting("clients must show a certificate of this authority (PEM)", path)
    ] = None
    model_control_mode: Annotated[
        Mode,
        Setting(
            "poll: all models, watched; explicit: those asked for; none: all, at start only",
            one_of("poll", "explicit", "none"),
        ),
    ] = "poll"
    load_model: Annotated[
        tuple[str, ...], Setting("models loaded at start in explicit mode; * is all", names)
    ] = ()
    watch: Annotated[
        Watch, Setting("how changes of files are seen", one_of("notify", "poll", "off"))
    ] = "notify"
    settle: Annotated[float, Setting("seconds without a change before files count", seconds)] = 1.0
    poll_secs: Annotated[
        float,
        Setting(
            "seconds between two looks with --watch poll",
            number(float, 0.05, MANY),
            ("repository-poll-secs",),
        ),
    ] = 1.5
    api_keys: Annotated[Path | None, Setting("file of API keys", path)] = None
    insecure: Annotated[bool, Setting("allow a public address without API keys", flag)] = False
    trust_code: Annotated[bool, Setting("allow models that bring their own code", flag)] = False
    default_host: Annotated[
        Literal["process", "inline"],
        Setting("where a model runs that does not say", one_of("process", "inline")),
    ] = "process"
    memory_budget: Annotated[
        Budget, Setting('bytes that models may take, "cpu=2GiB,cuda:0=70GiB"', budget)
    ] = field(default_factory=dict)
    host_tier: Annotated[
        int | None,
        Setting("host memory for models that sleep, such as 8GiB; 0: none do", size),
    ] = None
    pin_cap: Annotated[
        Shares,
        Setting('share of a device that pinned models may hold, "cuda:0=0.5"', shares),
    ] = field(default_factory=dict)
    room_wait: Annotated[
        float, Setting("seconds that a load waits for others to leave", seconds)
    ] = 10.0
    crash_limit: Annotated[
        int, Setting("crashes in a row after which a load is given up", number(int, 1, 1000))
    ] = 3
    allow_cpu_fallback: Annotated[
        bool,
        Setting("a model for a GPU may run on the CPU where the GPU cannot be used", flag),
    ] = False
    state_dir: Annotated[Path | None, Setting("folder for snapshots and state", path)] = None
    forget: Annotated[
        bool, Setting("start clean: what was said by call before counts no more", flag)
    ] = False
    allowed_root: Annotated[
        tuple[Path, ...],
        Setting("folder beside REPO that models and adapters may be loaded from", paths),
    ] = ()
    default_model: Annotated[
        str | None, Setting("model of a POST /v1/load_model that names none", text)
    ] = None
    enable_inline_model_loading: Annotated[
        bool, Setting("a request for a model that is not loaded loads it", flag)
    ] = False
    demand_timeout: Annotated[
        float,
        Setting(
            "seconds that a request waits for its model to load",
            number(float, 0.1, MANY),
        ),
    ] = 60.0
    demand_queue: Annotated[
        int,
        Setting("requests that may wait for one model to load", number(int, 1, MANY)),
    ] = 256
    min_residency: Annotated[
        float,
        Setting(
            "seconds that a model in use stays before a request for another drives it out",
            seconds,
        ),
    ] = 2.0
    load_slots: Annotated[
        int, Setting("loads that run at once", number(int, 1, 1024), ("model-load-thread-count",))
    ] = LOAD_SLOTS
    model_load_retry_count: Annotated[
        int, Setting("further attempts at a load that failed", number(int, 0, 100))
    ] = 0
    model_config_name: Annotated[
        str | None, Setting("read configs/NAME.pbtxt of a model in place of config.pbtxt", text)
    ] = None
    disable_auto_complete_config: Annotated[
        bool, Setting("a config.pbtxt must say all: nothing is taken from the model", flag)
    ] = False
    allow_client_shm: Annotated[
        bool, Setting("clients may register shared memory of theirs", flag)
    ] = False
    allow_file_override: Annotated[
        bool, Setting("a load may bring the model's files with it", flag)
    ] = False
    http_restricted_api: Annotated[
        tuple[str, ...],
        Setting("APIs that need a header: GROUP[,GROUP]:HEADER=VALUE", names_whole),
    ] = ()
    grpc_restricted_protocol: Annotated[
        tuple[str, ...], Setting("the same over gRPC", names_whole)
    ] = ()
    trace_config: Annotated[
        tuple[str, ...], Setting("tracing: KEY=VALUE or triton,KEY=VALUE", names_whole)
    ] = ()
    load_timeout: Annotated[
        float, Setting("seconds that a load may take", number(float, 0.1, MANY))
    ] = 600.0
    drain: Annotated[float, Setting("seconds an unload waits for running requests", seconds)] = 30.0
    grace: Annotated[
        float, Setting("seconds from SIGTERM to the exit", seconds, ("exit-timeout-secs",))
    ] = 30.0
    max_body: Annotated[
        int, Setting("largest inference request, such as 64MiB", size, ("http-max-input-size",))
    ] = MAX_BODY
    max_queue: Annotated[
        int, Setting("requests that may wait for one model", number(int, 1, MANY))
    ] = 1024
    response_cache_size: Annotated[
        int | None,
        Setting(
            "bytes of answers that are kept for models that want it, such as 64MiB",
            size,
            ("response-cache-byte-size",),
        ),
    ] = None
    keepalive: Annotated[
        float,
        Setting("seconds between signs of life of event streams", number(float, 0.1, MANY)),
    ] = 15.0
    fast_path: Annotated[bool, Setting("answer inference below ASGI", flag)] = True
    metrics_port: Annotated[
        int | None,
        Setting("a port of its own for /metrics, as Triton's 8002", number(int, 0, 65535)),
    ] = None
    triton_metrics: Annotated[bool, Setting("show Triton's names (nv_*) in /metrics too", flag)] = (
        True
    )
    server_name: Annotated[str, Setting("name in the server's metadata", text)] = "modeldepot"
    log_format: Annotated[
        Literal["text", "json"], Setting("how log lines look", one_of("text", "json"))
    ] = "text"
    log_level: Annotated[
        Level, Setting("least level logged", one_of("debug", "info", "warning", "error"))
    ] = "info"
    strict_readiness: Annotated[
        bool, Setting("not ready while any wanted model does not serve", flag)
    ] = False
    exit_on_error: Annotated[bool, Setting("exit 1 if a model fails at start", flag)] = False


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
    _one_repository(values, sources)
    settings = Settings(**values)
    if settings.state_dir is None:
        folder = _state_dir((settings.repo, *settings.model_repository), environ)
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


def _one_repository(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Of all folders that were named, `repo` is the first, and `model_repository` are the others. Raises
    ConfigError where one lies in another: its models would be there twice."""
    more: tuple[Path, ...] = values.get("model_repository", ())
    if not more:
        return
    if "repo" not in values:
        sources["repo"] = sources["model_repository"]
    named = (values["repo"], *more) if "repo" in values else more
    real = {path.resolve(): path for path in reversed(named)}
    folders = [path for path in dict.fromkeys(named) if real[path.resolve()] is path]
    for one in real:
        for other in real:
            if one in other.parents:
                raise ConfigError(
                    f"the folder '{other.name}' lies in '{one.name}', which is named too; name one of "
                    "them",
                    where=sources["model_repository"],
                )
    values["repo"], values["model_repository"] = folders[0], tuple(folders[1:])


def _state_dir(repos: tuple[Path, ...], environ: Mapping[str, str]) -> Path:
    """One folder per repository, whatever the order of its folders, so that two servers on one machine
    do not meet."""
    base = environ.get("XDG_STATE_HOME") or ""
    # XDG: a relative path there is to be ignored.
    root = (
        Path(base) if base.startswith("/") else Path(environ.get("HOME") or "/tmp") / ".local/state"
    )
    whole = b"\0".join(sorted(os.fsencode(repo.resolve()) for repo in repos))
    name = hashlib.sha256(whole).hexdigest()[:16]
    return root / "modeldepot" / name


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
