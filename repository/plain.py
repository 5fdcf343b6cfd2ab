"""A protobuf message as plain values: protobuf's JSON, but for two things that Triton does otherwise.

Names are those of the .proto file, and 64-bit numbers are numbers, not text. Works for any message;
protobuf itself is not imported here.
"""

from __future__ import annotations

import math
import struct
from typing import Any

_FLOAT, _MESSAGE, _ENUM = 2, 11, 14


def plain(message: Any, *, whole: bool = False) -> dict[str, Any]:
    """What is set. `whole`: also numbers, texts and lists that are not, as Triton prints a config;
    messages that are not there never are."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        many = field.is_repeated
        present = bool(getattr(message, field.name)) if many else _present(message, field)
        by_default = whole and (many or not field.has_presence)
        if present or by_default:
            found[field.name] = _field(message, field, whole=whole)
    return found


def _present(message: Any, field: Any) -> bool:
    if field.has_presence:
        return bool(message.HasField(field.name))
    return bool(getattr(message, field.name) != field.default_value)


def _field(message: Any, field: Any, *, whole: bool) -> Any:
    value = getattr(message, field.name)
    if not field.is_repeated:
        return _value(value, field, whole=whole)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        held = kind.fields_by_name["value"]
        return {str(key): _value(value[key], held, whole=whole) for key in sorted(value)}
    return [_value(item, field, whole=whole) for item in value]


def _value(value: Any, field: Any, *, whole: bool) -> Any:
    if field.type == _MESSAGE:
        return plain(value, whole=whole)
    if field.type == _ENUM:
        named = field.enum_type.values_by_number.get(value)
        return named.name if named is not None else value
    if field.type == _FLOAT:
        return _shortest(value)
    return value


def _shortest(value: float) -> float | str:
    """What one would write for a 32-bit number: 0.1, and not 0.10000000149011612."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3.5e38 and struct.pack("f", short) == struct.pack("f", value):
            return short
    return value
