"""Answers that wait to be sent together, and never for long.

Waking the server costs more than a quick answer, so several of them go out as one. What comes next may
be slow, though, and nobody knows it before: a thread looks every LATE_S whether something is held that
was there the last time, and sends it. It rests when nothing has been held for a while. A model that
keeps the interpreter to itself keeps it waiting too.

Rule: what is held goes out before anything that is sent later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from repository.tensors import Buffer

LATE_S = 0.005  # an answer waits twice as long at most
QUIET = 100  # looks at nothing before it rests


class Holding:
    """`send` of the pipe. One thread holds, any may send. `bytes`: about as many are held."""

    def __init__(self, send: Callable[[Sequence[Buffer]], None]) -> None:
        self.bytes = 0
        self._pipe_send = send
        self._lock = threading.Lock()
        self._frames: deque[Buffer] = deque()
        self._sent = 0  # times that something was
        self._awake = False
        self._wake = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def hold(self, parts: Sequence[Buffer]) -> None:
        """Whole frames."""
        frame = parts[0] if len(parts) == 1 else b"".join(parts)
        self._frames.append(frame)
        self.bytes += len(frame)
        if not self._awake:
            self._rouse()

    @property
    def count(self) -> int:
        return len(self._frames)

    def send(self, parts: Sequence[Buffer] = ()) -> None:
        """Behind what is held."""
        with self._lock:
            if self._frames:
                held = [self._frames.popleft() for _ in range(len(self._frames))]
                self.bytes = 0
                self._sent += 1
                parts = [b"".join([*held, *parts[:1]]), *parts[1:]]
            if parts:
                self._pipe_send(parts)

    def _rouse(self) -> None:
        self._awake = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="sends late", daemon=True)
            self._thread.start()
        self._wake.release()

    def _watch(self) -> None:
        while True:
            self._wake.acquire()
            try:
                self._until_quiet()
            except OSError:  # nobody is there: whoever reads hears of it
                return
            self._awake = False
            if self._frames:  # held since the last look
                self._awake = True
                self._wake.release()

    def _until_quiet(self) -> None:
        quiet, seen = 0, -1
        while quiet < QUIET:
            time.sleep(LATE_S)
            if not self._frames:
                quiet, seen = quiet + 1, -1
                continue
            if seen == self._sent:
                self.send()
            quiet, seen = 0, self._sent
