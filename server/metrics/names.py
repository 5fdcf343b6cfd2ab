"""Every series that `/metrics` may show: its name, kind, labels, help and buckets. One table.

Rules: base units (seconds, bytes, ratio 0..1); counters end in `_total`; label values come only
from the known repository and from fixed lists, never from a request, a path or an error text. A
model costs at most about 45 lines, and buckets are most of them: add one only for a question that
somebody asks. This file computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "modeldepot_"

DURATION_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
QUEUE_S = (0.001, 0.01, 0.1)
BATCH = (1.0, 4.0, 16.0)
FIRST_TOKEN_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LOAD_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
SCAN_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True, eq=False)  # each is itself: they are keys of many dictionaries
class Family:
    """`name` is without the prefix and, for a counter, without `_total`. unknown: of no kind that the
    format has, as Triton's counters are to us."""

    name: str
    kind: Literal["gauge", "counter", "histogram", "unknown"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    prefix: str = PREFIX

    @property
    def full(self) -> str:
        return self.prefix + self.name


def _gauge(name: str, help: str, *labels: str) -> Family:
    return Family(name, "gauge", help, labels)


def _counter(name: str, help: str, *labels: str) -> Family:
    return Family(name, "counter", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Family:
    return Family(name, "histogram", help, labels, buckets)


# the server
BUILD_INFO = _gauge(
    "build_info", "What runs; always 1.", "version", "python", "torch", "onnxruntime", "cuda"
)
SERVER_READY = _gauge("server_ready", "1 once what was wanted at start has settled.")
SERVER_DRAINING = _gauge("server_draining", "1 while the server is shutting down.")
AUTH_FAILURES = _counter("auth_failures", "Requests refused for want of a key or scope.", "scope")
LOAD_SHED = _counter("load_shed", "Requests turned away to protect the server.", "reason")
ILLEGAL_MOVES = _counter("illegal_moves", "State steps the table does not have: a bug.")

# models: state
MODELS = _gauge("models", "Models of the repository, by state.", "state")
MODEL_STATE = _gauge("model_state", "1 for the state it is in.", "model", "version", "state")
MODEL_TRANSITIONS = _counter(
    "model_state_transitions", "Changes of a generation's public state.", "model", "from", "to"
)
MODEL_CHANGED = _gauge(
    "model_last_transition_timestamp_seconds", "When its state last changed.", "model"
)
MODEL_INFO = _gauge(
    "model_info", "What serves; always 1.", "model", "version", "backend", "device", "generation"
)
MODEL_PINNED = _gauge("model_pinned", "1 where nobody may drive it out; else not there.", "model")
MODEL_ASLEEP = _gauge(
    "model_asleep", "1 while it sleeps in host memory, 0 where it could.", "model"
)
MODEL_SLEEPS = _counter("model_sleeps", "Times that it was put to sleep.", "model")
MODEL_WAKES = _counter("model_wakes", "Times that it was woken.", "model")

# models: memory
MODEL_MEMORY = _gauge(
    "model_memory_bytes", "As the worker reports it.", "model", "version", "device", "kind"
)
MODEL_ESTIMATED = _gauge(
    "model_memory_estimated_bytes", "Estimated before the load.", "model", "version", "device"
)
MODEL_RESERVED = _gauge(
    "model_memory_reserved_bytes", "Held of the device's budget.", "model", "version", "device"
)
MODEL_RECLAIMED = _gauge(
    "model_memory_reclaimed_ratio", "Freed of what was to come back, at its last unload.", "model"
)
MODEL_LEAKED = _counter(
    "model_memory_leaked_bytes", "Not given back by a device when its workers had ended.", "model"
)

# models: loads
MODEL_LOAD = _counter("model_load", "Loads that ended.", "model", "trigger", "outcome")
MODEL_LOAD_FAILURES = _counter("model_load_failures", "Why loads failed.", "model", "reason")
MODEL_LOAD_DURATION = _histogram(
    "model_load_duration_seconds", "Loads, by phase.", LOAD_S, "backend", "phase"
)
MODEL_LAST_LOAD = _gauge(
    "model_last_load_duration_seconds", "Its last successful load, from the wish on.", "model"
)
MODEL_UNLOAD = _counter(
    "model_unload", "Generations that left as asked.", "model", "trigger", "outcome"
)
MODEL_UNLOAD_DURATION = _histogram(
    "model_unload_duration_seconds", "From the order to leave to the memory's return.", LOAD_S,
    "backend",
)  # fmt: skip
MODEL_EVICTIONS = _counter("model_evictions", "Told to leave or to sleep.", "model", "reason")

# the repository
SCAN_DURATION = _histogram("repository_scan_duration_seconds", "Whole scans.", SCAN_S, "repository")
SCANS = _counter("repository_scans", "Whole scans.", "repository")
REPOSITORY_MODELS = _gauge("repository_models", "Models the last scan found.", "repository")
WATCH_EVENTS = _counter("watch_events", "Changes that the watcher saw.", "repository", "action")
WATCH_LAG = _histogram(
    "watch_lag_seconds", "From a file's last change to the new generation serving.", LOAD_S
)
WATCH_UP = _gauge("watch_up", "1 while the watcher runs.", "repository")
WATCH_OVERFLOWS = _counter(
    "watch_overflows", "Changes that a regular look found and no event had told.", "repository"
)

# inference
REQUESTS = _counter(
    "inference_requests", "Requests that ended.", "model", "version", "protocol", "outcome"
)
SAMPLES = _counter("inference_samples", "Rows given to the model.", "model", "version")
EXECUTIONS = _counter("inference_executions", "Calls of the model.", "model", "version")
DURATION = _histogram(
    "inference_duration_seconds", "Successful requests, end to end.", DURATION_S,
    "model", "version",
)  # fmt: skip
QUEUED = _histogram(
    "inference_queue_duration_seconds", "Waiting for a batch (models that batch).", QUEUE_S,
    "model", "version",
)  # fmt: skip
PHASES = _counter(
    "inference_phase_seconds", "Time of successful requests, by phase.", "model", "version", "phase"
)
BATCH_SIZE = _histogram(
    "inference_batch_size", "Size of the batch that a request was part of.", BATCH, "model"
)
TOKENS = _counter("tokens", "Read (prompt) and written.", "model", "version", "kind")
FIRST_TOKEN = _histogram(
    "first_token_seconds", "From a request for a text to its first token.", FIRST_TOKEN_S,
    "model", "version",
)  # fmt: skip
QUEUE_LENGTH = _gauge("inference_queue_length", "Requests that wait.", "model", "version")
DEMAND_WAITING = _gauge("demand_waiting", "Requests that wait for it to load.", "model")
IN_FLIGHT = _gauge("inference_in_flight", "Requests inside, waiting included.", "model", "version")

# answers that are kept
CACHE_HITS = _counter(
    "response_cache_hits", "Requests whose answer was there already.", "model", "version"
)
CACHE_MISSES = _counter(
    "response_cache_misses", "Requests that were looked up and not found.", "model", "version"
)
CACHE_LIMIT = _gauge("response_cache_limit_bytes", "Bytes that answers may take.")
CACHE_SIZE = _gauge("response_cache_bytes", "Bytes that they take, of the server's own memory.")
CACHE_ENTRIES = _gauge("response_cache_entries", "Answers that are kept.")
CACHE_EVICTIONS = _counter(
    "response_cache_evictions", "Answers that left because others needed their room."
)

# adapters; at most MOST_ADAPTERS of a model have series of their own, the others are OTHERS together
MOST_ADAPTERS = 100
OTHERS = "_other"
ADAPTER_STATE = _gauge(
    "adapter_state", "1 for the state it is in (of _other: how many).", "model", "adapter", "state"
)
ADAPTER_MEMORY = _gauge("adapter_memory_bytes", "Of its tensors, once.", "model", "adapter")
ADAPTER_REQUESTS = _counter("adapter_requests", "Requests that named it.", "model", "adapter")
ADAPTER_LOAD = _counter(
    "adapter_load", "Times that workers took it, or would not.", "model", "adapter", "outcome"
)

# workers
WORKER_UP = _gauge("worker_up", "1 while its workers serve, 0 when it failed.", "model", "device")
WORKER_MEMORY = _gauge("worker_memory_bytes", "Host memory of its workers.", "model", "device")
WORKER_RESTARTS = _counter(
    "worker_restarts", "New generations after one had failed.", "model", "device"
)

# devices: the ledger's view of each, and what NVML says of each GPU
DEVICE_BUDGET = _gauge("device_memory_budget_bytes", "What models may take.", "device")
DEVICE_RESERVED = _gauge("device_memory_reserved_bytes", "What models hold of it.", "device")
GPU_INFO = _gauge("gpu_info", "The GPU; always 1.", "gpu", "gpu_uuid", "name", "driver")
GPU_UP = _gauge("gpu_collector_up", "1 while the device answers.", "gpu", "gpu_uuid")
GPU_TOTAL = _gauge("gpu_memory_total_bytes", "As NVML says.", "gpu", "gpu_uuid")
GPU_USED = _gauge("gpu_memory_used_bytes", "As NVML says, by everybody.", "gpu", "gpu_uuid")
GPU_FREE = _gauge("gpu_memory_free_bytes", "As NVML says.", "gpu", "gpu_uuid")
GPU_BUDGET = _gauge("gpu_memory_budget_bytes", "What models may take.", "gpu", "gpu_uuid")
GPU_RESERVED = _gauge("gpu_memory_reserved_bytes", "What models hold of it.", "gpu", "gpu_uuid")
GPU_ATTRIBUTED = _gauge(
    "gpu_memory_attributed_bytes", "What our workers say they use.", "gpu", "gpu_uuid"
)
GPU_UNATTRIBUTED = _gauge(
    "gpu_memory_unattributed_bytes", "Used, but not by a worker of ours.", "gpu", "gpu_uuid"
)
GPU_UTILIZATION = _gauge("gpu_utilization_ratio", "Busy share of the time.", "gpu", "gpu_uuid")
GPU_POWER = _gauge("gpu_power_watts", "Drawn now.", "gpu", "gpu_uuid")

ALL: tuple[Family, ...] = tuple(v for v in list(globals().values()) if isinstance(v, Family))
