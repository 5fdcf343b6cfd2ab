"""A program as a container would run it, without an engine: a root file system of its own, read-only,
where only what is named can be written, and a user id that owns nothing else.

A mount namespace (unshare of util-linux, which needs root), a tmpfs as the root, in it this machine's
libraries and Python, read-only, then chroot. Processes, network and user ids are the machine's own.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc")
DEVICES = ("null", "zero", "full", "random", "urandom")
PACKAGES = Path(sysconfig.get_path("purelib"))


@functools.cache
def impossible() -> str:
    """Why no such place can be made here; "" where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a mount namespace needs root"
    try:
        tried = subprocess.run(
            ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt && chroot / true"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no unshare: {error}"
    return tried.stderr.strip()


@dataclass
class Place:
    """`shown`, `written`: where it is inside -> the folder outside; the first read-only."""

    home: Path  # a folder to mount the root on
    shown: dict[str, Path] = field(default_factory=dict)
    written: dict[str, Path] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"

    def command(self, words: Sequence[str]) -> list[str]:
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-ec",
            self._script(words),
        ]

    def _script(self, words: Sequence[str]) -> str:
        root = shlex.quote(str(self.home))
        lines = [f"mount -t tmpfs -o mode=755 root {root}", f"mkdir {root}/proc {root}/dev"]
        for path in SYSTEM:
            if os.path.islink(path):
                lines.append(f"ln -s {os.readlink(path)} {root}{path}")
            elif os.path.isdir(path):
                lines += _bound(root, path, path, "ro")
        lines += [f"mount --rbind /proc {root}/proc"]
        for name in DEVICES:
            lines += [f"touch {root}/dev/{name}", f"mount --bind /dev/{name} {root}/dev/{name}"]
        python = {p: Path(p) for p in (sys.base_prefix, sys.prefix) if not p.startswith("/usr")}
        places = [(inside, outside, "ro") for inside, outside in (python | self.shown).items()]
        places += [(inside, outside, "rw") for inside, outside in self.written.items()]
        for inside, outside, how in sorted(places):  # one may lie in another
            lines += _bound(root, str(outside), inside, how)
        variables = [f"{name}={value}" for name, value in self.environ.items()]
        inner = ["sh", "-c", f'cd {self.folder} && exec "$@"', "sh", *words]
        run = ["chroot", f"--userspec={self.user}", "--groups=", str(self.home)]
        lines += [
            f"mount -o remount,ro {root}",
            "exec " + shlex.join([*run, "/usr/bin/env", "-i", *variables, *inner]),
        ]
        return "\n".join(lines)

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(words), capture_output=True, text=True, timeout=timeout, check=False
        )

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        """Its log is `stderr`."""
        return await asyncio.create_subprocess_exec(
            *self.command(words), stderr=asyncio.subprocess.PIPE, start_new_session=True
        )


def _bound(root: str, outside: str, inside: str, how: str) -> list[str]:
    there = root + shlex.quote(inside)
    return [
        f"mkdir -p {there}",
        f"mount --rbind {shlex.quote(outside)} {there}",
        *([f"mount -o remount,bind,ro {there}"] if how == "ro" else []),
    ]
