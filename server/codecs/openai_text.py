"""/v1/completions and /v1/chat/completions: what is asked, as one `GenerateRequest` for each sequence.

As OpenAI's API reference has both; the fields that vLLM's servers take besides (top_k, min_p, ...)
mean what they mean there. Three kinds of fields: those that do what they say; those that would change
the answer and that nothing here can do, refused unless they ask for what happens anyway; those that
change nothing, taken and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from repository.generate import GenerateRequest, Sampling
from server.codecs.openai_fields import check_depth, read, shown, wrong

MOST_CHOICES = 16  # n
MOST_SEQUENCES = 256  # of one request: prompts times n
MOST_MESSAGES = 4096
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens
LEAST_TOP_P = 1e-6  # OpenAI takes 0: nothing but the likeliest

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Name = Annotated[str, Meta(max_length=1000)]
Prompt: TypeAlias = str | list[str | int | list[TokenId]]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`include_obfuscation`: padding against who counts bytes on the way; there is none."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both have."""

    model: Name
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: Count | None = None
    # as vLLM's servers take them
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    skip_special_tokens: bool | None = None
    # which adapter: one for all, or (a list of prompts) one for each
    adapter: Name | None = None
    adapters: Name | list[Name] | None = None
    # they change nothing
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    store: Any = None


class CompletionRequest(TextRequest, forbid_unknown_fields=True, kw_only=True):
    prompt: Prompt | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    suffix: Any = None


