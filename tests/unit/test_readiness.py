"""What a model says of its own readiness, asked often and answered seldom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from repository.errors import InferenceFailedError
from repository.hosts.readiness import FRESH_S, WAIT_S, Readiness

pytestmark = pytest.mark.looptime


def saying(
    *answers: Any, takes_s: float = 0.0
) -> tuple[Callable[[], Awaitable[list[bool]]], list[Any]]:
    """Each question the next answer; one that is an error is raised."""
    asked: list[Any] = []

    async def ask() -> list[bool]:
        answer = answers[len(asked)]
        asked.append(answer)
        await asyncio.sleep(takes_s)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    return ask, asked


async def test_one_instance_that_says_no_is_enough() -> None:
    ask, _ = saying([True, False])
    assert not await Readiness("m", ask).now()


async def test_what_was_said_a_moment_ago_is_not_asked_again() -> None:
    ask, asked = saying([True], [False])
    readiness = Readiness("m", ask)
    assert await asyncio.gather(*[readiness.now() for _ in range(3)]) == [True] * 3
    await asyncio.sleep(FRESH_S / 2)
    assert await readiness.now() and len(asked) == 1
    await asyncio.sleep(FRESH_S)
    assert not await readiness.now()


async def test_of_a_model_that_computes_it_is_what_it_said_last_and_nobody_waits_long(
    looptime: Any,
) -> None:
    ask, asked = saying([False], [True], takes_s=10.0)
    readiness = Readiness("m", ask)
    assert await readiness.now() and looptime == WAIT_S
    assert await readiness.now() and len(asked) == 1
    await asyncio.sleep(10)
    assert not await readiness.now()
    readiness.close()


async def test_a_model_that_cannot_say_it_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    failed = InferenceFailedError("ValueError: no")
    ask, _ = saying(failed, failed, [True])
    readiness = Readiness("model 'm'", ask)
    found = []
    for _ in range(3):
        found.append(await readiness.now())
        await asyncio.sleep(FRESH_S)
    assert found == [False, False, True]
    assert [r.getMessage() for r in caplog.records] == [
        "model 'm' cannot say whether it is ready: ValueError: no"
    ]
