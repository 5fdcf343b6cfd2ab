"""/v1/models/sleep, /wake, /pin, /v1/devices: who is where in memory, by call."""

from __future__ import annotations

from typing import Any

from repository.errors import ConflictError
from server.codecs.named_model import NamedModel
from server.faces import memory
from server.openapi.native import BODY, FACE, WISH
from server.openapi.operation import Operation, asked, ok

MIB = 2**20
SLEPT: dict[str, Any] = {
    "status": "success",
    "model": "iris",
    "message": "Model iris sleeps with 300MiB in host memory; 300MiB are free again",
    "asleep": True,
    "generations": 1,
    "unloaded": 0,
    "why": "",
    "freed_bytes": 300 * MIB,
    "freed": {"cuda:0": 300 * MIB},
    "host_bytes": 300 * MIB,
    "took_s": 0.041,
}
WOKEN: dict[str, Any] = {
    "status": "success",
    "model": "iris",
    "message": "Model iris woken; it holds 300MiB",
    "versions": [1],
    "woken": True,
    "already": False,
    "reserved_bytes": 300 * MIB,
    "reserved": {"cuda:0": 300 * MIB},
    "took_s": 0.017,
}
PINNED: dict[str, Any] = {
    "status": "success",
    "model": "iris",
    "message": "Model iris is pinned",
    "pinned": True,
    "honoured": True,
    "why": "",
}
ON_A_GPU: dict[str, Any] = {
    "device": "cuda:0",
    "name": "NVIDIA H200",
    "budget": 135679672320,
    "reserved": 300 * MIB,
    "free": 135365099520,
    "total": 150754820096,
    "used": 1073741824,
    "attributed": 943718400,
    "unattributed": 130023424,
    "uuid": "GPU-2f8a1c90-0c1e-4c5a-9f0e-5d1b7a3c9e21",
    "driver": "570.124.06",
    "utilization": 0.07,
    "temperature_c": 41.0,
    "power_w": 121.5,
    "power_limit_w": 700.0,
}
TIER: dict[str, Any] = {
    "device": "host",
    "name": "host",
    "budget": 17179869184,
    "reserved": 0,
    "free": 17179869184,
    "total": None,
    "used": None,
    "attributed": 0,
    "unattributed": None,
    "uuid": None,
    "driver": None,
    "utilization": None,
    "temperature_c": None,
    "power_w": None,
    "power_limit_w": None,
}
NOTHING_TO_SLEEP = ConflictError(
    "model 'iris' is not loaded, so there is nothing to put to sleep; load it first"
)
OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/models/sleep",
        face=FACE,
        handler=memory.sleep,
        body=asked(NamedModel, sleep={"model_name": "iris"}),
        answers=ok(memory.SleepReply, SLEPT),
        errors=WISH | {409: NOTHING_TO_SLEEP},
    ),
    Operation(
        method="POST",
        path="/v1/models/wake",
        face=FACE,
        handler=memory.wake,
        body=asked(NamedModel, wake={"model_name": "iris"}),
        answers=ok(memory.WakeReply, WOKEN),
        errors=WISH,
    ),
    Operation(
        method="POST",
        path="/v1/models/pin",
        face=FACE,
        handler=memory.pin,
        body=asked(
            memory.PinRequest,
            pin={"model_name": "iris"},
            unpin={"model_name": "iris", "pinned": False},
        ),
        answers=ok(memory.PinReply, PINNED),
        errors={**BODY, 500: None, 503: None, 507: None},
    ),
    Operation(
        method="GET",
        path="/v1/devices",
        face=FACE,
        handler=memory.devices,
        answers=ok(memory.DeviceList, {"devices": [ON_A_GPU, TIER]}),
    ),
)
