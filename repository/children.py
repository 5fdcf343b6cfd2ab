"""How a child process of the server is started: `python -P -m MODULE FD ...`.

It has one end of a socket, FD, and by that learns all else. It gets the environment of the server
without the server's own settings. It finds the modules that the server runs, installed or not, and
nothing of the working directory. It is in a process group of its own, so that Ctrl-C in a terminal is
for the server alone, which then stops in order.

Rule: what a child is for, and how it ends, is its starter's business.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PRIVATE = "MODELDEPOT_"  # settings of the server, keys among them, are none of a child's business
SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",  # else numpy starts one for every core; who forks must have none
}
HOME = Path(__file__).parents[1]  # what `python -m` is to find our packages in


def start(
    module: str, fd: int, *, args: Sequence[str] = (), defaults: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """`fd` stays the caller's to close. `defaults`: settings for where the environment has none.

    Raises OSError.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(fd), *args],
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
        env=environment(defaults or {}),
        process_group=0,
    )


def environment(defaults: Mapping[str, str]) -> dict[str, str]:
    """What a child of ours is started with."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(PRIVATE)}
    env = {**defaults, **own, **SETTINGS}
    # -P keeps a folder called "server" in the working directory from standing in for ours; a source
    # tree that is not installed must then be named.
    if HOME.name not in ("site-packages", "dist-packages"):
        env["PYTHONPATH"] = os.pathsep.join(p for p in (str(HOME), env.get("PYTHONPATH")) if p)
    return env
