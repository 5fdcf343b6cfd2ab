"""Triton's four clients behind one face, so that a promise is asked of each of them in the same words.

The asynchronous ones run on a loop of their own, a call at a time. What gRPC tells as protobuf's JSON is
told here as HTTP's: settings are flat, and 64-bit numbers are numbers.
"""

from __future__ import annotations

import asyncio
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.e2e.lasting import Lasting
from tests.e2e.server import WITHIN_S

Arrays = Mapping[str, np.ndarray]


class Answer(NamedTuple):
    """`shared`: what of an output lies in shared memory, as its parameters say."""

    id: str
    model: str
    version: str
    parameters: Mapping[str, Any]
    arrays: Arrays
    shared: Mapping[str, Mapping[str, Any]]


class Client(ABC):
    """One of the four. `ours`: Triton's own object."""

    name: ClassVar[str]
    protocol: ClassVar[str]
    kinds: ClassVar[Any]  # the module that has its InferInput
    codings: ClassVar[tuple[str | None, ...]]

    def __init__(self, server: Lasting) -> None:
        self.ours = self.connect(server)

    @abstractmethod
    def connect(self, server: Lasting) -> Any:
        """Triton's own."""

    def do(self, verb: str, *args: Any, **how: Any) -> Any:
        """One call, as it is answered."""
        return getattr(self.ours, verb)(*args, **how)

    def close(self) -> None:
        self.ours.close()

    # asking -------------------------------------------------------------------------------------------

    def inputs(self, arrays: Arrays) -> list[Any]:
        found = []
        for name, array in arrays.items():
            one = self.kinds.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            one.set_data_from_numpy(array)
            found.append(one)
        return found

    def outputs(self, *names: str, **said: Any) -> list[Any]:
        return [self.kinds.InferRequestedOutput(name, **said) for name in names]

    def infer(
        self,
        model: str,
        arrays: Arrays | Sequence[Any],
        *outputs: str,
        coding: str | None = None,
        **how: Any,
    ) -> Answer:
        """`arrays`: or inputs as the client has them; `outputs`: names, or `how` has them."""
        inputs = self.inputs(arrays) if isinstance(arrays, Mapping) else list(arrays)
        if outputs:
            how["outputs"] = self.outputs(*outputs)
        if coding is not None:
            how |= self.coded(coding)
        return self.told(self.do("infer", model, inputs, **how))

    @abstractmethod
    def coded(self, coding: str) -> dict[str, Any]:
        """How the request, and where it can be said the answer, is compressed."""

    @abstractmethod
    def told(self, result: Any) -> Answer: ...

    @abstractmethod
    def at_once(self, model: str, asked: Sequence[Arrays]) -> list[Answer]:
        """All under way before the first answer is read."""

    @abstractmethod
    def impatient(self, model: str, arrays: Arrays, server: Lasting) -> None:
        """Asks, and does not wait for the answer for long. Raises what the client raises."""

    def refused(self, verb: str, *args: Any, **how: Any) -> str:
        """What the error says."""
        asked = self.infer if verb == "infer" else partial(self.do, verb)
        with pytest.raises(InferenceServerException) as caught:
            asked(*args, **how)
        return str(caught.value.message())

    # the rest -----------------------------------------------------------------------------------------

    @abstractmethod
    def show(self, verb: str, *args: Any, **how: Any) -> Any:
        """A call whose answer is told as HTTP's."""


class _Http(Client):
    protocol = "http"
    kinds = http
    codings = (None, "gzip", "deflate")

    def coded(self, coding: str) -> dict[str, Any]:
        return {
            "request_compression_algorithm": coding,
            "response_compression_algorithm": coding,
        }

    def told(self, result: Any) -> Answer:
        said = result.get_response()
        outputs = {one["name"]: one.get("parameters", {}) for one in said["outputs"]}
        here = {n: p for n, p in outputs.items() if "shared_memory_region" not in p}
        return Answer(
            said.get("id", ""), said["model_name"], said["model_version"],
            said.get("parameters", {}), {name: result.as_numpy(name) for name in here},
            {n: p for n, p in outputs.items() if n not in here},
        )  # fmt: skip

    def show(self, verb: str, *args: Any, **how: Any) -> Any:
        return self.do(verb, *args, **how)


class _Grpc(Client):
    protocol = "grpc"
    kinds = grpc
    codings = (None, "gzip", "deflate")

    def coded(self, coding: str) -> dict[str, Any]:
        return {"compression_algorithm": coding}

    def told(self, result: Any) -> Answer:
        said = result.get_response()
        outputs = {one.name: _values(one.parameters) for one in said.outputs}
        here = {n: p for n, p in outputs.items() if "shared_memory_region" not in p}
        return Answer(
            said.id, said.model_name, said.model_version, _values(said.parameters),
            {name: result.as_numpy(name) for name in here},
            {n: p for n, p in outputs.items() if n not in here},
        )  # fmt: skip

    def show(self, verb: str, *args: Any, **how: Any) -> Any:
        return _plain(self.do(verb, *args, as_json=True, **how))


class Http(_Http):
    name = "http"

    def connect(self, server: Lasting) -> Any:
        return http.InferenceServerClient(_address(server), concurrency=8, network_timeout=WITHIN_S)

    def at_once(self, model: str, asked: Sequence[Arrays]) -> list[Answer]:
        going = [self.ours.async_infer(model, self.inputs(arrays)) for arrays in asked]
        return [self.told(one.get_result(timeout=WITHIN_S)) for one in going]

    def impatient(self, model: str, arrays: Arrays, server: Lasting) -> None:
        client = http.InferenceServerClient(_address(server), network_timeout=0.2)
        try:
            client.infer(model, self.inputs(arrays))
        finally:
            client.close()


