"""wrk as the client: one question, asked again and again over so many connections.

wrk takes whole seconds. It fills in what it thinks it missed during long waits (its correction for
coordinated omission), for every server alike. With one thread it is never idle at the fastest
servers, and shares the cores with them: `client_cpu_us` tells what it used.
"""

from __future__ import annotations

import http.client
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bench.dialects import Dialect, Message
from bench.subjects import Subject

SCRIPT = Path(__file__).with_name("post.lua")
TIMEOUT_S = 30
NEAR = 1e-3  # float32 sums in another order differ


@dataclass(frozen=True, slots=True)
class Taken:
    requests: int
    seconds: float
    p50_s: float
    p99_s: float
    wrong: Mapping[str, int]  # what went wrong, and how often; empty: nothing
    client_cpu_s: float = 0.0


class WrongAnswerError(Exception):
    """A server that answers something else is not measured."""


def found_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing; on Debian and Ubuntu: apt install wrk")


def read_wrk(text: str) -> Taken:
    """What post.lua has written, among wrk's own words."""
    line = re.search(r"^found (\{.*\})$", text, re.M)
    if line is None:
        raise ValueError(f"wrk ended without a result: {text.strip()[-300:] or 'it said nothing'}")
    found = json.loads(line[1])
    kinds = ("not_2xx", "connect", "read", "write", "timeout")
    return Taken(
        requests=found["requests"],
        seconds=found["took_us"] / 1e6,
        p50_s=found["p50_us"] / 1e6,
        p99_s=found["p99_us"] / 1e6,
        wrong={kind: found[kind] for kind in kinds if found[kind]},
    )


def ask_for(url: str, message: Message, body: Path, connections: int, seconds: int) -> Taken:
    """`body`: a file that holds the message's."""
    headers = [f"{name}={value}" for name, value in message.headers.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s",
         "--timeout", f"{TIMEOUT_S}s", "-s", str(SCRIPT), url, "--", str(body), *headers],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = read_wrk(ended.stdout + ended.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(
        taken.requests, taken.seconds, taken.p50_s, taken.p99_s, taken.wrong, client_cpu_s=cpu
    )


def verify(url: str, dialect: Dialect, subject: Subject) -> None:
    """One question, its answer held against numpy's."""
    x = subject.question()
    message = dialect.ask(x)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
    try:
        connection.request("POST", parts.path, message.body, dict(message.headers))
        reply = connection.getresponse()
        headers, body = dict(reply.getheaders()), reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise WrongAnswerError(f"{reply.status}: {body[:200].decode(errors='replace')}")
    y = dialect.read({k.lower(): v for k, v in headers.items()}, body)
    wanted = subject.expect(x)
    if y.shape != wanted.shape or not np.allclose(y, wanted, NEAR, NEAR):
        raise WrongAnswerError(f"the numbers are not those of numpy (shape {y.shape})")
