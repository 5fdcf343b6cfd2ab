"""Adapters from the disk into memory of our own: never mapped, never unpickled, and only while the
files are those that were judged.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from repository.adapters import peft
from repository.adapters.orders import AdapterFile, AdapterOrder
from repository.adapters.sources import AdapterFacts
from repository.backends.lora.matching import ModelLayers, features, weight_of
from repository.errors import AdapterRefusedError, IncompleteFilesError, NoRoomError
from repository.folder.safetensors_header import Header, header_of

CHUNK = 8 << 20  # bytes read at once
ALIGN = 64  # of every matrix in host memory
DATATYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Examined:
    """What an adapter is, and which layers of the model it changes: path of each -> its own rank."""

    facts: AdapterFacts
    ranks: dict[str, int]


@dataclass(frozen=True, slots=True)
class HostCopy:
    """An adapter in host memory, as it will lie in the slots: path of a layer -> `a` [r, in] and `b`
    [r, out], with the scaling in it, in the layer's datatype. `bytes`: of it all."""

    parts: dict[str, tuple[torch.Tensor, torch.Tensor]]
    bytes: int


def examine(order: AdapterOrder, model: ModelLayers) -> Examined:
    """Reads the header alone, and what PEFT saved of the model's own. Raises AdapterRefusedError."""
    with _opened(order) as files:
        paths = model.match(files.facts.modules)
        for name, layer in files.layers.items():
            for key in layer.own:
                _same_as_models(files, key, model[paths[name]])
        ranks = {paths[name]: layer.rank for name, layer in files.layers.items()}
        return Examined(files.facts, ranks)


def read(order: AdapterOrder, model: ModelLayers) -> HostCopy:
    """Raises AdapterRefusedError: its files changed, or hold what is no number."""
    with _opened(order) as files:
        paths = model.match(files.facts.modules)
        ranks = {name: layer.rank for name, layer in files.layers.items()}
        scalings = peft.scalings(files.config, ranks)
        copy = _room({paths[name]: rank for name, rank in ranks.items()}, model)
        for name, layer in files.layers.items():
            a, b = copy.parts[paths[name]]
            a.copy_(files.tensor(layer.a))
            b.copy_(_scaled(files.tensor(layer.b), scalings[name]).t())
            if not bool(a.isfinite().all() and b.isfinite().all()):
                raise AdapterRefusedError(
                    f"{name} holds what is no number, or too large for "
                    f"{str(a.dtype).removeprefix('torch.')}: save the adapter again"
                )
        return copy


def bytes_of(ranks: Mapping[str, int], model: ModelLayers) -> int:
    """Of a HostCopy."""
    return sum(sum(_sizes(model[path], rank)) for path, rank in ranks.items())


def _sizes(layer: nn.Module, rank: int) -> tuple[int, int]:
    """Bytes of `a` and `b`, each with what it needs so that the next one begins aligned."""
    found = features(layer)
    assert found is not None
    size = rank * weight_of(layer).element_size()
    out_bytes, in_bytes = (size * each for each in found)
    return in_bytes + -in_bytes % ALIGN, out_bytes + -out_bytes % ALIGN


def _room(ranks: Mapping[str, int], model: ModelLayers) -> HostCopy:
    """One piece of memory for all matrices; page-locked where it will be copied to a GPU."""
    size = bytes_of(ranks, model)
    on_gpu = any(weight_of(model[path]).is_cuda for path in ranks)
    memory = _memory(size, locked=on_gpu)
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    at = 0
    for path, rank in ranks.items():
        layer = model[path]
        matrices: list[torch.Tensor] = []
        found = features(layer)
        assert found is not None
        for width, room in zip(reversed(found), _sizes(layer, rank), strict=True):
            weight = weight_of(layer)
            end = at + rank * width * weight.element_size()
            matrices.append(memory[at:end].view(weight.dtype).view(rank, width))
            at += room
        parts[path] = (matrices[0], matrices[1])
    return HostCopy(parts, size)


