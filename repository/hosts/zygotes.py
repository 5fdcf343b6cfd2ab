"""The front's side of the zygotes: one process per framework, started when first needed.

All calls come from the event loop's thread, which must be the main thread: the kernel ends a zygote
when the thread that started it ends. A worker that ends resolves its `Child.exited` with the reason
in words. A zygote that dies takes its workers with it; the next fork starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from repository import children, linux
from repository.errors import LoadFailedError, WorkerDiedError
from repository.hosts import snapshots

log = logging.getLogger(__name__)
PROGRAM = "repository.hosts.zygote"
PACKET = 64 * 1024
CLOSE_S = 2.0  # how long a zygote may take to end its workers and itself
SETTINGS = {
    # Read when a library is loaded, so they must be set before the zygote imports anything.
    "ORT_DISABLE_TELEMETRY": "1",  # otherwise importing onnxruntime starts a thread that calls home
    "OMP_WAIT_POLICY": "PASSIVE",  # pools that spin on busy cores starve each other
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    # Whoever only asks whether there is a GPU must not start CUDA: no worker could use it any more.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts; CUDA alone counts by speed
    "MALLOC_ARENA_MAX": "2",
    # Large tensors come from memory that is used again instead of being mapped and faulted anew.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class Child:
    """One worker process. `sock` is our end of its socket; whoever gets the child owns it."""

    def __init__(self, zygote: Zygote, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._zygote = zygote

    def signal(self, number: int) -> None:
        """To the worker's whole process group. Nothing happens if it has ended."""
        if not self.exited.done():
            self._zygote.signal(self.pid, number)


class Zygotes:
    """`state_dir`: temporary files of workers lie there, and go with the last of them; torch cannot even
    be imported where there is no place for any. A TMPDIR that the server was given counts more."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self._state_dir = state_dir
        self._scratch: Path | None = None
        self._running: dict[str, Zygote] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._ended: set[Zygote] = set()
        self._closed = False

    async def warm(self, framework: str) -> Zygote:
        """Starts the framework's zygote unless it runs. Raises LoadFailedError."""
        async with self._starting.setdefault(framework, asyncio.Lock()):
            if self._closed:
                raise LoadFailedError("the server is shutting down")
            zygote = self._running.get(framework)
            if zygote is not None and not zygote.dead:
                return zygote
            if zygote is not None:
                self._ended.add(self._running.pop(framework))
            zygote = Zygote(framework, self._settings())
            try:
                await zygote.up
            except BaseException:
                await zygote.close()
                raise
            self._running[framework] = zygote
            return zygote

    async def fork(self, framework: str, name: str, arena: int = -1) -> Child:
        """A worker called `name`; `arena`: a descriptor that it gets too. Raises LoadFailedError,
        WorkerDiedError."""
        zygote = await self.warm(framework)
        return await zygote.fork(name, arena)

    def _settings(self) -> dict[str, str]:
        if self._state_dir is None:
            return SETTINGS
        if self._scratch is None:
            try:
                folder = snapshots.fresh(self._state_dir.absolute(), "scratch")
                folder.mkdir(mode=0o700)
            except OSError:  # full, or not to be written: then the machine's own place must do
                return SETTINGS
            self._scratch = folder
        return {**SETTINGS, "TMPDIR": str(self._scratch)}

    async def memory(self) -> int:
        """Bytes of host memory that workers share with what they were forked from, and have not changed:
        counted in none of them."""
        pids = [zygote.pid for zygote in self._running.values() if not zygote.dead]
        return await asyncio.to_thread(lambda: sum(map(linux.anonymous, pids)))

    async def close(self) -> None:
        """Ends every zygote and every worker of theirs."""
        self._closed = True
        for lock in self._starting.values():
            async with lock:
                pass  # whoever was starting one has finished
        every = [*self._running.values(), *self._ended]
        self._running.clear()
        self._ended.clear()
        await asyncio.gather(*(zygote.close() for zygote in every))
        if self._scratch is not None:
            folder, self._scratch = self._scratch, None
            with contextlib.suppress(OSError):  # swept at the next start
                await asyncio.to_thread(snapshots.remove, folder)


