"""The calls of the model repository extension."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from server.openapi.operation import Answer, Content, Operation, ok
from server.openapi.v2 import FACE, MODEL
from server.refusals import FailedToLoadError, LoadRefusedError, UnsupportedError
from server.triton.control import NO_FILES


class IndexBody(msgspec.Struct):
    """`ready`: only what serves."""

    ready: bool = False


class IndexEntry(msgspec.Struct):
    """Without a state: nothing of it was ever tried. `state`: READY, LOADING, UNLOADING, UNAVAILABLE.
    `reason`: why it does not serve; beside READY, what has come of a newer one."""

    name: str
    version: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class RepositoryBody(msgspec.Struct):
    """Of a load: `config`, a ModelConfig as JSON in a text; `file:PATH`, a file of the model in base64.
    Of an unload: `unload_dependents`."""

    parameters: dict[str, Any] | UnsetType = UNSET


REFUSED = LoadRefusedError(
    "load failed for model 'iris': version 2 is at UNAVAILABLE state: Internal: the file is no ONNX "
    "model;\n"
)
UNKNOWN = FailedToLoadError(
    "failed to load 'iris2', failed to poll from model repository: no model 'iris2' in the repository"
)
DONE = {200: Answer(description="It is so. The body is empty.")}
LOADS = {"plain": {}, "config": {"parameters": {"config": '{"max_batch_size": 8}'}}}

OPERATIONS = (
    Operation(
        method="POST",
        path="/v2/repository/index",
        face=FACE,
        summary="What the repository holds",
        description="One entry for each version that was ever tried, and one with a name alone for a "
        "model that never was. The folders are listed anew.",
        body=(Content(kind=IndexBody, examples={"all": {}, "ready": {"ready": True}}),),
        body_required=False,
        answers=ok(
            list[IndexEntry],
            [{"name": "bert"}, {"name": "iris", "version": "1", "state": "READY"}],
        ),
        errors={400: None, 405: None},
    ),
    Operation(
        method="POST",
        path="/v2/repository/models/{model}/load",
        route="/v2/repository/{rest:path}",
        face=FACE,
        summary="Load a model",
        description="Answers when every version that the model's policy chooses serves. What served "
        "before goes on until then, and if it fails. A model whose files have not changed is not "
        "loaded again. A `config` stands in place of the model's config file until its files change, "
        "another config is brought, or `config: null` on another face. With `--allow-file-override` "
        "a load may bring all files of the model: they stand in place of its folder until a load "
        "brings none, or it is unloaded.",
        params=(MODEL,),
        body=(Content(kind=RepositoryBody, examples=LOADS),),
        body_required=False,
        answers=DONE,
        errors={
            400: REFUSED,
            404: None,
            405: None,
            500: UNKNOWN,
            501: UnsupportedError(NO_FILES),
            503: None,
            507: None,
        },
    ),
    Operation(
        method="POST",
        path="/v2/repository/models/{model}/unload",
        route="/v2/repository/{rest:path}",
        face=FACE,
        summary="Unload a model",
        description="No request that comes after it finds the model; those that run are answered. A "
        "model that is not there is unloaded already. `unload_dependents`: also those that were loaded "
        "only because this one needs them.",
        params=(MODEL,),
        body=(
            Content(
                kind=RepositoryBody,
                examples={"plain": {}, "all": {"parameters": {"unload_dependents": True}}},
            ),
        ),
        body_required=False,
        answers=DONE,
        errors={400: None, 404: None, 405: None, 503: None, 507: None},
    ),
)
