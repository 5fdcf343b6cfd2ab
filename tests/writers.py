"""A text backend, driven as a worker drives it: begin, step until nothing is unfinished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repository.backends.base import Order
from repository.backends.text.backend import TextBackend
from repository.config import Adapters, ModelConfig
from repository.errors import RepositoryError
from repository.generate import Ended, GenerateRequest, Piece, Sampling
from repository.messages import Loaded

GREEDY = Sampling(temperature=0)


@dataclass
class Answer:
    pieces: list[Piece] = field(default_factory=list)
    ended: Ended | None = None
    error: RepositoryError | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def logprobs(self) -> list[Any]:
        return [one for piece in self.pieces for one in piece.logprobs or []]


class Writer:
    def __init__(self, backend: TextBackend, loaded: Loaded) -> None:
        self.backend = backend
        self.loaded = loaded
        self.answers: dict[int, Answer] = {}

    def begin(self, number: int, request: GenerateRequest) -> None:
        self.backend.begin(number, request)
        self.answers[number] = Answer()

    def step(self) -> None:
        for number, what in self.backend.step():
            answer = self.answers[number]
            assert answer.ended is None and answer.error is None, "it was told after its end"
            if isinstance(what, Piece):
                answer.pieces.append(what)
            elif isinstance(what, Ended):
                answer.ended = what
            else:
                answer.error = what

    def finish(self) -> None:
        while self.backend.unfinished:
            self.step()

    def write(self, *requests: GenerateRequest) -> list[Answer]:
        """All at once, to their ends."""
        first = max(self.answers, default=0) + 1
        for number, request in enumerate(requests, first):
            self.begin(number, request)
        self.finish()
        return [self.answers[first + i] for i in range(len(requests))]

    def ask(self, tokens: list[int] | str, **sampling: Any) -> Answer:
        return self.write(asked(tokens, **sampling))[0]


def asked(prompt: list[int] | str, **sampling: Any) -> GenerateRequest:
    """Greedy, unless a temperature is given."""
    settings = Sampling(**{"temperature": 0, **sampling})
    if isinstance(prompt, str):
        return GenerateRequest(text=prompt, sampling=settings)
    return GenerateRequest(tokens=tuple(prompt), sampling=settings)


def order(
    folder: Path, options: Mapping[str, Any] | None = None, *, adapters: bool = False, **more: Any
) -> Order:
    config = ModelConfig(
        backend="text", options=dict(options or {}), adapters=Adapters(enabled=adapters)
    )
    return Order(model="m", version=1, path=folder, model_file="", config=config, **more)


@contextmanager
def writing(folder: Path, *, adapters: bool = False, **options: Any) -> Iterator[Writer]:
    backend = TextBackend()
    try:
        yield Writer(backend, backend.load(order(folder, options, adapters=adapters)))
    finally:
        backend.unload()
