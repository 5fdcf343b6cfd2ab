"""Protobuf's wire format, as far as it takes to move tensors without copying them.

A message class makes a bytes object of every field that is looked at, and of the whole when it is
written. The tensors of a request are cut out of the message as views, and those of an answer are
joined to it, once; what is left is small, and the message classes' business.

Rule: nothing here believes a length before it was compared with what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from repository.errors import InvalidRequestError
from repository.tensors import Buffer

MOST_FIELDS = 8192  # of one message, at its top: each costs a step
MALFORMED = "the message is not what the protocol says: "
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SKIP = {_FIXED64: 8, _FIXED32: 4}


def varint(value: int) -> bytes:
    """Of a number that is not negative."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def key_of(number: int) -> bytes:
    """What stands before the length of field `number`, of bytes, text or a message."""
    return varint(number << 3 | _BYTES)


def field(number: int, data: bytes) -> bytes:
    """One field whole: bytes, text or a message."""
    return b"".join((key_of(number), varint(len(data)), data))


def read_varint(data: Buffer, at: int) -> tuple[int, int]:
    """The number, and where what follows it begins. Raises InvalidRequestError."""
    found = shift = 0
    try:
        while True:
            byte = data[at]
            at += 1
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                return found, at
            shift += 7
            if shift > 63:
                raise InvalidRequestError(f"{MALFORMED}a number in it does not end")
    except IndexError:
        raise InvalidRequestError(f"{MALFORMED}it ends too early") from None


def fields_of(message: Buffer) -> Iterator[tuple[int, int, int, int]]:
    """The fields at the top of a message, as they come: key (its number and its kind), where it begins,
    where its data begins and where that ends. Raises InvalidRequestError, also half-way."""
    at, end = 0, len(message)
    while at < end:
        start = at
        key, at = read_varint(message, at)
        data, at = _past(message, key & 7, at)
        yield key, start, data, at


def check_fields(message: Buffer) -> None:
    """Raises InvalidRequestError where there are too many, or one is malformed."""
    for count, _ in enumerate(fields_of(message)):
        if count >= MOST_FIELDS:
            raise _too_many()


def _too_many() -> InvalidRequestError:
    return InvalidRequestError(
        f"the message has more than {MOST_FIELDS} fields; send fewer at once"
    )


def cut(message: Buffer, number: int) -> tuple[bytes, list[memoryview]]:
    """The message without its fields `number`, and these in their order, as views of it.

    Raises InvalidRequestError.
    """
    view, wanted = memoryview(message), number << 3 | _BYTES
    rest: list[Buffer] = []
    found: list[memoryview] = []
    begin = 0
    for count, (key, start, data, end) in enumerate(fields_of(message)):
        if count >= MOST_FIELDS:
            raise _too_many()
        if key == wanted:
            rest.append(view[begin:start])
            found.append(view[data:end])
            begin = end
    if not found:
        return bytes(message), found
    rest.append(view[begin:])
    return b"".join(rest), found


def _past(message: Buffer, kind: int, at: int) -> tuple[int, int]:
    """Where the data of a field of this kind begins, and where it ends."""
    if kind == _BYTES:
        size, at = read_varint(message, at)
    elif kind == _VARINT:
        return at, read_varint(message, at)[1]
    elif kind in _SKIP:
        size = _SKIP[kind]
    else:
        raise InvalidRequestError(f"{MALFORMED}a field is of no kind that there is")
    if size > len(message) - at:
        raise InvalidRequestError(f"{MALFORMED}it ends too early")
    return at, at + size


def size_of(parts: Iterable[Buffer]) -> int:
    return sum(map(len, parts))
