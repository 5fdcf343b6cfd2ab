"""The main of a worker: one process, one backend, one model, one request after the other (or, where
the backend generates text, a step of all that run: see `stepping`; or, where it takes requests as they
are, a group of them: see `conversing`).

Forked by the zygote. It leads its own process group, hears nothing but its socket, and ends when
the socket ends, when it is told to stop (after what was asked before), at SIGTERM, or when the
zygote dies. Whatever a model prints goes to stderr. What a model raises is answered; only a broken
protocol, or a broken GPU, ends the worker with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

from repository import linux
from repository.adapters.orders import AdapterReport
from repository.backends import registry
from repository.backends.abilities import Adapts, Asks, Generates, Measures, Sleeps, Validates
from repository.backends.base import Backend, Order, RoomyBackend
from repository.errors import InferenceFailedError, InvalidRequestError, RepositoryError
from repository.hosts import failures, frames, snapshots, together, visible
from repository.hosts.answering import Answering
from repository.hosts.arena import Window
from repository.hosts.conversing import Conversing
from repository.hosts.frames import ERROR, INFER, REPLY, STOP, BrokenFrameError, Kind, LoadOrder
from repository.hosts.holding import Holding
from repository.hosts.pipe import Frame, Pipe
from repository.hosts.stepping import Stepping
from repository.lifecycle.placement import Memory
from repository.messages import Loaded
from repository.tensors import Buffer

OOM_OFFER = 200
QUICK_S, MOST_HELD = 100e-6, 7
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class ToldToStopError(BaseException):
    """SIGTERM. Not an Exception, so that a model's own handlers let it through."""


