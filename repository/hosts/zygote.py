"""The process that workers are forked from: `python -m repository.hosts.zygote FD FRAMEWORK`.

It has imported a framework and does nothing else: no op, no session, no thread, no GPU. A worker
forked from it starts in milliseconds and shares its memory. One message a packet on the socket FD:

    to us    {"fork": id, "name": ...} + the worker's socket, and its arena if it has one
             {"signal": pid, "number": n}
    from us  {"up": pid, "threads": n}   {"forked": id, "pid": pid, "threads": n}
             {"exited": pid, "status": wait status}

Only unreaped children of ours are ever signalled, so a pid cannot have become somebody else's. When
a worker has ended, whatever the model started goes with it: its process group, and what had left the
group. (A worker adopts the orphans below it and we adopt the worker's, so a child of ours that is no
worker belonged to one that has ended.) When the server is gone (end of the stream, or SIGTERM by
PR_SET_PDEATHSIG) all are killed and we exit.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
from types import FrameType
from typing import Any

import msgspec

from repository import linux
from repository.hosts import worker

TORCH = (
    "numpy",
    "torch",
    "safetensors.torch",
    "repository.backends.torch_module",
    "repository.backends.torch_export",
    "repository.backends.torchscript",
)
# A worker is ready when it has read its own files: what transformers would import for the usual
# models, lazily and for seconds, is here already.
TEXT = (
    "numpy",
    "torch",
    "safetensors.torch",
    "tokenizers",
    "transformers",
    "transformers.cache_utils",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "repository.backends.text.ahead",
    "repository.backends.text.backend",
    "repository.backends.embed.backend",
)
FRAMEWORKS = {
    "onnx": ("numpy", "repository.backends.onnx", "onnxruntime"),
    "python": ("numpy", "repository.backends.python", "repository.backends.triton.backend"),
    "torch": TORCH,
    "text": TEXT,
}
# Whatever the environment says: nothing is fetched, and a log has no moving parts.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # a pool of threads for one prompt at a time
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
PACKET = 64 * 1024
MOST_FDS = 2  # of one worker


class Zygote:
    def __init__(self, control: socket.socket, wakeup: int) -> None:
        self._control = control
        self._wakeup = wakeup
        self._workers: set[int] = set()
        self._told = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._told = True

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while not self._told:
            for fd, _ in poll.poll():
                if fd == self._wakeup:
                    os.read(self._wakeup, PACKET)
                elif not self._obey():
                    return
            self._reap()

    def end(self) -> None:
        """Nothing that was forked here stays."""
        for pid in self._workers:
            self._signal(pid, signal.SIGKILL)
        for pid in self._workers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._workers.clear()
        while self._end_orphans():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)

    def _obey(self) -> bool:
        """Does what one message says. False: the server is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, PACKET, MOST_FDS)
        except ConnectionResetError:  # it was killed before it had read what we told it
            return False
        if not data:
            return False
        message: dict[str, Any] = msgspec.msgpack.decode(data)
        if "fork" in message:
            self._fork(message["fork"], message["name"], fds)
        elif message["signal"] in self._workers:
            self._signal(message["signal"], message["number"])
        return True

    def _fork(self, number: int, name: str, fds: list[int]) -> None:
        threads = linux.threads()
        parent = os.getpid()
        # Until the child has its own handlers, ours must not run in it.
        before: set[int | signal.Signals] = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD}
        )
        pid = os.fork()
        if pid == 0:
            worker.main(fds, name, parent=parent, unblock=before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for fd in fds:
            os.close(fd)
        self._workers.add(pid)
        self._report({"forked": number, "pid": pid, "threads": threads})

    def _reap(self) -> None:
        for pid in list(self._workers):
            # First look, then kill its group, then bury it: a pid is not given away before that.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            self._signal(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            self._workers.discard(pid)
            self._end_orphans()
            self._report({"exited": pid, "status": status})
        self._end_orphans()

    def _end_orphans(self) -> bool:
        """Kills what workers that have ended left. True: some are not buried yet; the end of each
        is a SIGCHLD, after which we are here again, for what it may have left in its turn."""
        orphans = [pid for pid in linux.children() if pid not in self._workers]
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        return bool(orphans)

    def _signal(self, pid: int, number: int) -> None:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has not made its group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _report(self, message: dict[str, int]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the next read ends us
            self._control.send(msgspec.msgpack.encode(message))


def main(fd: int, framework: str) -> None:
    parent = os.getppid()
    linux.die_with_parent(parent, signal.SIGTERM)
    linux.name_process(f"md-zygote-{framework}")
    linux.adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # a model's folder is only read
    control = socket.socket(fileno=fd)
    wakeup, poke = os.pipe()
    os.set_blocking(poke, False)
    if framework in ("torch", "text"):
        os.environ.update(OFFLINE)
    for module in FRAMEWORKS[framework]:
        # What is not installed is missed by the worker that needs it, whose load then says so.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    zygote = Zygote(control, wakeup)
    signal.signal(signal.SIGTERM, zygote.on_signal)
    signal.signal(signal.SIGCHLD, zygote.on_signal)
    signal.set_wakeup_fd(poke)
    gc.collect()
    gc.freeze()
    if os.getppid() == parent:
        control.send(msgspec.msgpack.encode({"up": os.getpid(), "threads": linux.threads()}))
        try:
            zygote.run()
        finally:
            zygote.end()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
