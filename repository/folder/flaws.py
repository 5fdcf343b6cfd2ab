"""What keeps one version's files from being served, before it has become a Problem with a place."""

from __future__ import annotations

STILL_COPYING = "copy the file again, or wait until the copy is done"


class FlawError(Exception):
    """`rule`, `message` and `hint` as in a Problem. `name`: the file it is about, relative to the
    version's folder; "" where whoever asked knows."""

    def __init__(
        self, rule: str, message: str, hint: str = STILL_COPYING, *, name: str = ""
    ) -> None:
        super().__init__(message)
        self.rule, self.message, self.hint, self.name = rule, message, hint, name
