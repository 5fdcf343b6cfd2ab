"""/v1/models..., /v1/gpu...: as PolarGrid documents them, and what we tell beyond it."""

from __future__ import annotations

from repository.errors import DeviceSilentError, SupersededError
from server.codecs.named_model import NamedModel
from server.codecs.openai_models import ModelCard
from server.codecs.unloaded import UnloadAllReply
from server.faces import gpu, models, native
from server.openapi.failures import NativeError
from server.openapi.operation import Answer, Content, Face, Operation, Param, asked, ok

FACE = Face(
    name="models",
    description="Load, unload and look at models, as PolarGrid documents it; one page for each model.",
    error=NativeError,
)
NAME = Param(
    name="model",
    where="path",
    description="A model, an alias, or an adapter as `model:adapter`. Slashes as they are, or as %2F.",
    example="iris",
    schema={"type": "string", "minLength": 1, "maxLength": 401},
)
BODY = {400: None, 404: None, 413: None, 415: None}
WISH = {
    **BODY,
    409: SupersededError("an unload of 'iris' came later"),
    500: None,
    503: None,
    507: None,
}

LOADED = {
    "status": "success",
    "model": "iris",
    "force_reload": False,
    "message": "Model iris loaded successfully",
}
DRY = {
    "status": "success",
    "model": "iris",
    "dry_run": True,
    "would_load": True,
    "bytes_needed": 33554432,
    "bytes_free": 17179869184,
    "device": "cpu",
    "would_evict": [],
    "message": "Model iris would be loaded",
    "devices": ["cpu"],
    "needs": {"cpu": 33554432},
    "source": "estimate",
    "would_replace": False,
    "would_wake": False,
    "would_wait": False,
}
UNLOADED_ALL = {
    "status": "success",
    "unloaded_models": ["iris"],
    "errors": [],
    "total_unloaded": 1,
    "freed_bytes": 33554432,
    "leaked_bytes": 0,
    "confirmed": True,
}
CARD = {
    "id": "iris",
    "object": "model",
    "created": 1790000000,
    "owned_by": "modeldepot",
    "status": "loaded",
    "root": "iris",
    "parent": None,
}


def _of_model(example: object) -> tuple[Content, ...]:
    return (Content(kind=(models.ModelView, ModelCard), examples={"adapter": example}),)


OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/models/load",
        face=FACE,
        handler=native.load,
        body=asked(
            native.LoadRequest,
            load={"model_name": "iris"},
            reload={"model_name": "iris", "force_reload": True},
            dry_run={"model": "iris", "dry_run": True},
        ),
        answers={
            200: Answer(
                description="It is ready; or, of a dry run, what would happen.",
                contents=(
                    Content(
                        kind=(native.LoadReply, native.DryRunReply),
                        examples={"loaded": LOADED, "dry_run": DRY},
                    ),
                ),
            )
        },
        errors=WISH,
    ),
    Operation(
        method="POST",
        path="/v1/models/unload",
        face=FACE,
        handler=native.unload,
        body=asked(NamedModel, unload={"model_name": "iris"}),
        answers=ok(
            native.UnloadReply,
            {
                "status": "success",
                "model": "iris",
                "message": "Model iris unloaded successfully",
                "freed_bytes": 33554432,
                "leaked_bytes": 0,
                "confirmed": True,
            },
        ),
        errors=WISH,
    ),
    Operation(
        method="POST",
        path="/v1/models/unload-all",
        face=FACE,
        handler=native.unload_all,
        answers=ok(UnloadAllReply, UNLOADED_ALL),
        errors={400: None, 500: None, 503: None, 507: None},
    ),
    Operation(
        method="GET",
        path="/v1/models/status",
        face=FACE,
        handler=native.status,
        answers=ok(
            native.StatusReply,
            {
                "loaded": ["iris"],
                "loading_status": {"iris": "loaded", "org/name": "failed"},
                "repository": "/models",
                "reloading": [],
                "failed": {"org/name": "the file is no ONNX model"},
                "asleep": [],
                "pinned": ["iris"],
            },
        ),
    ),
    Operation(
        method="GET",
        path="/v1/models",
        face=FACE,
        handler=native.index,
        answers=ok(native.ModelList, {"object": "list", "data": [CARD]}),
    ),
    Operation(
        method="GET",
        path="/v1/models/{model}",
        route="/v1/models/{name:path}",
        face=FACE,
        handler=models.show,
        params=(NAME,),
        answers={
            200: Answer(
                description="The model, or the adapter.",
                contents=_of_model(
                    {**CARD, "id": "tiny-lm:pirate", "root": "tiny-lm", "parent": "tiny-lm"}
                ),
            )
        },
        errors={400: None, 404: None, 405: None},
    ),
)

GPU = Face(name="gpu", description="Device memory, as PolarGrid documents it.", error=NativeError)


SILENT = DeviceSilentError("the GPU driver does not answer", retry_after_s=5)
AT = "2026-09-01T12:00:00.000+00:00"
DEVICES = (
    Operation(
        method="GET",
        path="/v1/gpu/status",
        face=GPU,
        handler=gpu.status,
        answers=ok(
            gpu.GpuStatus,
            {
                "status": "success",
                "timestamp": AT,
                "gpus": [
                    {
                        "index": 0,
                        "name": "NVIDIA H200",
                        "uuid": "GPU-2f8a1c90-0c1e-4c5a-9f0e-5d1b7a3c9e21",
                        "memory": {
                            "total_mb": 143771.0,
                            "used_mb": 14377.1,
                            "free_mb": 129393.9,
                            "total_gb": 140.4,
                            "used_gb": 14.04,
                            "free_gb": 126.36,
                            "percent_used": 10.0,
                        },
                        "utilization": {"gpu_percent": 7, "memory_percent": 3},
                        "temperature_c": 41,
                    }
                ],
                "processes": [{"pid": 4711, "name": "modeldepot", "memory_mb": 14000.0, "gpu": 0}],
                "total_gpus": 1,
            },
        ),
        errors={503: SILENT},
    ),
    Operation(
        method="GET",
        path="/v1/gpu/memory",
        face=GPU,
        handler=gpu.memory,
        answers=ok(
            gpu.MemoryReply,
            {
                "status": "success",
                "timestamp": AT,
                "memory": [
                    {
                        "index": 0,
                        "total_gb": 140.4,
                        "used_gb": 14.04,
                        "free_gb": 126.36,
                        "percent_used": 10.0,
                        "percent_free": 90.0,
                    }
                ],
            },
        ),
        errors={503: SILENT},
    ),
    Operation(
        method="POST",
        path="/v1/gpu/purge",
        face=GPU,
        handler=gpu.purge,
        body=asked(gpu.PurgeRequest, gently={"force": False}, now={"force": True}),
        body_required=False,
        answers=ok(UnloadAllReply, UNLOADED_ALL),
        errors={400: None, 409: None, 413: None, 415: None, 500: None, 503: None, 507: None},
    ),
)
