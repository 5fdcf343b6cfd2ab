"""A real journal for the length of a block; nobody is waited for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from repository.journal import Journal

NOW_S = 0.05


@asynccontextmanager
async def opened(folder: Path, *, forget: bool = False, **how: Any) -> AsyncIterator[Journal]:
    journal = Journal(folder, **{"lock_wait_s": NOW_S, **how})
    try:
        await journal.open(forget=forget)
        yield journal
    finally:
        await journal.close()
