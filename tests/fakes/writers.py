"""Models that write what a test tells them to, over the real streams; and one that embeds.

talker    chats: says WORDS, as many as it may; echoes; with logprobs where these are wanted
plain     the same without a template for conversations
held      writes when the test says so: see `pens`
embedder  texts in, vectors out: as many as 3 rows at once, see `vectors_of`
tensors   does neither
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.config import ModelConfig
from repository.errors import AdapterNotFoundError, InvalidRequestError, ModelNotFoundError
from repository.generate import Ended, Finish, GenerateRequest, Logprob, Piece
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.signature import Signature
from repository.streaming import Streams, TokenStream
from repository.tensors import Array, Tensor
from tests.fakes.repository import FakeRepository

WORDS = ("Hello", " wör", "ld", "!")
PROMPT_TOKENS = 5
DIMENSIONS = 4
ROWS = 3  # of a batch of `embedder`
SLOTS = 4
EMBEDS = Loaded(
    inputs=(
        TensorSpec("text", "BYTES", (-1,), optional=True),
        TensorSpec("input_ids", "INT32", (-1, -1), optional=True),
    ),
    outputs=(
        TensorSpec("embedding", "FP32", (-1, DIMENSIONS)),
        TensorSpec("tokens", "INT32", (-1,)),
    ),
    max_batch_size=ROWS,
    abilities=("embed",),
)


class Pen:
    """One sequence. `gone`: nobody wants the rest."""

    def __init__(self, request: GenerateRequest, tell: Callable[[Piece], None]) -> None:
        self.request = request
        self._tell = tell
        self.answer: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.written = 0

    @property
    def gone(self) -> bool:
        return self.answer.cancelled()

    def write(self, text: str, *, logprobs: list[Logprob] | None = None) -> None:
        self.written += 1
        if logprobs is None and self.request.sampling.logprobs is not None:
            logprobs = [logprob_of(text, self.written, self.request.sampling.logprobs)]
        self._tell(Piece(text, [self.written], logprobs))

    def end(self, finish: Finish = "stop") -> None:
        if not self.answer.done():
            self.answer.set_result(
                Ended(finish, PROMPT_TOKENS, self.written, None, 0.01, 0.02, 0.05)
            )

    def fail(self, error: Exception) -> None:
        self.answer.set_exception(error)


def logprob_of(text: str, token: int, likeliest: int) -> Logprob:
    top = [(token + i, text if i == 0 else f"<{i}>", -0.5 - i) for i in range(likeliest)]
    return Logprob(token, text, -0.5, top)


def talk(pen: Pen) -> None:
    if pen.answer.done():
        return
    request = pen.request
    if request.echo:
        text = request.text if request.text is not None else "".join(map(str, request.tokens or ()))
        first = Logprob(0, text, float("nan"))
        pen._tell(Piece(text, [0], [first] if request.sampling.logprobs is not None else None))
    most = request.sampling.max_tokens or len(WORDS)
    for word in WORDS[:most]:
        pen.write(word)
    pen.end("length" if most < len(WORDS) else "stop")


class Writing:
    """Of the Host, what streams use."""

    slots = 1

    def __init__(self, models: Writers, model: str) -> None:
        self._models, self._model = models, model
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        pen = Pen(request, tell)
        models = self._models
        models.pens.append(pen)
        models.asked.set()
        if request.adapter not in ("", *models.known.get(self._model, ())):
            pen.fail(AdapterNotFoundError(f"The adapter {request.adapter} has not been registered"))
        elif request.text is not None and len(request.text) > 1000:
            pen.fail(InvalidRequestError("the prompt has 5000 tokens; 256 fit"))
        elif self._model != "held":
            asyncio.get_running_loop().call_soon(talk, pen)
        return pen.answer

    async def adapt(self, orders: Any) -> list[AdapterReport]:
        return [AdapterReport(order.name) for order in orders if isinstance(order, AdapterOrder)]


class Writers(FakeRepository):
    """`pens`: every sequence that was begun, oldest first. `known`: model -> its adapters. `parts`:
    what `embedder` was asked; `embeds`: it answers at once, else when `release` is called."""

    rooms = 0

    def __init__(self, *, max_queue: int = 16) -> None:
        super().__init__()
        self.pens: list[Pen] = []
        self.asked = asyncio.Event()
        self.known: dict[str, tuple[str, ...]] = {"talker": ("poet", "clerk")}
        self.parts: list[InferRequest] = []
        self.late: list[tuple[asyncio.Future[InferResponse], InferRequest]] = []
        self.embeds = True
        chats = ("generate", "chat")
        self._bring("talker", Loaded(details={"slots": SLOTS}, abilities=chats), max_queue)
        self._bring("held", Loaded(details={"slots": SLOTS}, abilities=chats), max_queue)
        self._bring("plain", Loaded(abilities=("generate",)), max_queue)
        self._bring("embedder", EMBEDS, None)
        self._bring("tensors", Loaded(), None)

    def _bring(self, name: str, loaded: Loaded, max_queue: int | None) -> None:
        self.add(name)
        gen = self.bring_up(name)
        gen.loaded = loaded
        gen.signature = Signature(name, loaded)
        if max_queue is not None:
            host: Any = Writing(self, name)
            gen.streams = Streams(host, loaded, ModelConfig(), max_queue=max_queue)

    def generate(self, gen: Generation, request: GenerateRequest) -> TokenStream:
        assert gen.leases > 0, "only between a lease's begin and end"
        assert gen.streams is not None
        return gen.streams.open(request)

    def infer(self, gen: Generation, request: InferRequest) -> asyncio.Future[InferResponse]:
        assert gen.leases > 0 and gen.signature is not None
        gen.signature.accept(request)
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        self.parts.append(request)
        self.late.append((future, request))
        self.asked.set()
        if self.embeds:
            self.release()
        return future

    def resolve(self, name: str) -> tuple[str, str]:
        model, _, adapter = name.partition(":")
        if not adapter:
            owners = [owner for owner, known in self.known.items() if model in known]
            if len(owners) == 1:
                return owners[0], model
        if model not in self.folders:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        return model, adapter

    def release(self) -> None:
        """Everybody has been answered."""
        for pen in self.pens:
            pen.end()
        for future, request in self.late:
            if not future.done():
                future.set_result(embedded(request))
        self.late.clear()

    @property
    def leases(self) -> int:
        return sum(g.leases for gens in self.generations.values() for g in gens)


def embedded(request: InferRequest) -> InferResponse:
    (given,) = request.inputs
    rows = given.array()
    if given.name == "text":
        found = [vector_of(len(text)) for text in rows]
        tokens = [len(text.split()) for text in rows]
    else:
        found = [vector_of(int(row[row >= 0].sum())) for row in rows]
        tokens = [int((row >= 0).sum()) for row in rows]
    vectors = np.array(found, np.float32)
    outputs = [Tensor.of("embedding", vectors), Tensor.of("tokens", np.array(tokens, np.int32))]
    return InferResponse(outputs, queue_s=0.1, compute_s=0.2, batch_size=len(rows))


def vector_of(seed: int) -> Array:
    """No two are alike, and none is a round number."""
    return np.sin(np.arange(1, DIMENSIONS + 1, dtype=np.float32) * np.float32(seed + 1))
