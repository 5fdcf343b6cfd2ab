"""The model that a call of the native face names."""

from __future__ import annotations

import msgspec

from repository.errors import InvalidRequestError


class NamedModel(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Exactly one name, under any of the three keys (the same name twice is still one)."""

    model_name: str | None = None
    model: str | None = None
    model_id: str | None = None

    @property
    def name(self) -> str:
        given = {n for n in (self.model_name, self.model, self.model_id) if n is not None}
        if len(given) != 1 or "" in given:
            raise InvalidRequestError(
                "'model_name' is missing or empty" if given <= {""} else "more than one model named"
            )
        return given.pop()
