"""All RPCs that do not infer: who may call them, what they say, and what the audit log says of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from tritonclient.grpc import service_pb2

from repository.errors import LoadFailedError
from server.auth import Scope
from server.limits import MANAGEMENT_BODY
from server.rpc.health import SERVICE_UNKNOWN, reply_of
from server.rpc.management import RPCS
from server.rpc.table import HEALTH, INFERENCE, ROWS
from server.rpc.wire import MOST_FIELDS, field
from tests.integration.test_routes_keys import KEYS, write_keys
from tests.rpc import CODE, Rpcs, asking, key, rpcs

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
METHODS = {method.name: method for method in SERVICE.methods}
OPEN = {"ServerLive", "ServerReady", "Check", "Watch"}
ADMIN = {row.name for row in ROWS if row.scope is Scope.ADMIN}
READY, WAITING = reply_of(1), reply_of(2)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.yaml", **KEYS)


async def code_of(server: Rpcs, name: str, metadata: Any = ()) -> Any:
    """The status of a call without anything in it."""
    call: Any = None
    path = next(row.path for row in ROWS if row.name == name)
    if name in ("ModelStreamInfer", "Watch"):
        call = server.channel.stream_stream(path)(metadata=metadata)
        with suppress(aio.AioRpcError):
            await call.write(b"")
            await call.done_writing()
            if await call.read() is not aio.EOF:
                call.cancel()  # it was let in, and would never end
                return CODE.OK
    else:
        call = server.channel.unary_unary(path)(b"", metadata=metadata)
    return await call.code()


def test_every_rpc_of_the_service_is_in_the_table_and_no_other() -> None:
    assert {row.name for row in ROWS if row.path.startswith(f"/{INFERENCE}/")} == METHODS.keys()
    assert len(METHODS) == 20
    assert RPCS.keys() == METHODS.keys() - {"ModelInfer", "ModelStreamInfer"}
    assert [row.path for row in ROWS if row.path.startswith(f"/{HEALTH}/")] == [
        f"/{HEALTH}/Check",
        f"/{HEALTH}/Watch",
    ]


def test_only_health_is_open_and_only_an_administrator_changes_anything() -> None:
    assert {row.name for row in ROWS if row.scope is None} == OPEN
    regions = {row.name for row in ROWS if "SharedMemory" in row.name}  # of whoever infers
    assert {row.name for row in ROWS if row.changes} - regions == ADMIN - {"RepositoryIndex"}
    assert all(row.group for row in ROWS)


async def test_without_a_key_nothing_but_health_is_answered(keys: Path) -> None:
    async with rpcs(api_keys=keys) as server:
        for row in ROWS:
            code = await code_of(server, row.name)
            assert (code is CODE.UNAUTHENTICATED) is (row.name not in OPEN), row.name


async def test_a_key_may_do_what_its_scopes_say_whatever_the_rpc(keys: Path) -> None:
    async with rpcs(api_keys=keys) as server:
        for row in ROWS:
            if row.name in OPEN:
                continue
            weak = await code_of(server, row.name, key("key-m"))
            some = await code_of(server, row.name, (("x-api-key", "key-i"),))
            full = await code_of(server, row.name, key("key-a"))
            assert weak is CODE.PERMISSION_DENIED, row.name
            assert (some is CODE.PERMISSION_DENIED) is (row.scope is Scope.ADMIN), row.name
            assert full not in (CODE.PERMISSION_DENIED, CODE.UNAUTHENTICATED), row.name


async def test_a_large_message_without_a_key_is_refused_unread(keys: Path) -> None:
    async with rpcs(api_keys=keys) as server:
        asked = asking(*[1.0] * (4 << 20), model="wide")
        error = await server.refused(server.stub.ModelInfer(asked, timeout=20))
        assert error.code() is CODE.UNAUTHENTICATED
        assert "API key missing" in error.details()


async def test_what_is_not_in_the_table_does_not_exist() -> None:
    async with rpcs() as server:
        call = server.channel.unary_unary(f"/{INFERENCE}/ModelTrain")
        assert (await server.refused(call(b""))).code() is CODE.UNIMPLEMENTED


async def test_a_restricted_protocol_wants_its_header() -> None:
    texts = ("model-repository,logging:x-admin=secret", "health:probe=yes")
    header = (("triton-grpc-protocol-x-admin", "secret"),)
    async with rpcs(grpc_restricted_protocol=texts) as server:
        load = server.stub.RepositoryModelLoad
        asked = service_pb2.RepositoryModelLoadRequest(model_name="double")
        error = await server.refused(load(asked))
        assert error.code() is CODE.PERMISSION_DENIED and error.details() == (
            "This protocol is restricted, expecting header 'triton-grpc-protocol-x-admin'"
        )
        assert await code_of(server, "LogSettings", header) is CODE.OK
        assert await code_of(server, "ServerLive") is CODE.PERMISSION_DENIED
        assert await code_of(server, "ServerMetadata") is CODE.OK


# what they say ------------------------------------------------------------------------------------


async def test_health_and_metadata_are_those_of_http() -> None:
    async with rpcs() as server:
        stub = server.stub
        assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
        assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready
        about = await stub.ServerMetadata(service_pb2.ServerMetadataRequest())
        assert (about.name, about.version) == ("depot", "1.2")
        model = await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="double"))
        assert list(model.versions) == ["1", "2"] and model.platform == "fake"
        assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [
            ("x", "FP32", [-1, 2])
        ]


@pytest.mark.parametrize(
    ("name", "version", "ready"), [("double", "", True), ("double", "7", False), ("no", "", False)]
)
async def test_a_model_is_ready_or_not_and_never_an_error(
    name: str, version: str, ready: bool
) -> None:
    async with rpcs() as server:
        asked = service_pb2.ModelReadyRequest(name=name, version=version)
        assert (await server.stub.ModelReady(asked)).ready is ready


async def test_a_server_that_goes_is_not_there_any_more() -> None:
    async with rpcs() as server:
        server.models.drain()
        for name in ("ServerLive", "ServerReady"):
            asked = getattr(service_pb2, f"{name}Request")()
            error = await server.refused(getattr(server.stub, name)(asked))
            assert error.code() is CODE.UNAVAILABLE and error.details() == "Server exiting"


async def test_a_repository_cannot_be_named() -> None:
    async with rpcs() as server:
        for name in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"):
            asked = getattr(service_pb2, f"{name}Request")(repository_name="one")
            error = await server.refused(getattr(server.stub, name)(asked))
            assert error.code() is CODE.UNIMPLEMENTED
            assert error.details() == "'repository_name' specification is not supported"


async def test_log_settings_are_shown_and_changed() -> None:
    async with rpcs() as server:
        asked = service_pb2.LogSettingsRequest()
        shown = (await server.stub.LogSettings(asked)).settings
        assert shown["log_file"].string_param == "" and not shown["log_verbose_level"].uint32_param
        asked.settings["log_verbose_level"].uint32_param = 1
        asked.settings["log_info"].bool_param = False
        found = (await server.stub.LogSettings(asked)).settings
        assert found["log_verbose_level"].uint32_param == 1
        assert found["log_info"].bool_param is False
        asked.settings["log_file"].string_param = "x"
        assert (await server.refused(server.stub.LogSettings(asked))).code() is CODE.UNIMPLEMENTED


async def test_trace_settings_are_lists_of_texts() -> None:
    async with rpcs() as server:
        asked = service_pb2.TraceSettingRequest()
        asked.settings["trace_rate"].value.append("5")
        found = (await server.stub.TraceSetting(asked)).settings
        assert list(found["trace_rate"].value) == ["5"]
        assert list(found["trace_level"].value) == ["OFF"]
        asked.settings["trace_rate"].value.append("6")
        error = await server.refused(server.stub.TraceSetting(asked))
        assert error.code() is CODE.INVALID_ARGUMENT


async def test_shared_memory_is_off_unless_it_is_allowed() -> None:
    async with rpcs() as server:
        for name in ("System", "Cuda"):
            assert await code_of(server, f"{name}SharedMemoryStatus") is CODE.UNIMPLEMENTED
    async with rpcs(allow_client_shm=True) as server:
        assert await code_of(server, "SystemSharedMemoryStatus") is CODE.OK
        asked = service_pb2.CudaSharedMemoryRegisterRequest(name="r", byte_size=4)
        error = await server.refused(server.stub.CudaSharedMemoryRegister(asked))
        assert error.code() is CODE.INVALID_ARGUMENT and error.details() == (
            "failed to register CUDA shared memory region: 'r', GPUs not supported"
        )


async def test_what_cannot_be_read_is_an_invalid_argument_everywhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with rpcs() as server:
        with caplog.at_level(logging.WARNING):
            for row in ROWS:
                if row.name in ("ModelStreamInfer", "Watch"):
                    continue
                call = server.channel.unary_unary(row.path)(b"\x0a\x7f", timeout=20)
                assert (await server.refused(call)).code() is CODE.INVALID_ARGUMENT, row.name
        assert caplog.records == []


# the audit log ------------------------------------------------------------------------------------


async def test_what_changes_something_is_noted_with_its_caller_and_its_end(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rpcs(api_keys=keys) as server:
        server.models.fail["double"] = LoadFailedError("no luck")
        with caplog.at_level(logging.INFO, logger="modeldepot.audit"):
            asked = service_pb2.RepositoryModelLoadRequest(model_name="nobody")
            asked.parameters["config"].string_param = "{}"
            metadata = (*key("key-a"), ("x-request-id", "mine"))
            error = await server.refused(server.stub.RepositoryModelLoad(asked, metadata=metadata))
            await server.stub.LogSettings(service_pb2.LogSettingsRequest(), metadata=key("key-a"))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "modeldepot.audit"]
    assert line.startswith(f"key='admin' client=127.0.0.1 GRPC '/{INFERENCE}/RepositoryModelLoad'")
    assert "'model_name': 'nobody', 'parameters': ['config']" in line
    assert f"status={error.code().name}" in line and line.endswith("request=mine")
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"


async def test_a_message_that_no_such_call_needs_is_refused_before_it_is_read() -> None:
    """A load that brings files may be long."""
    asked = service_pb2.RepositoryModelLoadRequest(model_name="double")
    asked.parameters["config"].string_param = "{}"
    asked.parameters["file:1/model.onnx"].bytes_param = bytes(MANAGEMENT_BODY)
    for files in (False, True):
        async with rpcs(allow_file_override=files) as server:
            if files:
                await server.stub.RepositoryModelLoad(asked)
            else:
                error = await server.refused(server.stub.RepositoryModelLoad(asked))
                assert error.code() is CODE.INVALID_ARGUMENT
            name = service_pb2.ModelReadyRequest(name="x" * MANAGEMENT_BODY)
            error = await server.refused(server.stub.ModelReady(name))
            assert error.code() is CODE.INVALID_ARGUMENT and "1048576" in error.details()
            many = service_pb2.TraceSettingRequest()
            for n in range(MOST_FIELDS + 1):
                many.settings[f"k{n}"].value.append("1")
            error = await server.refused(server.stub.TraceSetting(many))
            assert error.code() is CODE.INVALID_ARGUMENT and "8192 fields" in error.details()


@pytest.mark.parametrize("name", sorted(OPEN))
async def test_of_who_shows_no_key_nothing_is_read_and_the_answer_is_that_of_the_server(
    keys: Path, name: str
) -> None:
    """More than may be sent there: it would be refused, had it been looked at."""
    path = next(row.path for row in ROWS if row.name == name)
    long, other = (field(1, b"x" * size) for size in (2 * MANAGEMENT_BODY, 10))
    async with rpcs(api_keys=keys) as server:
        server.models.is_ready = True
        for metadata in ((), key("none")):
            call = server.channel.unary_stream(path)(long, metadata=metadata)
            assert await call.read() == READY
            call.cancel()
        call = server.channel.unary_stream(path)(other, metadata=key("key-i"))
        if name == "Check":
            with pytest.raises(aio.AioRpcError, match="there is no service"):
                await call.read()
        else:
            assert await call.read() == (reply_of(SERVICE_UNKNOWN) if name == "Watch" else READY)
        call.cancel()


# grpc.health.v1 -----------------------------------------------------------------------------------


async def test_the_health_service_says_whether_the_server_is_ready() -> None:
    async with rpcs() as server:
        check = server.channel.unary_unary(f"/{HEALTH}/Check")
        assert await check(b"") == READY
        assert await check(field(1, INFERENCE.encode())) == READY
        error = await server.refused(check(field(1, b"other")))
        assert error.code() is CODE.NOT_FOUND
        server.models.is_ready = False
        assert await check(b"") == WAITING


async def test_who_watches_is_told_of_every_change() -> None:
    async with rpcs() as server:
        server.models.is_ready = False
        watch = server.channel.unary_stream(f"/{HEALTH}/Watch")(b"")
        assert await watch.read() == WAITING
        server.models.is_ready = True
        server.models.events.publish("server.ready")
        assert await watch.read() == READY
        server.models.drain()
        assert await watch.read() == WAITING
        with suppress(aio.AioRpcError):
            await watch.read()
        assert await watch.code() is CODE.UNAVAILABLE


async def test_a_service_that_there_is_not_can_be_watched_all_the_same() -> None:
    async with rpcs() as server:
        watch = server.channel.unary_stream(f"/{HEALTH}/Watch")(field(1, b"other"))
        assert await watch.read() == reply_of(SERVICE_UNKNOWN)
        watch.cancel()
        await asyncio.sleep(0)
