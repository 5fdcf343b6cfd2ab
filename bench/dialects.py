"""How a question is put into a request, and an answer read, for each sort of server.

V2 binary   KServe V2 with binary data: a JSON header and the bytes of the tensor behind it
V2 JSON     KServe V2, numbers as text
base64      {"x": "..."} → {"y": "..."}, the bytes of a row as base64 within JSON: for servers that
            have no protocol and take JSON; several times faster there than numbers as text
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bench.subjects import Array

HEADER_LENGTH = "Inference-Header-Content-Length"


class Message(NamedTuple):
    headers: Mapping[str, str]
    body: bytes


class Dialect(NamedTuple):
    name: str
    ask: Callable[[Array], Message]
    read: Callable[[Mapping[str, str], bytes], Array]  # headers with small letters


def _ask_binary(x: Array) -> Message:
    tensor = _tensor(x, parameters={"binary_data_size": x.nbytes})
    wanted = [{"name": "y", "parameters": {"binary_data": True}}]
    return _binary({"inputs": [tensor], "outputs": wanted}, x)


def answer_binary(model: str, y: Array) -> Message:
    """What a V2 server answers: also for the servers of `bench.bare`."""
    tensor = _tensor(y, name="y", parameters={"binary_data_size": y.nbytes})
    return _binary({"model_name": model, "model_version": "1", "outputs": [tensor]}, y)


def _binary(header: dict[str, Any], data: Array) -> Message:
    head = json.dumps(header, separators=(",", ":")).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return Message(headers, head + data.tobytes())


def _read_binary(headers: Mapping[str, str], body: bytes) -> Array:
    length = int(headers[HEADER_LENGTH.lower()])
    shape = json.loads(body[:length])["outputs"][0]["shape"]
    return np.frombuffer(body, np.float32, offset=length).reshape(shape)


def _ask_json(x: Array) -> Message:
    return _json({"inputs": [_tensor(x, data=x.ravel().tolist())]})


def _read_json(headers: Mapping[str, str], body: bytes) -> Array:
    tensor = json.loads(body)["outputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def _ask_base64(x: Array) -> Message:
    return _json({"x": base64.b64encode(x.tobytes()).decode()})


def _read_base64(headers: Mapping[str, str], body: bytes) -> Array:
    return np.frombuffer(base64.b64decode(json.loads(body)["y"]), np.float32).reshape(1, -1)


def _json(message: dict[str, Any]) -> Message:
    body = json.dumps(message, separators=(",", ":")).encode()
    return Message({"Content-Type": "application/json"}, body)


def _tensor(array: Array, name: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": "FP32", **more}


V2_BINARY = Dialect("V2 binary", _ask_binary, _read_binary)
V2_JSON = Dialect("V2 JSON", _ask_json, _read_json)
BASE64 = Dialect("base64", _ask_base64, _read_base64)
