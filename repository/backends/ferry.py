"""Tensors between a GPU and page-locked host memory, and what a torch model needs to be measured there.

Memory is mapped by us and locked for the GPU afterwards: so it has just the size that is needed, and
goes back to the machine when it is dropped (torch keeps what it has locked itself, in powers of two).
Making pages costs more than copying to them: MAKERS threads do that ahead of the copies. What cannot
be locked (a limit, a driver that refuses) is used as it is; copies are slower then.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from repository.backends import pages
from repository.backends.asleep import Movable, Tensors
from repository.backends.device_use import DeviceUse

MAKERS = 4
log = logging.getLogger(__name__)


def movable(device: str, tensors: Callable[[], Tensors]) -> Movable:
    """To be made before anything of the model is on its device. On a GPU this makes the context, on
    that device and no other. Raises what torch raises where there is no such GPU."""
    if not device.startswith("cuda"):
        return Movable(device, tensors)
    there = torch.device(device)
    use = DeviceUse.of(device)
    use.before()
    torch.cuda.set_device(there)
    torch.empty(1, device=there)
    use.after(torch.cuda.memory_reserved(there))
    return Movable(
        device,
        tensors,
        ferry=CudaFerry(there),
        reserved=lambda: torch.cuda.memory_reserved(there),
        use=use,
    )


def mapped(size: int) -> torch.Tensor:
    """`size` bytes with all pages there. Raises MemoryError."""
    try:
        # Shared memory, which is what Python maps where nobody says, gets no huge pages.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {size} bytes of host memory: {error.strerror}") from error
    with suppress(OSError):  # a kernel that has none
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to make, and to lock
    made = torch.frombuffer(memory, dtype=torch.uint8)
    pages.populate(made.data_ptr(), size)
    return made


class CudaFerry:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._locked: set[int] = set()
        self._warned = False

    def memory(self, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        # A new thread's own device is the first one, and a context there would cost memory.
        with ThreadPoolExecutor(
            MAKERS, "makes pages", initializer=torch.cuda.set_device, initargs=(self._device,)
        ) as makers:
            coming = [makers.submit(self._made, size) for size in sizes]
            taken = 0
            try:
                for each in coming:
                    made = each.result()
                    taken += 1
                    yield made
            finally:
                for each in coming[taken:]:
                    self._drop(each)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's
            # What was allocated a moment ago may be memory that queued work still writes to.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.synchronize()

    def empty(self) -> None:
        # cuBLAS' workspaces are torch's memory too, kept for the next product.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def give(self, memory: list[torch.Tensor]) -> None:
        for each in memory:
            self._unlock(each)
        memory.clear()

    def _made(self, size: int) -> torch.Tensor:
        made = mapped(size)
        code = int(_runtime().cudaHostRegister(made.data_ptr(), size, 0))
        if code == 0:
            self._locked.add(made.data_ptr())
        elif not self._warned:
            self._warned = True
            log.warning("host memory cannot be locked for the GPU (CUDA error %d)", code)
        return made

    def _unlock(self, memory: torch.Tensor) -> None:
        at = memory.data_ptr()
        if at in self._locked:
            self._locked.discard(at)
            _runtime().cudaHostUnregister(at)

    def _drop(self, coming: Future[torch.Tensor]) -> None:
        """One that nobody has taken, since another could not be made."""
        if not coming.cancel() and coming.exception() is None:
            self._unlock(coming.result())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
