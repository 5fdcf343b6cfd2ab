"""What is said to a model that writes text, and what it answers. Plain data, for every face and host.

One request is one sequence: a face that is asked for several (`n`, a list of prompts) asks several
times. The answer comes in pieces, as it is written; the last thing that is heard is how it ended.
The words are OpenAI's where it has one, else those of Hugging Face's generation config.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

Finish: TypeAlias = Literal["stop", "length", "cancelled"]


class Sampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How the next token is chosen. Applied in this order: logit_bias, repetition_penalty, the two
    additive penalties, temperature, top_k, top_p, min_p.

    temperature         0: the likeliest (greedy); else >= 0
    top_k               0: all; top_p in (0, 1]; min_p in [0, 1), relative to the likeliest
    repetition_penalty  0.01 to 100, over prompt and answer, as Hugging Face has it
    presence_penalty, frequency_penalty   over the answer alone, as OpenAI has them
    seed                None: another answer each time
    logit_bias          token id -> added to its logit
    logprobs            None: none; n >= 0: of the chosen token and of the n likeliest
    max_tokens          None: as many as fit. At least 1
    stop                the answer ends before the first of these that it would hold
    stop_token_ids      beside the model's own ends; ignore_eos: those do not count
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class GenerateRequest(msgspec.Struct, frozen=True, array_like=True):
    """Exactly one of the three: a text, its token ids, or a conversation for the tokenizer's chat
    template (messages as OpenAI writes them).

    template   further names that the chat template may use
    echo       the prompt comes back first, as a piece (with its logprobs where those are wanted)
    adapter    "": the model itself
    """

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    template: dict[str, Any] = {}
    add_generation_prompt: bool = True
    echo: bool = False
    sampling: Sampling = Sampling()
    adapter: str = ""


class Logprob(msgspec.Struct, array_like=True, gc=False):
    """Of one token at its place: `logprob` natural, after all that Sampling did but the cuts
    (top_k, top_p, min_p). `top`: (token id, text, logprob) of the likeliest, likeliest first. Of a
    prompt that is echoed: the model's own; its first token has none (nan)."""

    token: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]] = []


class Piece(msgspec.Struct, array_like=True, gc=False):
    """What has been written since the last one. `text` is whole characters; it may be empty while
    `tokens` is not (a character in several tokens, a text that may become a stop string)."""

    text: str = ""
    tokens: list[int] = []
    logprobs: list[Logprob] | None = None


class Ended(msgspec.Struct, array_like=True, gc=False):
    """`stopped_by`: the stop string or token id, None where it was the model's own end. Seconds:
    `wait_s` until its first step, `prompt_s` until its first token, `total_s` in all."""

    finish: Finish
    prompt_tokens: int
    completion_tokens: int
    stopped_by: str | int | None = None
    wait_s: float = 0.0
    prompt_s: float = 0.0
    total_s: float = 0.0
