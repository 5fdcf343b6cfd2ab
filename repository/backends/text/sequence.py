"""One prompt and its answer: what is written, when it is over, what there is to tell of it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from functools import partial

from repository.backends.text.prompts import Prompts
from repository.backends.text.sampling import Choice, Chosen
from repository.backends.text.words import Letters, Stops
from repository.generate import Ended, Finish, GenerateRequest, Logprob, Piece


class Writing:
    """A sequence from its begin to its end. An engine feeds it one Chosen after the other.

    cached   so many of its tokens have been through the model
    adapter, adapter_slot   which one, and where it lies while this runs
    passed   so many with adapters began before it while its own found no slot
    finish   None: it goes on
    """

    def __init__(
        self,
        number: int,
        request: GenerateRequest,
        prompts: Prompts,
        *,
        ends: Collection[int],
        max_len: int,
    ) -> None:
        self.number = number
        self.adapter = request.adapter
        self.adapter_slot = 0
        self.passed = 0
        self.prompt = prompts.read(request)
        self.cached = 0
        self.finish: Finish | None = None
        sampling = request.sampling
        own = frozenset(sampling.stop_token_ids)
        self._own_ends = own
        self.choice = Choice(sampling, self.prompt, own if sampling.ignore_eos else own.union(ends))
        room = max_len - len(self.prompt)
        self._limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self._prompts = prompts
        self._decode = partial(prompts.decode, skip_special=sampling.skip_special_tokens)
        self._letters = Letters(self._decode)
        self._stops = Stops(sampling.stop)
        self._stopped_by: str | int | None = None
        self._echo = request.echo
        self._echoed: list[Logprob] = []
        self._text = request.text
        self._begun = time.monotonic()
        self._stepped = self._first = 0.0

    @property
    def order(self) -> float:
        """Of two that run, the one that started first has the lower."""
        return self._stepped

    @property
    def limit(self) -> int:
        """Tokens that its answer has at most."""
        return self._limit

    @property
    def last(self) -> int:
        return self.choice.written[-1]

    @property
    def echoes_logprobs(self) -> bool:
        return self._echo and self.choice.sampling.logprobs is not None

    def started(self) -> None:
        """Its first step begins."""
        self._stepped = time.monotonic()

    def read(self, chosen: list[Chosen]) -> None:
        """The logprobs of its next prompt tokens, where it echoes them."""
        if not self._echoed:
            self._echoed.append(self._logprob(Chosen(self.prompt[0], math.nan)))
        self._echoed += map(self._logprob, chosen)

    def echo(self) -> Piece | None:
        """The prompt as a piece, if it was asked for."""
        if not self._echo:
            return None
        text = self._decode(self.prompt) if self._text is None else self._text
        logprobs = self._echoed if self.echoes_logprobs else None
        return Piece(text=text, tokens=self.prompt, logprobs=logprobs)

    def take(self, chosen: Chosen, token: int) -> Piece:
        """One more token of the answer; afterwards `finish` may be set."""
        written = self.choice.written
        if not written:
            self._first = time.monotonic()
        written.append(token)
        text = self._written(token)
        logprobs = [self._logprob(chosen)] if self.choice.sampling.logprobs is not None else None
        return Piece(text=text, tokens=[token], logprobs=logprobs)

    def _written(self, token: int) -> str:
        count = len(self.choice.written)
        free = (
            count <= self.choice.sampling.min_tokens
        )  # not to be stopped yet, but by the end of room
        if token in self.choice.ends and not free:
            self.finish = "stop"
            self._stopped_by = token if token in self._own_ends else None
            return self._last_words("")
        new = self._letters.push(token)
        text = new if free else self._stops.push(new)
        if self._stops.found is not None:
            self.finish, self._stopped_by = "stop", self._stops.found
        elif count >= self._limit:
            self.finish = "length"
            return self._last_words(text)
        return text

    def _last_words(self, text: str) -> str:
        text += self._stops.push(self._letters.rest())
        if self._stops.found is not None:
            self.finish, self._stopped_by = "stop", self._stops.found
        return text + self._stops.rest()

    def _logprob(self, chosen: Chosen) -> Logprob:
        spelling = self._prompts.spelling
        top = [(token, spelling(token), logprob) for token, logprob in chosen.top]
        token = chosen.token or 0
        return Logprob(token=token, text=spelling(token), logprob=chosen.logprob, top=top)

    def ended(self, finish: Finish | None = None) -> Ended:
        now = time.monotonic()
        stepped = self._stepped or now
        return Ended(
            finish=finish or self.finish or "cancelled",
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.choice.written),
            stopped_by=None if finish else self._stopped_by,
            wait_s=stepped - self._begun,
            prompt_s=(self._first or now) - self._begun,
            total_s=now - self._begun,
        )
