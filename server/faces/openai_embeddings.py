"""POST /v1/embeddings, as OpenAI's clients ask and read it.

A request is ordinary inference with the inputs and outputs that models which embed texts have: `text`
BYTES [n] or `input_ids` INT32 [n, len] in, `embedding` FP32 [n, dimensions] and `tokens` INT32 [n]
out. A list that is longer than a batch may be is asked in parts, a few at a time, so that one long
list does not fill the queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from litestar.types import Receive, Scope, Send

from repository.errors import InferenceFailedError
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor
from server.call import Door
from server.codecs.openai_embeddings import Embed, body_of, embedding, rows_of, tensor_of
from server.codecs.openai_fields import wrong
from server.openai_call import OpenAICall, answered
from server.patience import answer_of

AT_ONCE = 4  # parts of a list that wait for the model
BLOCK = 64  # vectors that are written in one go: everybody else waits meanwhile
WANTED = ("embedding", "tokens")


async def embed(scope: Scope, receive: Receive, send: Send, *, door: Door) -> None:
    await answered(door, scope, receive, send, _work)


async def _work(call: OpenAICall, receive: Receive) -> bool:
    asked = embedding(await call.body(receive))
    gen = await call.hold(asked.model, "embed", receive)
    _check_dimensions(asked, _dimensions(gen))
    work = asyncio.ensure_future(_Embedding(call, gen, asked).run())
    await call.reply(await answer_of(work, receive))
    return True


class _Embedding:
    """One request, in parts of at most a batch."""

    def __init__(self, call: OpenAICall, gen: Generation, asked: Embed) -> None:
        self._call = call
        self._gen = gen
        self._asked = asked
        self._adapters = call.adapters(asked.adapters, len(asked.inputs))
        self._waiting: deque[asyncio.Future[InferResponse]] = deque()
        self._rows: list[bytes] = []
        self._read = self._tokens = 0  # of the parts that were answered

    async def run(self) -> bytes:
        inputs, loaded = self._asked.inputs, self._gen.loaded
        size = (loaded.max_batch_size if loaded is not None else 0) or len(inputs)
        try:
            for at in range(0, len(inputs), size):
                if len(self._waiting) == AT_ONCE:
                    await self._take()
                self._ask(slice(at, at + size))
            while self._waiting:
                await self._take()
        finally:
            for future in self._waiting:
                future.cancel()
        self._call.wrote(self._tokens, 0, None)
        return body_of(self._rows, self._asked.model, self._tokens)

    def _ask(self, part: slice) -> None:
        inputs = self._asked.inputs[part]
        request = _request(inputs, self._adapters[part])
        self._waiting.append(self._call.door.models.infer(self._gen, request))
        self._call.used(self._call.samples + len(inputs))

    async def _take(self) -> None:
        """The vectors of the oldest part."""
        response = await self._waiting[0]
        self._waiting.popleft()
        call, asked = self._call, self._asked
        call.queue_s += response.queue_s
        call.compute_s += response.compute_s
        call.batch_size = max(call.batch_size, response.batch_size)
        vectors = _output(response, "embedding").array()
        _check_dimensions(asked, vectors.shape[-1])
        for at in range(0, len(vectors), BLOCK):
            block = vectors[at : at + BLOCK]
            self._rows.append(rows_of(block, self._read + at, as_base64=asked.base64))
            await asyncio.sleep(0)
        self._read += len(vectors)
        self._tokens += int(_output(response, "tokens").array().sum())


def _request(inputs: Sequence[str | tuple[int, ...]], adapters: tuple[str, ...]) -> InferRequest:
    request = InferRequest([tensor_of(inputs)], WANTED)
    named = set(adapters)
    if len(named) > 1:
        request.parameters = {"adapters": list(adapters)}
    elif named != {""}:
        request.parameters = {"adapter": named.pop()}
    return request


def _output(response: InferResponse, name: str) -> Tensor:
    for tensor in response.outputs:
        if tensor.name == name:
            return tensor
    raise InferenceFailedError(f"the model says that it embeds texts, and gives no '{name}'")


def _dimensions(gen: Generation) -> int:
    """As the model says; -1 where it does not."""
    outputs = gen.loaded.outputs if gen.loaded is not None else ()
    return next((out.shape[-1] for out in outputs if out.name == "embedding" and out.shape), -1)


def _check_dimensions(asked: Embed, known: int) -> None:
    if asked.dimensions is not None and known > 0 and asked.dimensions != known:
        raise wrong(
            "dimensions", f"is {asked.dimensions}; the vectors of '{asked.model}' have {known}"
        )
