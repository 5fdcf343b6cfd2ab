"""The worker's end of the socket: blocking, one frame at a time, in a buffer that is used again.

A frame's payload is a view into that buffer and lives until the next `receive`. The buffer is
page-aligned, so every tensor in it is aligned. It grows for a large frame and shrinks back after a
row of small ones, so that one large request does not cost memory for ever.
"""

from __future__ import annotations

import mmap
import select
import socket
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from repository.hosts import frames
from repository.hosts.frames import HEADER_SIZE, Header
from repository.tensors import Buffer

SMALL = 256 * 1024
PATIENCE = 16  # small frames in a row after which a large buffer goes
IOV = 64  # parts that one sendmsg takes


class Frame(NamedTuple):
    header: Header
    payload: memoryview


class Pipe:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._buffer = memoryview(mmap.mmap(-1, SMALL))
        self._at = 0  # where the next frame begins
        self._have = 0  # up to where the buffer is filled
        self._small = 0

    def receive(self) -> Frame | None:
        """None: the other side is gone. Raises BrokenFrameError."""
        if self._have - self._at < HEADER_SIZE and not self._fill(HEADER_SIZE):
            return None
        header = frames.unpack(self._buffer, self._at)
        total = HEADER_SIZE + header[0]
        if total > SMALL or len(self._buffer) > SMALL:
            self._settle(total)
        if self._have - self._at < total and not self._fill(total):
            return None
        payload = self._buffer[self._at + HEADER_SIZE : self._at + total]
        self._at += total
        return Frame(header, payload)

    def take(self) -> Frame | None:
        """As `receive`, but the payload is the frame's own, and stays."""
        if self._have - self._at < HEADER_SIZE and not self._fill(HEADER_SIZE):
            return None
        header = frames.unpack(self._buffer, self._at)
        length = header[0]
        if HEADER_SIZE + length <= SMALL:
            frame = self.receive()
            return None if frame is None else Frame(header, memoryview(bytearray(frame.payload)))
        whole = np.empty(length, np.uint8).data  # its pages are written once: by the kernel
        self._at += HEADER_SIZE
        have = min(self._have - self._at, length)
        whole[:have] = self._buffer[self._at : self._at + have]
        self._at += have
        while have < length:
            got = self._sock.recv_into(whole[have:])
            if got == 0:
                return None
            have += got
        return Frame(header, whole)

    @property
    def ready(self) -> bool:
        """A whole frame is here: `receive` will not wait. Raises BrokenFrameError."""
        have = self._have - self._at
        return (
            have >= HEADER_SIZE and have >= HEADER_SIZE + frames.unpack(self._buffer, self._at)[0]
        )

    @property
    def stirs(self) -> bool:
        """Something has come, if only the end of the stream: `receive` will not wait long, for who
        sends a frame sends all of it."""
        return self._have > self._at or bool(self._poll.poll(0))

    def send(self, parts: Sequence[Buffer]) -> None:
        """All of it, large parts without a copy. Any thread may send."""
        with self._sending:
            self._send(parts)

    def _send(self, parts: Sequence[Buffer]) -> None:
        if len(parts) == 1:
            self._sock.sendall(parts[0])
            return
        left = [memoryview(p).cast("B") for p in parts]
        while left:
            sent = self._sock.sendmsg(left[:IOV])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _fill(self, wanted: int) -> bool:
        """Until `wanted` bytes lie at `_at`. False at the end of the stream."""
        if self._at == self._have:
            self._at = self._have = 0
        if self._at + wanted > len(self._buffer):
            self._move(self._buffer)
        while self._have - self._at < wanted:
            # Behind a large frame nothing is read ahead: moving it back would cost a copy.
            end = self._at + wanted if wanted > SMALL else len(self._buffer)
            got = self._sock.recv_into(self._buffer[self._have : end])
            if got == 0:
                return False
            self._have += got
        return True

    def _settle(self, total: int) -> None:
        """A buffer that fits frames of `total` bytes, without giving up a large one too early."""
        if total > len(self._buffer):
            self._small = 0
            self._move(memoryview(mmap.mmap(-1, -(-total // SMALL) * SMALL)))
            return
        self._small = 0 if total > SMALL else self._small + 1
        if self._small > PATIENCE and self._have - self._at <= SMALL:
            self._small = 0
            self._move(memoryview(mmap.mmap(-1, SMALL)))

    def _move(self, target: memoryview) -> None:
        """What has been read and not used yet goes to the beginning of `target`."""
        rest = self._have - self._at
        target[:rest] = bytes(self._buffer[self._at : self._have])
        # Never closed by hand: a model may have kept a view of it.
        self._buffer = target
        self._at, self._have = 0, rest
