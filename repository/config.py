"""The one configuration schema of a model. Readers (yaml, pbtxt, request) fill it; nothing else does.

Shapes: with max_batch_size > 0 the batch axis is not written (Triton's rule); with 0 a shape is
exactly what clients send. -1 is any size.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TensorConfig(_Part, frozen=True):
    """`shape` is what clients see; `reshape` what the model itself has, where that differs (neither
    with the batch axis). `labels`: a file in the model's folder, one name of a class per line."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    reshape: tuple[int, ...] | None = None
    labels: str = ""


TimeoutAction: TypeAlias = Literal["reject", "delay"]


class LevelPolicy(_Part, frozen=True):
    """What one priority has for itself; None: as for all."""

    priority: int
    max_queue: int | None = None
    timeout_us: int | None = None
    timeout_action: TimeoutAction | None = None
    allow_timeout_override: bool | None = None


POLICY = ("max_queue", "timeout_us", "timeout_action", "allow_timeout_override")


class Batching(_Part, frozen=True):
    """How requests wait, and go together. All but the first three hold without batching too.

    `max_delay_us`: how long a lone request may wait for company. `preferred_sizes`: batches that
    go at once, without using up the delay. `max_queue`: waiting requests (of one priority) beyond
    which a new one is refused; 0: the server's limit. `timeout_us`: how long one may wait, 0: for
    ever; `timeout_action`: what becomes of it then; a request may shorten it only where
    `allow_timeout_override`. `priorities`: how many there are, 1 the highest.
    """

    enabled: bool = True
    max_delay_us: int = 0
    preferred_sizes: tuple[int, ...] = ()
    preserve_ordering: bool = False
    max_queue: int = 0
    timeout_us: int = 0
    timeout_action: TimeoutAction = "reject"
    allow_timeout_override: bool = True
    priorities: int = 0
    default_priority: int = 0
    by_priority: tuple[LevelPolicy, ...] = ()

    def policy(self, priority: int) -> LevelPolicy:
        """What holds for that priority, with nothing left unsaid."""
        own = next((level for level in self.by_priority if level.priority == priority), None)
        said = msgspec.structs.asdict(own) if own is not None else {}
        return LevelPolicy(
            priority=priority,
            **{k: getattr(self, k) if said.get(k) is None else said[k] for k in POLICY},
        )


class VersionPolicy(_Part, frozen=True):
    """Exactly one of the three."""

    latest: int | None = None
    specific: tuple[int, ...] | None = None
    all: bool = False


class WarmupInput(_Part, frozen=True):
    """`shape` without the batch axis; `data`: zero, random, or a file in the folder warmup/ that holds
    the tensor's bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: str = "zero"


class WarmupRequest(_Part, frozen=True):
    """One sort of warm-up request, sent `count` times.

    `data` says how inputs are filled; -1 in a shape becomes `size`, the batch axis `batch_size`.
    `inputs` are said one by one where that is not enough.
    """

    batch_size: int = 1
    count: int = 1
    size: int = 1
    data: Literal["zero", "random"] = "zero"
    name: str = ""
    inputs: tuple[WarmupInput, ...] = ()


class Checks(_Part, frozen=True):
    """How near golden outputs must be: |got - golden| <= atol + rtol * |golden|; other types exact."""

    enabled: bool = True
    atol: float = 1e-5
    rtol: float = 1e-4


class Adapters(_Part, frozen=True):
    """LoRA adapters of a model that can take them. What lies in `adapters/` is registered.

    slots        how many are in the model's own memory at once, beside the model without any
    max_rank     the largest rank that a slot holds; one of a higher rank is refused
    host_memory  bytes of them that are kept beside the model, ready to be put into a slot
    """

    enabled: bool = True
    slots: int = 8
    max_rank: int = 16
    host_memory: int = 256 << 20


class EnsembleStep(_Part, frozen=True):
    """One model of an ensemble; `version` None: the newest.

    inputs    the model's input -> the ensemble's tensor that it gets
    outputs   the model's output -> the ensemble's tensor that it becomes
    """

    model: str
    version: int | None = None
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}


class Ensemble(_Part, frozen=True):
    """Models one behind the other, as Triton's ensemble_scheduling has it. `max_inflight`: answers of
    a decoupled step that may wait for the next one; 0: any number."""

    steps: tuple[EnsembleStep, ...] = ()
    max_inflight: int = 0


class Control(_Part, frozen=True):
    """A tensor that tells the model where in its sequence a request is. `off` and `on`: what stands for
    no and yes; of corrid neither, which is the sequence's own id."""

    name: str
    kind: Literal["start", "end", "ready", "corrid"]
    datatype: str
    off: float = 0.0
    on: float = 1.0


