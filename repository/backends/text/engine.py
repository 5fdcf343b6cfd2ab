"""The slots engine: every running sequence is a row of one cache, and they step together.

Rows 0 ... are sequences that write, the rows behind them still read their prompts; when one leaves,
the last row of its kind takes its place, so that both kinds are neighbours and nothing is gathered.
A step is one token for all that write, then at most `chunk` tokens of prompts: a long prompt makes
others slower for a while, but never stops them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repository.backends.abilities import Told
from repository.backends.text.cache import SlotCache
from repository.backends.text.desk import Desk
from repository.backends.text.sampling import Chosen, Sampler, logprobs
from repository.backends.text.sequence import Writing
from repository.errors import InferenceFailedError, RepositoryError

log = logging.getLogger("modeldepot.text")


@dataclass(frozen=True, slots=True)
class Runner:
    """One forward of the model over neighbouring rows of a cache. Masks are numbers that are added:
    every attention takes those, and the fast one need not make them of booleans in every layer."""

    model: Callable[..., Any]
    cache: SlotCache
    device: str
    dtype: torch.dtype
    picks: bool  # the model takes `logits_to_keep`

    def __call__(
        self, first: int, tokens: list[list[int]], begins: list[int], keep: torch.Tensor | int
    ) -> torch.Tensor:
        """tokens [rows, n], row i from position begins[i] on. Returns logits [rows, kept, vocab];
        `keep`: which of the n (a tensor), the last so many, or 0 for all."""
        ids = torch.tensor(tokens, device=self.device)
        count = ids.shape[1]
        positions = torch.tensor(begins, device=self.device)[:, None]
        if count > 1:
            positions = positions + torch.arange(count, device=self.device)
        window = self.cache.aim(first, positions, max(begins) + count)
        seen = torch.arange(window, device=self.device) <= positions[:, :, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
        more: dict[str, Any] = {"logits_to_keep": keep} if self.picks else {}
        logits: torch.Tensor = self.model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        ).logits
        if self.picks or (isinstance(keep, int) and keep == 0):
            return logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


class SlotsEngine:
    name = "slots"

    def __init__(self, run: Runner, desk: Desk, *, chunk: int, vocab: int) -> None:
        self._run = run
        self._cache = run.cache
        self._desk = desk
        self._chunk = chunk
        self._vocab = vocab
        self._seats: list[Writing] = []  # by row
        self._writing = 0  # so many of them, from row 0 on, write
        self._sampler: Sampler | None = None  # of those that write; None: they have changed

    @property
    def kv_bytes(self) -> int:
        return self._cache.bytes

    @property
    def kv(self) -> Sequence[torch.Tensor]:
        return self._cache.all

    def rest(self) -> None:
        """Nobody is written to: what only the last step needed goes."""
        self._sampler = None
        self._cache.rest()

    @torch.inference_mode()
    def step(self) -> list[Told]:
        told: list[Told] = []
        for writing in self._desk.drop(told):
            self._vacate(self._seats.index(writing))
        if self._writing:
            self._write(told)
        self._seats += self._desk.call(self._cache.slots - len(self._seats), told)
        if self._writing < len(self._seats):
            self._read(told)
        return told

    def close(self) -> None:
        self._seats.clear()

    def _write(self, told: list[Told]) -> None:
        rows = self._seats[: self._writing]
        tokens, begins = [[row.last] for row in rows], [row.cached for row in rows]
        logits = self._forward(0, rows, tokens, begins, 1, told)
        if logits is None:
            return
        for row in rows:
            row.cached += 1
        if self._sampler is None:
            self._sampler = Sampler([row.choice for row in rows], self._vocab, self._run.device)
        self._tell(rows, self._sampler.choose(logits[:, -1, : self._vocab]), told)

    def _read(self, told: list[Told]) -> None:
        """The next pieces of the prompt that waits longest, and of its neighbours if they fit in."""
        rows, count = self._readers()
        first = self._seats.index(rows[0])
        parts = [row.prompt[row.cached : row.cached + count] for row in rows]
        # What follows overwrites the fillers; until then they must be numbers, as these tokens give.
        tokens = [part + part[-1:] * (count - len(part)) for part in parts]
        begins = [row.cached for row in rows]
        lasts = sorted({len(part) - 1 for part in parts})
        every = any(row.echoes_logprobs for row in rows)
        keep = 0 if every else 1 if lasts == [count - 1] else self._tensor(lasts)
        logits = self._forward(first, rows, tokens, begins, keep, told)
        if logits is None:
            return
        ends = [len(part) - 1 if every else lasts.index(len(part) - 1) for part in parts]
        last = logits[self._tensor(range(len(rows))), self._tensor(ends), : self._vocab]
        fine = last.amax(-1).isfinite().tolist()
        for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
            if fine[i]:
                self._overhear(row, logits[i], len(part))
            row.cached += len(part)
        self._expel(rows, fine, told)
        done = [i for i, row in enumerate(rows) if fine[i] and row.cached == len(row.prompt)]
        if done:
            ready = [rows[i] for i in done]
            self._promote(ready, told)
            sampler = Sampler([row.choice for row in ready], self._vocab, self._run.device)
            self._tell(ready, sampler.choose(last[done]), told)

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self._run.device)

    def _readers(self) -> tuple[list[Writing], int]:
        """Neighbouring rows, and how many tokens of each: `chunk` in all, fillers counted."""
        readers = self._seats[self._writing :]
        at = min(range(len(readers)), key=lambda i: readers[i].order)
        rows, count = [readers[at]], self._left(readers[at])
        for row in readers[at + 1 :]:
            wider = max(count, self._left(row))
            room = min(self._cache.max_len - one.cached for one in (*rows, row))
            if wider * (len(rows) + 1) > self._chunk or wider > room:
                break
            rows.append(row)
            count = wider
        return rows, count

    def _left(self, row: Writing) -> int:
        return min(len(row.prompt) - row.cached, self._chunk)

    def _overhear(self, row: Writing, logits: torch.Tensor, count: int) -> None:
        """Notes the logprobs of prompt tokens: each place says how likely the one behind it was."""
        if not row.echoes_logprobs:
            return
        behind = row.prompt[row.cached + 1 : row.cached + count + 1]
        top = row.choice.sampling.logprobs or 0
        if behind or row.cached == 0:
            known = logits[: len(behind), : self._vocab]
            row.read(logprobs(known, behind, [top] * len(behind)) if behind else [])

    def _promote(self, rows: list[Writing], told: list[Told]) -> None:
        """They have read their prompts: they write from now on."""
        for row in rows:
            at, target = self._seats.index(row), self._writing
            if at != target:
                other = self._seats[target]
                self._cache.swap(at, target, max(row.cached, other.cached))
                self._seats[at], self._seats[target] = other, row
            self._writing += 1
            echo = row.echo()
            if echo is not None:
                told.append(Told(row.number, echo))
        self._sampler = None

    def _forward(
        self,
        first: int,
        rows: list[Writing],
        tokens: list[list[int]],
        begins: list[int],
        keep: torch.Tensor | int,
        told: list[Told],
    ) -> torch.Tensor | None:
        """None: the model broke, and with it these sequences; others go on."""
        try:
            self._desk.rows(rows)
            return self._run(first, tokens, begins, keep)
        except RuntimeError as error:  # torch's own, out of memory among them
            for row in rows:
                self._leave(row, told, broke(error))
            return None

    def _tell(self, rows: list[Writing], chosen: list[Chosen], told: list[Told]) -> None:
        self._expel(rows, [choice.token is not None for choice in chosen], told)
        for row, choice in zip(rows, chosen, strict=True):
            if choice.token is None:
                continue
            told.append(Told(row.number, row.take(choice, choice.token)))
            if row.finish is not None:
                self._leave(row, told)

    def _expel(self, rows: list[Writing], fine: list[bool], told: list[Told]) -> None:
        """Those whose numbers broke leave in the step in which they broke. All are wiped before any row
        moves: what moves leaves its old numbers behind, for whoever comes next."""
        broken = [row for row, whole in zip(rows, fine, strict=True) if not whole]
        for row in broken:
            self._cache.wipe(self._seats.index(row))
        for row in broken:
            self._leave(row, told, no_numbers())

    def _leave(self, row: Writing, told: list[Told], error: RepositoryError | None = None) -> None:
        self._vacate(self._seats.index(row))
        self._desk.leave(row, told, error)

    def _vacate(self, hole: int) -> None:
        if hole < self._writing:
            self._writing -= 1
            self._sampler = None
            self._fill(hole, self._writing)
            hole = self._writing
        self._fill(hole, len(self._seats) - 1)
        self._seats.pop()

    def _fill(self, hole: int, last: int) -> None:
        if hole != last:
            self._cache.move(last, hole, self._seats[last].cached)
            self._seats[hole] = self._seats[last]


def broke(error: Exception) -> InferenceFailedError:
    """What its sequences are told. Raises it instead where the device itself is lost."""
    if isinstance(error, torch.AcceleratorError):
        raise error
    log.error("the model broke", exc_info=error)
    reason = (str(error).splitlines() or [""])[0]
    return InferenceFailedError(f"the model broke: {type(error).__name__}: {reason}")


def no_numbers() -> InferenceFailedError:
    return InferenceFailedError(
        "the model's answer is no number (nan or infinity): its weights may be spoilt, or its "
        "datatype too small for them"
    )
