"""The tensors of a torch model, as what they take: told by kind, moved to host memory and back.

A model's tensors are views of storages. A storage whose memory has been given back and taken again
is the same storage: parameters, buffers, views of them, tied weights, strides and whoever else holds
one of them know nothing of it. So storages are moved, each once, and no tensor is replaced.

    a GPU    storages are copied into page-locked host memory, BLOCK bytes at a time, while the next
             blocks are being prepared; then torch's cache is emptied. Back the same way
    the CPU  it is host memory already. Weights that are mapped from a private file are dropped and come
             back from the page cache as they are touched; others stay where they are
    scratch  (keys and values of texts) is not kept: it is given back, and zeros when the model wakes

It must not know what a model is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from repository.backends import pages
from repository.backends.device_use import DeviceUse
from repository.lifecycle.placement import HOST, Memory

BLOCK = 128 << 20  # bytes of host memory that are made ready at once
ALIGN = 512  # of every storage in it, as torch's own allocator aligns them
SCRATCH = "kv"

# kind -> tensors; what two kinds share is the first one's.
Tensors: TypeAlias = Mapping[str, Iterable[torch.Tensor]]


class Ferry(Protocol):
    """How bytes go between a device and host memory. Called by one thread."""

    def memory(self, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        """Host memory that copies may go to and come from: flat, uint8, one for each size, in order;
        later ones are made while the first are in use. Raises MemoryError."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begins a copy."""
        ...

    def wait(self) -> None:
        """Until all copies have ended."""
        ...

    def empty(self) -> None:
        """What was freed on the device goes back to it."""
        ...

    def give(self, memory: list[torch.Tensor]) -> None:
        """Of `memory`, all that are left of it; its owner drops them then."""
        ...


class Piece(NamedTuple):
    """`size` bytes of storage `storage` from `at` on lie in block `block` from `begin` on."""

    storage: int
    at: int
    block: int
    begin: int
    size: int


