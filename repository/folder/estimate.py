"""What a load will need, and where it may go, judged before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from repository.config import ModelConfig
from repository.errors import ConfigError

MIB = 2**20
# Copies of the weights that stay in memory: onnxruntime keeps one, in its own layout.
ONNX_COPIES = 1.0
# A session's arenas, thread pool and optimised graph, beside a forked worker's own few MiB.
ONNX_BASE = 16 * MIB
# An interpreter's own pages once user code has imported this and that; the files stand for weights.
PYTHON_BASE = 32 * MIB
USES_GPU = frozenset({"onnx", "python"})


def bytes_needed(config: ModelConfig, weights: int) -> int:
    """For all instances together. `weights`: bytes of the files that the backend will read."""
    if config.memory is not None:
        return config.memory
    copies, base = (1.0, PYTHON_BASE) if config.backend == "python" else (ONNX_COPIES, ONNX_BASE)
    return config.instances * (int(weights * copies) + base)


def devices_for(config: ModelConfig, gpus: Sequence[str] | None) -> tuple[str, ...]:
    """Where it may go, best first. `gpus` are this machine's; None: not known, nothing is refused.

    Raises ConfigError where the config asks for a GPU that is not there.
    """
    wish = config.device
    if wish == "auto":
        return (*(gpus or ()), "cpu") if config.backend in USES_GPU else ("cpu",)
    if wish == "cuda":
        if gpus is None:
            return ("cuda:0",)
        if not gpus:
            raise ConfigError(
                "'device' is cuda, but this machine has no GPU that the server may use",
                hint="set device: auto or cpu",
            )
        return tuple(gpus)
    if wish != "cpu" and gpus is not None and wish not in gpus:
        raise ConfigError(
            f"'device' is {wish}, but this machine has {', '.join(gpus) or 'no GPU'}",
            hint="set device: auto or cpu",
        )
    return (wish,)


def weights_of(sizes: dict[str, int], backend: str | None, needed: Collection[str]) -> int:
    """Bytes that a backend reads: the files `needed` for onnx, the whole folder for python."""
    if backend == "python":
        return sum(sizes.values())
    return sum(size for path, size in sizes.items() if path in needed)
