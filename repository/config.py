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
    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


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


class WarmupRequest(_Part, frozen=True):
    """One sort of warm-up request, sent `count` times.

    `data` says how inputs are filled; -1 in a shape becomes `size`, the batch axis `batch_size`.
    """

    batch_size: int = 1
    count: int = 1
    size: int = 1
    data: Literal["zero", "random"] = "zero"


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


class ModelConfig(_Part, frozen=True):
    """Every key is optional. `warmup`: None lets the server decide (one request of zeros where every
    input is numeric; its failure is only noted), () switches it off."""

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
    options: dict[str, Any] = msgspec.field(default_factory=dict)  # the backend's own