class Zygote:
    """One zygote process. `up` resolves when it can fork."""

    def __init__(self, framework: str, settings: Mapping[str, str] = SETTINGS) -> None:
        self.framework = framework
        self.dead = False
        loop = asyncio.get_running_loop()
        self.up: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._turn = asyncio.Lock()
        self._number = 0
        self._forking: tuple[asyncio.Future[Child], socket.socket] | None = None
        self._children: dict[int, Child] = {}
        self._warned = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            self._process = children.start(
                PROGRAM, theirs.fileno(), args=[framework], defaults=settings
            )
        self.pid = self._process.pid
        loop.add_reader(self._control.fileno(), self._hear)

    async def fork(self, name: str, arena: int = -1) -> Child:
        async with self._turn:  # one request in flight: the socket's buffer can never be full
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.setblocking(False)
            try:
                with theirs:
                    fds = [theirs.fileno(), arena] if arena >= 0 else [theirs.fileno()]
                    return await self._ask_fork(name, ours, fds)
            except BaseException:
                ours.close()  # a worker that is forked all the same sees the end and goes
                raise

    async def _ask_fork(self, name: str, ours: socket.socket, fds: list[int]) -> Child:
        if self.dead:
            raise WorkerDiedError(f"the {self.framework} zygote has died; ask again")
        self._number += 1
        message = msgspec.msgpack.encode({"fork": self._number, "name": name})
        forked: asyncio.Future[Child] = self._loop.create_future()
        self._forking = forked, ours
        try:
            socket.send_fds(self._control, [message], fds)
            return await forked
        except OSError as error:
            raise WorkerDiedError(f"no worker could be forked: {error.strerror}") from error
        finally:
            self._forking = None

    def signal(self, pid: int, number: int) -> None:
        """To the group of a worker that has not been reported as ended."""
        if not self.dead:
            with contextlib.suppress(OSError):
                self._control.send(msgspec.msgpack.encode({"signal": pid, "number": number}))

    async def close(self) -> None:
        """At the end of the stream it kills its workers and exits; past CLOSE_S we kill it."""
        if not self.dead:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
        await asyncio.shield(self._loop.run_in_executor(None, self._wait))
        self._died()
        if self._children:
            await asyncio.wait([child.exited for child in self._children.values()])

    def _wait(self) -> None:
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # hearing ------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """One packet from the zygote."""
        try:
            data = self._control.recv(PACKET)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._died()
            return
        message: dict[str, Any] = msgspec.msgpack.decode(data)
        if "up" in message and not self.up.done():
            self.up.set_result(None)
        elif "forked" in message:
            self._on_forked(message["forked"], message["pid"])
        elif "exited" in message:
            self._on_exited(message["exited"], linux.how_it_ended(message["status"]))
        if message.get("threads", 1) > 1 and not self._warned:
            self._warned = True
            log.warning(
                "the %s zygote runs %d threads; a fork may hang",
                self.framework,
                message["threads"],
            )

    def _on_forked(self, number: int, pid: int) -> None:
        if number != self._number or self._forking is None or self._forking[0].done():
            return  # whoever asked has gone, and has closed the socket
        forked, sock = self._forking
        child = self._children[pid] = Child(self, pid, sock)
        forked.set_result(child)

    def _on_exited(self, pid: int, how: str) -> None:
        child = self._children.pop(pid, None)
        if child is not None and not child.exited.done():
            child.exited.set_result(how)

    def _died(self) -> None:
        """The kernel has sent SIGKILL to its workers; each is gone when its pidfd says so."""
        if self.dead:
            return
        self.dead = True
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        self._process.kill()
        self._loop.run_in_executor(None, self._process.wait)
        if not self.up.done():
            self.up.set_exception(
                LoadFailedError(
                    f"the process that {self.framework} models are forked from did not start; "
                    "the server's log says why"
                )
            )
        if self._forking is not None and not self._forking[0].done():
            self._forking[0].set_exception(
                WorkerDiedError(f"the {self.framework} zygote has died; ask again")
            )
        for pid in list(self._children):
            self._outlive(pid)

    def _outlive(self, pid: int) -> None:
        how = "killed together with the process that it was forked from"
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_exited(pid, how)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what the model itself had started

        def ended() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # where we are process 1 it became our child
            self._on_exited(pid, how)

        self._loop.add_reader(pidfd, ended)
