"""/v1/completions, /v1/chat/completions, /v1/embeddings. What is asked is what the codecs decode; what
is answered they write by hand: the structs here say how it looks."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from repository.errors import InferenceFailedError, ModelNotReadyError
from server.codecs.openai_answers import Usage
from server.codecs.openai_embeddings import EmbeddingRequest
from server.codecs.openai_fields import wrong
from server.codecs.openai_text import ChatRequest, CompletionRequest
from server.openapi.failures import OpenAIError, openai
from server.openapi.operation import Answer, Content, Face, Operation, Param, asked, events

FACE = Face(
    name="OpenAI",
    description="Texts, chats and embeddings, as OpenAI's clients ask for them.",
    error=OpenAIError,
    shape=openai,
)
Finish = Literal["stop", "length"] | None


class TextChoice(msgspec.Struct):
    """`logprobs`: tokens, token_logprobs, top_logprobs and text_offset, in columns."""

    text: str
    index: int
    logprobs: dict[str, list[Any]] | None
    finish_reason: Finish


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatText(msgspec.Struct):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatText
    logprobs: dict[str, Any] | None
    finish_reason: Finish


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET


class Embedding(msgspec.Struct):
    """`embedding`: numbers, or (`encoding_format` base64) their bytes, float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


ADAPTER = (
    Param(name="adapter", description="A registered adapter, for the whole request."),
    Param(
        name="X-Amzn-SageMaker-Adapter-Identifier",
        where="header",
        description="A registered adapter, as SageMaker's clients name it.",
    ),
)
NAMED = (
    "An adapter is named by the model's name (`model:adapter`), by `adapter` or `adapters` (one for "
    "each prompt), by `?adapter=` or by the header; the later wins."
)
USAGE = {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
SAME = {"created": 1790000000, "model": "tiny-lm", "system_fingerprint": "fp_5a1c7e0b9d3f"}
TEXT = {
    "id": "cmpl-6c1d",
    "object": "text_completion",
    **SAME,
    "choices": [{"text": " over", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "usage": USAGE,
}
CHAT = {
    "id": "chatcmpl-6c1d",
    "object": "chat.completion",
    **SAME,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}
CHUNK = (
    'data: {"id":"cmpl-6c1d","object":"text_completion","created":1790000000,"model":"tiny-lm",'
    '"system_fingerprint":"fp_5a1c7e0b9d3f","choices":[{"text":" over","index":0,"logprobs":null,'
    '"finish_reason":null}]}\n\ndata: [DONE]\n\n'
)
HELLO = [{"role": "user", "content": "Say hello."}]
ERRORS = {
    400: wrong("temperature", "should be `float | null`"),
    404: None,
    413: None,
    415: None,
    424: None,
    500: InferenceFailedError("model 'tiny-lm': the worker could not go on"),
    503: ModelNotReadyError("model 'tiny-lm' is loading", retry_after_s=1),
    507: None,
}


def _written(kind: Any, example: Any) -> dict[int, Answer]:
    """One body, or (`stream`) events."""
    whole = Content(kind=kind, examples={"answer": example})
    return {
        200: Answer(
            description="The text; as events where `stream` is true.",
            contents=(whole, events(CHUNK)),
        )
    }


OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/completions",
        face=FACE,
        summary="Go on with a text",
        description=f"What cannot be done here is refused by its name. {NAMED} What goes wrong in a "
        "stream that has begun is its last event; there is no [DONE] then.",
        params=ADAPTER,
        body=asked(
            CompletionRequest,
            text={
                "model": "tiny-lm",
                "prompt": "the quick brown",
                "max_tokens": 8,
                "temperature": 0,
            },
            stream={"model": "tiny-lm", "prompt": ["the", "a"], "max_tokens": 4, "stream": True},
        ),
        answers=_written(Completion, TEXT),
        errors=ERRORS,
    ),
    Operation(
        method="POST",
        path="/v1/chat/completions",
        face=FACE,
        summary="Answer a conversation",
        description=f"The model needs a chat template. {NAMED}",
        params=ADAPTER,
        body=asked(
            ChatRequest,
            chat={"model": "tiny-lm", "messages": HELLO, "max_completion_tokens": 8, "seed": 1},
            stream={"model": "tiny-lm", "messages": HELLO, "max_tokens": 4, "stream": True},
        ),
        answers=_written(ChatCompletion, CHAT),
        errors=ERRORS,
    ),
    Operation(
        method="POST",
        path="/v1/embeddings",
        face=FACE,
        summary="Texts as vectors",
        description=f"Texts or lists of token ids; nothing mixed. {NAMED}",
        params=ADAPTER,
        body=asked(
            EmbeddingRequest,
            text={"model": "minilm", "input": "a text"},
            list={"model": "minilm", "input": ["a text", "another"], "encoding_format": "base64"},
        ),
        answers={
            200: Answer(
                description="One vector for each input, in their order.",
                contents=(
                    Content(
                        kind=Embeddings,
                        examples={
                            "answer": {
                                "object": "list",
                                "data": [
                                    {"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}
                                ],
                                "model": "minilm",
                                "usage": {"prompt_tokens": 3, "total_tokens": 3},
                            }
                        },
                    ),
                ),
            )
        },
        errors=ERRORS,
    ),
)
