"""What a request says, as token ids that this model knows and has room for.

Sizes are looked at before the tokenizer or a template has to work on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from repository.backends import panics
from repository.backends.text.time_limit import within
from repository.errors import InvalidRequestError
from repository.generate import GenerateRequest

MAX_MESSAGES = 4096
TEMPLATE_S = 3.0  # nobody else's text goes on meanwhile
MAX_REASON = 1000  # characters of what a template says
# What a chat template of someone else's may fail with.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class Prompts:
    """`tokenizer`: a fast one of transformers. `vocab`: how many tokens the model knows; `max_len`:
    how many it holds, prompt and answer together."""

    def __init__(self, tokenizer: Any, vocab: int, max_len: int) -> None:
        self._tokenizer = tokenizer
        self._plain = tokenizer.backend_tokenizer
        self._vocab = vocab
        self._max_len = max_len
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)
        self.chat = bool(tokenizer.chat_template)
        self._spellings: dict[int, str] = {}
        own = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._reserved = own - {"tools", "documents", "kwargs"}

    def read(self, request: GenerateRequest) -> list[int]:
        """Raises InvalidRequestError: nothing or more than one thing is asked, unknown tokens, no
        template or one that refuses, a prompt that leaves no room for an answer."""
        said = (request.text, request.tokens, request.messages)
        if sum(one is not None for one in said) != 1:
            raise InvalidRequestError("say exactly one of a text, token ids and messages")
        if request.tokens is not None:
            ids = list(request.tokens)
        elif request.text is not None:
            ids = self._tokens(request.text, add_special_tokens=True)
        else:
            ids = self._tokens(self._conversation(request), add_special_tokens=False)
        return self._checked(ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self._plain.decode(ids, skip_special_tokens=skip_special))

    def spelling(self, token: int) -> str:
        """A token's own text: as it stands behind another, where a leading space is kept."""
        known = self._spellings.get(token)
        if known is None:
            alone = self.decode([token], skip_special=False)
            known = self.decode([token, token], skip_special=False)[len(alone) :]
            self._spellings[token] = known
        return known

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self._check_size(len(text))
        unread = InvalidRequestError(
            "the prompt cannot be cut into tokens: the model's tokenizer gives up on it"
        )
        try:
            with panics.refused(unread):  # a pattern of tokenizer.json that never comes to an end
                ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except (TypeError, ValueError) as error:  # halves of surrogate pairs
            raise InvalidRequestError("the prompt is no text that UTF-8 can write") from error
        return list(ids)

    def _check_size(self, characters: int) -> None:
        """No token is longer than the longest one: so much text cannot fit."""
        least = characters // self._longest
        if least >= self._max_len:
            raise InvalidRequestError(
                f"the prompt has {characters} characters, at least {least} tokens; the model holds "
                f"{self._max_len} with the answer"
            )

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise InvalidRequestError("the prompt is empty: there is nothing to go on from")
        if len(ids) >= self._max_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; the model holds {self._max_len} with the answer"
            )
        strange = next((token for token in ids if not 0 <= token < self._vocab), None)
        if strange is not None:
            raise InvalidRequestError(
                f"the prompt has token {strange}; the model knows 0 to {self._vocab - 1}"
            )
        return ids

    def _conversation(self, request: GenerateRequest) -> str:
        messages = request.messages or ()
        if not self.chat:
            raise InvalidRequestError(
                "this model has no chat template; send a plain prompt to /v1/completions"
            )
        if not 0 < len(messages) <= MAX_MESSAGES:
            raise InvalidRequestError(f"{len(messages)} messages; 1 to {MAX_MESSAGES} are possible")
        taken = self._reserved.intersection(request.template)
        if taken:
            raise InvalidRequestError(f"a template cannot be given '{min(taken)}'")
        plain = [_plain(message) for message in messages]
        self._check_size(sum(len(str(message.get("content") or "")) for message in plain))
        too_slow = InvalidRequestError(
            f"the chat template had not ended after {TEMPLATE_S:g} s; does it loop?"
        )
        try:
            with within(TEMPLATE_S, too_slow):
                text = self._tokenizer.apply_chat_template(
                    plain,
                    tokenize=False,
                    add_generation_prompt=request.add_generation_prompt,
                    **request.template,
                )
        except TEMPLATE_ERRORS as error:
            raise InvalidRequestError(f"the chat template refuses: {_reason(error)}") from error
        return str(text)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_REASON]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """As OpenAI writes it, with a list of text parts joined to one text."""
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError("a message must have a role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, list):
        raise InvalidRequestError("a message's content must be a text or a list of parts")
    return {**message, "content": "".join(map(_text_of, content))}


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise InvalidRequestError(f"a part of type '{kind}' in a message: this model reads text")
    return text
