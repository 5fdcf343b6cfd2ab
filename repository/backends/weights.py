"""The tensors of safetensors files, as every torch backend reads them. Nothing in them can run code.

    tensors = read_weights(weight_files(order.path), device=order.device, private=order.private)
    model.load_state_dict(tensors, assign=True)        # they become the model's own: nothing is copied

How they are read:
    CPU, private      the files are mapped: nothing is read before it is used, and instances on one
                      machine share the page cache. Writing to a tensor copies its page
    CPU, not private  into memory of our own, one piece a file: an overwrite in place cannot change
                      what a model computes, a truncation cannot kill it
    a GPU             two threads read chunks into a ring of pinned memory that is used again and
                      again, copies to the device run beside them (`backends.ring`)

A header is held against its file before anything is allocated. What was read, not mapped, is only
given out if size, mtime and inode of each file are afterwards what they were before.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from repository.backends import ring
from repository.errors import FilesChangedError, IncompleteFilesError, LoadFailedError
from repository.folder.safetensors_header import Entry, Header, header_of

CHUNK = 16 << 20  # bytes
MAP_NORESERVE = 0x4000  # Linux's; not every Python names it
MAX_INDEX = 64 << 20  # bytes of a JSON index
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """`name` in the folder, or all files that `name`.index.json lists, as Hugging Face shards them.

    Raises IncompleteFilesError, LoadFailedError.
    """
    whole = folder / name
    index = folder / f"{name}.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        if index.stat().st_size > MAX_INDEX:
            raise ValueError("too long")
        listed = set(json.loads(index.read_bytes())["weight_map"].values())
        shards = sorted(str(PurePosixPath(each)) for each in listed)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IncompleteFilesError(f"{index.name} is not an index of safetensors files") from error
    for each in shards:
        if PurePosixPath(each).name != each or not each.endswith(".safetensors"):
            raise LoadFailedError(
                f"{index.name} names '{each}'; every file must be a .safetensors beside it"
            )
    return [folder / each for each in shards]


def read_weights(
    files: Sequence[Path],
    *,
    device: str = "cpu",
    private: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of `files` by its name, bytes exact, on `device` ("cpu", "cuda:N").

    private  nobody writes to the files: they are mapped (on the CPU); tensors are views of the map
    dtype    of all floating tensors; None: as they are. Converted ones are no views

    Raises IncompleteFilesError (missing, half-copied, header and size disagree), FilesChangedError
    (written to meanwhile), LoadFailedError (a datatype that torch lacks; one name in two files).
    No two tensors overlap. They may be written to; a file never is.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(_opened(path)) for path in files]
        _check_names(sources)
        if device.startswith("cuda"):
            found = _on_device(sources, torch.device(device), ring.CudaLane(torch.device(device)))
        elif private:
            found = _views_of_all(sources, [_mapped(source) for source in sources])
        else:
            found = _views_of_all(sources, [_in_memory(source) for source in sources])
        if not private:
            for source in sources:
                source.check_unchanged()
    if dtype is not None:
        for name, tensor in found.items():
            if tensor.is_floating_point() and tensor.dtype != dtype:
                found[name] = tensor.to(dtype)
    return found


def described_weights(
    files: Sequence[Path], *, dtype: torch.dtype | None = None, device: str = "meta"
) -> dict[str, torch.Tensor]:
    """As `read_weights`, by the headers alone: tensors without numbers in them, on the meta device, or
    on the CPU in memory that nobody has touched. Raises the same, but for what only shows in reading."""
    with ExitStack() as stack:
        sources = [stack.enter_context(_opened(path)) for path in files]
        _check_names(sources)
        found = {}
        for source in sources:
            for name, entry in source.header.tensors.items():
                stored = DTYPES[entry.dtype]
                kind = dtype if dtype is not None and stored.is_floating_point else stored
                found[name] = torch.empty(_shape(entry), dtype=kind, device=device)
        return found


# files ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """An open file whose header agrees with its size."""

    path: Path
    fd: int
    size: int
    stamp: tuple[int, int, int]
    header: Header

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, into: memoryview, at: int) -> None:
        """Fills `into` with the bytes from `at`. Raises FilesChangedError where the file ends first:
        it was longer when it was opened."""
        done = 0
        while done < len(into):
            count = os.preadv(self.fd, [into[done:]], at + done)
            if not count:
                raise FilesChangedError(
                    f"{self.name} had {self.size} bytes and ends at {at + done} now; it is being "
                    "written to: the load starts again when the copy is done"
                )
            done += count

    def check_unchanged(self) -> None:
        """Both what was read and what lies under the name now."""
        try:
            now = (_stamp(os.fstat(self.fd)), _stamp(os.stat(self.path)))
        except FileNotFoundError:
            now = ((0, 0, 0), (0, 0, 0))
        if now != (self.stamp, self.stamp):
            raise FilesChangedError(f"{self.name} was changed while it was being read")


@contextmanager
def _opened(path: Path) -> Iterator[Source]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise IncompleteFilesError(f"{path.name} is missing") from error
    try:
        found = os.fstat(fd)
        try:
            header = header_of(fd, found.st_size)
        except IncompleteFilesError as error:
            raise IncompleteFilesError(f"{path.name} is not complete: {error}") from error
        for name, entry in header.tensors.items():
            _check_datatype(path, name, entry)
        yield Source(path, fd, found.st_size, _stamp(found), header)
    finally:
        os.close(fd)


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _check_datatype(path: Path, name: str, entry: Entry) -> None:
    if entry.dtype not in DTYPES:
        raise LoadFailedError(
            f"tensor '{name}' of {path.name} is of datatype {entry.dtype}, which torch "
            f"{torch.__version__} does not have; convert it to one of {', '.join(DTYPES)}"
        )
    if entry.dtype == "F4" and (not entry.shape or entry.shape[-1] % 2):
        raise LoadFailedError(
            f"tensor '{name}' of {path.name} has shape {list(entry.shape)}; torch packs two F4 "
            "values a byte along the last axis, which must be even"
        )


def _check_names(sources: Sequence[Source]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        for name in source.header.tensors:
            if name in seen:
                raise LoadFailedError(
                    f"tensor '{name}' is in {seen[name]} and in {source.name}; keep one of them"
                )
            seen[name] = source.name


# the CPU ----------------------------------------------------------------------------------------


def _mapped(source: Source) -> torch.Tensor:
    """The bytes of its tensors, as pages that are read when they are touched."""
    if not source.header.size:
        return torch.empty(0, dtype=torch.uint8)
    # MAP_NORESERVE: what is only read needs no memory of its own, so none has to be promised.
    memory = mmap.mmap(
        source.fd,
        source.size,
        flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )
    return torch.frombuffer(memory, dtype=torch.uint8)[source.header.begin :]


def _in_memory(source: Source) -> torch.Tensor:
    """The same in memory of our own."""
    made = torch.empty(source.header.size, dtype=torch.uint8)
    into = ring.memory_of(made)
    os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for at in range(0, len(into), CHUNK):
        source.read(into[at : at + CHUNK], source.header.begin + at)
    return made


def _views_of_all(
    sources: Sequence[Source], memory: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = {}
    for source, data in zip(sources, memory, strict=True):
        for name, entry in source.header.tensors.items():
            begin, end = entry.data_offsets
            found[name] = _shaped(data[begin:end], entry)
    return found


def _shaped(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    dtype, shape = DTYPES[entry.dtype], _shape(entry)
    if not data.numel():
        return torch.empty(shape, dtype=dtype)
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()  # the writer of the file has not aligned it
    return data.view(dtype).view(shape)


def _shape(entry: Entry) -> tuple[int, ...]:
    if entry.dtype == "F4":
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


# a device ---------------------------------------------------------------------------------------


def _on_device(
    sources: Sequence[Source], device: torch.device, lane: ring.Lane
) -> dict[str, torch.Tensor]:
    """Device memory is allocated once, a tensor at a time; the bytes come through the ring."""
    found: dict[str, torch.Tensor] = {}
    chunks: list[ring.Chunk] = []
    for source in sources:
        places: list[tuple[int, torch.Tensor]] = []
        for name, entry in source.header.tensors.items():
            tensor = torch.empty(_shape(entry), dtype=DTYPES[entry.dtype], device=device)
            found[name] = tensor
            if math.prod(entry.shape):
                places.append((entry.data_offsets[0], tensor.reshape(-1).view(torch.uint8)))
        chunks += ring.chunks_of(source.read, source.header.begin, places, CHUNK)
    ring.carry(chunks, lane, size=CHUNK)
    return found
