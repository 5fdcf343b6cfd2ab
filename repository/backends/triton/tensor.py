"""`pb_utils.Tensor`: a named tensor of a request or an answer, in numpy's hands or a framework's.

A request's tensors are views of the frame that they came in, as long as that may be written to; where
it may not, `as_numpy` copies, because models written for Triton write into what they are given.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from repository.backends.triton import dlpack
from repository.backends.triton.datatypes import NUMBERS
from repository.backends.triton.errors import TritonModelException
from repository.errors import InvalidTensorError
from repository.tensors import Array, datatype_of
from repository.tensors import Tensor as Wire

ON_CPU = frozenset({dlpack.CPU, dlpack.PINNED})


class Tensor:
    """`numpy_array`: any that KServe V2 has a datatype for; bytes and texts as objects.

    Of these one is there: `_array`, `_wire` (as it came, not looked at yet), `_foreign` (on a device).
    """

    __slots__ = ("_array", "_datatype", "_foreign", "_name", "_shape", "_wire")

    def __init__(self, name: str, numpy_array: Array) -> None:
        if not isinstance(name, str):
            raise TritonModelException(f"a tensor's name must be text, not {type(name).__name__}")
        if not isinstance(numpy_array, np.ndarray | np.generic):
            raise TritonModelException(
                f"tensor '{name}' must be a numpy array, not {type(numpy_array).__name__}"
            )
        array = np.asarray(numpy_array)
        try:
            self._datatype = datatype_of(array.dtype)
        except InvalidTensorError as error:
            raise TritonModelException(f"tensor '{name}': {error}") from error
        self._name = name
        self._shape: tuple[int, ...] = tuple(array.shape)
        self._array: Array | None = array
        self._wire: Wire | None = None
        self._foreign: Any = None

    @classmethod
    def arrived(cls, wire: Wire) -> Tensor:
        """Of a request, or of another model's answer."""
        found = cls.__new__(cls)
        found._name, found._datatype = wire.name, wire.datatype
        found._shape = wire.shape
        found._wire, found._array, found._foreign = wire, None, None
        return found

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """`tensor`: a capsule, or anything with `__dlpack__`, on the CPU or a GPU; contiguous."""
        capsule = dlpack.capsule_of(tensor)
        seen = dlpack.look(capsule)
        found = Tensor.__new__(Tensor)
        found._name, found._datatype, found._shape = name, seen.datatype, seen.shape
        found._wire = found._array = found._foreign = None
        if seen.device[0] in ON_CPU:
            found._array = dlpack.borrow(seen, capsule)
        else:
            found._foreign = tensor if hasattr(tensor, "__dlpack__") else _torch(capsule)
        return found

    def name(self) -> str:
        return self._name

    def triton_dtype(self) -> int:
        return NUMBERS[self._datatype]

    def shape(self) -> list[int]:
        return list(self._shape)

    def is_cpu(self) -> bool:
        return self._foreign is None

    def as_numpy(self) -> Array:
        """Raises TritonModelException for what lies on a GPU, and for BF16, which numpy lacks."""
        if self._foreign is not None:
            raise TritonModelException(
                f"tensor '{self._name}' lies on a GPU; take it with to_dlpack(), or move it first"
            )
        if self._datatype == "BF16":
            raise TritonModelException(
                f"tensor '{self._name}' is BF16, which numpy lacks; take it with to_dlpack()"
            )
        return self._bits()

    def to_dlpack(self) -> Any:
        """A capsule of the same memory. Raises TritonModelException for BYTES."""
        if self._foreign is not None:
            return dlpack.capsule_of(self._foreign)
        if self._datatype == "BYTES":
            return dlpack.lend(np.empty(0), "BYTES")
        return dlpack.lend(_writable(self._bits()), self._datatype)

    def __dlpack__(
        self,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        return self.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        if self._foreign is None:
            return dlpack.CPU, 0
        kind, number = self._foreign.__dlpack_device__()
        return int(kind), int(number)

    # for the way out ------------------------------------------------------------------------------

    def datatype(self) -> str:
        """As KServe V2 calls it."""
        return self._datatype

    def wire(self, declared: str = "") -> Wire:
        """As it travels. `declared`: "BF16" makes of an array of uint16 what it holds the bits of.
        Raises TritonModelException."""
        datatype = self._datatype
        if declared == "BF16" and datatype == "UINT16":
            datatype = declared
        if self._wire is not None and self._array is None:
            return Wire(self._name, datatype, self._shape, self._wire.data)
        array = _on_cpu(self._foreign) if self._foreign is not None else self._bits()
        try:
            return Wire.of(self._name, array, datatype)
        except InvalidTensorError as error:
            raise TritonModelException(f"tensor '{self._name}': {error}") from error

    def _bits(self) -> Array:
        """BF16 as uint16."""
        if self._array is None:
            assert self._wire is not None
            self._array = _writable(self._wire.array())
        return self._array


def _writable(array: Array) -> Array:
    return array if array.flags.writeable else array.copy()


def _torch(capsule: Any) -> Any:
    try:
        return importlib.import_module("torch").from_dlpack(capsule)
    except ImportError as error:
        raise TritonModelException(
            "a tensor on a GPU is read with torch, which is missing"
        ) from error


def _on_cpu(foreign: Any) -> Array:
    """From a GPU: torch's tensors and cupy's arrays know how; anything else goes through torch."""
    if hasattr(foreign, "get") and not hasattr(foreign, "cpu"):
        found: Array = np.ascontiguousarray(foreign.get())
        return found
    moved = (foreign if hasattr(foreign, "cpu") else _torch(foreign)).detach().cpu()
    capsule = dlpack.capsule_of(moved)
    return dlpack.borrow(dlpack.look(capsule), capsule)


def preferred(tensor: Tensor, device: int) -> Tensor:
    """The same on that GPU, by torch; as it is where that cannot be: no torch, no GPU, or texts."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return tensor
    if tensor.datatype() == "BYTES" or not torch.cuda.is_available():
        return tensor
    return Tensor.from_dlpack(tensor.name(), torch.from_dlpack(tensor).to(f"cuda:{device}"))
