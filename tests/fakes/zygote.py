"""The zygote's program, with a backend more: `tests.fakes.counting`."""

from __future__ import annotations

import sys

from repository.backends import registry
from repository.hosts import zygote
from tests.fakes import counting

if __name__ == "__main__":
    registry.BACKENDS |= counting.ENTRIES
    zygote.main(int(sys.argv[1]), sys.argv[2])
