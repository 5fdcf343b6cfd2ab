"""Requests and answers that a model may keep as long as it likes.

Elsewhere a worker's tensors lie in memory that is used again for the next request. Here what lies in
the arena stays there as long as anybody can see it: the server is told when the last view of it has
died, which a weak reference knows. Views die on any thread, in the middle of anything, so nothing is
sent then: `freed` is read with the next frame.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np

from repository.hosts import frames
from repository.hosts.answering import Answering, Offer
from repository.hosts.arena import Window
from repository.hosts.frames import FREED, Header, Lot
from repository.messages import InferRequest, InferResponse
from repository.tensors import Buffer


class _View(weakref.ref[Any]):
    __slots__ = ("lot",)
    lot: Lot


class Lasting(Answering):
    """Only one thread reads; any writes."""

    def __init__(self, window: Window | None) -> None:
        super().__init__(window)
        self.freed: deque[Lot] = deque()
        self._views: dict[int, _View] = {}  # by their own id: what they see has no hash
        self._seen: list[_View] = []  # of the frame that is being read
        self._left: dict[Lot, list[None]] = {}  # as many as the views of it that live

    def read(self, header: Header, payload: memoryview) -> tuple[InferRequest, Offer | None]:
        found = super().read(header, payload)
        if header[5]:
            self._watch((header[2], 0))
        return found

    def read_answer(self, header: Header, payload: memoryview, lot: Lot) -> InferResponse:
        """Raises BrokenFrameError, msgspec.MsgspecError."""
        request, _ = super().read(header, payload)
        if header[5]:
            self._watch(lot)
        return InferResponse(request.inputs, request.parameters, form=request.form)

    def unsent(self) -> list[Buffer]:
        """A frame that says what was freed; nothing if nothing was."""
        lots: list[Lot] = []
        while self.freed:
            try:
                lots.append(self.freed.popleft())
            except IndexError:  # another thread was quicker
                break
        return frames.pack(FREED, 0, frames.encode(lots)) if lots else []

    def _data(self, at: int, size: int) -> Buffer:
        whole = np.frombuffer(self._view(at, size), np.uint8)
        whole.flags.writeable = False  # others may be given the same
        self._seen.append(_View(whole, self._died))
        return whole.data

    def _watch(self, lot: Lot) -> None:
        """The views of one frame have been made."""
        seen, self._seen = self._seen, []
        self._left[lot] = [None] * len(seen)
        for view in seen:
            view.lot = lot
            self._views[id(view)] = view
        for view in seen:
            if view() is None:  # joined with others, and gone already
                self._died(view)
        if not seen:
            self._free(lot)

    def _died(self, view: Any) -> None:
        if self._views.pop(id(view), None) is None:
            return  # before `_watch`, or a second time
        left = self._left[view.lot]
        left.pop()
        if not left:
            self._free(view.lot)

    def _free(self, lot: Lot) -> None:
        if self._left.pop(lot, None) is not None:
            self.freed.append(lot)
