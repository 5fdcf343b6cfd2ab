"""A model that generates, without a framework: it counts, and does what its prompt says.

The prompt's words, in any order: `fail` (begin refuses it), `break` (a foreign exception in begin),
`raise` (every step with it raises until it is cancelled), `stuck` (it cannot even be cancelled),
`die` (the process ends in its second step), `wrong` (its second step tells an error of ours),
`quote` (one that quotes a path of this machine),
`hold=PATH` (its second step waits until somebody reads the pipe PATH), `note=PATH` (each step of it
adds a line to a file). Each step gives every sequence that has a slot one piece, "0 ", "1 ", ...

With the option `mute` it does not say that it generates. tests/fakes/zygote.py makes it known to
workers, under the name "counting" (and "counting_copy", which has its files to itself).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends.abilities import Told
from repository.backends.base import Order
from repository.backends.registry import COMMON, Entry
from repository.errors import AdapterNotFoundError, InferenceFailedError, InvalidRequestError
from repository.generate import Ended, GenerateRequest, Piece
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import Tensor

SLOTS = 4
ENTRY = Entry(
    name="counting",
    where="tests.fakes.counting:Counting",
    framework="python",
    runs_code=False,
    gpu=False,
    snapshot="none",
    platform="counting",
    options=COMMON,
)
ENTRIES = {"counting": ENTRY, "counting_copy": replace(ENTRY, snapshot="folder")}


class Sequence_:  # noqa: N801 - the other one is imported
    def __init__(self, number: int, request: GenerateRequest) -> None:
        self.number = number
        self.words = dict(word.partition("=")[::2] for word in (request.text or "").split())
        self.most = request.sampling.max_tokens or 3
        self.written = 0
        self.cancelled = False


class Counting:
    def __init__(self) -> None:
        self._all: list[Sequence_] = []
        self._adapters: dict[str, AdapterOrder] = {}
        self._order: Order | None = None

    def load(self, order: Order) -> Loaded:
        self._order = order
        return Loaded(
            platform="counting",
            memory={"kv": 64},
            details={
                "slots": SLOTS,
                "private": order.private,
                "offline": os.environ.get("HF_HUB_OFFLINE"),
                "modules": list(sys.modules),
            },
            abilities=("adapt",) if "mute" in order.config.options else ("generate", "adapt"),
        )

    def infer(self, request: InferRequest) -> InferResponse:
        """How many sequences run."""
        return InferResponse([Tensor.of("running", np.array([self.unfinished], np.int32), "INT32")])

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        for order in orders:
            if order.name == "raises":
                raise RuntimeError("no adapters today")
            if order.remove:
                self._adapters.pop(order.name, None)
            elif order.name != "refused":
                self._adapters[order.name] = order
        known = orders or self._adapters.values()
        instance = self._order.instance if self._order else 0
        return [
            AdapterReport(o.name, "too large" if o.name == "refused" else "", "host", instance)
            for o in known
        ]

    @property
    def unfinished(self) -> int:
        return len(self._all)

    def begin(self, number: int, request: GenerateRequest) -> None:
        sequence = Sequence_(number, request)
        if "fail" in sequence.words:
            raise InvalidRequestError("the prompt says fail")
        if "break" in sequence.words:
            raise ZeroDivisionError("the prompt says break")
        if request.adapter and request.adapter not in self._adapters:
            raise AdapterNotFoundError(f"The adapter {request.adapter} has not been registered")
        self._all.append(sequence)

    def cancel(self, number: int) -> None:
        for sequence in self._all:
            if sequence.number == number and "stuck" not in sequence.words:
                sequence.cancelled = True

    def step(self) -> list[Told]:
        told: list[Told] = []
        gone = [s for s in self._all if s.cancelled]
        self._all = [s for s in self._all if not s.cancelled]
        told += [Told(s.number, Ended("cancelled", 1, s.written)) for s in gone]
        if any("raise" in s.words for s in self._all):
            raise ZeroDivisionError("the prompt says raise")
        for sequence in self._all[:SLOTS]:
            told += self._write(sequence)
        over = {number for number, what in told if not isinstance(what, Piece)}
        self._all = [s for s in self._all if s.number not in over]
        return told

    def _write(self, sequence: Sequence_) -> list[Told]:
        if "note" in sequence.words:
            with Path(sequence.words["note"]).open("a") as file:
                file.write(f"{sequence.written}\n")
        if sequence.written == 1:
            if "die" in sequence.words:
                os._exit(3)
            if "wrong" in sequence.words:
                return [Told(sequence.number, InferenceFailedError("the prompt says wrong"))]
            if "quote" in sequence.words:
                error = InferenceFailedError("the model broke: OSError: no /usr/lib/secret/x.so")
                return [Told(sequence.number, error)]
            if "hold" in sequence.words:
                Path(sequence.words["hold"]).write_text("here")
        told = [Told(sequence.number, Piece(f"{sequence.written} ", [sequence.written]))]
        sequence.written += 1
        if sequence.written == sequence.most:
            told.append(Told(sequence.number, Ended("length", 1, sequence.written)))
        return told

    def unload(self) -> None:
        self._all.clear()
