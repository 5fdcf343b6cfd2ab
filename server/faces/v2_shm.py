"""Clients' shared memory over HTTP, as Triton has it (system_shared_memory and cuda_shared_memory).

    POST /v2/systemsharedmemory/region/NAME/register      {"key", "byte_size", "offset"?}
    POST /v2/systemsharedmemory[/region/NAME]/unregister  one, or all
    GET  /v2/systemsharedmemory[/region/NAME]/status      one, or all

and the same below /v2/cudasharedmemory, where nothing can be registered. What is registered is used by
infer (`server.extras`); the rules are those of `server.triton.shm`. The media type of a body is ignored,
as Triton does: its clients send any.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from server.limits import ASKED, decode
from server.replies import told

SYSTEM, CUDA = "/systemsharedmemory", "/cudasharedmemory"
REGION = "/region/{name:str}"
Reply = Response[bytes]
Asked = Request[Any, Any, Any]


class Registration(msgspec.Struct):
    """`key`: the POSIX name of the shared memory, such as "/my_region". `byte_size` from `offset` on
    is what belongs to the region."""

    key: str
    byte_size: int
    offset: int = 0


class Handle(msgspec.Struct):
    """A CUDA IPC handle, in base64."""

    b64: str


class CudaRegistration(msgspec.Struct):
    raw_handle: Handle
    byte_size: int
    device_id: int = 0


@post(f"{SYSTEM}{REGION}/register", status_code=200)
async def register(request: Asked, regions: NamedDependency[Any], name: FromPath[str]) -> Reply:
    said = await _said(request, Registration)
    regions.register(name, said.key, said.offset, said.byte_size)
    return _empty()


@post([f"{SYSTEM}/unregister", f"{SYSTEM}{REGION}/unregister"], status_code=200)
async def unregister(regions: NamedDependency[Any], name: FromPath[str] = "") -> Reply:
    regions.unregister(name or None)
    return _empty()


@get([f"{SYSTEM}/status", f"{SYSTEM}{REGION}/status"], sync_to_thread=False)
def status(regions: NamedDependency[Any], name: FromPath[str] = "") -> Reply:
    return told(regions.status(name or None))


@post(f"{CUDA}{REGION}/register", status_code=200)
async def register_cuda(
    request: Asked, cuda_regions: NamedDependency[Any], name: FromPath[str]
) -> Reply:
    cuda_regions.register(name)
    return _empty()


@post([f"{CUDA}/unregister", f"{CUDA}{REGION}/unregister"], status_code=200)
async def unregister_cuda(cuda_regions: NamedDependency[Any], name: FromPath[str] = "") -> Reply:
    cuda_regions.unregister(name or None)
    return _empty()


@get([f"{CUDA}/status", f"{CUDA}{REGION}/status"], sync_to_thread=False)
def status_cuda(cuda_regions: NamedDependency[Any], name: FromPath[str] = "") -> Reply:
    return told(cuda_regions.status(name or None))


async def _said(request: Asked, kind: type[Registration]) -> Registration:
    found: Registration = decode(await request.body(), kind)
    request.scope["state"][ASKED] = found.key  # for the audit log
    return found


def _empty() -> Reply:
    return Response(b"", media_type="application/json")


router = Router(
    "/v2",
    route_handlers=[register, unregister, status, register_cuda, unregister_cuda, status_cuda],
)
