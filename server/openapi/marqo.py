"""GET /, GET and DELETE /models, /device/...: as Marqo's clients know them."""

from __future__ import annotations

from repository.errors import ConflictError, DeviceSilentError
from server.codecs.marqo_answers import CpuInfo, CudaInfo, Ejected, Greeting, LoadedModels
from server.codecs.marqo_errors import NoCudaError, NotCachedError, ParameterError
from server.faces import marqo
from server.openapi.failures import MarqoError
from server.openapi.operation import Answer, Content, Face, Operation, Param, ok

FACE = Face(name="Marqo", description="What is loaded, as Marqo's clients ask.", error=MarqoError)


GREETING = {
    "message": "Welcome to modeldepot",
    "server": "modeldepot",
    "server_version": "0.1.0",
    "version": "2.23.1",
}
SILENT = DeviceSilentError("the GPU driver does not answer", retry_after_s=5)

OPERATIONS = (
    Operation(
        method="GET",
        path="/",
        face=FACE,
        handler=marqo.greet,
        answers={
            200: Answer(
                description="Who is there; a page to browsers.",
                contents=(
                    Content(kind=Greeting, examples={"client": GREETING}),
                    Content(
                        kind={"type": "string"},
                        media="text/html",
                        examples={"browser": "<!doctype html>..."},
                    ),
                ),
            )
        },
    ),
    Operation(
        method="GET",
        path="/models",
        face=FACE,
        handler=marqo.loaded,
        answers=ok(LoadedModels, {"models": [{"model_name": "iris", "model_device": "cpu"}]}),
    ),
    Operation(
        method="DELETE",
        path="/models",
        face=FACE,
        handler=marqo.eject,
        params=(
            Param(
                name="model_name",
                description="Slashes as they are.",
                required=True,
                example="iris",
                schema={"type": "string", "minLength": 1},
            ),
            Param(name="model_device", description="cpu, cuda, cuda:1 ...", example="cpu"),
        ),
        answers={
            **ok(
                Ejected,
                {
                    "result": "success",
                    "message": "successfully eject model_name `iris` from device `cpu`",
                },
            ),
        },
        errors={
            400: None,
            404: NotCachedError("iris2", "cpu"),
            409: ConflictError(
                "model 'iris' serves on cpu and cuda, and its versions are unloaded together; eject it "
                "without a model_device"
            ),
            422: ParameterError("model_name", "field required", "value_error.missing"),
            500: None,
            503: None,
            507: None,
        },
    ),
    Operation(
        method="GET",
        path="/device/cpu",
        face=FACE,
        handler=marqo.cpu,
        answers=ok(
            CpuInfo,
            {
                "cpu_usage_percent": "1.0 %",
                "memory_used_percent": "2.0 %",
                "memory_used_gb": "3.0",
            },
        ),
    ),
    Operation(
        method="GET",
        path="/device/cuda",
        face=FACE,
        handler=marqo.cuda,
        answers={
            **ok(
                CudaInfo,
                {
                    "cuda_devices": [
                        {
                            "device_id": 0,
                            "device_name": "NVIDIA H200",
                            "memory_used": "1.2 GiB",
                            "total_memory": "139.8 GiB",
                            "utilization": "3.0 %",
                            "memory_used_percent": "0.9 %",
                        }
                    ]
                },
            ),
        },
        errors={400: NoCudaError(), 503: SILENT},
    ),
)
