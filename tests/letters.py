"""Requests as Triton's clients would write them, to models that know its wire (`fakes.lettered`), on
both routes at once."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import uvloop

from tests.fakes.lettered import Lettered
from tests.routes import CLOSE, answers_in, both, same
from tests.wire import Answer, post

LENGTH = "Inference-Header-Content-Length"
MAX_BODY = 300_000
ROW = list(range(16))


class Pair:
    """Both servers, in a loop that runs while something is asked."""

    def __init__(self, runner: asyncio.Runner, depots: list[Any]) -> None:
        self._runner, self.depots = runner, depots

    def ask(self, model: str, raw: bytes, *headers: str) -> Answer:
        return self.send(post(f"/v2/models/{model}/infer", raw, *headers, CLOSE))

    def send(self, raw: bytes | list[bytes]) -> Answer:
        (answer,) = answers_in(self._runner.run(same(self.depots, raw)))
        return answer

    def quiet(self) -> None:
        for depot in self.depots:
            self._runner.run(depot.quiet())

    def connection(self, raw: list[bytes]) -> list[Answer]:
        """The answers to all that is sent over one connection."""
        return answers_in(self._runner.run(same(self.depots, raw)))


@contextmanager
def paired(**settings: Any) -> Iterator[Pair]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        make: Any = Lettered  # as much of `Manners` as the routes look at
        settings = {"max_body": MAX_BODY, **settings}
        depots = runner.run(stack.enter_async_context(both(make, **settings)))
        yield Pair(runner, depots)
        runner.run(stack.aclose())


# requests -----------------------------------------------------------------------------------------


def tensor(name: str = "x", shape: Any = (2, 2), datatype: str = "FP32", **more: Any) -> Any:
    data = {} if "parameters" in more else {"data": [1, 2, 3, 4]}
    return {"name": name, "shape": list(shape), "datatype": datatype, **data, **more}


def numbers(rows: int = 1, **change: Any) -> list[Any]:
    return [tensor(f"INPUT{n}", (rows, 16), "INT32", data=ROW * rows, **change) for n in (0, 1)]


def asking(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def simple(**more: Any) -> bytes:
    return asking(*numbers(), **more)


def one(datatype: str, data: Any, shape: Any = (2, 2), **more: Any) -> bytes:
    return asking(tensor(datatype=datatype, shape=shape, data=data), **more)


def sized(size: int) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": size}}


def binary(*blobs: bytes, **more: Any) -> tuple[bytes, str]:
    """For `simple`, each input with so many bytes of its own, and the header that goes with it."""
    inputs = [
        tensor(f"INPUT{n}", (1, 16), "INT32", **sized(len(blob))) for n, blob in enumerate(blobs)
    ]
    header = asking(*inputs, **more)
    return header + b"".join(blobs), f"{LENGTH}: {len(header)}"


SIXTEEN = struct.pack("<16i", *ROW)
ZEROS = bytes(64)


# answers ------------------------------------------------------------------------------------------


def told(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    length = answer.headers.get(LENGTH.lower())
    return json.loads(answer.body[: int(length)] if length else answer.body)