def _memory(size: int, *, locked: bool = False) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=locked)
    except (MemoryError, RuntimeError) as error:  # torch says "out of memory" with either
        raise NoRoomError(f"no memory for the {size} bytes of it", needed=size) from error


def _scaled(b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Multiplied before it is rounded to the datatype of the model."""
    return b.to(torch.float64 if b.dtype == torch.float64 else torch.float32) * scaling


class _Files:
    """Both files of an adapter, open."""

    def __init__(self, config: bytes, fd: int, header: Header) -> None:
        self.config = config
        self._fd = fd
        self._header = header
        shapes = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        self.facts = peft.read_facts(config, shapes)
        # In the order of their bytes: the file is read from its beginning to its end.
        self.layers = peft.layers(shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._header.tensors[key].shape

    def tensor(self, key: str) -> torch.Tensor:
        entry = self._header.tensors[key]
        begin, end = entry.data_offsets
        raw = _memory(end - begin)
        room = raw.numpy().data
        done = 0
        while done < len(room):
            part = room[done : done + CHUNK]
            count = os.preadv(self._fd, [part], self._header.begin + begin + done)
            if count == 0:
                raise AdapterRefusedError(_changed(peft.WEIGHTS))
            done += count
        return raw.view(DATATYPES[entry.dtype]).view(entry.shape)


def _same_as_models(files: _Files, key: str, layer: nn.Module) -> None:
    """PEFT saves the weight of a head beside its LoRA. It is no part of the adapter as long as it is
    the model's own; a trained one is."""
    own = getattr(layer, key.rpartition(".")[2], None)
    if (
        not isinstance(own, torch.Tensor)
        or files.shape(key) != tuple(own.shape)
        or not torch.equal(files.tensor(key).to(own.dtype), own.detach().cpu())
    ):
        raise AdapterRefusedError(
            f"tensor '{key}' is not what the model has: the layer itself was trained or resized; "
            "merge the adapter into the model"
        )


@contextmanager
def _opened(order: AdapterOrder) -> Iterator[_Files]:
    """Raises AdapterRefusedError for files that are not, or no longer, those of the order. The
    framework's and the system's own errors while they are read become one too."""
    try:
        with ExitStack() as stack:
            opened = {name: _open(stack, order.path, name) for name in (peft.CONFIG, peft.WEIGHTS)}
            before = {name: _stamp(name, fd) for name, fd in opened.items()}
            _check(order, before)
            config = os.pread(opened[peft.CONFIG], peft.MAX_CONFIG + 1, 0)
            fd = opened[peft.WEIGHTS]
            yield _Files(config, fd, header_of(fd, before[peft.WEIGHTS].size))
            for name, then in before.items():
                if _stamp(name, opened[name]) != then:
                    raise AdapterRefusedError(_changed(name))
            _check(order, before)
    except IncompleteFilesError as error:
        raise AdapterRefusedError(f"{peft.WEIGHTS}: {error}") from error
    except OSError as error:
        raise AdapterRefusedError(f"its files cannot be read: {error.strerror}") from error


def _open(stack: ExitStack, folder: str, name: str) -> int:
    try:
        fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise AdapterRefusedError(
            f"{name} is not there: an adapter is a folder with {peft.CONFIG} and {peft.WEIGHTS}"
        ) from error
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise AdapterRefusedError(f"{name} is no file")
    return fd


def _stamp(name: str, fd: int) -> AdapterFile:
    found = os.fstat(fd)
    return AdapterFile(name, found.st_size, found.st_mtime_ns, found.st_ino)


def _check(order: AdapterOrder, opened: Mapping[str, AdapterFile]) -> None:
    for file in order.files:
        if file.name in opened:
            now = opened[file.name]
        else:
            found = os.stat(os.path.join(order.path, file.name))
            now = AdapterFile(file.name, found.st_size, found.st_mtime_ns, found.st_ino)
        if now != file:
            raise AdapterRefusedError(_changed(file.name))


def _changed(name: str) -> str:
    return (
        f"{name} has changed since it was registered: register it again, or wait for the next scan"
    )
