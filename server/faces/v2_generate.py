"""POST /v2/models/NAME[/versions/N]/generate, /generate_stream: Triton's generate extension.

Raw ASGI. `generate` wants exactly one answer; `generate_stream` tells each as an event when it comes. A
stream's status line is held back until the first answer or an error is there, so that an error before
it has its own status; what goes wrong later is an event, and the last. There is no [DONE].
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from litestar.types import Receive, Scope, Send

from repository.errors import InferenceFailedError
from repository.generate import Ended
from repository.lifecycle.generation import Generation
from repository.messages import InferResponse
from repository.responding import Responses
from server import errors
from server.call import Door
from server.chorus import Chorus
from server.codecs import openai_text, squeeze, v2_generate
from server.codecs.v2_paths import Route, model_of
from server.heads import Header
from server.intake import ClientGoneError
from server.patience import answer_of
from server.streamed import StreamedCall, answered
from server.streams import PING, START, frame

GENERATE, STREAM = VERBS = ("/generate", "/generate_stream")
SSE: list[Header] = START["headers"]  # type: ignore[assignment]
ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that "
    "generates various number of responses"
)


def verb_of(path: str) -> str | None:
    """Which of the two an address is, if it is one."""
    return next((v for v in VERBS if path.endswith(v) and model_of(path, v) is not None), None)


async def generate(
    scope: Scope, receive: Receive, send: Send, *, door: Door, keepalive_s: float
) -> None:
    call = GenerateCall(door, scope, send)
    await answered(call, receive, Generating(keepalive_s).run)


class GenerateCall(StreamedCall):
    json_only = False  # as with all of Triton's calls: curl -d says that it is a form
    answers = 0  # of a model that may give any number

    def told(self, response: InferResponse, since: float) -> float:
        """Counts one more answer. When that was."""
        now = time.perf_counter()
        self.door.meter.answered(
            self.model,
            self.version,
            self.answers,
            good=True,
            empty=not response.outputs,
            took_s=now - since,
        )
        self.answers += 1
        return now

    def shown(self, error: Exception) -> tuple[int, bytes]:
        return errors.status_v2(error), errors.body_v2(errors.text_of(error))


class Generating:
    def __init__(self, keepalive_s: float) -> None:
        self._keepalive_s = keepalive_s

    async def run(self, call: GenerateCall, receive: Receive) -> bool:
        """Whether it ended well. Raises what is to be answered instead."""
        verb = verb_of(call.path)
        route = model_of(call.path, verb) if verb else None
        if route is None:
            raise errors.NoSuchPathError("Not Found")
        squeeze.refuse_packed(call.headers)
        found = v2_generate.read(await call.body(receive))
        id = call.request_id = v2_generate.id_of(found)
        async with aclosing(self._answers(call, found, route, id, receive)) as answers:
            if verb == STREAM:
                return await self._stream(call, answers)
            lines = [line async for line in answers]
        if len(lines) != 1:
            raise InferenceFailedError(ONE)
        await call.reply(lines[0])
        return True

    async def _answers(
        self, call: GenerateCall, found: dict[str, Any], route: Route, id: str, receive: Receive
    ) -> AsyncGenerator[bytes]:
        """Each as a line of JSON; an empty one where nothing has come for a while."""
        nested = found.get("parameters")
        said = found | nested if isinstance(nested, dict) else found
        gen = await call.lease(*route, receive, said)
        told: dict[str, Any] = {"model": gen.spec.model, "version": gen.spec.version, "id": id}
        if gen.streams is not None and v2_generate.TEXT_INPUT in found:
            whole = verb_of(call.path) == GENERATE
            async with aclosing(self._texts(call, gen, found, receive, whole=whole)) as texts:
                async for text in texts:
                    yield v2_generate.text_answer(text, **told) if text else b""
            return
        async with aclosing(self._tensors(call, gen, found, receive)) as responses:
            async for response in responses:
                yield v2_generate.answer(response, **told)

    async def _tensors(
        self, call: GenerateCall, gen: Generation, found: dict[str, Any], receive: Receive
    ) -> AsyncGenerator[InferResponse]:
        assert gen.signature is not None and gen.loaded is not None
        batched = gen.loaded.max_batch_size > 0
        request = v2_generate.request_of(
            found, gen.signature.inputs, model=gen.spec.model, batched=batched
        )
        responses = call.door.models.stream(gen, request)
        call.used(1)
        since = time.perf_counter()
        try:
            while (response := await answer_of(_next(responses), receive)) is not None:
                call.queue_s = max(call.queue_s, response.queue_s)
                call.compute_s += response.compute_s
                call.batch_size = response.batch_size
                if gen.decoupled:
                    since = call.told(response, since)
                yield response
        finally:
            responses.close()

    async def _texts(
        self,
        call: GenerateCall,
        gen: Generation,
        found: dict[str, Any],
        receive: Receive,
        *,
        whole: bool,
    ) -> AsyncGenerator[str]:
        """What a model writes, piece by piece or `whole`; "" where it has written nothing for a
        while."""
        asked = openai_text.completion(v2_generate.completion_of(found, gen.spec.model))
        stream = call.door.models.generate(gen, asked.sequences[0])
        written: list[str] = []
        first_s: float | None = None
        prompt = 0
        async with Chorus([stream], receive, patience_s=self._keepalive_s) as chorus:
            call.used(1)
            try:
                while chorus.singing:
                    said = await chorus.take()
                    if said and first_s is None:
                        first_s = time.perf_counter() - call.began
                    text = "".join(s.what.text for s in said if not isinstance(s.what, Ended))
                    prompt += sum(s.what.prompt_tokens for s in said if isinstance(s.what, Ended))
                    written.append(text)
                    if not whole and (text or not said):
                        yield text
            finally:
                call.wrote(prompt, stream.tokens, first_s)
        if whole:
            yield "".join(written)

    async def _stream(self, call: GenerateCall, answers: AsyncIterator[bytes]) -> bool:
        try:
            async for line in answers:
                if not call.begun:
                    await call.start(200, SSE)
                await call.send(frame(line) if line else PING, more=True)
        except ClientGoneError:
            raise
        except Exception as error:
            if not call.begun:
                raise
            await call.send(frame(call.failed(error)), more=False)
            return False
        if not call.begun:
            await call.start(200, SSE)
        await call.send(b"", more=False)
        return True


def _next(responses: Responses) -> asyncio.Future[InferResponse | None]:
    return asyncio.ensure_future(anext(responses, None))