class Worker:
    """Answers frames until there are no more."""

    def __init__(self, pipe: Pipe, window: Window | None) -> None:
        self._pipe = pipe
        self._window = window
        self._talk: Conversing | None = None  # with a backend that takes requests as they are
        self._answering = Answering(window)
        self._backend: Backend | None = None
        self._roomy: RoomyBackend | None = None  # the same, if it can
        self._asleep: Backend | None = None  # in place of `_backend`
        self._visible = visible.AS_IS
        self._loaded = False
        self._can_sleep = False
        self._roots: tuple[str, ...] = ()
        self._took_s = 0.0  # the last inference
        self._held = Holding(pipe.send)  # small answers that are not sent yet

    def run(self) -> None:
        if not self._until_loaded():
            return
        if self._talk is not None:
            self._talk.run(lambda: self._backend, self._answer)
        elif hasattr(self._backend, "step"):
            generates = cast("Generates", self._backend)
            Stepping(self._pipe, generates, self._answer, self._fault).run()
        else:
            self._run()

    def _until_loaded(self) -> bool:
        """False: there is nothing more to do."""
        while not self._loaded:
            frame = self._pipe.receive() if self._talk is None else self._talk.take()
            if frame is None or frame.header[3] == STOP:
                return False
            self._pipe.send(self._answer(frame))
        return True

    def _run(self) -> None:
        try:
            while (frame := self._pipe.receive()) is not None and frame.header[3] != STOP:
                parts = self._answer(frame)
                if self._may_wait(parts):
                    self._held.hold(parts)
                else:
                    self._held.send(parts)
        finally:
            self._held.send()

    def _may_wait(self, parts: Sequence[Buffer]) -> bool:
        """Answers that take no time go out together, as long as there are requests here to be
        answered."""
        return (
            self._took_s < QUICK_S
            and len(parts) == 1
            and self._held.count < MOST_HELD
            and self._pipe.ready
        )

    def unload(self) -> None:
        backend, self._backend, self._roomy = self._backend or self._asleep, None, None
        if backend is not None:
            backend.unload()

    def _answer(self, frame: Frame) -> list[Buffer]:
        _, _, number, kind, *_ = frame.header
        try:
            if kind == INFER:
                return self._infer(frame)
            return frames.pack(REPLY, number, self._other(frame))
        except RepositoryError as error:
            failure = error
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - the model's edge
            failure = self._foreign(error, kind)
        return frames.pack(ERROR, number, frames.encode(failures.to_wire(failure)))

    def _infer(self, frame: Frame) -> list[Buffer]:
        if self._backend is None:
            said = "the model sleeps" if self._asleep else "no model is loaded"
            raise InferenceFailedError(said)
        header, payload = frame
        request, offer = self._answering.read(header, payload)
        self._took_s = QUICK_S  # should it fail: nobody knows
        began = time.perf_counter()
        if offer is None or self._roomy is None:
            response = self._backend.infer(request)
        else:
            response = self._roomy.infer_into(request, offer.room)
        self._took_s = took_s = time.perf_counter() - began
        return self._answering.write(header[2], response, offer, took_s)

    def _other(self, frame: Frame) -> bytes:
        _, meta, _, kind, *_ = frame.header
        body = frame.payload[:meta]
        if kind in ABOUT_MODEL:
            return frames.encode(ABOUT_MODEL[kind](self, body))
        if kind not in LOADING:
            raise BrokenFrameError(f"a request of kind {kind}")
        order = frames.read_order(body)
        self._roots += (order.path, order.snapshot)
        try:
            if kind == Kind.PREPARE:
                policy = registry.entry(order.backend).snapshot
                found = snapshots.prepare(
                    policy, Path(order.path), order.model_file, Path(order.snapshot)
                )
                return frames.encode(frames.Prepared(str(found)))
            if kind == Kind.VALIDATE:
                self._validate(order)
                return frames.encode(None)
            return frames.encode(self._load(order))
        except RepositoryError as error:
            raise failures.of_load(error, *self._roots) from error

    def _memory(self, body: memoryview) -> Memory:
        backend = self._backend or self._asleep
        known: Memory = {}
        if self._loaded and hasattr(backend, "memory"):
            known = self._visible.shown(cast("Measures", backend).memory())
        return together.with_the_rest(known, linux.resident())

    def _is_ready(self, body: memoryview) -> bool:
        return self._backend is not None and cast("Asks", self._backend).is_ready()

    def _sleep(self, body: memoryview) -> None:
        backend = self._backend
        if not self._can_sleep or backend is None:
            raise InvalidRequestError("the model cannot sleep, or does already")
        if getattr(backend, "unfinished", 0):
            raise InvalidRequestError("the model cannot sleep while it writes texts")
        # Whatever comes of it, nothing is to run before it is awake again.
        self._asleep, self._backend = backend, None
        cast("Sleeps", backend).sleep()

    def _wake(self, body: memoryview) -> None:
        if self._asleep is None:
            raise InvalidRequestError("the model does not sleep")
        cast("Sleeps", self._asleep).wake()
        self._backend, self._asleep = self._asleep, None

    def _validate(self, order: LoadOrder) -> None:
        self._backend = backend = registry.make(order.backend, order.config)
        if hasattr(backend, "validate"):
            cast("Validates", backend).validate(self._order(order))

    def _adapt(self, body: memoryview) -> list[AdapterReport]:
        if not hasattr(self._backend, "adapt"):
            raise InvalidRequestError("the model takes no adapters")
        return cast("Adapts", self._backend).adapt(frames.read_orders(body))

    def _load(self, order: LoadOrder) -> Loaded:
        self._visible = visible.only(order.device, order.extra)
        self._backend = registry.make(order.backend, order.config)
        if hasattr(self._backend, "meet"):
            self._talk = Conversing(self._pipe, self._window, self._fault)
            cast("Asks", self._backend).meet(self._talk.others)
            self._talk.start()  # from here on it alone reads the socket
        loaded = self._backend.load(self._order(order))
        if self._talk is not None:
            self._talk.decoupled = "decoupled" in loaded.abilities
        if hasattr(self._backend, "infer_into"):
            self._roomy = cast("RoomyBackend", self._backend)
        loaded.details.setdefault("pid", os.getpid())
        self._loaded = True
        self._can_sleep = "sleep" in loaded.abilities
        return loaded

    def _order(self, order: LoadOrder) -> Order:
        for name in THREADS:  # for libraries that the model is about to import
            os.environ[name] = str(order.threads)
        return Order(
            model=order.model,
            version=order.version,
            path=Path(order.path),
            model_file=order.model_file,
            config=order.config,
            device=self._visible.device or order.device,
            threads=order.threads,
            instance=order.instance,
            private=order.private,
            extra=order.extra,
        )

    def _foreign(self, error: BaseException, kind: int) -> RepositoryError:
        if isinstance(error, BrokenFrameError):
            raise error
        moves = kind in (Kind.SLEEP, Kind.WAKE) and not failures.is_fatal(error)
        if kind in LOADING or moves:
            _log_traceback()
            return failures.of_load(error, *self._roots)
        return self._fault(error)

    def _fault(self, error: BaseException) -> RepositoryError:
        if failures.is_fatal(error):
            raise error  # the end of this worker; whoever waits is told so, and another is started
        if not isinstance(error, RepositoryError):
            _log_traceback()
        return failures.of_infer(error, *self._roots)


LOADING = (Kind.PREPARE, Kind.LOAD, Kind.VALIDATE)
ABOUT_MODEL: dict[int, Callable[[Worker, memoryview], object]] = {
    Kind.MEMORY: Worker._memory,
    Kind.ADAPT: Worker._adapt,
    Kind.SLEEP: Worker._sleep,
    Kind.WAKE: Worker._wake,
    Kind.IS_READY: Worker._is_ready,
}


def main(
    fds: Sequence[int], name: str, *, parent: int, unblock: set[int | signal.Signals]
) -> NoReturn:
    """In the child, right after the fork. Never returns into the zygote's code. `fds`: its socket,
    and its host's arena if there is one."""
    code = 1
    try:
        _become(fds, name, parent, unblock)
        sock, *arena = fds
        _serve(socket.socket(fileno=sock), Window(arena[0]) if arena else None)
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


def _become(fds: Sequence[int], name: str, parent: int, unblock: set[int | signal.Signals]) -> None:
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
        if other > 2 and other not in fds:
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
    linux.let_others_go_first()
    faulthandler.enable()


def _serve(sock: socket.socket, window: Window | None) -> None:
    worker = Worker(Pipe(sock), window)
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
