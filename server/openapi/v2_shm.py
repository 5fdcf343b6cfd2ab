"""KServe V2's shared memory: /v2/systemsharedmemory and /v2/cudasharedmemory."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from repository.errors import InvalidRequestError
from server.faces.v2_shm import CudaRegistration, Registration
from server.openapi.operation import Answer, Operation, Param, asked, ok
from server.openapi.v2 import FACE
from server.refusals import UnsupportedError
from server.triton.shm import DISABLED, UnknownRegionError

NAME = Param(
    name="name",
    where="path",
    description="The region, as requests name it.",
    schema={"type": "string", "minLength": 1, "maxLength": 255},
    example="inputs",
)
DONE = {200: Answer(description="Done. The body is empty.")}
OFF = UnsupportedError(DISABLED)
UNKNOWN = UnknownRegionError("Unable to find system shared memory region: 'inputs'")
SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"


class RegionStatus(msgspec.Struct):
    name: str
    key: str
    offset: int
    byte_size: int


class CudaRegionStatus(msgspec.Struct):
    name: str
    device_id: int
    byte_size: int


ONE = {"name": "inputs", "key": "/inputs", "offset": 0, "byte_size": 64}


def _operations() -> Iterator[Operation]:
    for base, what, region in ((SYSTEM, "shared", RegionStatus), (CUDA, "CUDA", CudaRegionStatus)):
        cuda = base == CUDA
        for path, params in ((base, ()), (f"{base}/region/{{name}}", (NAME,))):
            which = "a region" if params else "all regions"
            route = path.replace("{name}", "{name:str}")
            yield Operation(
                method="GET",
                path=f"{path}/status",
                route=f"{route}/status",
                face=FACE,
                summary=f"What is registered of {which} in {what} memory",
                description="A list, also of one. There are none in CUDA memory."
                if cuda
                else "A list, also of one.",
                params=params,
                answers=ok(list[region], [] if cuda else [ONE]),  # type: ignore[valid-type]
                errors={404: UNKNOWN, 501: OFF} if params else {501: OFF},
            )
            yield Operation(
                method="POST",
                path=f"{path}/unregister",
                route=f"{route}/unregister",
                face=FACE,
                summary=f"Forget {which} in {what} memory",
                description="What is not there is forgotten already. Requests that run keep what they "
                "found.",
                params=params,
                answers=DONE,
                errors={501: OFF},
            )
    yield Operation(
        method="POST",
        path=f"{SYSTEM}/region/{{name}}/register",
        route=f"{SYSTEM}/region/{{name:str}}/register",
        face=FACE,
        summary="Register shared memory",
        description="A file in /dev/shm, by its POSIX name, that requests may take inputs from and have "
        "outputs written to. Needs `--allow-client-shm`.",
        params=(NAME,),
        body=asked(Registration, whole={"key": "/inputs", "byte_size": 64}),
        answers=DONE,
        errors={
            400: InvalidRequestError("shared memory region 'inputs' already in manager"),
            501: OFF,
        },
    )
    yield Operation(
        method="POST",
        path=f"{CUDA}/region/{{name}}/register",
        route=f"{CUDA}/region/{{name:str}}/register",
        face=FACE,
        summary="Register CUDA memory",
        description="Refused: this server opens no handles of clients to a GPU's memory.",
        params=(NAME,),
        body=asked(
            CudaRegistration,
            whole={"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": 64},
        ),
        answers=DONE,
        errors={
            400: InvalidRequestError(
                "failed to register CUDA shared memory region: 'inputs', GPUs not supported"
            ),
            501: OFF,
        },
    )


OPERATIONS = tuple(_operations())
