"""What the tests of one file may share: the processes from which workers are forked."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from repository.hosts.zygotes import Zygotes
from tests.hosting import forking


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygotes() -> AsyncIterator[Zygotes]:
    """Of all tests of a file, which run in one loop: `pytest.mark.asyncio(loop_scope="module")`. A test
    that kills them, or looks at their start, has its own: `forking()`."""
    async with forking() as found:
        yield found