def laid_out(sizes: Iterable[int], block: int) -> tuple[list[int], list[Piece]]:
    """The blocks' sizes, and where in them storages of `sizes` lie, one behind the other. Blocks are
    full but for the last; what is larger than the rest of one goes on in the next."""
    pieces: list[Piece] = []
    end = 0
    for storage, size in enumerate(sizes):
        end += -end % ALIGN
        at = 0
        while at < size:
            begin = end % block
            count = min(size - at, block - begin)
            pieces.append(Piece(storage, at, end // block, begin, count))
            at += count
            end += count
    full, rest = divmod(end, block)
    return [block] * full + ([rest] if rest else []), pieces


class Movable:
    """One model's tensors on one device.

    tensors  what there is now, asked each time
    ferry    on a GPU; None on the CPU
    reserved, use   on a GPU: bytes that torch has taken, and what the process has there in all
    """

    def __init__(
        self,
        device: str,
        tensors: Callable[[], Tensors],
        *,
        ferry: Ferry | None = None,
        reserved: Callable[[], int] | None = None,
        use: DeviceUse | None = None,
        block: int = BLOCK,
    ) -> None:
        self._block = block
        self._device = device
        self._tensors = tensors
        self._ferry = ferry
        self._reserved = reserved
        self._use = use
        self._moved: list[tuple[Any, int]] = []  # (storage, bytes), in the blocks' order
        self._blank: list[tuple[Any, int]] = []  # scratch
        self._blocks: list[torch.Tensor] = []
        self._pieces: list[Piece] = []
        self._asleep: dict[str, int] = {}  # what was moved, by kind
        self.sleeping = False

    @property
    def device(self) -> str:
        return self._device

    def sleep(self) -> None:
        """Raises MemoryError where the host has no room; then nothing has moved."""
        found = self._storages()
        self._blank = [(s, s.nbytes()) for s in found.pop(SCRATCH, []) if _is_ours(s)]
        if self._ferry is not None:
            self._put_away(self._ferry, found)
        for storage, _ in self._blank:
            storage.resize_(0)
        self.sleeping = True
        if self._ferry is not None:
            gc.collect()
            self._ferry.empty()
        else:
            pages.forget(_span(s) for of in found.values() for s in of)
        pages.trim()

    def wake(self) -> None:
        """Raises torch.OutOfMemoryError, MemoryError."""
        for storage, size in self._moved + self._blank:
            storage.resize_(size)
        for storage, _ in self._blank:
            _flat(storage).zero_()
        if self._ferry is not None:
            self._bring_back(self._ferry)
        self._moved, self._blank, self._pieces = [], [], []
        self._asleep = {}
        self.sleeping = False

    def memory(self) -> Memory:
        """As `abilities.Measures`."""
        found: Memory = {}
        for kind, storages in self._storages().items():
            of: dict[str, list[Any]] = {}
            for storage in storages:
                of.setdefault(_device_of(storage), []).append(storage)
            for device, mine in of.items():
                there = HOST if device == "cpu" and self._sleeps_here else device
                found.setdefault(there, {})[kind] = _bytes_of(device, mine)
        if self._asleep:
            found[HOST] = {**found.get(HOST, {}), **self._asleep}
        self._add_devices_own(found)
        bare = {d: {kind: n for kind, n in kinds.items() if n} for d, kinds in found.items()}
        return {device: kinds for device, kinds in bare.items() if kinds}

    @property
    def _sleeps_here(self) -> bool:
        return self.sleeping and self._ferry is None

    def _add_devices_own(self, found: Memory) -> None:
        if self._reserved is None or self._use is None:
            return
        kinds = found.setdefault(self._device, {})
        reserved = self._reserved()
        kinds["workspace"] = max(0, reserved - sum(kinds.values()))
        kinds["context"] = max(0, self._use.bytes(reserved) - reserved)

    def _storages(self) -> dict[str, list[Any]]:
        """By kind, each once."""
        seen: set[int] = set()
        found: dict[str, list[Any]] = {}
        for kind, tensors in self._tensors().items():
            mine = found.setdefault(kind, [])
            for tensor in tensors:
                if tensor.layout is not torch.strided or tensor.is_meta:
                    continue
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    mine.append(storage)
        return found

    def _moves(self, storage: Any) -> bool:
        return _device_of(storage) == self._device and storage.nbytes() > 0 and _is_ours(storage)

    def _put_away(self, ferry: Ferry, found: Mapping[str, Iterable[Any]]) -> None:
        moved: list[tuple[Any, int]] = []
        asleep: dict[str, int] = {}
        for kind, storages in found.items():
            mine = [s for s in storages if self._moves(s)]
            moved += [(storage, storage.nbytes()) for storage in mine]
            asleep[kind] = sum(storage.nbytes() for storage in mine)
        sizes, pieces = laid_out([size for _, size in moved], self._block)
        flats = [_flat(storage) for storage, _ in moved]
        blocks: list[torch.Tensor] = []
        left = iter(pieces)
        piece = next(left, None)
        try:
            for number, block in enumerate(ferry.memory(sizes)):
                blocks.append(block)
                while piece is not None and piece.block == number:
                    there = block[piece.begin : piece.begin + piece.size]
                    ferry.copy(there, flats[piece.storage][piece.at : piece.at + piece.size])
                    piece = next(left, None)
        except BaseException:
            ferry.wait()  # memory that copies still go to must not be given back
            ferry.give(blocks)
            raise
        ferry.wait()
        del flats
        for storage, _ in moved:
            storage.resize_(0)
        self._moved, self._blocks, self._pieces = moved, blocks, pieces
        self._asleep = {kind: size for kind, size in asleep.items() if size}

    def _bring_back(self, ferry: Ferry) -> None:
        flats = [_flat(storage) for storage, _ in self._moved]
        for storage, at, block, begin, size in self._pieces:
            ferry.copy(flats[storage][at : at + size], self._blocks[block][begin : begin + size])
        ferry.wait()
        blocks, self._blocks = self._blocks, []
        ferry.give(blocks)


class Moves:
    """Of a backend all of whose tensors are moved by one Movable: `Sleeps` and `Measures`."""

    _movable: Movable | None = None  # from `load` on

    def sleep(self) -> None:
        assert self._movable is not None, "load comes first"
        self._movable.sleep()

    def wake(self) -> None:
        assert self._movable is not None, "load comes first"
        self._movable.wake()

    def memory(self) -> Memory:
        return self._movable.memory() if self._movable is not None else {}


def tensors_of(*modules: Any) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that a module holds as plain attributes."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
        for part in module.modules():
            for value in list(vars(part).values()):
                if isinstance(value, torch.Tensor):
                    yield value


def _flat(storage: Any) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    flat.set_(storage)
    return flat


def _device_of(storage: Any) -> str:
    device = storage.device
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def _is_ours(storage: Any) -> bool:
    """Its memory can be given back: it is not somebody else's that torch looks at."""
    return bool(storage.resizable())


def _span(storage: Any) -> pages.Span:
    return storage.data_ptr(), storage.nbytes()


def _bytes_of(device: str, storages: Iterable[Any]) -> int:
    size: int = sum(storage.nbytes() for storage in storages)
    if device != "cpu":
        return size
    there = pages.resident(map(_span, storages))
    return size if there is None else there
