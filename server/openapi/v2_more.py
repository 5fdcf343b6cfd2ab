"""What Triton's API has beside /infer: configuration, statistics, generate, logging, traces."""

from __future__ import annotations

from typing import Any

import msgspec

from repository.errors import InferenceFailedError, InvalidRequestError, QueueFullError
from server.faces.v2_generate import ONE
from server.openapi.operation import Answer, Content, Operation, asked, events, ok
from server.openapi.v2 import FACE, MODEL, NUMBER

CONFIG = {
    "name": "iris", "platform": "onnxruntime_onnx", "backend": "onnxruntime", "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
}  # fmt: skip
COUNTED = {"count": 2, "ns": 1_000_000}
STATS = {
    "model_stats": [
        {
            "name": "iris",
            "version": "1",
            "last_inference": 1_790_000_000_000,
            "inference_count": 2,
            "execution_count": 1,
            "inference_stats": {"success": COUNTED, "fail": {"count": 0, "ns": 0}},
            "response_stats": {},
            "batch_stats": [{"batch_size": 2, "compute_infer": COUNTED}],
            "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 4096}],
        }
    ]
}
NOT_THERE = InvalidRequestError("requested model 'iris' is not available")
EVENTS = 'data: {"model_name":"repeat","model_version":"1","OUT":1}\n\n'


class LogView(msgspec.Struct):
    """`log_format`: default or ISO8601; the lines look the same."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    log_format: str


class TraceView(msgspec.Struct):
    """`trace_level`: OFF, TIMESTAMPS, TENSORS. `trace_rate`: one of so many; `trace_count`: how many
    more, -1 any number; `log_frequency`: traces per file, 0 one file for all."""

    trace_level: list[str]
    trace_rate: str
    trace_count: str
    log_frequency: str
    trace_file: str
    trace_mode: str


LOGGING = {
    "log_file": "", "log_info": True, "log_warning": True, "log_error": True,
    "log_verbose_level": 0, "log_format": "default",
}  # fmt: skip
TRACING = {
    "trace_level": ["TIMESTAMPS"], "trace_rate": "100", "trace_count": "-1", "log_frequency": "0",
    "trace_file": "/tmp/trace.jsonl", "trace_mode": "triton",
}  # fmt: skip
ANYTHING: dict[str, Any] = {"type": "object", "additionalProperties": True}


def _of_model(version: bool) -> tuple[Operation, ...]:
    path = "/v2/models/{model}" + ("/versions/{version}" if version else "")
    route, params = "/v2/models/{rest:path}", (MODEL, NUMBER) if version else (MODEL,)
    which = " version" if version else ""
    generates: dict[str, Any] = {
        "method": "POST",
        "face": FACE,
        "params": params,
        "body": asked(ANYTHING, plain={"x": [5.1, 3.5, 1.4, 0.2], "id": "7"}),
    }
    failures = {
        400: None, 404: None, 413: None, 415: None, 424: None, 501: None, 507: None,
        503: QueueFullError("Exceeds maximum queue size", retry_after_s=1),
    }  # fmt: skip
    return (
        Operation(
            method="GET",
            path=f"{path}/config",
            route=route,
            face=FACE,
            summary=f"The configuration of a model{which}",
            description="Triton's ModelConfig in protobuf's JSON: what its config says, completed with "
            "what the model itself has.",
            params=params,
            answers=ok(ANYTHING, CONFIG),
            errors={400: None, 404: None, 405: None, 503: None},
        ),
        Operation(
            method="GET",
            path=f"{path}/stats",
            route=route,
            face=FACE,
            summary=f"What a model{which} has done",
            description="Counts and nanoseconds since the start, of the versions that serve.",
            params=params,
            answers=ok(ANYTHING, STATS),
            errors={400: NOT_THERE, 404: None, 405: None},
        ),
        Operation(
            path=f"{path}/generate",
            summary=f"Ask a model{which} in plain JSON",
            description="A key that is an input's name is that tensor: one value or a flat list; any "
            "other is a parameter. A model that writes texts takes `text_input` and answers "
            "`text_output`. The model must give exactly one answer.",
            answers=ok(
                ANYTHING, {"model_name": "iris", "model_version": "1", "id": "7", "y": [6.1, 4.5]}
            ),
            errors={**failures, 405: None, 500: InferenceFailedError(ONE)},
            **generates,
        ),
        Operation(
            path=f"{path}/generate_stream",
            summary=f"The same, each answer as it comes from a model{which}",
            description="Server-sent events. An error before the first answer has its own status; a "
            "later one is the last event.",
            answers={200: Answer(description="The answers.", contents=(events(EVENTS),))},
            errors={**failures, 405: None, 500: None},
            **generates,
        ),
    )


def _settings(
    path: str, what: str, kind: Any, example: Any, said: Any, route: str = ""
) -> tuple[Operation, ...]:
    params = (MODEL,) if route else ()
    return (
        Operation(
            method="GET",
            path=path,
            route=route,
            face=FACE,
            summary=f"{what}: the settings",
            params=params,
            answers=ok(kind, example),
            errors={400: None, 404: None, 405: None, 503: None} if route else {405: None},
        ),
        Operation(
            method="POST",
            path=path,
            route=route,
            face=FACE,
            summary=f"{what}: other settings",
            description="All of it or nothing; answered is what holds now.",
            params=params,
            body=(Content(kind=ANYTHING, examples={"some": said}),),
            body_required=False,
            answers=ok(kind, example),
            errors={400: None, 404: None, 405: None, 501: None, 503: None},
        ),
    )


OPERATIONS = (
    Operation(
        method="GET",
        path="/v2/models/stats",
        route="/v2/models/{rest:path}",
        face=FACE,
        summary="What all models have done",
        description="As of one model; of those that serve.",
        answers=ok(ANYTHING, STATS),
        errors={405: None},
    ),
    *_of_model(version=False),
    *_of_model(version=True),
    *_settings("/v2/logging", "Logging", LogView, LOGGING, {"log_verbose_level": 1}),
    *_settings("/v2/trace/setting", "Traces", TraceView, TRACING, {"trace_rate": "100"}),
    *_settings(
        "/v2/models/{model}/trace/setting",
        "Traces of a model",
        TraceView,
        TRACING,
        {"trace_rate": "100"},
        route="/v2/models/{rest:path}",
    ),
)
