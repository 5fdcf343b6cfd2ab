"""What the facade is told and what it tells: options in, reports out. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Options:
    """How a repository is run. Times in seconds, sizes in bytes.

    more_roots      further folders that make one repository with `root`
    mode            poll: all models wanted, watcher on; explicit: only those asked for; none: all at
                    start, no watcher
    load            names wanted at start in explicit mode; ("*",) is all
    watch           notify (inotify), poll, off
    allowed_roots   folders beside the repository that models and adapters may be loaded from
    forget          what was said by call before this start counts no more
    config_name     of a model, configs/NAME.pbtxt stands in place of config.pbtxt
    allow_files     models may load others with files that they bring
    completes       what a config.pbtxt leaves out of inputs and outputs is taken from the model
    load_retries    further attempts at a load that failed
    default_model   what is meant where no model is named; None: the only one
    on_demand       a request for a model that is not loaded loads it and waits, `demand_timeout_s` at
                    the longest, `demand_queue` requests for one model at the most
    min_residency_s how long a model that is asked for is safe from requests for another one
    memory_budget   device -> bytes the ledger may hand out; a device left out gets its own size
    host_tier       bytes of host memory in which models may sleep; None: a tenth of it; 0: none sleep
    response_cache  bytes of answers that are kept, for models that want it; 0: none are
    pin_cap         device -> share of its budget (0..1) that pinned models may hold; "": all others
    """

    root: Path
    more_roots: tuple[Path, ...] = ()
    mode: Literal["poll", "explicit", "none"] = "poll"
    load: tuple[str, ...] = ()
    watch: Literal["notify", "poll", "off"] = "notify"
    settle_s: float = 1.0
    poll_s: float = 1.5
    trust_code: bool = False
    default_host: Literal["process", "inline"] = "process"
    memory_budget: Mapping[str, int] = field(default_factory=dict)
    host_tier: int | None = None
    pin_cap: Mapping[str, float] = field(default_factory=dict)
    state_dir: Path | None = None
    load_slots: int = 4
    load_timeout_s: float = 600.0
    drain_s: float = 30.0
    stop_s: float = 5.0
    room_wait_s: float = 10.0
    crash_limit: int = 3
    max_queue: int = 1024
    cpu_fallback: bool = False
    allowed_roots: tuple[Path, ...] = ()
    forget: bool = False
    default_model: str | None = None
    on_demand: bool = False
    demand_timeout_s: float = 60.0
    demand_queue: int = 256
    min_residency_s: float = 2.0
    load_retries: int = 0
    config_name: str = ""
    completes: bool = True
    response_cache: int = 0
    allow_files: bool = False

    @property
    def roots(self) -> tuple[Path, ...]:
        return (self.root, *self.more_roots)

    @property
    def other_roots(self) -> tuple[Path, ...]:
        """What may be read beside `root`."""
        return (*self.more_roots, *self.allowed_roots)


@dataclass(frozen=True, slots=True)
class Brought:
    """What a load in Triton's way brings. `config`: a ModelConfig as JSON, in place of the model's
    config file; `files`: path in the model's folder -> content, in place of all its files. Neither: a
    plain load, which ends the files that an earlier one brought."""

    config: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadReport:
    model: str
    versions: tuple[int, ...]
    already: bool  # it was loaded before and nothing was done
    took_s: float
    applied: Mapping[str, tuple[Any, str]] = field(default_factory=dict)  # key -> value, source
    woken: bool = False  # it had been asleep


@dataclass(frozen=True, slots=True)
class UnloadReport:
    model: str
    generations: int  # how many ended
    bytes_freed: int  # reserved bytes that came back
    took_s: float
    drain_s: float = 0.0  # of it, until the last request had ended
    confirmed: bool = True  # every worker is gone, and with it all that it held
    leaked_bytes: int = 0  # bytes that a device had not given back when the workers had ended


@dataclass(frozen=True, slots=True)
class SleepReport:
    """`generations`: how many sleep now; `unloaded`: how many could not, and were unloaded instead, and
    `why`; `freed`: device -> bytes that came back; `host_bytes`: of the host tier that they hold."""

    model: str
    generations: int
    unloaded: int
    why: str
    freed: Mapping[str, int]
    host_bytes: int
    took_s: float


@dataclass(frozen=True, slots=True)
class PinReport:
    """`pinned`: what was asked for; `honoured`: by all that runs of it now; `why` not."""

    model: str
    pinned: bool
    honoured: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class UnloadAllReport:
    unloaded: tuple[UnloadReport, ...]
    errors: Mapping[str, str]  # model -> what went wrong


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of an ensemble. `version` None: the newest; `serving_version`: what it would be now;
    None: nothing."""

    model: str
    version: int | None
    serving_version: int | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a load would do now. Bytes on `device`, the first of `devices` (one for each instance).

    needs          device -> bytes, where it takes of several
    source         how the need is known: config, measured (of an earlier load), estimate
    would_evict    models that would leave, or sleep
    would_replace  its own older generation would have to leave first: there is a gap
    would_wake     it sleeps, and would be woken
    would_wait     what is free or may leave now is not enough; others are busy, or leaving
    """

    model: str
    would_load: bool
    bytes_needed: int
    bytes_free: int
    device: str
    would_evict: tuple[str, ...]
    message: str
    devices: tuple[str, ...] = ()
    needs: Mapping[str, int] = field(default_factory=dict)
    source: str = "estimate"
    would_replace: bool = False
    would_wake: bool = False
    would_wait: bool = False


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device, or the tier "host": budget >= reserved. `total`, `used`: as the device says (None: it
    cannot). `attributed`: what our workers say they use; `unattributed`: the rest of `used` (None: not
    known, or none of our business: host memory)."""

    device: str
    name: str
    budget: int
    reserved: int
    total: int | None = None
    used: int | None = None
    uuid: str = ""
    utilization: float | None = None  # 0..1
    power_w: float | None = None
    temperature_c: float | None = None
    attributed: int = 0
    unattributed: int | None = None
    driver: str = ""
    power_limit_w: float | None = None


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """Whoever computes on a GPU, ours or not. `pid`: the machine's, which inside a container is another
    than the one seen there. None: it is not told."""

    pid: int
    name: str | None
    used: int | None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One GPU at one moment; used + free = total. None: it does not tell.

    index               of "cuda:N"
    utilization         0..1, of the time in which it computed; memory_utilization: in which its
                        memory was read or written
    """

    index: int
    name: str
    uuid: str
    total: int
    used: int
    free: int
    utilization: float | None = None
    memory_utilization: float | None = None
    temperature_c: float | None = None
    processes: tuple[GpuProcess, ...] = ()
    power_w: float | None = None
    power_limit_w: float | None = None
    driver: str = ""  # its version


GpuUse: TypeAlias = tuple[GpuReport, ...]
Skill: TypeAlias = Literal["text_generation", "embeddings", "adapters"]


@dataclass(frozen=True, slots=True)
class HostReport:
    """This machine, or the part of it that the process was given. `busy`: 0..1 of all its cores."""

    busy: float
    total: int
    used: int


AdapterState: TypeAlias = Literal["settling", "registered", "loading", "loaded", "failed"]


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One adapter of a model, as it is now.

    src        relative to the model's folder (or, from elsewhere, with that folder's name)
    state      settling: its files are still being written; registered: known, and read when it is
               first asked for; loading: a worker is being told; loaded: in memory; failed: see `error`
    residence  nearest place to the model where it is: registered, host, device; "" where none runs
    error      why it cannot be used; of a loaded one: what is wrong with its replacement
    bytes      in host memory if it were there
    """

    name: str
    src: str
    state: AdapterState
    residence: str = ""
    origin: Literal["folder", "call"] = "folder"
    preload: bool = False
    pin: bool = False
    rank: int = 0
    bytes: int = 0
    error: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    requests: int = 0
    loads: int = 0
    failures: int = 0


@dataclass(slots=True)
class Lookups:
    """Requests that were looked up among the answers that are kept. Seconds: hashing and finding; of a
    miss also keeping its answer."""

    hits: int = 0
    misses: int = 0
    hit_s: float = 0.0
    miss_s: float = 0.0

    def add(self, other: Lookups) -> None:
        self.hits += other.hits
        self.misses += other.misses
        self.hit_s += other.hit_s
        self.miss_s += other.miss_s


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The answers that are kept: bytes that they may take and do; how many they are, and how many have
    left because others needed their room."""

    limit: int
    size: int
    entries: int
    evictions: int
