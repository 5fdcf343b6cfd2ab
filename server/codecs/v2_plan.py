"""The JSON header of an infer request, read and judged without the bytes that follow it.

A Plan depends on the header alone and never changes, so one plan serves every request that brings
the same header: those in front of binary data, which clients repeat, are remembered. Sizes are
compared with each other here and with the body in `v2_binary`; nothing is allocated from a number
that a client wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from repository.errors import InvalidRequestError, InvalidTensorError
from repository.forms import Blank, Form
from repository.messages import Parameters
from repository.tensors import DATATYPES, Buffer, Shape
from server.codecs import v2_json

MOST_AXES = 64  # what numpy can hold
MOST_BYTES = 1 << 63
MOST_REMEMBERED = 1024  # headers
LONGEST_REMEMBERED = 4096  # bytes of one
MOST_TEXTS = 1 << 20  # elements of BYTES: each costs a step of its own, whatever its length


class _InputParameters(msgspec.Struct, gc=False, frozen=True):
    binary_data_size: int | UnsetType = UNSET
    shared_memory_region: str | UnsetType = UNSET
    shared_memory_byte_size: int | UnsetType = UNSET
    shared_memory_offset: int = 0


class _OutputParameters(msgspec.Struct, gc=False, frozen=True):
    binary_data: bool = False
    classification: int = 0
    shared_memory_region: str | UnsetType = UNSET
    shared_memory_byte_size: int | UnsetType = UNSET
    shared_memory_offset: int = 0


_NO_INPUT_PARAMETERS = _InputParameters()
_NO_OUTPUT_PARAMETERS = _OutputParameters()


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: _OutputParameters = _NO_OUTPUT_PARAMETERS


class _Input(msgspec.Struct, gc=False):
    """`data`: left as text, because what it must hold is only known from `datatype`."""

    name: str
    shape: Shape
    datatype: str
    parameters: _InputParameters = _NO_INPUT_PARAMETERS
    data: msgspec.Raw | UnsetType = UNSET


class _Header(msgspec.Struct, gc=False):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, bool | int | float | str] | UnsetType = UNSET
    adapters: str | list[str] | UnsetType = UNSET
    outputs: list[_Output] | UnsetType = UNSET


class _LenientInput(msgspec.Struct):
    """As _Input; `data` is a list, since text with a NaN in it cannot be left for later."""

    name: str
    shape: Shape
    datatype: str
    parameters: _InputParameters = _NO_INPUT_PARAMETERS
    data: Any = UNSET


class _LenientHeader(msgspec.Struct):
    inputs: list[_LenientInput]
    id: str = ""
    parameters: dict[str, bool | int | float | str] | UnsetType = UNSET
    adapters: str | list[str] | UnsetType = UNSET
    outputs: list[_Output] | UnsetType = UNSET


_STRICT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Header)


_NO_PARAMETERS: Parameters = {}
ADAPTER, ADAPTERS = "adapter", "adapters"  # parameters: one for all rows, one for each


class Piece(NamedTuple):
    """One input: `data` if the header brought it, else the next `size` bytes behind the header."""

    name: str
    datatype: str
    shape: Shape
    size: int
    data: Buffer | None


class Place(NamedTuple):
    """Part of a client's shared memory."""

    region: str
    offset: int
    size: int  # bytes


class Extras(NamedTuple):
    """What few requests ask for.

    taken     which inputs lie in shared memory, by their place among the inputs
    given     outputs that go there
    classes   outputs of which the classes are wanted, and how many
    """

    taken: Mapping[int, Place]
    given: Mapping[str, Place]
    classes: Mapping[str, int]


class Plan(NamedTuple):
    """What a header asks for.

    outputs      names asked for; empty means all
    binary       those of them that are wanted in binary form
    rest_binary  the form of outputs when none were named
    parameters   the request's own, without those that only concern its form
    form         what the tensors are but for their bytes; None: the header will not come again
    extras       shared memory and classes, where any are asked for. The bytes of an input that lies
                 there are put into its piece before the plan is used
    """

    pieces: tuple[Piece, ...]
    outputs: tuple[str, ...] = ()
    binary: frozenset[str] = frozenset()
    rest_binary: bool = False
    id: str = ""
    parameters: Parameters = _NO_PARAMETERS
    form: Form | None = None
    extras: Extras | None = None

    def wants_binary(self, output: str) -> bool:
        return output in self.binary if self.outputs else self.rest_binary


