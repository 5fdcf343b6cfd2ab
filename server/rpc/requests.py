"""A ModelInferRequest, read and judged: the same plan that the HTTP codec makes of a JSON header.

What a message says beside the tensors' bytes is said again and again; it is read once, and what it came
to is found by its bytes. Nothing is allocated from a number that a client wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from repository.errors import InvalidRequestError, InvalidTensorError
from repository.forms import Blank, Form
from repository.messages import InferRequest, Parameters
from repository.tensors import DATATYPES, Buffer, Shape, Tensor
from server.codecs.v2_paths import LONGEST_VERSION, Route
from server.codecs.v2_plan import (
    MOST_AXES,
    MOST_TEXTS,
    Extras,
    Piece,
    Place,
    Plan,
    elements_of,
    naming,
    parameters_of,
)
from server.rpc import typed
from server.rpc.wire import MALFORMED

RAW_CONTENTS = 7  # the number of its field
MOST_REMEMBERED, LONGEST_REMEMBERED = 1024, 4096
MOST_HEAD = 1 << 20  # bytes of a request beside the data of its tensors
NO_CONTENTS: Mapping[int, memoryview] = {}
REGION, REGION_SIZE = "shared_memory_region", "shared_memory_byte_size"
REGION_OFFSET = "shared_memory_offset"
EMPTY_FINAL = "triton_enable_empty_final_response"


class Asked(NamedTuple):
    """`final`: the end of a stream of answers is to be told by an answer of its own."""

    route: Route
    plan: Plan
    final: bool = False


def message_of(kind: Any, data: bytes) -> Any:
    """Raises InvalidRequestError."""
    try:
        return kind.FromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{MALFORMED}it is no {kind.DESCRIPTOR.name}") from error


def asked_of(head: bytes, blobs: Sequence[Buffer], adapter: str | None = None) -> Asked:
    """`head`: a ModelInferRequest without its raw contents, which are `blobs`. `adapter`: the one that
    the metadata names, for all rows.

    Raises InvalidRequestError, InvalidTensorError, UnsupportedError.
    """
    contents: Mapping[int, memoryview] = {}
    if not blobs:
        head, contents = typed.cut_contents(head)
    if len(head) > MOST_HEAD:
        raise InvalidRequestError(
            f"the request has {len(head)} bytes beside its tensors' data; at most {MOST_HEAD} fit"
        )
    if blobs and len(head) <= LONGEST_REMEMBERED:
        return _remembered(head, tuple(map(len, blobs)), adapter)
    return _asked(head, [len(blob) for blob in blobs], adapter, contents)


@lru_cache(MOST_REMEMBERED)
def _remembered(head: bytes, sizes: tuple[int, ...], adapter: str | None) -> Asked:
    asked = _asked(head, sizes, adapter)
    plan = asked.plan
    blanks = [Blank(p.name, p.datatype, p.shape, p.size) for p in plan.pieces]
    return asked._replace(plan=plan._replace(form=Form(blanks, plan.outputs, plan.parameters)))


def _asked(
    head: bytes,
    sizes: Sequence[int],
    adapter: str | None,
    contents: Mapping[int, memoryview] = NO_CONTENTS,
) -> Asked:
    found = message_of(service_pb2.ModelInferRequest, head)
    route = route_of(found.model_name, found.model_version)
    parameters = values_of(found.parameters)
    final = parameters.pop(EMPTY_FINAL, False)
    if not isinstance(final, bool):
        raise InvalidRequestError(
            f"invalid value for parameter '{EMPTY_FINAL}', expected bool_param"
        )
    parameters, _ = parameters_of(parameters)
    pieces = tuple(_pieces(found, sizes, contents, route.model))
    once("input", [p.name for p in pieces])
    outputs = tuple([output.name for output in found.outputs])
    once("output", outputs)
    extras = extras_of(found, outputs)
    plan = Plan(pieces, outputs, id=found.id, parameters=parameters, extras=extras)
    return Asked(route, naming(plan, adapter), final)


def route_of(name: str, version: str) -> Route:
    """Raises InvalidRequestError."""
    if not version:
        return Route(name, None)
    if not (version.isascii() and version.isdigit() and len(version) <= LONGEST_VERSION):
        raise InvalidRequestError(
            f"failed to get model version from specified version string '{version[:40]}', version "
            "should be an integral value > 0"
        )
    return Route(name, int(version))


def values_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a map whose values are each one of several kinds. Raises InvalidRequestError."""
    found = {}
    for key, value in given.items():
        which = value.WhichOneof(value.DESCRIPTOR.oneofs[0].name)
        if which is None:
            raise InvalidRequestError(
                f"parameter '{key}' has no value of a kind that is known here"
            )
        found[key] = getattr(value, which)
    return found


def once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidRequestError(f"{what} '{name}' already exists in request")
        seen.add(name)


