"""KServe V2: /v2... . The codecs read and write requests by hand; the structs here say how they look."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from repository.errors import (
    InferenceFailedError,
    InvalidTensorError,
    ModelNotReadyError,
    QueueFullError,
)
from repository.tensors import DATATYPES
from server.errors import UnsupportedError
from server.openapi.failures import V2Error
from server.openapi.operation import Answer, Content, Face, Operation, Param, ok

FACE = Face(
    name="KServe V2",
    description="KServe V2 with Triton's binary tensors: ask models, and what they take.",
    error=V2Error,
)
Datatype = Annotated[str, Meta(extra_json_schema={"enum": list(DATATYPES)})]
Size = Annotated[int, Meta(ge=0)]
Value = bool | int | float | str


class InputParameters(msgspec.Struct):
    """`binary_data_size`: bytes of this input behind the JSON, in place of `data`; or it lies in shared
    memory, which is registered first."""

    binary_data_size: Size | UnsetType = UNSET
    shared_memory_region: str | UnsetType = UNSET
    shared_memory_byte_size: Size | UnsetType = UNSET
    shared_memory_offset: Size | UnsetType = UNSET


class InferInput(msgspec.Struct):
    """`data`: nested or flat, row by row; or `parameters.binary_data_size` says how many bytes."""

    name: str
    shape: list[Size]
    datatype: Datatype
    parameters: InputParameters | UnsetType = UNSET
    data: list[Any] | UnsetType = UNSET


class OutputParameters(msgspec.Struct):
    """`classification`: in place of the output, so many of its highest values, each as the text
    "VALUE:INDEX" or "VALUE:INDEX:LABEL". With `shared_memory_region` it is written there."""

    binary_data: bool = False
    classification: Size | UnsetType = UNSET
    shared_memory_region: str | UnsetType = UNSET
    shared_memory_byte_size: Size | UnsetType = UNSET
    shared_memory_offset: Size | UnsetType = UNSET


class InferOutput(msgspec.Struct):
    name: str
    parameters: OutputParameters | UnsetType = UNSET


class InferBody(msgspec.Struct):
    """`outputs`: those that are wanted; all of them where it is not there. `parameters`:
    `binary_data_output`, `priority`, `timeout` (microseconds), `adapter`, and the model's own.
    `adapters`: one for all rows, or a list with one for each."""

    inputs: Annotated[list[InferInput], Meta(min_length=1)]
    id: str = ""
    parameters: dict[str, Value] | UnsetType = UNSET
    outputs: list[InferOutput] | UnsetType = UNSET
    adapters: str | list[str] | UnsetType = UNSET


class TensorBody(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | UnsetType = UNSET
    parameters: dict[str, int | str] | UnsetType = UNSET


class InferReply(msgspec.Struct):
    """`id`: as the request had it, if it had one."""

    model_name: str
    model_version: str
    outputs: list[TensorBody]
    id: str | UnsetType = UNSET
    parameters: dict[str, Any] | UnsetType = UNSET


class TensorMetadata(msgspec.Struct):
    """-1 in `shape`: any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(msgspec.Struct):
    name: str
    version: str
    extensions: list[str]


MODEL = Param(
    name="model",
    where="path",
    description="The model. Slashes as they are, or as %2F.",
    schema={"type": "string", "minLength": 1, "maxLength": 200},
    example="iris",
)
NUMBER = Param(
    name="version",
    where="path",
    description="A version that serves. Without one: the highest.",
    schema={"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    example=1,
)
HEADER = "Inference-Header-Content-Length"
ASKED = {
    "id": "42",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}],
    "outputs": [{"name": "y"}],
}
NESTED = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [[1, 2, 3, 4]] * 2}]
}
ANSWER = {
    "id": "42",
    "model_name": "iris",
    "model_version": "1",
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [6.1, 4.5, 2.4, 1.2]}],
}
METADATA = {
    "name": "iris",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}