RAW_PLAN = Plan((), rest_binary=True)  # a raw binary request has no header; all it gets is binary


def known_plan_of(header: bytes, adapter: str | None = None) -> Plan:
    """As `plan_of`, for a header that is likely to come again. `adapter`: as in `naming`."""
    if adapter is None:
        return _remembered(header) if len(header) <= LONGEST_REMEMBERED else plan_of(header)
    if len(header) + len(adapter) <= LONGEST_REMEMBERED:
        return _remembered(header, adapter)
    return naming(plan_of(header), adapter)


def naming(plan: Plan, adapter: str | None) -> Plan:
    """The plan with this adapter for all rows, whatever the header says of adapters. None: as it is."""
    if adapter is None:
        return plan
    return plan._replace(parameters=_naming(plan.parameters, adapter), form=None)


def _naming(parameters: Parameters, said: str | list[str]) -> Parameters:
    rest = {k: v for k, v in parameters.items() if k not in (ADAPTER, ADAPTERS)}
    if said:
        rest[ADAPTER if isinstance(said, str) else ADAPTERS] = said
    return rest


@lru_cache(MOST_REMEMBERED)
def _remembered(header: bytes, adapter: str | None = None) -> Plan:
    plan = naming(plan_of(header), adapter)
    # Data that the header brings is served to many: nobody may write to it.
    pieces = tuple(
        [
            p if p.data is None else p._replace(data=memoryview(p.data).toreadonly())
            for p in plan.pieces
        ]
    )
    blanks = [
        Blank(p.name, p.datatype, p.shape, p.size if p.data is None else len(p.data))
        for p in pieces
    ]
    return plan._replace(pieces=pieces, form=Form(blanks, plan.outputs, plan.parameters))


def plan_of(header: bytes) -> Plan:
    """Raises InvalidRequestError, InvalidTensorError, UnsupportedError."""
    found: Any = v2_json.read(header, _STRICT, _LenientHeader)
    pieces = tuple([_piece(each) for each in found.inputs])
    if len(pieces) > 1:
        _once("input", [p.name for p in pieces])
    outputs: tuple[str, ...] = ()
    binary: frozenset[str] = frozenset()
    if found.outputs is not UNSET:
        outputs = tuple([o.name for o in found.outputs])
        _once("output", outputs)
        binary = frozenset([o.name for o in found.outputs if o.parameters.binary_data])
    parameters, rest_binary = NOTHING_ASKED
    if found.parameters is not UNSET:
        parameters, rest_binary = parameters_of(found.parameters)
    if found.adapters is not UNSET:
        parameters = _naming(parameters, found.adapters)
    extras = _extras(found.inputs, found.outputs)
    plan = Plan(pieces, outputs, binary, rest_binary, found.id, parameters, None, extras)
    if type(found) is _LenientHeader:
        _check_texts(plan)
    return plan


