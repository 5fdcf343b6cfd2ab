"""What a request that has ended tells whoever traces it, on both routes alike: its id, its tensors."""

from __future__ import annotations

import asyncio
import gzip
import json
from functools import partial
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from server.call import Door
from server.faces import v2_infer
from server.metrics.meter import Traced
from tests.integration.v2 import Counted, Stage, listening

VALUES = [[1.0, 2.0], [3.0, 4.0]]
INFER = "/v2/models/m/infer"


class Told(NamedTuple):
    id: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class Tracing(Counted):
    """Copies what it is told, as a tracer does."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Told] = []

    def done(self, model: str, version: int, outcome: str, **rest: Any) -> None:
        of: Traced = rest["of"]
        each = ({t.name: t.array().tolist() for t in kind} for kind in (of.inputs, of.outputs))
        self.told.append(Told(of.request_id, *each))
        super().done(model, version, outcome, **rest)


class Traces(Stage):
    def __init__(self, *, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.meter: Tracing = Tracing()
        self.door = Door(models=self.models, meter=self.meter)
        self.app.infer = partial(v2_infer.infer, door=self.door)

    async def tells(self, body: bytes, **headers: str) -> Told:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        async with listening(self) as port, httpx.AsyncClient() as client:
            await client.post(f"http://127.0.0.1:{port}{INFER}", content=body, headers=named)
            async with asyncio.timeout(10):
                await self.meter.ended.wait()
        (told,) = self.meter.told
        return told


def header(**parameters: Any) -> bytes:
    one: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [2, 2]}
    one |= {"parameters": parameters} if parameters else {"data": VALUES}
    return json.dumps({"id": "7", "inputs": [one]}).encode()


ALL = Told("7", {"x": VALUES}, {"y": [[2.0, 4.0], [6.0, 8.0]]})
RAW = np.array(VALUES, np.float32).tobytes()


@pytest.mark.parametrize("fast", [False, True])
async def test_a_request_in_json_in_binary_or_compressed_tells_its_id_and_its_tensors(
    fast: bool,
) -> None:
    binary = header(binary_data_size=len(RAW))
    length = {"inference_header_content_length": str(len(binary))}
    assert await Traces(fast=fast).tells(header()) == ALL
    assert await Traces(fast=fast).tells(binary + RAW, **length) == ALL
    packed = gzip.compress(binary + RAW)
    assert await Traces(fast=fast).tells(packed, content_encoding="gzip", **length) == ALL


@pytest.mark.parametrize("fast", [False, True])
async def test_one_that_was_refused_tells_what_there_was_of_it(fast: bool) -> None:
    assert await Traces(fast=fast).tells(b"{") == Told("", {}, {})
    stage = Traces(fast=fast)
    stage.models.answers = lambda request: ValueError("odd")
    assert await stage.tells(header()) == ALL._replace(outputs={})


@pytest.mark.parametrize("fast", [False, True])
async def test_of_a_raw_body_there_is_no_tensor_to_tell(fast: bool) -> None:
    told = await Traces(fast=fast).tells(RAW[:8], inference_header_content_length="0")
    assert told == Told("", {}, {"y": [[2.0, 4.0]]})
