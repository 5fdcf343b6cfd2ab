"""POST /v1/completions, /v1/chat/completions, as OpenAI's clients ask and read them.

Raw ASGI. A stream's status line is held back until the first piece or an error is there, so that an
error before it has its own status; a model that takes longer than the time between two signs of life
gets a comment then, and what goes wrong later is an event. Such an event is the last: no [DONE].
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import msgspec
from litestar.types import Receive, Scope, Send

from repository.generate import Ended, GenerateRequest
from repository.lifecycle.generation import Generation
from repository.streaming import TokenStream
from server.call import Door
from server.chorus import Chorus, Said
from server.codecs import openai_text
from server.codecs.openai_answers import Answer, ChatAnswer, TextAnswer
from server.codecs.openai_text import Asked
from server.heads import Header
from server.intake import ClientGoneError
from server.openai_call import OpenAICall, answered
from server.streams import PING, START, frame

SSE: list[Header] = START["headers"]  # type: ignore[assignment]


class Kind(NamedTuple):
    read: Callable[[bytes], Asked]
    ability: str
    answer: type[Answer]


KINDS = {
    "/v1/completions": Kind(openai_text.completion, "generate", TextAnswer),
    "/v1/chat/completions": Kind(openai_text.chat, "chat", ChatAnswer),
}


async def write(
    scope: Scope, receive: Receive, send: Send, *, door: Door, path: str, keepalive_s: float
) -> None:
    async def work(call: OpenAICall, receive: Receive) -> bool:
        return await Writing(call, KINDS[path]).run(receive, keepalive_s)

    await answered(door, scope, receive, send, work)


class Writing:
    """One request's sequences, and what is told of them."""

    def __init__(self, call: OpenAICall, kind: Kind) -> None:
        self._call = call
        self._kind = kind
        self._first_s: float | None = None

    async def run(self, receive: Receive, keepalive_s: float) -> bool:
        """Whether it ended well. Raises what is to be answered instead."""
        call = self._call
        asked = self._kind.read(await call.body(receive))
        gen = await call.hold(asked.model, self._kind.ability, receive)
        answer = self._kind.answer(
            id=secrets.token_hex(12),
            model=asked.model,
            fingerprint=f"fp_{gen.spec.fingerprint[:12]}",
            choices=len(asked.sequences),
            n=asked.n,
            logprobs=asked.logprobs,
            stream=asked.stream,
            include_usage=asked.include_usage,
        )
        streams = self._open(gen, self._requests(asked))
        prompts = len(streams) // asked.n
        names = [f"prompt[{i // asked.n}]" for i in range(len(streams))] if prompts > 1 else ()
        async with Chorus(streams, receive, patience_s=keepalive_s, names=names) as chorus:
            call.used(len(streams))
            try:
                if asked.stream:
                    return await self._stream(chorus, answer)
                while chorus.singing:
                    self._hear(await chorus.take(), answer)
            finally:
                written = sum(stream.tokens for stream in streams)
                call.wrote(answer.prompt_tokens, written, self._first_s)
        await call.reply(answer.body())
        return True

    def _requests(self, asked: Asked) -> list[GenerateRequest]:
        n = asked.n
        adapters = self._call.adapters(asked.adapters, len(asked.sequences) // n)
        return [
            msgspec.structs.replace(one, adapter=adapters[i // n]) if adapters[i // n] else one
            for i, one in enumerate(asked.sequences)
        ]

    def _open(self, gen: Generation, requests: list[GenerateRequest]) -> list[TokenStream]:
        """All of them or none."""
        with ExitStack() as opened:
            streams = []
            for request in requests:
                stream = self._call.door.models.generate(gen, request)
                opened.callback(stream.close)
                streams.append(stream)
            opened.pop_all()
        return streams

    def _hear(self, said: list[Said], answer: Answer) -> bytes:
        call = self._call
        if said and self._first_s is None:
            self._first_s = time.perf_counter() - call.began
        events = []
        for index, what in said:
            if isinstance(what, Ended):
                events.append(answer.end(index, what))
                call.queue_s = max(call.queue_s, what.wait_s)
                call.compute_s = max(call.compute_s, what.total_s - what.wait_s)
            else:
                events.append(answer.piece(index, what))
        return b"".join(events)

    async def _stream(self, chorus: Chorus, answer: Answer) -> bool:
        call = self._call
        try:
            while chorus.singing:
                said = await chorus.take()
                if not call.begun:
                    if chorus.error is not None:
                        raise chorus.error
                    await call.start(200, SSE)
                events = self._hear(said, answer) if said else PING
                if not chorus.singing:
                    events += answer.close()
                if events:
                    await call.send(events, more=bool(chorus.singing))
        except ClientGoneError:
            raise
        except Exception as error:
            if not call.begun:
                raise
            await call.send(frame(call.failed(error)), more=False)
            return False
        return True
