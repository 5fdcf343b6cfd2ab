"""Triton's generate extension: one request as plain JSON, its answers as plain JSON.

    {"text": "hello", "max": 3, "parameters": {"priority": 1}, "id": "7"}
    {"model_name": "m", "model_version": "1", "id": "7", "out": 1.5, "all": [1, 2]}

A key that is an input's name is that tensor: one value, or a flat list; every other one is a parameter
of the request. A tensor of one element is answered as that element. Of a model that writes texts
`text_input` is the prompt and `text_output` what it wrote, as Triton's engines for language models have
them; its parameters are those of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from repository.errors import InvalidRequestError, InvalidTensorError
from repository.messages import InferRequest, InferResponse, TensorSpec
from repository.tensors import DATATYPES, Shape, Tensor
from server.codecs import v2_json
from server.codecs.v2_plan import parameters_of

TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
MOST_KEYS = 1000  # of the body, and of its parameters: each costs steps while everybody waits
_OURS = ("id", "parameters")
_OBJECT: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


def read(body: bytes) -> dict[str, Any]:
    """Raises InvalidRequestError."""
    if not body:
        raise InvalidRequestError("the body is empty; send a JSON object")
    found = v2_json.read(body, _OBJECT, dict[str, Any])
    for said in (found, found.get("parameters")):
        if isinstance(said, dict) and len(said) > MOST_KEYS:
            raise InvalidRequestError(
                f"the request has {len(said)} keys in one object; at most {MOST_KEYS} are read"
            )
    return found


def id_of(found: Mapping[str, Any]) -> str:
    """Raises InvalidRequestError."""
    given = found.get("id", "")
    if not isinstance(given, str):
        raise InvalidRequestError("'id' must be a text")
    return given


def request_of(
    found: Mapping[str, Any], inputs: Sequence[TensorSpec], *, model: str, batched: bool
) -> InferRequest:
    """`inputs` as clients see them; with `batched` it becomes one row. Raises InvalidRequestError,
    InvalidTensorError."""
    if not inputs:
        raise InvalidRequestError(
            f"model '{model}' does not say what it takes, so nothing can be made of plain JSON; list "
            "its inputs in its config, or use /infer"
        )
    tensors = [
        _tensor(spec, found[spec.name], batched=batched) for spec in inputs if spec.name in found
    ]
    rest = {k: v for k, v in found.items() if k not in _OURS and all(k != i.name for i in inputs)}
    parameters, _ = parameters_of(_parameters(found, rest))
    return InferRequest(tensors, (), id_of(found), parameters)


def _parameters(found: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    nested = found.get("parameters", {})
    if not isinstance(nested, dict):
        raise InvalidRequestError("'parameters' must be an object")
    for key, value in (*nested.items(), *rest.items()):
        if not isinstance(value, bool | int | float | str):
            raise InvalidRequestError(
                f"'{key[:60]}' is no input of the model, and a parameter must be a text, a number, true "
                "or false"
            )
    return {**nested, **rest}


def _tensor(spec: TensorSpec, value: Any, *, batched: bool) -> Tensor:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, list) for each in values):
        raise InvalidTensorError(f"input '{spec.name}' must be one value, or a flat list of values")
    shape = _filled(spec, len(values), batched=batched)
    try:
        data = v2_json.to_bytes(spec.name, spec.datatype, math.prod(shape), values)
    except msgspec.ValidationError as error:
        raise InvalidTensorError(f"input '{spec.name}': {error}") from None
    return Tensor(spec.name, spec.datatype, shape, data)


def _filled(spec: TensorSpec, count: int, *, batched: bool) -> Shape:
    """The shape with its free axes chosen: the last one takes the values, the others are 1."""
    shape = list(spec.shape)
    free = [axis for axis, size in enumerate(shape) if size == -1]
    for axis in free:
        shape[axis] = 1
    fixed = math.prod(shape)
    last = free[-1] if free and not (batched and free[-1] == 0) else None
    if last is not None and fixed and count % fixed == 0:
        shape[last] = count // fixed
    if math.prod(shape) != count:
        raise InvalidTensorError(
            f"input '{spec.name}' has {count} values, which do not fill its shape {list(spec.shape)}"
        )
    return tuple(shape)


def answer(response: InferResponse, *, model: str, version: int, id: str) -> bytes:
    """One line of JSON. Raises InvalidRequestError for what JSON cannot hold."""
    told: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if id:
        told["id"] = id
    told |= {k: v for k, v in response.parameters.items() if k not in told}
    for tensor in response.outputs:
        told[tensor.name] = _value(tensor)
    return msgspec.json.encode(told)


def _value(tensor: Tensor) -> msgspec.Raw:
    text = v2_json.to_json(tensor)
    one = math.prod(tensor.shape) == 1 and tensor.datatype in DATATYPES
    return msgspec.Raw(bytes(text)[1:-1]) if one else text


# texts ------------------------------------------------------------------------------------------


def completion_of(found: Mapping[str, Any], model: str) -> bytes:
    """The same as a completion in OpenAI's JSON. Raises InvalidRequestError."""
    prompt = found.get(TEXT_INPUT)
    if not isinstance(prompt, str):
        raise InvalidRequestError(f"'{TEXT_INPUT}' is missing: the text that the model is to go on")
    nested = found.get("parameters", {})
    if not isinstance(nested, dict):
        raise InvalidRequestError("'parameters' must be an object")
    rest = {k: v for k, v in found.items() if k not in (*_OURS, TEXT_INPUT)}
    told = {k: v for k, v in {**nested, **rest}.items() if k != "stream"}
    return msgspec.json.encode({**told, "model": model, "prompt": prompt})


def text_answer(text: str, *, model: str, version: int, id: str) -> bytes:
    told = {"model_name": model, "model_version": str(version)}
    if id:
        told["id"] = id
    return msgspec.json.encode({**told, TEXT_OUTPUT: text})
