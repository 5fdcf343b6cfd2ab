"""What a request says of its sequence, in its parameters: sequence_id, sequence_start, sequence_end.

An id is a whole number (1 to 2^64-1) or a text; 5 and "5" are two sequences. 0 and "" are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from repository.errors import InvalidRequestError
from repository.names import shown

SequenceId: TypeAlias = int | str
OF_A_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
LARGEST_ID = 2**64 - 1
LONGEST_ID = 128  # bytes of UTF-8, as Triton has it


class Asked(NamedTuple):
    id: SequenceId
    start: bool
    end: bool


def sequence_of(parameters: Mapping[str, Any], model: str) -> Asked:
    """Raises InvalidRequestError where there is none, or it cannot be one."""
    found = parameters.get("sequence_id", 0)
    if isinstance(found, str):
        if len(found.encode(errors="replace")) > LONGEST_ID:
            raise InvalidRequestError(
                f"sequence_id of a request to model '{model}' is longer than {LONGEST_ID} bytes"
            )
    elif isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= LARGEST_ID:
        raise InvalidRequestError(
            f"sequence_id of a request to model '{model}' must be a whole number from 1 to "
            f"2^64-1, or a text"
        )
    if not found:
        raise InvalidRequestError(
            f"inference request to model '{model}' must specify a non-zero or non-empty "
            f"correlation ID (the parameter sequence_id): it takes sequences"
        )
    return Asked(
        found,
        _flag(parameters, "sequence_start", model),
        _flag(parameters, "sequence_end", model),
    )


def going_on(parameters: Mapping[str, Any]) -> SequenceId | None:
    """The id of a request that belongs to a sequence which began before; whatever is wrong with it,
    `sequence_of` says."""
    found = parameters.get("sequence_id")
    if parameters.get("sequence_start") or isinstance(found, bool):
        return None
    return found if found and isinstance(found, (int, str)) else None


def _flag(parameters: Mapping[str, Any], name: str, model: str) -> bool:
    found = parameters.get(name, False)
    if isinstance(found, int) and found in (0, 1):  # a bool is one too
        return bool(found)
    raise InvalidRequestError(f"{name} of a request to model '{model}' must be true or false")


def named(sequence: SequenceId) -> str:
    """For people."""
    return str(sequence) if isinstance(sequence, int) else f"'{shown(sequence)}'"