class Grpc(_Grpc):
    name = "grpc"

    def connect(self, server: Lasting) -> Any:
        return grpc.InferenceServerClient(server.grpc)

    def at_once(self, model: str, asked: Sequence[Arrays]) -> list[Answer]:
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for number, arrays in enumerate(asked):
            self.ours.async_infer(
                model, self.inputs(arrays), callback=lambda result, error: done.put((result, error)),
                request_id=str(number),
            )  # fmt: skip
        found = [done.get(timeout=WITHIN_S) for _ in asked]
        assert [error for _, error in found if error] == []
        return sorted((self.told(result) for result, _ in found), key=lambda answer: int(answer.id))

    def impatient(self, model: str, arrays: Arrays, server: Lasting) -> None:
        self.ours.infer(model, self.inputs(arrays), client_timeout=0.2)

    @contextmanager
    def stream(self, **how: Any) -> Iterator[Callable[[], Answer]]:
        """Gives the next answer; an error is raised."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ours.start_stream(callback=lambda result, error: done.put((result, error)), **how)

        def following() -> Answer:
            result, error = done.get(timeout=WITHIN_S)
            if error is not None:
                raise error
            return self.told(result)

        try:
            yield following
        finally:
            self.ours.stop_stream()


class _Looped(Client):
    """On a loop of its own."""

    def __init__(self, server: Lasting) -> None:
        self._runner = asyncio.Runner()
        super().__init__(server)

    def run(self, work: Any) -> Any:
        async def within() -> Any:
            async with asyncio.timeout(WITHIN_S):
                return await work

        return self._runner.run(within())

    def do(self, verb: str, *args: Any, **how: Any) -> Any:
        return self.run(getattr(self.ours, verb)(*args, **how))

    def close(self) -> None:
        self.run(self.ours.close())
        self._runner.close()

    def at_once(self, model: str, asked: Sequence[Arrays]) -> list[Answer]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(
                *[self.ours.infer(model, self.inputs(arrays)) for arrays in asked]
            )

        return [self.told(result) for result in self.run(all_of_them())]


class HttpAio(_Looped, _Http):
    name = "http.aio"

    def connect(self, server: Lasting) -> Any:
        async def made() -> Any:  # its session wants a running loop
            return http_aio.InferenceServerClient(_address(server), conn_timeout=WITHIN_S)

        return self.run(made())

    def impatient(self, model: str, arrays: Arrays, server: Lasting) -> None:
        async def work() -> None:
            async with http_aio.InferenceServerClient(_address(server), conn_timeout=0.2) as client:
                await client.infer(model, self.inputs(arrays))

        self.run(work())


class GrpcAio(_Looped, _Grpc):
    name = "grpc.aio"

    def connect(self, server: Lasting) -> Any:
        async def made() -> Any:
            return grpc_aio.InferenceServerClient(server.grpc)

        return self.run(made())

    def impatient(self, model: str, arrays: Arrays, server: Lasting) -> None:
        self.do("infer", model, self.inputs(arrays), client_timeout=0.2)

    def streamed(self, asked: Sequence[Mapping[str, Any]]) -> list[Answer | str]:
        """All answers to these, each what `infer` takes; errors as their texts."""

        async def each() -> Any:
            for one in asked:
                yield {**one, "inputs": self.inputs(one["inputs"])}

        async def work() -> list[Answer | str]:
            found: list[Answer | str] = []
            async for result, error in self.ours.stream_infer(each()):
                found.append(str(error.message()) if error is not None else self.told(result))
            return found

        said: list[Answer | str] = self.run(work())
        return said


KINDS: dict[str, type[Client]] = {kind.name: kind for kind in (Http, HttpAio, Grpc, GrpcAio)}


@contextmanager
def connected(name: str, server: Lasting) -> Iterator[Client]:
    client = KINDS[name](server)
    try:
        yield client
    finally:
        client.close()


def _address(server: Lasting) -> str:
    return server.url.removeprefix("http://")


def _values(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(one, one.WhichOneof("parameter_choice")) for name, one in parameters.items()
    }


def _plain(said: Any) -> Any:
    """Protobuf's JSON as HTTP tells the same."""
    if isinstance(said, list):
        return [_plain(one) for one in said]
    if not isinstance(said, dict):
        return said
    if said.keys() <= {"settings"}:
        return {name: _setting(one) for name, one in said.get("settings", {}).items()}
    for outer in ("config", "models", "regions"):
        if said.keys() == {outer}:
            return _plain(said[outer])
    return {key: _numbers(value) if key in WIDE else _plain(value) for key, value in said.items()}


WIDE = {
    "shape", "dims", "count", "ns", "inference_count", "execution_count", "last_inference",
    "byte_size", "batch_size", "offset", "size",
}  # fmt: skip


def _numbers(said: Any) -> Any:
    return [_numbers(one) for one in said] if isinstance(said, list) else int(said)


def _setting(said: Mapping[str, Any]) -> Any:
    """Of the log: one value with its type. Of traces: a list of texts, of which HTTP tells one as it is,
    but for the level."""
    if "value" not in said:
        return next(iter(said.values()), "")
    found = said["value"]
    return found if len(found) != 1 or found[0] in ("OFF", "TIMESTAMPS", "TENSORS") else found[0]