BINARY = Content(
    kind={"type": "string", "format": "binary"},
    media="application/octet-stream",
)
NOT_READY = ModelNotReadyError("model 'iris' is loading", retry_after_s=1)
WRONG = InvalidTensorError(
    "inference input 'x' data-type is 'INT32', but model 'iris' expects 'FP32'"
)
PACKED = UnsupportedError(
    "Unsupported compression type", headers={"Accept-Encoding": "gzip, deflate"}
)
EMPTY = {200: Answer(description="Yes. The body is empty.")}
NO = Answer(
    description="No. The body is empty, or says why.",
    contents=(Content(kind=V2Error, examples={"why": {"error": "Model version not ready"}}),),
)
GOING = Answer(
    description="The server is going.",
    contents=(Content(kind=V2Error, examples={"going": {"error": "Server exiting"}}),),
)


def _of_model(version: bool) -> tuple[Operation, ...]:
    path = "/v2/models/{model}" + ("/versions/{version}" if version else "")
    route, params = "/v2/models/{rest:path}", (MODEL, NUMBER) if version else (MODEL,)
    which = " version" if version else ""
    return (
        Operation(
            method="GET",
            path=path,
            route=route,
            face=FACE,
            summary=f"What a model{which} takes and gives",
            description="Names, datatypes and shapes; -1 is any size.",
            params=params,
            answers=ok(ModelMetadata, METADATA),
            errors={400: None, 404: None, 405: None, 503: NOT_READY},
        ),
        Operation(
            method="GET",
            path=f"{path}/ready",
            route=route,
            face=FACE,
            summary=f"Does a model{which} serve?",
            description="An empty 200, or 400 with the reason.",
            params=params,
            answers={**EMPTY, 400: NO},
            errors={404: None, 405: None, 503: NOT_READY},
        ),
        Operation(
            method="POST",
            path=f"{path}/infer",
            face=FACE,
            summary=f"Ask a model{which}",
            description="JSON alone, or JSON followed by the bytes of the tensors in the order of the "
            f"inputs: then `{HEADER}` says where the JSON ends, and an output is answered so if its "
            "`binary_data` is true. The header 0: the body is nothing but the only input's bytes. NaN, "
            "Infinity and -Infinity are numbers here. A body that is too long is answered 400, as "
            "Triton's clients expect. A body may be compressed (`Content-Encoding: gzip` or `deflate`), "
            "and so is the answer where `Accept-Encoding` asks for one of them alone, or by weights. "
            "An adapter is named by `adapters` or the parameter `adapter`, `?adapter=`, or the header "
            "`X-Amzn-SageMaker-Adapter-Identifier`; the later wins.",
            params=(
                *params,
                Param(name="adapter", description="A registered adapter."),
                Param(
                    name=HEADER,
                    where="header",
                    description="Bytes of the JSON, where tensors follow it.",
                    schema={"type": "integer", "minimum": 0},
                ),
                Param(
                    name="X-Amzn-SageMaker-Adapter-Identifier",
                    where="header",
                    description="A registered adapter, as SageMaker's clients name it.",
                ),
            ),
            body=(
                Content(kind=InferBody, examples={"flat": ASKED, "nested": NESTED}),
                BINARY,
            ),
            answers={
                200: Answer(
                    description="The outputs.",
                    contents=(Content(kind=InferReply, examples={"answer": ANSWER}), BINARY),
                    headers={HEADER: "Bytes of the JSON, where tensors follow it."},
                )
            },
            errors={
                400: WRONG,
                404: None,
                424: None,
                500: InferenceFailedError("model 'iris': the graph divides by zero"),
                501: PACKED,
                503: QueueFullError("Exceeds maximum queue size", retry_after_s=1),
                507: None,
            },
        ),
    )


OPERATIONS = (
    Operation(
        method="GET",
        path="/v2",
        face=FACE,
        summary="What this server is",
        description="Its name, its version, and which extensions of the protocol it speaks.",
        answers=ok(
            ServerMetadata,
            {"name": "modeldepot", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
        ),
    ),
    Operation(
        method="GET",
        path="/v2/health/live",
        face=FACE,
        summary="Is it alive?",
        description="An empty 200, as long as it does not go.",
        answers={**EMPTY, 503: GOING},
    ),
    Operation(
        method="GET",
        path="/v2/health/ready",
        face=FACE,
        summary="Can it be asked?",
        description="All that was wanted at the start has settled. With `--strict-readiness`: all that "
        "is wanted serves.",
        answers={**EMPTY, 400: Answer(description="Not yet. The body is empty."), 503: GOING},
    ),
    *_of_model(version=False),
    *_of_model(version=True),
)