class State(_Part, frozen=True):
    """What the model says as `output` comes back as `input` with the sequence's next request. `initial`:
    a file in initial_state/ with the first one's bytes; "": zeros. -1 in `shape` is 1 in the first."""

    input: str
    output: str
    datatype: str
    shape: tuple[int, ...]
    initial: str = ""
    initial_shape: tuple[int, ...] | None = None


class Sequences(_Part, frozen=True):
    """Requests that belong together, as Triton's sequence_batching has it.

    direct   a sequence has one place in the batch of one instance from its first request to its last
    oldest   at most one request of each sequence is in a batch; the oldest sequences come first
    idle_us        a sequence that has been silent so long is over
    max_candidates   oldest: sequences of one instance that are considered at once
    min_slots_ratio  direct: share of places that should be filled before `max_delay_us` is over
    iterative      the model may ask to be called again for the same request
    """

    strategy: Literal["direct", "oldest"] = "direct"
    idle_us: int = 1_000_000
    controls: tuple[Control, ...] = ()
    states: tuple[State, ...] = ()
    max_delay_us: int = 0
    min_slots_ratio: float = 0.0
    max_candidates: int = 0
    preferred_sizes: tuple[int, ...] = ()
    preserve_ordering: bool = False
    iterative: bool = False

    @property
    def own_inputs(self) -> frozenset[str]:
        """What the server itself gives the model; clients neither see nor send them."""
        return frozenset([c.name for c in self.controls] + [s.input for s in self.states])

    @property
    def own_outputs(self) -> frozenset[str]:
        return frozenset(state.output for state in self.states)


class ModelConfig(_Part, frozen=True):
    """Every key is optional. `warmup`: None lets the server decide (one request of zeros where every
    input is numeric; its failure is only noted), () switches it off. `triton`: what its config.pbtxt
    says, as protobuf's JSON has it (their field names), for models and clients that ask for it;
    everything above is read from it."""

    backend: str | None = None
    max_batch_size: int = 0
    inputs: tuple[TensorConfig, ...] | None = None
    outputs: tuple[TensorConfig, ...] | None = None
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    instances: int = 1
    host: Literal["inline", "process"] | None = None
    batching: Batching | None = None
    version_policy: VersionPolicy = VersionPolicy(latest=1)
    reload: Literal["auto", "overlap", "replace"] = "auto"
    warmup: tuple[WarmupRequest, ...] | None = None
    checks: Checks = Checks()
    pin: bool = False
    ttl_s: float | None = None  # idle seconds after which the model leaves
    sleep_s: float | None = None  # idle seconds after which it sleeps in host memory
    evict_to: Literal["auto", "host", "disk"] = "auto"  # host: it sleeps; auto: a GPU's models do
    priority: int = 0  # higher stays longer when memory is short
    memory: int | None = None  # bytes one generation needs; None: estimated from the files
    device_share: float | None = None  # the most that it may need, 0..1 of its device's budget
    aliases: tuple[str, ...] = ()
    adapters: Adapters = Adapters()
    decoupled: bool = False  # a request may have any number of answers
    ensemble: Ensemble | None = None
    sequences: Sequences | None = None
    response_cache: bool = False  # an answer may be given again to a request that says the same
    devices: tuple[str, ...] | None = None  # of each instance, in place of `device` and `instances`
    metric_tags: dict[str, str] = {}  # further labels of its metrics
    triton: dict[str, Any] = msgspec.field(default_factory=dict)
    options: dict[str, Any] = msgspec.field(default_factory=dict)  # the backend's own
