"""What the mix asks, as bytes, and what is wrong with an answer to it.

Every tensor begins with a stamp of four numbers that no other request has; the rest counts on and on.
The models are y = x + value: what comes back is the same with the value added, to the last bit, as
all sums are exact in FP32. An answer to another's question, or half of one, would be seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np

Buffer: TypeAlias = bytes | memoryview
Stamp: TypeAlias = tuple[int, int, int, int]
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

MEDIUM = 150_000  # floats, 600 kB; as JSON about 1 MiB
HUGE = 2 * 2**20  # floats, 8 MiB
COUNT: Floats = (np.arange(HUGE) % 4096 + 0.5).astype(np.float32)


class Target(NamedTuple):
    """A model, and the floats of a row."""

    name: str
    value: int
    row: int


ALONE = Target("alone", 1, 4)  # takes tensors of any length, one request at a time
MERGED = Target("merged", 2, 4)  # in batches
PYTHON = Target("python", 3, 4)  # in batches
WIDE = Target("wide", 4, MEDIUM)  # in batches of large rows
UNKNOWN = Target("nobody", 0, 4)


class Answer(NamedTuple):
    status: int
    headers: Mapping[bytes, bytes]  # names in lower case
    body: bytes


class Question(NamedTuple):
    """`model`: who is to answer; empty: it is to be refused. `fault` says what is wrong with an
    answer; nothing: the empty text."""

    kind: str
    model: str
    head: bytes
    body: tuple[Buffer, ...]
    fault: Callable[[Answer], str]

    @property
    def length(self) -> int:
        return sum(map(len, self.body))


Maker: TypeAlias = Callable[[random.Random, Stamp], Question]


# what is asked -----------------------------------------------------------------------------------


def _binary(kind: str, target: Target, rows: int, stamp: Stamp) -> Question:
    size = 4 * rows * target.row
    header = (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d,%d],"parameters":'
        b'{"binary_data_size":%d}}],"parameters":{"binary_data_output":true}}'
    ) % (rows, target.row, size)
    more = b"Inference-Header-Content-Length: %d\r\n" % len(header)
    tail = memoryview(COUNT.data).cast("B")[16:size]
    body = (header, np.array(stamp, np.float32).tobytes(), tail)
    return _question(kind, target, rows, stamp, more, body)


def _json(kind: str, target: Target, rows: int, stamp: Stamp) -> Question:
    top = '{"inputs":[{"name":"x","datatype":"FP32","shape":[%d,%d],"data":[%d,%d,%d,%d'
    told = (top % (rows, target.row, *stamp)).encode()
    body = (told, _counted(rows * target.row), b"]}]}")
    return _question(kind, target, rows, stamp, b"Content-Type: application/json\r\n", body)


_texts: dict[int, bytes] = {}


def _counted(length: int) -> bytes:
    """ ",4.5,5.5" and so on: all but the first four of `length` numbers."""
    if length not in _texts:
        _texts[length] = "".join(f",{number}" for number in COUNT[4:length].tolist()).encode()
    return _texts[length]


def _question(
    kind: str, target: Target, rows: int, stamp: Stamp, more: bytes, body: tuple[Buffer, ...]
) -> Question:
    def fault(answer: Answer) -> str:
        return _fault(answer, target, rows, stamp)

    head = (b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: mix\r\nContent-Length: %d\r\n%s\r\n") % (
        target.name.encode(),
        sum(map(len, body)),
        more,
    )
    return Question(kind, target.name, head, body, fault)


def _refused(question: Question, kind: str, status: int, word: str) -> Question:
    def fault(answer: Answer) -> str:
        if answer.status != status:
            return f"{answer.status} in place of {status}: {answer.body[:200]!r}"
        text = str(msgspec.json.decode(answer.body)["error"])
        return "" if word in text else f"an error without {word!r}: {text!r}"

    return question._replace(kind=kind, model="", fault=fault)


def tiny_binary(dice: random.Random, stamp: Stamp) -> Question:
    return _binary("tiny binary", dice.choice((ALONE, MERGED, PYTHON)), dice.randint(1, 3), stamp)


def tiny_json(dice: random.Random, stamp: Stamp) -> Question:
    return _json("tiny JSON", dice.choice((ALONE, MERGED, PYTHON)), dice.randint(1, 3), stamp)


def medium_binary(dice: random.Random, stamp: Stamp) -> Question:
    target = dice.choice((ALONE, WIDE))
    return _binary("600 kB binary", target, MEDIUM // target.row, stamp)


def long_json(dice: random.Random, stamp: Stamp) -> Question:
    target = dice.choice((ALONE, WIDE))
    return _json("1 MiB JSON", target, MEDIUM // target.row, stamp)


def huge_binary(_: random.Random, stamp: Stamp) -> Question:
    return _binary("8 MiB binary", ALONE, HUGE // ALONE.row, stamp)


def unknown_model(dice: random.Random, stamp: Stamp) -> Question:
    make = dice.choice((_binary, _json))
    return _refused(make("", UNKNOWN, 1, stamp), "unknown model", 404, UNKNOWN.name)


def wrong_shape(dice: random.Random, stamp: Stamp) -> Question:
    make, target = dice.choice((_binary, _json)), dice.choice((ALONE, MERGED, PYTHON))
    return _refused(make("", target._replace(row=5), 1, stamp), "wrong shape", 400, "shape")


# what is answered --------------------------------------------------------------------------------


def _fault(answer: Answer, target: Target, rows: int, stamp: Stamp) -> str:
    if answer.status != 200:
        return f"{answer.status}: {answer.body[:200]!r}"
    told = int(answer.headers.get(b"inference-header-content-length", 0))
    found = msgspec.json.decode(memoryview(answer.body)[: told or None])
    (y,) = found["outputs"]
    if (found["model_name"], y["name"], y["shape"]) != (target.name, "y", [rows, target.row]):
        return f"another's answer: {str(found)[:200]}"
    got = np.frombuffer(answer.body, np.float32, offset=told) if told else _floats(y["data"])
    length = rows * target.row
    if len(got) != length:
        return f"{len(got)} numbers in place of {length}"
    if tuple(got[:4]) != tuple(number + target.value for number in stamp):
        return f"the numbers of another: {got[:4]} for {stamp}"
    return "" if np.array_equal(got[4:], COUNT[4:length] + target.value) else "numbers are wrong"


def _floats(data: list[float]) -> Floats:
    return np.array(data, np.float32)
