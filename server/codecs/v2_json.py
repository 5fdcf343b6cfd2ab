"""JSON as KServe V2 uses it: more than strict JSON in one place, less in another.

NaN, Infinity and -Infinity are part of the protocol in both directions, nesting is limited. Numbers
become the bytes of a tensor and back. Nothing here knows requests or responses.

Rule: whatever the text holds, only InvalidRequestError and InvalidTensorError are raised, and what
is allocated is bounded by the length of the text, never by a number in it.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec
import numpy as np

from repository.errors import InvalidRequestError, InvalidTensorError
from repository.tensors import DATATYPES, LENGTH, Array, Buffer, Tensor, unpack_bytes

DEEPEST = 100  # levels of [ and {
T = TypeVar("T")

_BLOCK = 1 << 20  # bytes that are scanned at once
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_TOO_DEEP = f"the request's JSON is nested deeper than {DEEPEST} levels"


def read(text: bytes, strict: msgspec.json.Decoder[T], lenient: type[T]) -> T:
    """What `strict` decodes; only from text with a NaN or Infinity is a `lenient` built."""
    try:
        found = strict.decode(text)
    except RecursionError:
        raise InvalidRequestError(_TOO_DEEP) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, msgspec.ValidationError) or not _has_literals(text):
            raise _malformed(error) from None
        found = _read_literals(text, lenient)
    if text.count(b"[") + text.count(b"{") > DEEPEST and depth_of(text) > DEEPEST:
        raise InvalidRequestError(_TOO_DEEP)
    return found


def _has_literals(text: bytes) -> bool:
    return b"NaN" in text or b"Infinity" in text


def _read_literals(text: bytes, lenient: type[T]) -> T:
    try:
        return msgspec.convert(json.loads(text), lenient)
    except RecursionError:
        raise InvalidRequestError(_TOO_DEEP) from None
    except (ValueError, msgspec.ValidationError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"failed to parse the request JSON: {error}")


def depth_of(text: bytes) -> int:
    """How deep valid JSON is nested. Brackets inside strings do not count."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(text.translate(None, _NOT_STRUCTURE), np.uint8)
    deepest = level = inside = 0
    for start in range(0, len(marks), _BLOCK):
        block = marks[start : start + _BLOCK]
        quotes = np.cumsum(block == ord('"'), dtype=np.int32) + inside
        steps = np.where(quotes & 1, 0, _STEP[block])
        levels = np.cumsum(steps, dtype=np.int32) + level
        deepest = max(deepest, int(levels.max()))
        level, inside = int(levels[-1]), int(quotes[-1]) & 1
    return deepest


# data of one tensor -------------------------------------------------------------------------------

_KINDS: dict[str, tuple[type, Any]] = {
    "b": (bool, np.dtype("?")),
    "i": (int, np.dtype("i8")),
    "u": (int, np.dtype("u8")),
    "f": (float, np.dtype("f8")),
}
_LISTS: dict[type, Any] = {bool: list[bool], int: list[int], float: list[float], str: list[str]}
_FLAT: dict[type, msgspec.json.Decoder[list[Any]]] = {
    kind: msgspec.json.Decoder(many) for kind, many in _LISTS.items()
}


def to_bytes(name: str, datatype: str, elements: int, data: msgspec.Raw | Any) -> Buffer:
    """The wire form of a JSON `data` field, nested or flat; only the number of its elements counts.

    Integers wrap around as they are made to fit, as they do in Triton. `data` is what `read` left:
    undecoded text, or a list.
    """
    if datatype in ("FP16", "BF16"):
        raise InvalidRequestError(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data "
            f"format for input {name}"
        )
    plain = DATATYPES[datatype].dtype
    kind = str if datatype == "BYTES" else _KINDS[plain.kind][0]
    values = _values(name, kind, data)
    if len(values) < elements:
        raise InvalidTensorError(
            f"Failed to parse 'data' field: shape does not match true shape. Input '{name}' has "
            f"{len(values)} elements, its shape needs {elements}"
        )
    if len(values) > elements:
        raise InvalidTensorError(
            f"Unable to parse 'data': Shape does not match true shape of 'data' field. Input "
            f"'{name}' has {len(values)} elements, its shape allows {elements}"
        )
    if kind is str:
        return _pack(name, values)
    try:
        wide = np.array(values, _KINDS[plain.kind][1])
    except OverflowError:
        raise InvalidTensorError(
            f"input '{name}' holds a number that no {datatype} can be read from"
        ) from None
    with np.errstate(over="ignore"):  # 1e300 as FP32 is infinity
        array: Any = wide.astype(plain)
    return memoryview(array).cast("B") if elements else b""


def _values(name: str, kind: type, data: msgspec.Raw | Any) -> list[Any]:
    try:
        if not isinstance(data, msgspec.Raw):
            return _typed(_flatten(data), kind)
        text = bytes(data)
        if kind is not str and text.startswith(b"[") and text.find(b"[", 1) > 0:
            # Without strings the brackets carry nothing but structure, which does not count.
            text = b"[" + text.translate(None, b"[]") + b"]"
        try:
            return _FLAT[kind].decode(text)
        except msgspec.DecodeError:
            return _typed(_flatten(msgspec.json.decode(data)), kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidTensorError(f"Unable to parse 'data' of input '{name}': {error}") from None


def _typed(values: list[Any], kind: type) -> list[Any]:
    found: list[Any] = msgspec.convert(values, _LISTS[kind])
    return found


def _flatten(data: Any) -> list[Any]:
    """Each element once, in order. Not deeper than DEEPEST: `read` saw to that."""
    if not isinstance(data, list):
        raise msgspec.ValidationError(f"Expected `array`, got `{type(data).__name__}`")
    flat: list[Any] = []
    _collect(data, flat)
    return flat


def _collect(data: list[Any], into: list[Any]) -> None:
    for item in data:
        if isinstance(item, list):
            _collect(item, into)
        else:
            into.append(item)


def _pack(name: str, texts: list[str]) -> bytes:
    parts: list[bytes] = []
    try:
        for text in texts:
            raw = text.encode()
            parts += (LENGTH.pack(len(raw)), raw)
    except UnicodeEncodeError:
        raise InvalidTensorError(f"input '{name}' holds half of a surrogate pair") from None
    return b"".join(parts)


def to_json(tensor: Tensor) -> msgspec.Raw:
    """The flat `data` array of an output, with NaN and Infinity as such."""
    if tensor.datatype in ("FP16", "BF16"):
        raise InvalidRequestError(
            f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data "
            f"format for output {tensor.name}"
        )
    if tensor.datatype == "BYTES":
        return msgspec.Raw(msgspec.json.encode(_texts(tensor)))
    array: Array = np.frombuffer(tensor.data, DATATYPES[tensor.datatype].dtype)
    values = array.tolist()
    # A finite sum is the cheap proof; an infinite one may also be an overflow, which does no harm.
    if array.dtype.kind == "f" and not math.isfinite(sum(values)):
        return msgspec.Raw(json.dumps(values, separators=(",", ":")).encode())
    return msgspec.Raw(msgspec.json.encode(values))


def _texts(tensor: Tensor) -> list[str]:
    try:
        return [element.decode() for element in unpack_bytes(tensor.data)]
    except UnicodeDecodeError:
        raise InvalidRequestError(
            f"output '{tensor.name}' holds bytes that are not UTF-8 text; ask for it with "
            f'"parameters": {{"binary_data": true}}'
        ) from None
