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
from server.refusals import MiscountError

DEEPEST = 100  # levels of [ and {
T = TypeVar("T")

_BLOCK = 1 << 20  # bytes that are scanned at once
_CHUNK = 1 << 17  # bytes of numbers that are objects at once: an object takes 32 bytes
_ELEMENTS = 1 << 13  # of a tensor that are objects at once
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
    if datatype == "BYTES":
        texts = _values(name, str, data)
        _check_number(name, len(texts), elements)
        return _pack(name, texts)
    array = _in_chunks(datatype, data) if isinstance(data, msgspec.Raw) else None
    if array is None:
        values = _values(name, _KINDS[DATATYPES[datatype].dtype.kind][0], data)
        _check_number(name, len(values), elements)
        try:
            array = _narrow(datatype, values)
        except OverflowError:
            raise InvalidTensorError(
                f"input '{name}' holds a number that no {datatype} can be read from"
            ) from None
    _check_number(name, len(array), elements)
    found: Any = array
    return memoryview(found).cast("B") if elements else b""


def _check_number(name: str, found: int, elements: int) -> None:
    if found < elements:
        raise MiscountError(
            f"Failed to parse 'data' field: shape does not match true shape. Input '{name}' has "
            f"{found} elements, its shape needs {elements}"
        )
    if found > elements:
        raise MiscountError(
            f"Unable to parse 'data': Shape does not match true shape of 'data' field. Input "
            f"'{name}' has {found} elements, its shape allows {elements}"
        )


def _narrow(datatype: str, values: list[Any]) -> Array:
    """Raises OverflowError for an integer that 64 bits cannot hold."""
    plain = DATATYPES[datatype].dtype
    wide = np.fromiter(values, _KINDS[plain.kind][1], len(values))
    with np.errstate(over="ignore"):  # 1e300 as FP32 is infinity
        narrow: Array = wide.astype(plain)
    return narrow


def _in_chunks(datatype: str, data: msgspec.Raw) -> Array | None:
    """The numbers of a long `data`, never all of them as objects: those of 64 MiB of text would
    take 1 GiB. None: it is short, or anything but numbers within brackets; then all is to be read at
    once, which also finds the words for what is wrong."""
    if len(memoryview(data)) <= _CHUNK:
        return None
    text = bytes(data)
    if text[:1] != b"[" or text[-1:] != b"]":
        return None
    decode = _FLAT[_KINDS[DATATYPES[datatype].dtype.kind][0]].decode
    nested = text.find(b"[", 1) > 0
    found: list[Array] = []
    at, end = 1, len(text) - 1
    try:
        while at < end:
            comma = text.find(b",", at + _CHUNK)
            stop = end if comma < 0 else comma
            chunk = text[at:stop]
            # Without strings the brackets carry nothing but structure, which does not count.
            chunk = chunk.translate(None, b"[]") if nested else chunk
            found.append(_narrow(datatype, decode(b"[%b]" % chunk)))
            at = stop + 1
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError):
        return None
    return np.concatenate(found) if at > end else None  # no comma was the last


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
    if list not in set(map(type, data)):
        return data
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
    if len(array) <= _ELEMENTS:
        return msgspec.Raw(b"[%b]" % _numbers(array))
    starts = range(0, len(array), _ELEMENTS)
    return msgspec.Raw(b"[%b]" % b",".join([_numbers(array[i : i + _ELEMENTS]) for i in starts]))


def _numbers(array: Array) -> bytes:
    values = array.tolist()
    text = msgspec.json.encode(values)[1:-1]
    # A finite sum is the cheap proof; an infinite one may also be an overflow, which does no harm.
    if array.dtype.kind != "f" or math.isfinite(sum(values)):
        return text
    # What JSON has no number for has become null. Their literals go in between.
    parts = text.split(b"null")
    words = [_literal(value) for value in array[~np.isfinite(array)].tolist()]
    return b"".join([part + word for part, word in zip(parts, [*words, b""], strict=True)])


def _literal(value: float) -> bytes:
    return b"NaN" if value != value else b"Infinity" if value > 0 else b"-Infinity"


def _texts(tensor: Tensor) -> list[str]:
    try:
        return [element.decode() for element in unpack_bytes(tensor.data)]
    except UnicodeDecodeError:
        raise InvalidRequestError(
            f"output '{tensor.name}' holds bytes that are not UTF-8 text; ask for it with "
            f'"parameters": {{"binary_data": true}}'
        ) from None