def _once(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidRequestError(f"{what} '{name}' already exists in request")
        seen.add(name)


def _piece(given: Any) -> Piece:
    size = given.parameters.binary_data_size
    if (
        (given.data is not UNSET)
        + (size is not UNSET)
        + (given.parameters.shared_memory_region is not UNSET)
    ) != 1:
        raise _not_one_source(given)
    if size is UNSET and given.data is UNSET:
        size = _place(f"input '{given.name}'", given.parameters).size
    datatype = DATATYPES.get(given.datatype)
    if datatype is None:
        raise InvalidTensorError(
            f"unknown datatype '{given.datatype[:32]}' of input '{given.name}'; known are "
            f"{', '.join(DATATYPES)}"
        )
    elements = elements_of(given.name, given.shape, datatype.size)
    if not datatype.size and elements > MOST_TEXTS:
        raise InvalidTensorError(
            f"input '{given.name}' has {elements} texts; at most {MOST_TEXTS} fit into a request"
        )
    if size is UNSET:
        data = v2_json.to_bytes(given.name, given.datatype, elements, given.data)
        return Piece(given.name, given.datatype, given.shape, 0, data)
    if size < 0:
        raise InvalidTensorError(f"binary_data_size of input '{given.name}' is negative")
    return Piece(given.name, given.datatype, given.shape, size, None)


def _not_one_source(given: Any) -> InvalidRequestError:
    fields = {
        "'data'": given.data,
        "'binary_data_size' in 'parameters'": given.parameters.binary_data_size,
        "'shared_memory_region' in 'parameters'": given.parameters.shared_memory_region,
    }
    found = " and ".join(k for k, v in fields.items() if v is not UNSET) or "none of them"
    return InvalidRequestError(
        f"Input must set only one of the following fields: {', '.join(fields)}. Input "
        f"'{given.name}' sets {found}"
    )


def elements_of(name: str, shape: Shape, size: int) -> int:
    """The number of elements, once the shape is known to be one that can be. `size` per element."""
    if len(shape) > MOST_AXES:
        raise InvalidTensorError(
            f"shape of input '{name}' has {len(shape)} dimensions; at most {MOST_AXES} are allowed"
        )
    bound = size or 8  # an element of BYTES is a pointer once it is in an array
    for dim in shape:
        if dim < 0:
            raise InvalidTensorError(
                f"shape {list(shape)} of input '{name}' has a negative dimension"
            )
        # A zero makes the product small and the array no less impossible.
        bound *= dim or 1
        if bound >= MOST_BYTES:
            raise InvalidTensorError(f"shape of input '{name}' is larger than any memory")
    return math.prod(shape)


def _place(whose: str, given: Any) -> Place:
    size, offset = given.shared_memory_byte_size, given.shared_memory_offset
    if size is UNSET:
        raise InvalidRequestError(
            f"{whose} has 'shared_memory_region' in 'parameters', and no 'shared_memory_byte_size'"
        )
    if size < 0 or offset < 0:
        raise InvalidRequestError(f"size and offset in shared memory of {whose} are not negative")
    return Place(given.shared_memory_region, offset, size)


def _extras(inputs: Sequence[Any], outputs: Sequence[_Output] | UnsetType) -> Extras | None:
    taken = {
        i: _place(f"input '{each.name}'", each.parameters)
        for i, each in enumerate(inputs)
        if each.parameters.shared_memory_region is not UNSET
    }
    given: dict[str, Place] = {}
    classes: dict[str, int] = {}
    if outputs is not UNSET:
        for each in outputs:
            if each.parameters is not _NO_OUTPUT_PARAMETERS:
                _of_output(each, given, classes)
    return Extras(taken, given, classes) if taken or given or classes else None


def _of_output(output: _Output, given: dict[str, Place], classes: dict[str, int]) -> None:
    said = output.parameters
    if said.shared_memory_region is not UNSET:
        given[output.name] = _place(f"output '{output.name}'", said)
    if not said.classification:
        return
    if said.classification < 0:
        raise InvalidRequestError(
            f"classification of output '{output.name}' is the number of classes that are wanted"
        )
    if output.name in given:
        raise InvalidRequestError(
            f"shared memory can not be used with classification, and output '{output.name}' asks for "
            f"both"
        )
    classes[output.name] = said.classification


# The request parameters that the protocol gives a meaning, and what they may be.
RESERVED: dict[str, tuple[type, ...]] = {
    "sequence_id": (int, str),
    "sequence_start": (bool,),
    "sequence_end": (bool,),
    "priority": (int,),
    "timeout": (int,),
    "binary_data_output": (bool,),
}
NOTHING_ASKED: tuple[Parameters, bool] = ({}, False)


def parameters_of(given: Parameters) -> tuple[Parameters, bool]:
    """A request's own, checked, without binary_data_output, and what that says. Raises
    InvalidRequestError."""
    for key, value in given.items():
        if key.startswith("triton_") or key == "headers":
            raise InvalidRequestError(f"parameter '{key}' is reserved and cannot be specified")
        if type(value) is int and not -(1 << 63) <= value < 1 << 64:
            raise InvalidRequestError(f"Unable to parse '{key}': it does not fit into 64 bits")
        kinds = RESERVED.get(key)
        if kinds is None:
            continue
        if type(value) not in kinds:
            words = " or ".join(
                {int: "an integer", str: "a string"}.get(k, "a bool") for k in kinds
            )
            raise InvalidRequestError(f"Unable to parse '{key}': it must be {words}")
        if type(value) is int and value < 0:
            raise InvalidRequestError(f"Unable to parse '{key}': it must not be negative")
    passed = {k: v for k, v in given.items() if k != "binary_data_output"}
    return passed, bool(given.get("binary_data_output", False))


def _check_texts(plan: Plan) -> None:
    """The lenient reader lets through half surrogates, which no answer could repeat."""
    try:
        msgspec.json.encode((plan.id, plan.outputs, plan.parameters, [p.name for p in plan.pieces]))
    except UnicodeEncodeError:
        raise InvalidRequestError("a text in the request holds half of a surrogate pair") from None
