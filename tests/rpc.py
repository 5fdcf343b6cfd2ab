"""gRPC in this loop over models known by how they behave: the real service, a real port and clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from grpc import aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from repository.tensors import Tensor
from server.auth import Gate, Scope
from server.call import Door
from server.metrics.http import Metrics
from server.rpc.depot import Depot, depot_of
from server.rpc.port import RpcPort
from server.run import bind
from server.settings import Settings
from server.triton.logs import LogSettings
from server.triton.shm import CudaRegions, Regions
from server.triton.trace_settings import Start
from server.triton.tracing import Tracer
from server.turnstile import Turnstile
from tests.fakes.manners import Manners
from tests.integration.v2 import Info

WITHIN_S = 20.0
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Rpcs:
    """`stub`: all RPCs of inference.GRPCInferenceService. `channel`: for any other, by its path."""

    def __init__(self, depot: Depot, port: RpcPort, metrics: Metrics, channel: Any) -> None:
        self.depot, self.port, self.metrics, self.channel = depot, port, metrics, channel
        self.models: Manners = depot.models  # type: ignore[assignment]
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def until(self, holds: Callable[[], bool]) -> None:
        """For what no event tells of."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                if holds():
                    return
                await asyncio.sleep(0.001)

    def counted(self, model: str = "double") -> dict[tuple[str, str], int]:
        """(protocol, outcome) -> requests, of all its versions."""
        found: dict[tuple[str, str], int] = {}
        for (name, _), tally in self.metrics.meter._found.items():
            if name == model:
                for key, count in tally.requests.items():
                    found[key] = found.get(key, 0) + count
        return found

    async def refused(self, call: Any) -> aio.AioRpcError:
        """What it fails with."""
        try:
            await call
        except aio.AioRpcError as error:
            return error
        raise AssertionError("it was answered")


@asynccontextmanager
async def rpcs(models: Manners | None = None, **settings: Any) -> AsyncIterator[Rpcs]:
    """The service, and a client that is connected to it."""
    found = models or Manners()
    chosen = Settings(**settings)
    metrics = Metrics()
    metrics.attach(found)
    gate = Gate(chosen.api_keys, refused=metrics.auth_failed, local=True)
    door = Door(
        models=found,
        meter=metrics.meter,
        authorize=lambda headers: gate.check(headers, Scope.INFERENCE),
        epoch=gate.epoch,
        shed=metrics.shed,
        regions=Regions(allowed=chosen.allow_client_shm),
    )
    logs = LogSettings(logging.Logger("none", logging.INFO))
    known = {
        "settings": chosen,
        "metrics": metrics,
        "info": Info(),
        "logs": logs,
        "tracer": Tracer(Start(), None, found),
        "cuda_regions": CudaRegions(allowed=chosen.allow_client_shm),
    }
    closing = asyncio.Event()
    depot = depot_of(known, door, gate, Turnstile(), closing)
    port = RpcPort(depot, bind("127.0.0.1", 0), max_message=chosen.grpc_max_message)
    await port.open()
    async with aio.insecure_channel(port.address, options=OPTIONS) as channel:
        try:
            yield Rpcs(depot, port, metrics, channel)
        finally:
            found.release()
            closing.set()
            found.drain()
            await port.close(0.5)


def asking(
    *values: float,
    model: str = "double",
    version: str = "",
    outputs: Iterable[str] = (),
    **more: Any,
) -> Any:
    """x, FP32 [rows, 2], raw."""
    x = np.array(values or (1, 2), np.float32).reshape(-1, 2)
    return request_of([Tensor.of("x", x)], model=model, version=version, outputs=outputs, **more)


def request_of(
    tensors: Sequence[Tensor],
    *,
    model: str = "double",
    version: str = "",
    outputs: Iterable[str] = (),
    id: str = "",
    parameters: dict[str, Any] | None = None,
) -> Any:
    asked = service_pb2.ModelInferRequest(model_name=model, model_version=version, id=id)
    for tensor in tensors:
        asked.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        asked.raw_input_contents.append(bytes(tensor.data))
    for name in outputs:
        asked.outputs.add(name=name)
    for key, value in (parameters or {}).items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value))
        setattr(asked.parameters[key], kind or "string_param", value)
    return asked


def floats_of(answer: Any, at: int = 0) -> list[float]:
    found: list[float] = np.frombuffer(answer.raw_output_contents[at], np.float32).tolist()
    return found


def key(value: str) -> tuple[tuple[str, str], ...]:
    """Metadata."""
    return (("authorization", f"Bearer {value}"),)


CODE = grpc.StatusCode
