"""Sessions of onnxruntime for one order: made, compared with the wish, made again after sleep.

What a session is made of later is what it was made of first. A private copy is kept where it lies; any
other file is read into host memory when the model falls asleep, and only if it still is the file that
was loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from repository.backends import agreement, registry
from repository.backends.base import Order
from repository.backends.device_use import DeviceUse
from repository.backends.whole_file import read_whole
from repository.errors import FilesChangedError, IncompleteFilesError, LoadFailedError
from repository.folder.onnx_files import external_files
from repository.lifecycle.placement import HOST, Memory
from repository.messages import TensorSpec

TYPES = {
    "tensor(bool)": "BOOL", "tensor(string)": "BYTES",
    "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16",
    "tensor(int32)": "INT32", "tensor(int64)": "INT64", "tensor(float16)": "FP16",
    "tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(bfloat16)": "BF16",
}  # fmt: skip
OPTIMIZATION = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
ERRORS_ONLY = 3  # onnxruntime's log severity
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
SMALL = 64 << 20  # bytes of a model that may be loaded whole only to be looked at


def onnxruntime() -> Any:
    # Importing it starts a thread that sends usage data over the network, unless this is set.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


class Sessions:
    """`ort`: the onnxruntime module. Of its sessions one is there at a time, and its owner holds it."""

    def __init__(
        self, ort: Any, order: Order, *, use: Callable[[str], DeviceUse] = DeviceUse.of
    ) -> None:
        self.on_gpu = order.device.startswith("cuda")
        self._ort = ort
        self._order = order
        self._path = order.path / order.model_file
        self._stamp: tuple[int, int, int] | None = None
        self._weights = 0
        self._kept: bytes | None = None
        self._asleep = False
        self._use = use(order.device) if self.on_gpu else None

    def first(self) -> Any:
        """Raises LoadFailedError, IncompleteFilesError, and what onnxruntime raises."""
        providers = self._providers()
        self._stamp = self._look()
        if self._use is not None:
            self._use.before()
        session = self._made(os.fspath(self._path), providers)
        self._weights = self._size()
        if self._use is not None:
            self._use.after(0, model=self._weights)
        return session

    def keep(self) -> None:
        """Before the session goes. Raises FilesChangedError: what it was made of is there no more."""
        if not self._order.private:
            found = read_whole(self._path)
            if self._look() != self._stamp:
                raise FilesChangedError(
                    f"{self._path.name} was changed after it was loaded, so it could not be loaded "
                    "again; the model cannot sleep"
                )
            self._kept = found
        self._asleep = True

    def again(self) -> Any:
        """The same session after `keep`. Raises as `first`."""
        source = self._kept if self._kept is not None else os.fspath(self._path)
        session = self._made(source, self._providers())
        self._kept, self._asleep = None, False
        return session

    def check(self) -> None:
        """Without a device. A small model is loaded whole and held against the config; of others the
        file's outer form is walked, which shows a file that is cut off or no model."""
        order = self._order
        self._look()
        self._providers()
        files = external_files(self._path)
        if self._size() > SMALL or (files and not order.private):
            return
        options = self._options()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        agreement_of(
            self._ort.InferenceSession(os.fspath(self._path), options, providers=[CPU]), order
        )

    def memory(self) -> Memory:
        """As `abilities.Measures`. onnxruntime does not tell what its arena holds: on a GPU all that the
        process has there beside the weights is its workspace, the context included."""
        held: Memory = {HOST: {"weights": len(self._kept)}} if self._kept else {}
        if self._use is None:
            return held if self._asleep else {"cpu": {"weights": self._weights}}
        if self._asleep:
            return {**held, self._order.device: {"context": self._use.bytes(0)}}
        there = self._use.bytes(0, model=self._weights)
        weights = min(self._weights, there)
        return {self._order.device: {"weights": weights, "workspace": there - weights}}

    def _look(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            found = None
        if found is None or not self._path.is_file():
            raise IncompleteFilesError(f"{self._path.name} is missing")
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _size(self) -> int:
        """Of the file and of its external data."""
        files = {self._path, *(self._path.parent / e.location for e in external_files(self._path))}
        return sum(_bytes_of(file) for file in files)

    def _made(self, source: str | bytes, providers: list[Any]) -> Any:
        session = self._ort.InferenceSession(source, self._options(), providers=providers)
        # On a CUDA error in use it would go on with the CPU, again without a word.
        session.disable_fallback()
        self._check_device(session)
        return session

    def _options(self) -> Any:
        options, ort = self._order.config.options, self._ort
        level = registry.option(options, "optimization", str, "all")
        if level not in OPTIMIZATION:
            raise LoadFailedError(
                f"options.optimization is '{level}'; it must be one of {', '.join(OPTIMIZATION)}"
            )
        made = ort.SessionOptions()
        made.intra_op_num_threads = threads_of(self._order)
        made.inter_op_num_threads = registry.option(options, "inter_threads", int, 1)
        if registry.option(options, "execution", str, "sequential") == "parallel":
            made.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        made.log_severity_level = ERRORS_ONLY
        made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATION[level])
        made.enable_cpu_mem_arena = registry.option(options, "arena", bool, True)
        made.enable_mem_pattern = registry.option(options, "mem_pattern", bool, True)
        spin = "1" if registry.option(options, "spinning", bool, False) else "0"
        made.add_session_config_entry("session.intra_op.allow_spinning", spin)
        made.add_session_config_entry("session.inter_op.allow_spinning", spin)
        return made

    def _providers(self) -> list[Any]:
        order = self._order
        if not self.on_gpu:
            return [CPU]
        if CUDA not in self._ort.get_available_providers():
            if self._may_fall_back():
                return [CPU]
            raise LoadFailedError(
                f"the model wants {order.device}, but this onnxruntime was built without CUDA; "
                "install onnxruntime-gpu, set device to cpu, or allow the CPU instead "
                "(options.allow_cpu_fallback, or --allow-cpu-fallback for all models)"
            )
        # The CUDA libraries that came with torch serve; without this only the system's are found.
        self._ort.preload_dlls()
        index = order.device.partition(":")[2] or "0"
        cuda = {"device_id": index, "arena_extend_strategy": "kSameAsRequested"}
        limit = self._limit()
        if limit:
            cuda["gpu_mem_limit"] = str(limit)
        return [(CUDA, cuda), CPU]

    def _limit(self) -> int | None:
        """Bytes of the CUDA arena: what the config says, else this instance's part of what is reserved
        by the config's `memory`. None: as much as there is."""
        config = self._order.config
        given: int | None = registry.option(
            config.options, "gpu_mem_limit", int, self._order.extra.get("gpu_mem_limit")
        )
        if given or config.memory is None:
            return given
        return max(1, config.memory // max(1, config.instances))

    def _check_device(self, session: Any) -> None:
        """onnxruntime falls back to the CPU without a word: the wish is compared with the truth."""
        if not self.on_gpu or CUDA in session.get_providers() or self._may_fall_back():
            return
        raise LoadFailedError(
            f"the model wants {self._order.device}, but onnxruntime could not use it (no such GPU, or "
            "no matching CUDA libraries) and would run on the CPU; mend that, set device to cpu, or "
            "allow it (options.allow_cpu_fallback, or --allow-cpu-fallback for all models)"
        )

    def _may_fall_back(self) -> bool:
        default = bool(self._order.extra.get("cpu_fallback", False))
        options = self._order.config.options
        return bool(registry.option(options, "allow_cpu_fallback", bool, default))


def run_options(ort: Any, order: Order) -> Any:
    """None: nothing is said of single runs. On the CPU no GPU's arena can be told anything."""
    said = registry.option(order.config.options, "arena_shrinkage", str, "")
    on_gpu = order.device.startswith("cuda")
    arenas = [a for a in said.split(";") if a and (on_gpu or a.startswith("cpu"))]
    if not arenas or not registry.option(order.config.options, "arena", bool, True):
        return None
    made = ort.RunOptions()
    made.add_run_config_entry("memory.enable_memory_arena_shrinkage", ";".join(arenas))
    return made


def threads_of(order: Order) -> int:
    threads = registry.option(order.config.options, "threads", int, order.threads)
    return max(1, int(threads))


class Agreed(NamedTuple):
    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def agreement_of(session: Any, order: Order) -> Agreed:
    """Of the session and the config. Raises LoadFailedError."""
    have_in = [_spec(node, "input") for node in session.get_inputs()]
    asked = {t.name for t in order.config.inputs or ()}
    # What has a value in the file may be given one all the same, if the config lists it.
    more = [n for n in session.get_overridable_initializers() if n.name in asked]
    have_in += [msgspec.structs.replace(_spec(n, "input"), optional=True) for n in more]
    listed = {t.name for t in order.config.outputs or ()}
    # An output that cannot travel only matters if it is to be served.
    nodes = [n for n in session.get_outputs() if n.type in TYPES or not listed or n.name in listed]
    have_out = [_spec(node, "output") for node in nodes]
    config = agreement.completed(order.config, order.model, have_in, have_out)
    return Agreed(config.max_batch_size, *agreement.reconcile(config, have_in, have_out))


def _spec(node: Any, side: str) -> TensorSpec:
    datatype = TYPES.get(node.type)
    if datatype is None:
        hint = "export it without it" if side == "input" else "list the other outputs in the config"
        raise LoadFailedError(
            f"{side} '{node.name}' is of type {node.type}, for which KServe V2 has no datatype; "
            f"{hint}"
        )
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape or ())
    return TensorSpec(node.name, datatype, shape)


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
