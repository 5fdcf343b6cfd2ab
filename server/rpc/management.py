"""The RPCs that do not infer: what is known of the server and its models, and what may be changed.

Each takes its request as its message and answers with a plain dict, protobuf's JSON of its reply; what
they say is what HTTP says. Errors are raised, and told by whoever called.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from repository.errors import DrainingError, InvalidRequestError
from server.codecs.v2_paths import Route
from server.errors import PayloadTooLargeError, UnsupportedError
from server.limits import MANAGEMENT_BODY
from server.rpc.depot import Depot
from server.rpc.requests import message_of, route_of, values_of
from server.rpc.wire import check_fields
from server.triton import config, control, index, metadata, stats

Answer = dict[str, Any]
Manage = Callable[[Depot, Any], Awaitable[Answer]]
EXITING = "Server exiting"


async def server_live(depot: Depot, _: Any) -> Answer:
    _not_exiting(depot)
    return {"live": True}


async def server_ready(depot: Depot, _: Any) -> Answer:
    _not_exiting(depot)
    strict = depot.settings.strict_readiness
    return {"ready": metadata.server_ready(depot.models, strict=strict)}


def _not_exiting(depot: Depot) -> None:
    if depot.models.draining:
        raise DrainingError(EXITING)


async def server_metadata(depot: Depot, _: Any) -> Answer:
    return metadata.server_of(depot.info)


async def model_ready(depot: Depot, asked: Any) -> Answer:
    route = route_of(asked.name, asked.version)
    return {"ready": await metadata.model_ready(depot.models, route)}


async def model_metadata(depot: Depot, asked: Any) -> Answer:
    return metadata.model_of(depot.models, route_of(asked.name, asked.version))


async def model_config(depot: Depot, asked: Any) -> Answer:
    return {"config": config.config_of(depot.models, route_of(asked.name, asked.version))}


async def model_statistics(depot: Depot, asked: Any) -> Answer:
    """Of all models where none is named."""
    route: Route | None = route_of(asked.name, asked.version) if asked.name else None
    return stats.stats_of(depot.models, depot.tallies, route)


# the repository -----------------------------------------------------------------------------------


async def repository_index(depot: Depot, asked: Any) -> Answer:
    _of_all_repositories(asked)
    return {"models": await index.index(depot.models, ready=asked.ready)}


async def load(depot: Depot, asked: Any) -> Answer:
    _of_all_repositories(asked)
    said, allow = values_of(asked.parameters), depot.settings.allow_file_override
    await control.load(depot.models, asked.model_name, said, allow_files=allow)
    return {}


async def unload(depot: Depot, asked: Any) -> Answer:
    _of_all_repositories(asked)
    await control.unload(depot.models, asked.model_name, values_of(asked.parameters))
    return {}


def _of_all_repositories(asked: Any) -> None:
    if asked.repository_name:
        raise UnsupportedError("'repository_name' specification is not supported")


# shared memory ------------------------------------------------------------------------------------


async def system_status(depot: Depot, asked: Any) -> Answer:
    return _by_name(depot.regions.status(asked.name or None))


async def system_register(depot: Depot, asked: Any) -> Answer:
    depot.regions.register(asked.name, asked.key, asked.offset, asked.byte_size)
    return {}


async def system_unregister(depot: Depot, asked: Any) -> Answer:
    depot.regions.unregister(asked.name or None)
    return {}


async def cuda_status(depot: Depot, asked: Any) -> Answer:
    return _by_name(depot.cuda.status(asked.name or None))


async def cuda_register(depot: Depot, asked: Any) -> Answer:
    depot.cuda.register(asked.name)
    return {}


async def cuda_unregister(depot: Depot, asked: Any) -> Answer:
    depot.cuda.unregister(asked.name or None)
    return {}


def _by_name(regions: list[Answer]) -> Answer:
    return {"regions": {region["name"]: region for region in regions}}


# settings -----------------------------------------------------------------------------------------


async def trace_setting(depot: Depot, asked: Any) -> Answer:
    """A setting without values goes back to what it was at the start."""
    model = asked.model_name or None
    said = {key: _trace_value(key, value.value) for key, value in asked.settings.items()}
    found = depot.tracer.update(model, said) if said else depot.tracer.settings(model)
    return {"settings": {key: {"value": _listed(value)} for key, value in found.items()}}


def _trace_value(key: str, values: Any) -> list[str] | str | None:
    if not values:
        return None
    if key == "trace_level":
        return list(values)
    if len(values) > 1:
        raise InvalidRequestError(f"expect only 1 value for '{key}'")
    return str(values[0])


def _listed(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]


async def log_settings(depot: Depot, asked: Any) -> Answer:
    said = values_of(asked.settings)
    found = depot.logs.update(said) if said else depot.logs.shown()
    return {"settings": {key: {_kind_of(value): value} for key, value in found.items()}}


def _kind_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolParam"
    return "uint32Param" if isinstance(value, int) else "stringParam"


RPCS: Mapping[str, Manage] = {
    "ServerLive": server_live,
    "ServerReady": server_ready,
    "ServerMetadata": server_metadata,
    "ModelReady": model_ready,
    "ModelMetadata": model_metadata,
    "ModelConfig": model_config,
    "ModelStatistics": model_statistics,
    "RepositoryIndex": repository_index,
    "RepositoryModelLoad": load,
    "RepositoryModelUnload": unload,
    "SystemSharedMemoryStatus": system_status,
    "SystemSharedMemoryRegister": system_register,
    "SystemSharedMemoryUnregister": system_unregister,
    "CudaSharedMemoryStatus": cuda_status,
    "CudaSharedMemoryRegister": cuda_register,
    "CudaSharedMemoryUnregister": cuda_unregister,
    "TraceSetting": trace_setting,
    "LogSettings": log_settings,
}
_METHODS = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
_LONGEST = 100  # characters of what was asked for, in the audit log
_BRINGS_FILES = "RepositoryModelLoad"


def request_of(name: str, message: bytes, *, files: bool) -> Any:
    """`files`: a load may bring some, and be long. Everybody waits while a message is read, so what no
    such call needs is refused before. Raises InvalidRequestError, PayloadTooLargeError."""
    if len(message) > MANAGEMENT_BODY and not (files and name == _BRINGS_FILES):
        raise PayloadTooLargeError(
            f"the message has more than {MANAGEMENT_BODY} bytes; a load that brings files may be "
            "longer, if --allow-file-override is set"
        )
    check_fields(message)
    return message_of(getattr(service_pb2, _METHODS[name].input_type.name), message)


def reply_of(name: str, answer: Answer) -> bytes:
    reply = getattr(service_pb2, _METHODS[name].output_type.name)()
    return bytes(
        json_format.ParseDict(answer, reply, ignore_unknown_fields=True).SerializeToString()
    )


def only_reads(asked: Any) -> bool:
    """Whether an RPC that also changes settings was given none."""
    return "settings" in asked.DESCRIPTOR.fields_by_name and not asked.settings


def shown(asked: Any) -> str:
    """What the audit log says of a request that changes something: never what a file holds."""
    found = {}
    for of, value in asked.ListFields():
        is_map = of.message_type is not None and of.message_type.GetOptions().map_entry
        if not isinstance(value, bytes):
            found[of.name] = sorted(value) if is_map else value
    return repr(found)[:_LONGEST]
