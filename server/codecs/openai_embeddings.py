"""/v1/embeddings: texts or token ids in, one vector for each out, as OpenAI's API reference has it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from repository.tensors import Array, Tensor
from server.codecs.openai_fields import read, wrong
from server.codecs.openai_text import Name, Prompt, named_adapters, prompts_of

MOST_INPUTS = 2048
PAD = -1  # behind the shorter ones of several token lists

encode = msgspec.json.Encoder().encode


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Name
    input: Prompt | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    adapter: Name | None = None
    adapters: Name | list[Name] | None = None
    user: Any = None  # it changes nothing


@dataclass(frozen=True, slots=True)
class Embed:
    """`inputs`: all texts or all lists of token ids. `adapters`: one for each, as the body says."""

    model: str
    inputs: Sequence[str | tuple[int, ...]]
    dimensions: int | None
    base64: bool
    adapters: tuple[str, ...] | None


def embedding(raw: bytes) -> Embed:
    """Raises InvalidRequestError."""
    request = read(raw, EmbeddingRequest)
    inputs = prompts_of(request.input, "input", MOST_INPUTS)
    for i, item in enumerate(inputs):
        if not item:
            raise wrong(f"input[{i}]" if len(inputs) > 1 else "input", "is empty")
    return Embed(
        model=request.model,
        inputs=inputs,
        dimensions=request.dimensions,
        base64=request.encoding_format == "base64",
        adapters=named_adapters(request, len(inputs)),
    )


def tensor_of(inputs: Sequence[str | tuple[int, ...]]) -> Tensor:
    """`text`, BYTES [n], or `input_ids`, INT32 [n, longest]."""
    if isinstance(inputs[0], str):
        texts = np.empty(len(inputs), dtype=object)
        texts[:] = inputs
        return Tensor.of("text", texts, "BYTES")
    ids = np.full((len(inputs), max(map(len, inputs))), PAD, np.int32)
    for row, tokens in zip(ids, inputs, strict=True):
        row[: len(tokens)] = tokens
    return Tensor.of("input_ids", ids)


def rows_of(vectors: Array, first: int, *, as_base64: bool) -> bytes:
    """The items of `data`, the first with the index `first`, without the brackets around them.

    `vectors`, float32 [n, dimensions]. base64: of the numbers' bytes, little-endian."""
    found = []
    for index, vector in enumerate(vectors, first):
        numbers: Any = vector.tolist()
        if as_base64:
            numbers = base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
        found.append(encode({"object": "embedding", "index": index, "embedding": numbers}))
    return b",".join(found)


def body_of(rows: Sequence[bytes], model: str, tokens: int) -> bytes:
    usage = encode({"prompt_tokens": tokens, "total_tokens": tokens})
    head = b'{"object":"list","data":['
    return b"".join(
        (head, b",".join(rows), b'],"model":', encode(model), b',"usage":', usage, b"}")
    )