class Part(msgspec.Struct, kw_only=True):
    """Of a message's content; only `text` is one that we can take."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The last six are what an answer holds that a client sends back as it came: empty."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: Name | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None


class ChatRequest(TextRequest, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MOST_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_completion_tokens: Count | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # refused unless they ask for what happens anyway: see ANYWAY
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None
    # they change nothing
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None


_TOOLS = "cannot be had: no tools are called here; leave it out"
_LEAVE = "cannot be had here; leave it out"
# Field -> what it may say all the same, and what its sender is told otherwise.
ANYWAY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _TOOLS),
    "functions": (([],), _TOOLS),
    "tool_choice": (("none",), 'must be "none": no tools are called here'),
    "function_call": (("none",), 'must be "none": no functions are called here'),
    "response_format": (
        ({"type": "text"},),
        'must be {"type": "text"}: answers cannot be held to a form; ask for it in the prompt',
    ),
    "modalities": ((["text"],), 'must be ["text"]: answers are text'),
    "audio": ((), "cannot be had: answers are text; leave it out"),
    "reasoning_effort": (("none",), 'must be "none", or say it in chat_template_kwargs'),
    "verbosity": (("medium",), 'must be "medium": say in the prompt how long it shall be'),
    "web_search_options": ((), "cannot be had: nothing is looked up; leave it out"),
    "moderation": ((), _LEAVE),
    "suffix": (("",), "cannot be had: text is written at the end only; put it into the prompt"),
    "store": ((False,), "cannot be had: nothing is kept here; leave it out"),
}
# What an assistant's message may still hold.
EMPTY: tuple[Any, ...] = (None, [], "", {})


@dataclass(frozen=True, slots=True)
class Asked:
    """`sequences`: `n` for each prompt, the prompts in order, without their adapters. `adapters`: one
    for each prompt, as the body says; None: it does not."""

    model: str
    sequences: tuple[GenerateRequest, ...]
    n: int
    adapters: tuple[str, ...] | None
    stream: bool
    include_usage: bool
    logprobs: int | None


def completion(raw: bytes) -> Asked:
    """Raises InvalidRequestError."""
    request = read(raw, CompletionRequest)
    _refuse_unless_anyway(request)
    if request.best_of not in (None, request.n or 1):
        raise wrong("best_of", "must equal n: all that is written is returned; leave it out")
    max_tokens = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    prompts = [
        GenerateRequest(text=p, echo=bool(request.echo))
        if isinstance(p, str)
        else GenerateRequest(tokens=p, echo=bool(request.echo))
        for p in prompts_of(request.prompt, "prompt", MOST_SEQUENCES)
    ]
    return _asked(request, prompts, _sampling(request, max_tokens, request.logprobs))


def chat(raw: bytes) -> Asked:
    """Raises InvalidRequestError."""
    request = read(raw, ChatRequest)
    _refuse_unless_anyway(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    most, older = request.max_completion_tokens, request.max_tokens
    if most is not None and older not in (None, most):
        raise wrong("max_tokens", "is the older name of max_completion_tokens; say one of them")
    template = request.chat_template_kwargs or {}
    check_depth(template, "chat_template_kwargs")
    conversation = GenerateRequest(
        messages=tuple(_message(m, f"messages[{i}]") for i, m in enumerate(request.messages)),
        template=template,
        add_generation_prompt=request.add_generation_prompt is not False,
    )
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = _sampling(request, older if most is None else most, logprobs)
    return _asked(request, [conversation], sampling)


def prompts_of(given: Prompt | None, param: str, most: int) -> list[str | tuple[int, ...]]:
    """A text, its token ids, or a list of either, at most `most`; nothing mixed. Raises FieldError."""
    if given is None:
        raise wrong(param, "is missing")
    if isinstance(given, str):
        return [given]
    if not given:
        raise wrong(param, "is an empty list")
    kind = type(given[0])
    if kind is not int and len(given) > most:
        raise wrong(param, f"has {len(given)} items; at most {most} in one request")
    if any(type(item) is not kind for item in given):
        raise wrong(param, "mixes texts, token ids and lists; send one kind")
    if kind is int:
        return [_tokens(given, param)]
    if kind is str:
        return [item for item in given if isinstance(item, str)]
    return [_tokens(item, f"{param}[{i}]") for i, item in enumerate(given)]  # type: ignore[arg-type]


def _tokens(given: Sequence[Any], param: str) -> tuple[int, ...]:
    if not given:
        raise wrong(param, "is an empty list")
    if min(given) < 0 or max(given) >= 2**31:
        raise wrong(param, "holds a number that is no token id")
    return tuple(given)


def named_adapters(request: Any, rows: int) -> tuple[str, ...] | None:
    """One for each row, as the body says; None: it does not. Raises FieldError."""
    one, many = request.adapter, request.adapters
    if one is not None and many is not None:
        raise wrong("adapters", "and 'adapter' are both there; say one of them")
    if many is None or isinstance(many, str):
        name = one if many is None else many
        return None if name is None else (name,) * rows
    if len(many) != rows:
        raise wrong("adapters", f"names {len(many)} for {rows} inputs; name one for each")
    return tuple(many)


def _refuse_unless_anyway(request: msgspec.Struct) -> None:
    for name, (anyway, why) in ANYWAY.items():
        value = getattr(request, name, None)
        if value is not None and value not in anyway:
            raise wrong(name, why)


def _asked(request: TextRequest, prompts: list[GenerateRequest], sampling: Sampling) -> Asked:
    n = request.n or 1
    if len(prompts) * n > MOST_SEQUENCES:
        raise wrong(
            "n" if n > 1 else "prompt",
            f"asks for {len(prompts) * n} answers in all; at most {MOST_SEQUENCES} in one request",
        )
    stream = bool(request.stream)
    if request.stream_options is not None and not stream:
        raise wrong("stream_options", "needs stream: true")
    replace = msgspec.structs.replace
    samplings = [_seeded(sampling, i) for i in range(n)]
    return Asked(
        model=request.model,
        sequences=tuple(replace(p, sampling=s) for p in prompts for s in samplings),
        n=n,
        adapters=named_adapters(request, len(prompts)),
        stream=stream,
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        logprobs=sampling.logprobs,
    )


def _seeded(sampling: Sampling, i: int) -> Sampling:
    """The same seed gives the same answers, and each of them another one."""
    if not i or sampling.seed is None:
        return sampling
    seed = sampling.seed + i
    return msgspec.structs.replace(sampling, seed=seed if seed < 2**63 else seed - 2**64)


def _sampling(request: TextRequest, max_tokens: int | None, logprobs: int | None) -> Sampling:
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise wrong("min_tokens", f"is {min_tokens}, more than max_tokens ({max_tokens})")
    return Sampling(
        temperature=_or(request.temperature, 1.0),
        top_p=max(_or(request.top_p, 1.0), LEAST_TOP_P),
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=request.seed,
        logit_bias=_bias(request.logit_bias or {}),
        logprobs=logprobs,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=_stops(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < 2**31):
            raise wrong("logit_bias", f"has the key '{shown(key)}', which is no token id")
        found[int(key)] = value
    return found


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if len(stops) > MOST_STOPS:
        raise wrong("stop", f"has {len(stops)} texts; at most {MOST_STOPS} are taken")
    for stop in stops:
        if not 0 < len(stop) <= LONGEST_STOP:
            raise wrong(
                "stop", f"has a text of {len(stop)} characters; 1 to {LONGEST_STOP} are taken"
            )
    return tuple(stops)


def _message(message: Message, param: str) -> dict[str, Any]:
    role = message.role
    for name in ("tool_calls", "function_call", "tool_call_id", "refusal", "audio"):
        if getattr(message, name) not in EMPTY:
            raise wrong(f"{param}.{name}", _LEAVE)
    if role in ("tool", "function"):
        raise wrong(f"{param}.role", f"'{role}' is for what tools say; none are called here")
    if message.content is None:
        raise wrong(f"{param}.content", "is missing")
    # OpenAI's newer name for the same; the templates of models know the older one.
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    found["content"] = _content(message.content, f"{param}.content")
    if message.name is not None:
        found["name"] = message.name
    return found


def _content(content: str | list[Part], param: str) -> str:
    """Templates take a text; nothing is put between its parts that nobody wrote."""
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise wrong(
                f"{param}[{i}].type", f"is '{shown(part.type)}'; models here read text only"
            )
    return "".join(part.text or "" for part in content)
