"""The generate engine: for models whose cache slots cannot hold. transformers' own generate runs each
sequence, with whatever cache the model brings; only which token comes next is ours.

Each running sequence is a generate() in a thread of its own that stops at every token, hands over the
logits and waits for our choice: so sampling, penalties, stops and logprobs are the same as with slots,
and no two ever compute at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import torch
import transformers

from repository.backends.abilities import Told
from repository.backends.text.desk import Desk
from repository.backends.text.engine import broke, no_numbers
from repository.backends.text.folder import bare_generation
from repository.backends.text.sampling import Chosen, Sampler, logprobs
from repository.backends.text.sequence import Writing
from repository.errors import RepositoryError


class _EnoughError(Exception):
    """Nobody wants the rest."""


class Pen(transformers.LogitsProcessor):  # type: ignore[misc]  # of a library without types
    """One generate(). `start`, then `write` with what was chosen, return the next logits [vocab]."""

    def __init__(self, model: Any, writing: Writing, device: str) -> None:
        self._model = model
        self._device = device
        self._ids = writing.prompt
        self._config = bare_generation(
            max_new_tokens=writing.limit + 1,  # it is stopped from here, never by itself
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._said: SimpleQueue[torch.Tensor | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> torch.Tensor:
        self._thread.start()
        return self._next()

    def write(self, token: int) -> torch.Tensor:
        self._asked.put(token)
        return self._next()

    def stop(self) -> None:
        """Returns when its thread has ended."""
        if self._thread.ident is not None:
            self._asked.put(None)
            self._thread.join()

    def _next(self) -> torch.Tensor:
        said = self._said.get()
        if isinstance(said, Exception):
            raise said
        return said

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._said.put(scores[0])
        token = self._asked.get()
        if token is None:
            raise _EnoughError
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0
        return only

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                ids = torch.tensor([self._ids], device=self._device)
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._config,
                    logits_processor=transformers.LogitsProcessorList([self]),
                )
        except _EnoughError:
            return
        except Exception as error:  # noqa: BLE001  whatever it is, the one who waits must hear of it
            self._said.put(error)
        else:
            self._said.put(RuntimeError("generate() ended by itself"))


class GenerateEngine:
    name = "generate"
    kv_bytes = 0  # nothing is kept ahead: each sequence has its cache while it runs
    kv: Sequence[torch.Tensor] = ()

    def __init__(self, model: Any, desk: Desk, *, seats: int, vocab: int, device: str) -> None:
        self._model = model
        self._desk = desk
        self._count = seats
        self._vocab = vocab
        self._device = device
        self._seats: dict[int, tuple[Writing, Pen]] = {}
        self._sampler: tuple[list[Writing], Sampler] | None = None

    @torch.inference_mode()
    def step(self) -> list[Told]:
        told: list[Told] = []
        for writing in self._desk.drop(told):
            self._seats.pop(writing.number)[1].stop()
        for writing in self._desk.call(self._count - len(self._seats), told):
            self._seats[writing.number] = (writing, Pen(self._model, writing, self._device))
        rows: list[Writing] = []
        logits: list[torch.Tensor] = []
        for writing, pen in list(self._seats.values()):
            try:
                self._desk.rows([writing])
                logits.append(self._advance(writing, pen, told))
                rows.append(writing)
            except Exception as error:  # noqa: BLE001  what generate() of any model raises
                self._leave(writing, told, broke(error))
        if rows:
            self._tell(rows, self._choose(rows, torch.stack(logits)), told)
        return told

    def rest(self) -> None:
        self._sampler = None

    def close(self) -> None:
        for _, pen in self._seats.values():
            pen.stop()
        self._seats.clear()

    def _advance(self, writing: Writing, pen: Pen, told: list[Told]) -> torch.Tensor:
        if writing.choice.written:
            return pen.write(writing.last)
        if writing.echoes_logprobs:
            self._overhear(writing)
        echo = writing.echo()
        first = pen.start()
        if echo is not None:
            told.append(Told(writing.number, echo))
        return first

    def _overhear(self, writing: Writing) -> None:
        ids = torch.tensor([writing.prompt], device=self._device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        behind = writing.prompt[1:]
        top = writing.choice.sampling.logprobs or 0
        writing.read(logprobs(logits, behind, [top] * len(behind)) if behind else [])

    def _choose(self, rows: list[Writing], logits: torch.Tensor) -> list[Chosen]:
        if self._sampler is None or self._sampler[0] != rows:
            choices = [row.choice for row in rows]
            self._sampler = (rows, Sampler(choices, self._vocab, self._device))
        return self._sampler[1].choose(logits[:, : self._vocab])

    def _tell(self, rows: list[Writing], chosen: list[Chosen], told: list[Told]) -> None:
        for row, choice in zip(rows, chosen, strict=True):
            if choice.token is None:
                self._leave(row, told, no_numbers())
                continue
            told.append(Told(row.number, row.take(choice, choice.token)))
            if row.finish is not None:
                self._leave(row, told)

    def _leave(self, row: Writing, told: list[Told], error: RepositoryError | None = None) -> None:
        self._seats.pop(row.number)[1].stop()
        self._desk.leave(row, told, error)
