"""How much of what is drawn at random a run of the tests tries. Usually enough to notice what broke;
with MODELDEPOT_TEST_LONG=1 enough to look for what nobody has seen yet.
"""

from __future__ import annotations

import os


def drawn(usually: int, *, long: int) -> int:
    return long if os.environ.get("MODELDEPOT_TEST_LONG") else usually
