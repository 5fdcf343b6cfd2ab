"""/v1/load_model, /v1/unload_model: as Aphrodite had them."""

from __future__ import annotations

import msgspec

from repository.errors import ConfigError, LoadFailedError, OutOfBoundsError
from server.codecs.aphrodite_answers import (
    ConfiguredReply,
    InfoReply,
    LoadedReply,
    NotLoadedReply,
    UnloadedReply,
)
from server.faces import aphrodite
from server.openapi.failures import AphroditeError
from server.openapi.operation import Answer, Content, Face, Operation, asked

FACE = Face(
    name="Aphrodite",
    description="Load and unload with launch arguments, as Aphrodite had it.",
    error=AphroditeError,
)


class UnloadModel(msgspec.Struct):
    model: str | None = None


ARGUMENTS = {
    "type": "object",
    "description": "`model`, and launch arguments in `config` or beside it; `config` wins. Keys with "
    "`-` are read as with `_`. A key that is not known is refused by its name.",
    "properties": {
        "model": {"type": "string", "description": "A name, or a path in an allowed folder."},
        "config": {"type": ["object", "null"]},
    },
}
FORM = {
    "type": "object",
    "properties": {
        "config": {"type": "string", "contentMediaType": "application/octet-stream"},
        "model": {"type": "string"},
    },
}
FAILURES = {
    400: ConfigError("unknown key 'max_model_length'; did you mean 'max_model_len'?"),
    403: OutOfBoundsError("'iris' lies outside of the folders that models may be loaded from"),
    404: None,
    409: None,
    413: None,
    500: LoadFailedError("model 'iris' version 1: the file is no ONNX model"),
    503: None,
    507: None,
}

OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/load_model",
        face=FACE,
        handler=aphrodite.load_model,
        body=(
            *asked(ARGUMENTS, name={"model": "iris"}, empty_config={"model": "iris", "config": {}}),
            Content(kind=FORM, media="multipart/form-data"),
        ),
        body_required=False,
        answers={
            200: Answer(
                description="It serves; `info`: it did already.",
                contents=(
                    Content(
                        kind=(ConfiguredReply, LoadedReply, InfoReply),
                        examples={
                            "loaded": {
                                "status": "success",
                                "message": "Model loaded successfully in 0.31s.",
                                "load_time_s": 0.31,
                                "model": "iris",
                                "config_applied": {"model": {"value": "iris", "source": "request"}},
                            },
                            "already": {
                                "status": "info",
                                "message": "Model 'iris' is already loaded in the registry.",
                            },
                        },
                    ),
                ),
            )
        },
        errors=FAILURES,
    ),
    Operation(
        method="POST",
        path="/v1/unload_model",
        face=FACE,
        handler=aphrodite.unload_model,
        body=asked(UnloadModel, one={"model": "iris"}),
        body_required=False,
        answers={
            200: Answer(
                description="Nothing of it runs any more; `info`: nothing did.",
                contents=(
                    Content(
                        kind=(UnloadedReply, InfoReply),
                        examples={
                            "unloaded": {
                                "status": "success",
                                "message": "Model unloaded successfully in 1.28s. All GPU memory has "
                                "been freed.",
                                "drain_time_s": 0.0,
                                "shutdown_time_s": 1.28,
                                "total_time_s": 1.28,
                                "freed_bytes": 33554432,
                                "unloaded_models": ["iris"],
                            },
                            "nothing": {"status": "info", "message": "Model is already unloaded."},
                        },
                    ),
                ),
            ),
            404: Answer(
                description="It is not loaded.",
                contents=(
                    Content(
                        kind=(NotLoadedReply, AphroditeError),
                        examples={
                            "not_loaded": {
                                "status": "error",
                                "message": "Model 'iris2' is not loaded.",
                            }
                        },
                    ),
                ),
            ),
        },
        errors={
            400: None,
            403: None,
            409: None,
            413: None,
            500: None,
            503: None,
            507: None,
        },
    ),
)
