"""What stands around a model that takes requests as they are: the way back of one, and other models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue

from repository.errors import ModelNotFoundError, RepositoryError
from repository.figures import Figures
from repository.messages import InferRequest, InferResponse

PATIENCE_S = 20.0

Answering = Callable[[InferRequest], Iterator[InferResponse]]


class FakeReply:
    """`answers` as they came; after the end none may come, and there is one end."""

    def __init__(self) -> None:
        self.answers: list[InferResponse] = []
        self.error: RepositoryError | None = None
        self.cancelled = False
        self.came = threading.Semaphore(0)  # once for each answer
        self._ended = threading.Event()

    @property
    def over(self) -> bool:
        return self._ended.is_set()

    def send(self, response: InferResponse) -> None:
        assert not self.over, "an answer after the end"
        self.answers.append(response)
        self.came.release()

    def last(self, response: InferResponse) -> None:
        self.send(response)
        self.end()

    def end(self, error: RepositoryError | None = None) -> None:
        if not self.over:
            self.error = error
            self._ended.set()

    def wait(self) -> RepositoryError | None:
        """Until it has ended. What it ended with."""
        assert self._ended.wait(PATIENCE_S), "the request never ended"
        return self.error


class FakeOthers:
    """`models`: name -> what it answers. `calls`: who was asked, for what version, and how."""

    def __init__(self, **models: Answering) -> None:
        self.models = models
        self.calls: list[tuple[str, int | None, InferRequest]] = []
        self.done: list[tuple[str, ...]] = []
        self.left = 0  # calls whose rest nobody wanted
        self.figures: SimpleQueue[list[Figures]] = SimpleQueue()  # as they were shown

    def call(
        self, model: str, version: int | None, request: InferRequest
    ) -> Iterator[InferResponse]:
        self.calls.append((model, version, request))
        if model not in self.models:
            raise ModelNotFoundError(f"Request for unknown model: '{model}' is not found")
        try:
            yield from self.models[model](request)
        except GeneratorExit:
            self.left += 1
            raise

    def load(
        self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        if model == "broken":
            raise ModelNotFoundError("failed to load 'broken'")
        self.done.append(("load", model, config or "", *(files or {})))

    def unload(self, model: str, dependents: bool = False) -> None:
        self.done.append(("unload", model, *(["dependents"] if dependents else ())))

    def show(self, figures: Sequence[Figures]) -> None:
        self.figures.put(list(figures))

    def is_ready(self, model: str, version: int | None = None) -> bool:
        return model in self.models and version in (None, 1)
