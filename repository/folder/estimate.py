"""What a load will need, and where it may go, judged before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from repository.adapters.sources import AdapterSource
from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.huggingface import Described

MIB = 2**20
MOST = 2**56  # whatever a config.json says: it fits nowhere, and into every message
# What a worker has of its own beside the weights, measured with tiny models after a first run.
BASES = {
    # onnxruntime's arenas, thread pool and optimised graph; its copy of the weights is in its own
    # layout, and the file's is given back.
    "onnx": 16 * MIB,
    # An interpreter's own pages once user code has imported this and that; the files stand for
    # weights.
    "python": 32 * MIB,
    "triton_python": 32 * MIB,
    "torch_module": 16 * MIB,
    "torch_export": 16 * MIB,
    "torchscript": 16 * MIB,
    # transformers' modules, the tokenizer and the first run's buffers: 32 to 42 MiB.
    "text": 48 * MIB,
    "embed": 48 * MIB,
    "ensemble": 0,  # its models have their own
}
# Memory of a tokenizer for every byte of its tokenizer.json: 80 MiB for 130,000 words in 8.5 MiB.
OF_WORDS = 9
USES_GPU = frozenset(BASES) - {"ensemble"}
TAKES_ADAPTERS = frozenset({"embed", "text", "torch_module"})
NO_GPU = "but this machine has no GPU that the server may use"
# The text engine's own defaults, for a config that does not say.
SLOTS = 8
LONGEST = 4096  # tokens

# Bytes of one number, by the names that torch and people use, and by those of safetensors.
ITEMSIZE = {
    "float64": 8, "double": 8, "float32": 4, "float": 4, "fp32": 4,
    "float16": 2, "half": 2, "fp16": 2, "bfloat16": 2, "bf16": 2,
}  # fmt: skip
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E5M2": 1, "F8_E4M3": 1}

Tensors = Iterable[tuple[str, int, int]]  # (safetensors datatype, numbers, bytes)


def bytes_needed(config: ModelConfig, weights: int, more: int = 0) -> int:
    """For all instances together. `weights`: bytes of what the backend will read, as it lies in
    memory then; `more`: what it makes room for beside them (KV, adapters)."""
    if config.memory is not None:
        return config.memory
    needed = config.instances * (weights + more + BASES.get(config.backend or "", 0))
    return min(needed, MOST)


def loaded_size(config: ModelConfig, described: Described | None) -> int:
    """Bytes of every floating number once it is loaded; 0: as it lies in the file."""
    said = _itemsize(config.options.get("dtype"))
    if said or config.backend != "text":
        return said
    return 2 if described is not None and _itemsize(described.dtype) == 2 else 4


def weights_of(tensors: Tensors, size: int) -> int:
    """Bytes of the tensors once they are loaded. `size`: see `loaded_size`."""
    return sum(
        numbers * size if size and datatype in FLOATS else length
        for datatype, numbers, length in tensors
    )


def number_size(tensors: Tensors, size: int) -> int:
    """Bytes of one number that the model computes with: as it was loaded, or as most of it is."""
    found = max((t for t in tensors if t[0] in FLOATS), key=lambda t: t[1], default=("F32", 0, 0))
    return size or max(2, FLOATS[found[0]])


def kv_bytes(config: ModelConfig, described: Described, size: int) -> int:
    """Keys and values of every slot, which the text engine takes when it loads. `size`: bytes of one
    number. 0 for a model without attention heads."""
    slots = _count(config, "slots") or SLOTS
    longest = _count(config, "max_len") or min(described.positions or LONGEST, LONGEST)
    per_token = 2 * described.layers * described.kv_heads * described.head_dim * size
    return per_token * slots * longest


def adapter_layers(adapters: Mapping[str, AdapterSource]) -> dict[str, int]:
    """The layers that any of them changes: in and out features of each, summed."""
    layers: dict[str, int] = {}
    for source in adapters.values():
        for name, (out, into) in (source.facts.modules if source.facts else {}).items():
            layers[name] = max(layers.get(name, 0), out + into)
    return layers


def adapter_bytes(config: ModelConfig, layers: Mapping[str, int], size: int) -> int:
    """Room for every slot, the one without an adapter too, at every layer (`adapter_layers`).
    `size`: bytes of one number."""
    if config.backend not in TAKES_ADAPTERS or not config.adapters.enabled:
        return 0
    return (config.adapters.slots + 1) * config.adapters.max_rank * sum(layers.values()) * size


def _itemsize(name: object) -> int:
    """0: not said, or a name that only the backend can judge."""
    return ITEMSIZE.get(name.removeprefix("torch."), 0) if isinstance(name, str) else 0


def _count(config: ModelConfig, key: str) -> int:
    value = config.options.get(key)
    return value if type(value) is int and value > 0 else 0


def devices_for(config: ModelConfig, gpus: Sequence[str] | None) -> tuple[str, ...]:
    """Where it may go, best first. `gpus` are this machine's; None: not known, nothing is refused.
    Where the config says that of each instance (`instances.spread`): all of these, GPUs first.

    Raises ConfigError where the config asks for a GPU that is not there.
    """
    if config.devices:
        return tuple(sorted(dict.fromkeys(config.devices), key=lambda d: d == "cpu"))
    wish = config.device
    if wish == "auto":
        return (*(gpus or ()), "cpu") if config.backend in USES_GPU else ("cpu",)
    if wish == "cuda":
        if gpus is None:
            return ("cuda:0",)
        if not gpus:
            raise ConfigError(f"'device' is cuda, {NO_GPU}", hint="set device: auto or cpu")
        return tuple(gpus)
    if wish != "cpu" and gpus is not None and wish not in gpus:
        raise no_such_gpu("device", wish, gpus)
    return (wish,)


def no_such_gpu(key: str, wish: str, gpus: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"'{key}' is {wish}, but this machine has {', '.join(gpus) or 'no GPU'}",
        hint="set device: auto or cpu",
    )


def files_of(sizes: Mapping[str, int], names: Collection[str]) -> int:
    """Bytes of these files."""
    return sum(size for path, size in sizes.items() if path in names)
