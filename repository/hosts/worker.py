"""The main of a worker: one process, one backend, one model, one request after the other.

Forked by the zygote. It leads its own process group, hears nothing but its socket, and ends when
the socket ends, when it is told to stop (after what was asked before), at SIGTERM, or when the
zygote dies. Whatever a model prints goes to stderr. What a model raises is answered; only a broken
protocol ends the worker with an error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from repository.backends import registry
from repository.backends.base import Backend, Order
from repository.errors import InferenceFailedError, InvalidTensorError, RepositoryError
from repository.hosts import failures, frames, linux, snapshots
from repository.hosts.frames import BrokenFrameError, Kind, LoadOrder
from repository.hosts.pipe import Frame, Pipe
from repository.messages import Loaded
from repository.tensors import Buffer

OOM_OFFER = 200
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class ToldToStopError(BaseException):
    """SIGTERM. Not an Exception, so that a model's own handlers let it through."""


class Worker:
    """Answers frames until there are no more."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._backend: Backend | None = None
        self._roots: tuple[str, ...] = ()

    def run(self) -> None:
        while (frame := self._pipe.receive()) is not None and frame.kind is not Kind.STOP:
            self._pipe.send(self._answer(frame))

    def unload(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.unload()

    def _answer(self, frame: Frame) -> list[Buffer]:
        try:
            if frame.kind is Kind.INFER:
                return self._infer(frame)
            return frames.pack(Kind.REPLY, frame.number, self._other(frame))
        except RepositoryError as error:
            failure = error
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the model's edge
            _log_traceback()
            failure = self._foreign(error, frame.kind)
        return frames.pack(Kind.ERROR, frame.number, frames.encode(failures.to_wire(failure)))

    def _infer(self, frame: Frame) -> list[Buffer]:
        if self._backend is None:
            raise InferenceFailedError("no model is loaded")
        request = frames.unpack_infer(frame.payload, frame.meta)
        began = time.perf_counter()
        response = self._backend.infer(request)
        response.compute_s = time.perf_counter() - began
        try:
            return frames.pack_answer(frame.number, response)
        except InvalidTensorError as error:  # too long: not what the client sent is at fault
            raise InferenceFailedError(f"the answer holds {error}") from error

    def _other(self, frame: Frame) -> bytes:
        body = frame.payload[: frame.meta]
        if frame.kind is Kind.MEMORY:
            return frames.encode(linux.resident())
        if frame.kind not in (Kind.PREPARE, Kind.LOAD):
            raise BrokenFrameError(f"a request of kind {frame.kind.name}")
        order = frames.read_order(body)
        self._roots += (order.path, order.snapshot)
        try:
            if frame.kind is Kind.PREPARE:
                policy = registry.entry(order.backend).snapshot
                found = snapshots.prepare(
                    policy, Path(order.path), order.model_file, Path(order.snapshot)
                )
                return frames.encode(frames.Prepared(str(found)))
            return frames.encode(self._load(order))
        except RepositoryError as error:
            raise failures.of_load(error, *self._roots) from error

    def _load(self, order: LoadOrder) -> Loaded:
        for name in THREADS:  # for libraries that the model is about to import
            os.environ[name] = str(order.threads)
        self._backend = registry.make(order.backend)
        loaded = self._backend.load(
            Order(
                model=order.model,
                version=order.version,
                path=Path(order.path),
                model_file=order.model_file,
                config=order.config,
                device=order.device,
                threads=order.threads,
                instance=order.instance,
                extra=order.extra,
            )
        )
        loaded.memory.update(linux.resident())
        loaded.details.setdefault("pid", os.getpid())
        return loaded

    def _foreign(self, error: BaseException, kind: Kind) -> RepositoryError:
        if isinstance(error, BrokenFrameError):
            raise error
        if kind is Kind.INFER:
            return failures.of_infer(error, *self._roots)
        return failures.of_load(error, *self._roots)


def main(fd: int, name: str, *, parent: int, unblock: set[int | signal.Signals]) -> NoReturn:
    """In the child, right after the fork. Never returns into the zygote's code."""
    code = 1
    try:
        _become(fd, name, parent, unblock)
        _serve(socket.socket(fileno=fd))
        code = 0
    except ToldToStopError:
        code = 0
    except BaseException:  # noqa: BLE001 - the last edge of the process
        _log_traceback()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(fd: int, name: str, parent: int, unblock: set[int | signal.Signals]) -> None:
    """From a copy of the zygote to a process of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _on_sigterm)
    linux.die_with_parent(parent, signal.SIGKILL)
    linux.adopt_orphans()
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, unblock)
    os.dup2(2, 1)
    for other in [int(n) for n in os.listdir("/proc/self/fd")]:
        if other > 2 and other != fd:
            with contextlib.suppress(OSError):
                os.close(other)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # os._exit would lose what waits in it
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()  # or all workers would draw the same numbers
    linux.name_process(name)
    linux.offer_to_oom_killer(OOM_OFFER)
    faulthandler.enable()


def _serve(sock: socket.socket) -> None:
    worker = Worker(Pipe(sock))
    try:
        worker.run()
    except (ConnectionError, ToldToStopError):
        pass  # the server is gone, or wants us gone: either way this is the end
    finally:
        worker.unload()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise ToldToStopError


def _log_traceback() -> None:
    with contextlib.suppress(OSError, ValueError):  # a log that nobody reads must not end a worker
        traceback.print_exc()
