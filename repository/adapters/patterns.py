"""The keys of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them: a regular expression
that a layer's whole path fits, or all that stands behind one of its dots. The first that fits counts.

The expressions come from files that anybody may have written, and the server waits while they are
matched. So only simple ones are taken, and their work is counted before it is done.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Generic, TypeVar

from repository.errors import AdapterRefusedError

T = TypeVar("T")

MAX_PATTERNS = 2048  # each costs 0.2 ms before it is tried
MAX_LENGTH, MAX_QUANTIFIERS = 300, 3
MAX_STEPS = 100_000_000  # about a second
CALL = 100  # what a try costs at least, in steps
# Letters, dots, classes; a star, a plus or a question mark behind one of these; one list of
# alternatives. None of this form takes more steps than the path's length to the power of its
# quantifiers, and once more for the dot that it may stand behind.
_PART = r"(?:[\w\-]|\\[.\-_dw]|\.|\[[\w\-]+\])[*+?]?"
_GROUP = r"\((?:\?:)?[\w\-.|]*\)"
_SIMPLE = re.compile(rf"\^?(?:{_PART})*(?:{_GROUP})?(?:{_PART})*\$?")


class Patterns(Generic[T]):
    """`field` names them in errors. Raises AdapterRefusedError for one that is not simple."""

    def __init__(self, field: str, values: Mapping[str, T]) -> None:
        if len(values) > MAX_PATTERNS:
            raise AdapterRefusedError(
                f"{field} has {len(values)} entries, at most {MAX_PATTERNS} are read: use patterns"
            )
        self._field = field
        self._steps = 0
        self._patterns = [(_compiled(field, key), _power(key), values[key]) for key in values]

    def of(self, path: str, default: T) -> T:
        """Raises AdapterRefusedError where it would take too long."""
        for pattern, power, value in self._patterns:
            self._steps += CALL + len(path) ** power
            if self._steps > MAX_STEPS:
                raise AdapterRefusedError(
                    f"{self._field} would take too long to match: name the layers without * and +"
                )
            if pattern.match(path):
                return value
        return default


def _power(key: str) -> int:
    return 1 + sum(key.count(sign) for sign in "*+?")


def _compiled(field: str, key: str) -> re.Pattern[str]:
    simple = len(key) <= MAX_LENGTH and _power(key) <= 1 + MAX_QUANTIFIERS
    if simple and _SIMPLE.fullmatch(key):
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error:
            pass  # such as [z-a]
    raise AdapterRefusedError(
        f"{field} has the key '{key[:80]}', which is no pattern that is read here: "
        "write the layers' names, with at most three of * + ?"
    )
