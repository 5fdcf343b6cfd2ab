"""Loads that are tried again."""

from __future__ import annotations

import pytest

from repository.attempts import at_last
from repository.errors import FilesChangedError, LoadFailedError, WorkerDiedError


class Trying:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.story: list[str] = []

    async def attempt(self) -> str:
        self.story.append("try")
        if self.errors:
            raise self.errors.pop(0)
        return "loaded"

    async def clear(self) -> None:
        self.story.append("clear")

    async def at_last(self, retries: int) -> str:
        return await at_last(self.attempt, self.clear, retries=retries, what="m:1#1")


async def test_a_load_is_tried_again_as_often_as_was_said() -> None:
    trying = Trying(LoadFailedError("a"), ValueError("b"))
    assert await trying.at_last(2) == "loaded"
    assert trying.story == ["try", "clear", "try", "clear", "try"]


async def test_the_last_failure_is_told_and_what_it_left_is_not_cleared_here() -> None:
    trying = Trying(LoadFailedError("a"), LoadFailedError("b"))
    with pytest.raises(LoadFailedError, match="b"):
        await trying.at_last(1)
    assert trying.story == ["try", "clear", "try"]


@pytest.mark.parametrize("error", [FilesChangedError("changed"), WorkerDiedError("died")])
async def test_what_others_decide_about_is_not_tried_again(error: Exception) -> None:
    trying = Trying(error)
    with pytest.raises(type(error)):
        await trying.at_last(5)
    assert trying.story == ["try"]
