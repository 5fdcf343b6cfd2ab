"""How the next token is chosen, for all rows of a forward at once. The order is Sampling's.

A row's choice depends on its own logits, its own settings and its own random numbers, never on who
else is there: rows that are cut (top_k, top_p) are drawn from sorted tokens, others from tokens as
they are numbered, whatever their neighbours need.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from repository.errors import InvalidRequestError
from repository.generate import Sampling

MAX_LOGPROBS = 100
MAX_STOPS, LONGEST_STOP = 32, 1024
LIKELY, MORE = 256, 16  # so many are sorted first, and times so many where that was too few
LEAST_PENALTY, MOST_PENALTY = 0.01, 100  # by more, logits would leave what a float32 holds
COLDEST = 1e-30  # a temperature below it would be 0 as a float32, and 0 / 0 is no number
DRAWS = 32  # bits of a random number: a row's total times it is always below the total


class Choice:
    """What one sequence's choices depend on, beside its logits. `ends`: ids that end it."""

    __slots__ = ("ends", "prompt", "random", "sampling", "written")

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int]) -> None:
        self.sampling = sampling
        self.prompt = prompt
        self.ends = ends
        self.written: list[int] = []
        seed = sampling.seed
        # Random takes -1 for 1, and those two are to give different answers.
        self.random = random.Random(None if seed is None else seed % 2**64)

    @property
    def plain(self) -> bool:
        """Greedy, and nothing is asked for beside."""
        s = self.sampling
        return s.temperature == 0 and s.logprobs is None and not self.touched

    @property
    def touched(self) -> bool:
        """Its logits are changed before temperature."""
        s = self.sampling
        return bool(s.logit_bias or s.min_tokens) or self.repeats or self.counts

    @property
    def repeats(self) -> bool:
        return self.sampling.repetition_penalty != 1

    @property
    def counts(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0

    @property
    def cut(self) -> bool:
        return self.sampling.top_k > 0 or self.sampling.top_p < 1


class Chosen(NamedTuple):
    """`token` None: the logits were no numbers. `top`: (token, logprob), likeliest first."""

    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """For these rows, in this order, until one joins or leaves."""

    def __init__(self, rows: Sequence[Choice], vocab: int, device: str) -> None:
        self._rows = list(rows)
        self._vocab = vocab
        self._device = device
        self._plain = all(row.plain for row in rows)
        if self._plain:
            return
        settings = [row.sampling for row in rows]
        self._bias = self._biases()
        self._repeat = [i for i, row in enumerate(rows) if row.repeats]
        self._seen = self._table([(*rows[i].prompt, *rows[i].written) for i in self._repeat])
        self._repetition = self._column([settings[i].repetition_penalty for i in self._repeat])
        self._count = [i for i, row in enumerate(rows) if row.counts]
        self._counts = self._table([rows[i].written for i in self._count])
        self._presence = self._column([settings[i].presence_penalty for i in self._count])
        self._frequency = self._column([settings[i].frequency_penalty for i in self._count])
        self._wanted = [i for i, s in enumerate(settings) if s.logprobs is not None]
        drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
        self._drawn = drawn
        self._heat = self._column([max(settings[i].temperature, COLDEST) for i in drawn])
        self._greedy = [i for i, s in enumerate(settings) if s.temperature == 0]
        self._whole = [i for i in drawn if not rows[i].cut]
        self._cut = [i for i in drawn if rows[i].cut]

    def _column(self, numbers: Sequence[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self._device)[:, None]

    def _table(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """How often each token of the vocabulary stands in each list."""
        table = torch.zeros(len(tokens), self._vocab, device=self._device)
        for row, ids in zip(table, tokens, strict=True):
            index = torch.tensor(ids, dtype=torch.long, device=self._device)
            row.index_add_(0, index, torch.ones(len(ids), device=self._device))
        return table

    def _biases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        said = [
            (i, t, b) for i, r in enumerate(self._rows) for t, b in r.sampling.logit_bias.items()
        ]
        if not said:
            return None
        rows, tokens, bias = zip(*said, strict=True)
        return (
            torch.tensor(rows, device=self._device),
            torch.tensor(tokens, device=self._device),
            torch.tensor(bias, dtype=torch.float32, device=self._device),
        )

    def choose(self, logits: torch.Tensor) -> list[Chosen]:
        """logits [rows, vocab]; left as they are."""
        if self._plain:
            best, tokens = logits.max(-1)
            pairs = zip(tokens.tolist(), best.tolist(), strict=True)
            return [Chosen(token if math.isfinite(top) else None) for token, top in pairs]
        logits = logits.to(torch.float32, copy=True)
        self._touch(logits)
        best, likeliest = logits.max(-1)
        tokens = likeliest.clone()
        if self._drawn:
            heated = (logits[self._drawn] - best[self._drawn, None]) / self._heat
            logits[self._drawn] = heated
        if self._whole:
            tokens[self._whole] = self._draw_whole(logits[self._whole])
        if self._cut:
            tokens[self._cut] = self._draw_cut(logits[self._cut])
        said = self._logprobs(logits, tokens)
        fine = best.isfinite().tolist()
        chosen = [
            said.get(i, Chosen(token)) if fine[i] else Chosen(None)
            for i, token in enumerate(tokens.tolist())
        ]
        self._remember(tokens)
        return chosen

    def _touch(self, logits: torch.Tensor) -> None:
        if self._bias is not None:
            rows, tokens, bias = self._bias
            logits[rows, tokens] += bias
        if self._repeat:
            some = logits[self._repeat]
            less = torch.where(some < 0, some * self._repetition, some / self._repetition)
            logits[self._repeat] = torch.where(self._seen > 0, less, some)
        if self._count:
            down = self._counts * self._frequency + (self._counts > 0) * self._presence
            logits[self._count] -= down
        for i, row in enumerate(self._rows):
            if len(row.written) < row.sampling.min_tokens and row.ends:
                logits[i, list(row.ends)] = -torch.inf

    def _remember(self, tokens: torch.Tensor) -> None:
        for rows, table in ((self._repeat, self._seen), (self._count, self._counts)):
            if rows:
                table[torch.arange(len(rows), device=self._device), tokens[rows]] += 1

    def _numbers(self, rows: Sequence[int]) -> torch.Tensor:
        """One of [0, 1) for each row, of its own source."""
        drawn = [self._rows[i].random.getrandbits(DRAWS) / 2**DRAWS for i in rows]
        return torch.tensor(drawn, dtype=torch.float64, device=self._device)[:, None]

    def _draw(self, rows: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
        """An index of each row of `weights`, as often as it weighs."""
        sums = weights.cumsum(-1, dtype=torch.float64)
        at = torch.searchsorted(sums, self._numbers(rows) * sums[:, -1:], right=True)
        return at.clamp_(max=weights.shape[1] - 1)

    def _draw_whole(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: the likeliest of each row is 0."""
        weights = logits.exp()
        least = self._column([self._rows[i].sampling.min_p for i in self._whole])
        weights = weights.masked_fill_(weights < least, 0)
        return self._draw(self._whole, weights)[:, 0]

    def _draw_cut(self, logits: torch.Tensor) -> torch.Tensor:
        tokens = torch.empty(len(self._cut), dtype=torch.long, device=self._device)
        left, size = list(range(len(self._cut))), LIKELY
        while left:
            rows = [self._cut[i] for i in left]
            ids, weights, short = self._cut_to(rows, logits[left], min(size, self._vocab))
            done = [k for k, lacks in enumerate(short) if not lacks]
            if done:
                drawn = self._draw([rows[k] for k in done], weights[done])
                tokens[[left[k] for k in done]] = ids[done].gather(1, drawn)[:, 0]
            left = [left[k] for k, lacks in enumerate(short) if lacks]
            size *= MORE
        return tokens

    def _cut_to(
        self, rows: Sequence[int], logits: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """The `size` likeliest tokens of each row, what each weighs after the cuts, and of which rows
        more must be looked at. What a row gets does not depend on `size`, if it is enough."""
        settings = [self._rows[i].sampling for i in rows]
        tops = self._column([min(s.top_k or self._vocab, self._vocab) for s in settings])
        shares_of = self._column([s.top_p if s.top_p < 1 else 2 for s in settings])  # 2: no cut
        likely, ids = logits.topk(size)
        last = likely.gather(1, tops.clamp(max=size).long() - 1)
        weights = likely.exp().masked_fill_(likely < last, 0)  # as likely as the k-th: stays
        limited = tops < self._vocab
        every = torch.where(
            limited, weights.sum(-1, keepdim=True), logits.exp().sum(-1, keepdim=True)
        )
        shares = weights / every
        sums = shares.cumsum(-1)
        before = sums - shares
        least = self._column([s.min_p for s in settings])
        weights.masked_fill_((before >= shares_of) | (weights < least), 0)
        short = torch.where(limited, tops > size, sums[:, -1:] < shares_of)
        return ids, weights, [bool(lacks) and size < self._vocab for (lacks,) in short.tolist()]

    def _logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> dict[int, Chosen]:
        if not self._wanted:
            return {}
        found = logprobs(
            logits[self._wanted],
            tokens[self._wanted].tolist(),
            [self._rows[i].sampling.logprobs or 0 for i in self._wanted],
        )
        return dict(zip(self._wanted, found, strict=True))


def logprobs(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Chosen]:
    """Of one token of each row and of its `tops` likeliest; impossible ones are left out."""
    every = logits.float().log_softmax(-1)
    own = every.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best, ids = every.topk(min(max(tops), every.shape[1]))
    found = []
    for token, logprob, top, likeliest, which in zip(
        tokens, own, tops, best.tolist(), ids.tolist(), strict=True
    ):
        pairs = list(zip(which, likeliest, strict=True))[:top]
        found.append(Chosen(token, logprob, tuple(p for p in pairs if p[1] > -math.inf)))
    return found


def check(sampling: Sampling, vocab: int) -> None:
    """Raises InvalidRequestError for what Sampling does not allow."""
    s = sampling
    for name, value, allowed, must in (
        ("temperature", s.temperature, 0 <= s.temperature < math.inf, "be 0 or more"),
        ("top_p", s.top_p, 0 < s.top_p <= 1, "be above 0 and at most 1"),
        ("top_k", s.top_k, s.top_k >= 0, "be 0 (all) or more"),
        ("min_p", s.min_p, 0 <= s.min_p < 1, "be at least 0 and below 1"),
        (
            "repetition_penalty",
            s.repetition_penalty,
            LEAST_PENALTY <= s.repetition_penalty <= MOST_PENALTY,
            f"be {LEAST_PENALTY} to {MOST_PENALTY}",
        ),
        ("presence_penalty", s.presence_penalty, math.isfinite(s.presence_penalty), "be a number"),
        (
            "frequency_penalty",
            s.frequency_penalty,
            math.isfinite(s.frequency_penalty),
            "be a number",
        ),
        ("logprobs", s.logprobs, 0 <= (s.logprobs or 0) <= MAX_LOGPROBS, f"be 0 to {MAX_LOGPROBS}"),
        ("max_tokens", s.max_tokens, s.max_tokens is None or s.max_tokens >= 1, "be 1 or more"),
        ("min_tokens", s.min_tokens, s.min_tokens >= 0, "be 0 or more"),
    ):
        if not allowed:
            raise InvalidRequestError(f"{name} is {value}; it must {must}")
    _check_ids("logit_bias", s.logit_bias, vocab)
    _check_ids("stop_token_ids", s.stop_token_ids, vocab)
    if not all(math.isfinite(bias) for bias in s.logit_bias.values()):
        raise InvalidRequestError("logit_bias has a value that is no number")
    if len(s.stop) > MAX_STOPS:
        raise InvalidRequestError(f"{len(s.stop)} stop strings; at most {MAX_STOPS} are possible")
    if not all(0 < len(stop) <= LONGEST_STOP for stop in s.stop):
        raise InvalidRequestError(f"a stop string must have 1 to {LONGEST_STOP} characters")


def _check_ids(name: str, ids: Sequence[int] | dict[int, float], vocab: int) -> None:
    for token in ids:
        if not 0 <= token < vocab:
            raise InvalidRequestError(f"{name}: {token} is no token; there are 0 to {vocab - 1}")
