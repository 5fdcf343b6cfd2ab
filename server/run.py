"""Runs the server: socket, signals, exit code.

The first SIGTERM or SIGINT: not ready any more, event streams end; a moment later no new
connections; what runs is answered; every model is unloaded; exit 0. All that within `grace`, else
what is left is killed and the exit code is 1. The second signal: that, now.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from typing import Protocol as Shape

import psutil
import uvicorn

from repository.errors import ConfigError, RepositoryError
from repository.lifecycle.status import Public
from repository.repository import Repository
from server import logs
from server.app import ModelDepot, build_app
from server.binding import check_bind
from server.fast import FastProtocol
from server.metrics.http import Metrics
from server.metrics_port import PATH, MetricsPort
from server.options import options_of
from server.protocol import Protocol, watch_over
from server.rpc.quiet import quiet
from server.settings import Settings
from server.tls import Tls, tls_of

log = logging.getLogger("modeldepot.server")

LINGER_S = 0.5  # between "not ready" and the end of accepting, for whoever routes requests here
UNLOAD_S = 5.0  # of the grace, kept for unloading once everything is answered
KILL_S = 3.0  # after everything was killed, until the process ends itself
BACKLOG = 2048
MANY_FILES = 65_536
_MALLOPT = {-3: 32 << 20, -1: 512 << 20, -2: 16 << 20}  # mmap threshold, trim threshold, top pad


class Beside(Shape):
    """Another port of the same server, such as that of gRPC."""

    async def open(self) -> None:
        """Raises ConfigError."""

    async def close(self, within_s: float) -> None:
        """What runs may end within so long."""


def _config(app: ModelDepot, settings: Settings, tls: Tls | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=_protocol(app, settings),
        ws="none",
        interface="asgi3",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        date_header=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=in_flight_s(settings.grace),  # type: ignore[arg-type]
        **(tls.of_uvicorn() if tls else {}),
    )


def _protocol(app: ModelDepot, settings: Settings) -> Any:
    return partial(FastProtocol, door=app.door) if settings.fast_path else Protocol


def in_flight_s(grace_s: float) -> float:
    """How long running requests may take after the signal, so that unloading has its time too."""
    return max(grace_s - LINGER_S - UNLOAD_S, grace_s / 2)


class Server(uvicorn.Server):
    """uvicorn's, but a signal begins a drain. `exit_code` is the process's; `up` is set when it
    accepts."""

    def __init__(
        self,
        app: ModelDepot,
        settings: Settings,
        *,
        alone: bool = False,
        scraped: MetricsPort | None = None,
        rpc: Beside | None = None,
        tls: Tls | None = None,
    ) -> None:
        """`alone`: the process is for nothing else. `scraped` and `rpc`: opened and closed with it."""
        super().__init__(_config(app, settings, tls))
        self.exit_code = 0
        self.up = asyncio.Event()
        self._app = app
        self._settings = settings
        self._alone = alone
        self._scraped = scraped
        self._rpc = rpc
        self._tls = tls
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beside: list[asyncio.Task[None]] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._scraped is not None:
            await self._scraped.open()
            log.info("metrics %s%s", url_of(self._scraped.sock, self._tls), PATH)
        await self._open_rpc()
        if self._alone:
            # What start-up made stays: the collector need not look at it again.
            gc.collect()
            gc.freeze()
        for sock in sockets or ():
            log.info(
                "serving %s models=%d repository=%s",
                url_of(sock, self._tls),
                len(self._app.models.names()),
                self._settings.repo,
            )

        self._beside = [
            asyncio.create_task(self._report_start()),
            asyncio.create_task(watch_over(self.server_state.connections)),
        ]
        self.up.set()

    async def _open_rpc(self) -> None:
        if self._rpc is None:
            return
        try:
            await self._rpc.open()
        except ConfigError as error:
            log.error("%s", error)
            self.exit_code = 1
            # Not before the start is over: what was started is to be ended in its order.
            asyncio.get_running_loop().call_soon(self._stop_accepting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._beside:
            task.cancel()
        if self._rpc is not None:
            # Beside HTTP's end, and before the models are unloaded.
            self._app.answering = asyncio.create_task(self._close_rpc(self._rpc))
        if self._scraped is not None:
            await self._scraped.close()
        await super().shutdown(sockets)
        if self._app.answering is not None:
            await self._app.answering

    async def _close_rpc(self, rpc: Beside) -> None:
        closing = asyncio.create_task(rpc.close(in_flight_s(self._settings.grace)))
        while not closing.done() and not self.force_exit:
            await asyncio.wait((closing,), timeout=0.1)
        if not closing.done():
            closing.cancel()
            await rpc.close(0.0)

    async def _report_start(self) -> None:
        """Says how the start ended; with `exit_on_error`, a failed model ends the server."""
        began = time.monotonic()
        with self._app.models.events.subscribe(after=0) as listener:
            while not self._app.models.ready:
                async for event in listener:
                    if event.kind == "server.ready":
                        break
                else:
                    return  # it drains before it was ready
        found = [s for s in self._app.models.statuses() if s.wanted]
        failed = [s.name for s in found if s.state is Public.FAILED]
        log.info(
            "ready after %.1fs: %d of %d wanted models serve%s",
            time.monotonic() - began,
            sum(s.state is Public.LOADED for s in found),
            len(found),
            f"; failed: {', '.join(failed)}" if failed else "",
        )
        if failed and self._settings.exit_on_error:
            self.exit_code = 1
            self.drain("a model failed at start and --exit-on-error is set")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs between two byte codes of the loop's thread, so it only leaves word."""
        self._signals += 1
        if self._signals > 1:
            self.stop_now()
        elif self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain, signal.Signals(sig).name)

    def drain(self, why: str) -> None:
        if self._app.closing.is_set():
            return
        grace_s = self._settings.grace
        log.info("draining (%s): at most %gs; a second signal ends it at once", why, grace_s)
        loop = asyncio.get_running_loop()
        self._app.drain()
        loop.call_later(min(LINGER_S, grace_s / 4), self._stop_accepting)
        loop.call_later(grace_s, self._out_of_time)

    def _stop_accepting(self) -> None:
        self.should_exit = True

    def _out_of_time(self) -> None:
        log.error("Exit timeout expired. Exiting immediately.")  # in Triton's words
        self.stop_now()

    def stop_now(self) -> None:
        """Kills the workers and cancels everything; the process ends within KILL_S."""
        log.warning("ending now: workers are killed, requests in flight are lost")
        self.exit_code = 1
        self.should_exit = self.force_exit = True
        kill_children()
        last = threading.Timer(KILL_S, os._exit, (1,))
        last.daemon = True
        last.start()


def kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def serve(settings: Settings, *, unused: Sequence[str] = ()) -> int:
    """Returns the exit code: 0 after a clean end. `unused`: flags that mean nothing here."""
    logs.set_up(settings.log_format, settings.log_level)
    if unused:
        log.info("taken and not used: %s", ", ".join(unused))
    with ExitStack() as sockets:
        try:
            check_bind(settings)
            tls = tls_of(settings)
            for folder in (settings.repo, *settings.model_repository):
                _check_folder(folder)
            metrics = Metrics(triton=settings.triton_metrics)
            models = Repository(options_of(settings), metrics.observer)
            app = build_app(models, settings, metrics)
            sock = sockets.enter_context(bind(settings.host, settings.port))
            scraped = _metrics_port(app, settings, tls)
            if scraped is not None:
                sockets.enter_context(scraped.sock)
            rpc = _rpc_port(app, settings, tls, sockets)
        except RepositoryError as error:
            log.error("%s", error)
            return 1
        return _run(Server(app, settings, alone=True, scraped=scraped, rpc=rpc, tls=tls), sock)


def _metrics_port(app: ModelDepot, settings: Settings, tls: Tls | None) -> MetricsPort | None:
    if settings.metrics_port is None:
        return None
    sock = bind(settings.host, settings.metrics_port, flag="--metrics-port")
    return MetricsPort(app, sock, **(tls.of_uvicorn() if tls else {}))


def _rpc_port(
    app: ModelDepot, settings: Settings, tls: Tls | None, sockets: ExitStack
) -> Beside | None:
    """Imports gRPC, which takes half a second: who does not want it does not pay."""
    if not settings.allow_grpc:
        return None
    with quiet():
        from server.rpc.depot import depot_of
        from server.rpc.port import RpcPort

    sock = sockets.enter_context(
        bind(settings.host, settings.grpc_port, flag="--grpc-port", besides=" (or --no-allow-grpc)")
    )
    depot = depot_of(app.known, app.door, app.gate, app.turnstile, app.closing)
    return RpcPort(depot, sock, max_message=settings.grpc_max_message, tls=tls)


def _run(server: Server, sock: socket.socket) -> int:
    _keep_freed_memory()
    _allow_many_files()
    _name_process()
    try:
        server.run(sockets=[sock])
    except SystemExit:
        log.error("the start failed")
        return 1
    if server.exit_code == 0:
        log.info("stopped")
    return server.exit_code


def bind(host: str, port: int, *, flag: str = "--port", besides: str = "") -> socket.socket:
    """A listening socket, before anything else is started. Raises ConfigError, naming the flag and
    what could be done `besides`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"cannot find '{host}': {error.strerror}", where="--host") from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Listening at once: two servers may both bind, only one may listen.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; "
            f"stop what listens there or choose another with {flag}{besides}",
            where=flag,
        ) from error
    return sock


def url_of(sock: socket.socket, tls: Tls | None = None) -> str:
    host, port = sock.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _check_folder(repo: Path) -> None:
    if not repo.is_dir():
        raise ConfigError(
            f"no folder '{repo}'; create it or name your own: modeldepot serve REPO",
            where="repo",
        )


def _keep_freed_memory() -> None:
    """Tells glibc to keep what large bodies freed: page faults on fresh memory cost more than the
    copying. Another C library has no such call; then nothing is gained and nothing lost."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for what, value in _MALLOPT.items():
            mallopt(what, value)


def _allow_many_files() -> None:
    """Every client is one, and a worker needs a few: the usual 1024 would let idle clients keep
    models from coming back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MANY_FILES:
        allowed = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _name_process() -> None:
    """As `ps` and `top` show it."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text("modeldepot")