def _pieces(
    found: Any, sizes: Sequence[int], contents: Mapping[int, memoryview], model: str
) -> Iterable[Piece]:
    left = list(reversed(sizes))
    for at, given in enumerate(found.inputs):
        name, explicit = given.name, given.HasField("contents")
        shape, elements = _shape(given)
        data: Buffer | None = None
        if REGION in given.parameters:
            if explicit:
                raise InvalidRequestError(
                    "unexpected 'content' provided when using shared memory for input tensor "
                    f"'{name}' for model '{model}'"
                )
            size = place_of(f"input '{name}'", values_of(given.parameters)).size
        elif explicit:
            if sizes:
                raise InvalidRequestError(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{name}' for model '{model}'"
                )
            size = 0
            data = typed.to_bytes(name, given.datatype, elements, contents[at])
        elif left:
            size = left.pop()
        else:
            raise InvalidRequestError(
                f"unable to find data for input tensor '{name}' for model '{model}' in request."
            )
        yield Piece(name, given.datatype, shape, size, data)
    if left:
        raise InvalidRequestError(f"unexpected additional input data for model '{model}'")


def _shape(given: Any) -> tuple[Shape, int]:
    """With the number of its elements, once it is known to be one that can be."""
    datatype = DATATYPES.get(given.datatype)
    if datatype is None:
        raise InvalidTensorError(
            f"unknown datatype '{given.datatype[:32]}' of input '{given.name}'; known are "
            f"{', '.join(DATATYPES)}"
        )
    # Before it is a tuple: a few bytes each, a client may send millions.
    shape = tuple(given.shape[: MOST_AXES + 1])
    elements = elements_of(given.name, shape, datatype.size)
    if not datatype.size and elements > MOST_TEXTS:
        raise InvalidTensorError(
            f"input '{given.name}' has {elements} texts; at most {MOST_TEXTS} fit into a request"
        )
    return shape, elements


def extras_of(found: Any, outputs: Sequence[str]) -> Extras | None:
    """Shared memory and classes, where any are asked for. Raises InvalidRequestError."""
    taken = {
        i: place_of(f"input '{each.name}'", values_of(each.parameters))
        for i, each in enumerate(found.inputs)
        if REGION in each.parameters
    }
    given: dict[str, Place] = {}
    classes: dict[str, int] = {}
    for name, each in zip(outputs, found.outputs, strict=True):
        if not each.parameters:
            continue
        said = values_of(each.parameters)
        if REGION in said:
            given[name] = place_of(f"output '{name}'", said)
        wanted = said.get("classification", 0)
        if type(wanted) is not int or wanted < 0:
            raise InvalidRequestError(
                "invalid value for parameter 'classification', expected int64_param, the number of "
                f"classes of output '{name}'"
            )
        if wanted and name in given:
            raise InvalidRequestError(
                f"shared memory can not be used with classification, and output '{name}' asks for "
                "both"
            )
        if wanted:
            classes[name] = wanted
    return Extras(taken, given, classes) if taken or given or classes else None


def place_of(whose: str, said: Mapping[str, Any]) -> Place:
    """Raises InvalidRequestError."""
    region, size, offset = said[REGION], said.get(REGION_SIZE), said.get(REGION_OFFSET, 0)
    if type(region) is not str:
        raise InvalidRequestError(f"invalid value for parameter '{REGION}', expected string_param")
    if type(size) is not int or type(offset) is not int:
        raise InvalidRequestError(
            f"{whose} is in shared memory; '{REGION_SIZE}' and '{REGION_OFFSET}' are int64_params"
        )
    if size < 0 or offset < 0:
        raise InvalidRequestError(f"size and offset in shared memory of {whose} are not negative")
    return Place(region, offset, size)


def request_of(plan: Plan, blobs: Sequence[Buffer]) -> InferRequest:
    """Its tensors are `blobs`, in the order of the inputs that brought none themselves."""
    raw = iter(blobs)
    inputs = [
        Tensor(p.name, p.datatype, p.shape, next(raw) if p.data is None else p.data)
        for p in plan.pieces
    ]
    return InferRequest(inputs, plan.outputs, plan.id, plan.parameters, plan.form)


def told_of(parameters: Parameters) -> dict[str, Any]:
    """What a model said of its answer, as InferParameter has it; what has no place there, as text."""
    found = {}
    for key, value in parameters.items():
        kind = type(value)
        if kind is bool:
            found[key] = service_pb2.InferParameter(bool_param=value)
        elif kind is int and -(1 << 63) <= value < 1 << 63:
            found[key] = service_pb2.InferParameter(int64_param=value)
        elif kind is int and 0 <= value < 1 << 64:
            found[key] = service_pb2.InferParameter(uint64_param=value)
        elif kind is float:
            found[key] = service_pb2.InferParameter(double_param=value)
        else:
            text = str(value).encode(errors="replace").decode()
            found[key] = service_pb2.InferParameter(string_param=text)
    return found
