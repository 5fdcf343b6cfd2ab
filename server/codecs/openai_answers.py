"""What OpenAI's clients are answered: one body, or chunks as server-sent events. Pure.

Two forms, of the completions and of chat. A piece that brings nothing to read makes no chunk. What is
the same in all chunks of an answer is written once: a chunk costs about two microseconds.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from repository.generate import Ended, Logprob, Piece

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
UNSURE = "\ufffd"  # stands for part of a character
NO_LOGPROB = -9999.0  # OpenAI's word for "as good as impossible"; JSON has none for infinity


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(ABC):
    """Of one request. `n` choices belong to each prompt; `logprobs` as in Sampling.

    Tell it every piece and every end, in their order; then either each call's bytes are sent, and
    `close` at the end, or `body` is.
    """

    prefix: str
    chunks: str  # their `object`
    whole: str

    def __init__(
        self,
        *,
        model: str,
        fingerprint: str,
        choices: int,
        id: str,
        n: int = 1,
        logprobs: int | None = None,
        stream: bool = False,
        include_usage: bool = False,
    ) -> None:
        self._choices = [self.choice(i, logprobs) for i in range(choices)]
        self._n = n
        self._stream = stream
        self._include_usage = include_usage
        self.prompt_tokens = self.completion_tokens = 0
        same = {
            "id": f"{self.prefix}-{id}",
            "object": self.chunks if stream else self.whole,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = encode(same)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    @abstractmethod
    def choice(self, index: int, logprobs: int | None) -> Choice: ...

    def piece(self, index: int, piece: Piece) -> bytes:
        choice = self._choices[index]
        if not self._stream:
            choice.keep(piece)
            return b""
        return b"".join(map(self._chunk, choice.chunks(piece)))

    def end(self, index: int, ended: Ended) -> bytes:
        choice = self._choices[index]
        choice.finish = "length" if ended.finish == "length" else "stop"
        self.completion_tokens += ended.completion_tokens
        if index % self._n == 0:  # the others have the same prompt: it is read once
            self.prompt_tokens += ended.prompt_tokens
        return b"".join(map(self._chunk, choice.last())) if self._stream else b""

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return b"data: " + self._head + encode(choice) + self._tail

    @property
    def usage(self) -> Usage:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return Usage(prompt, completion, prompt + completion)

    def close(self) -> bytes:
        """The last events of a stream that ended well."""
        if not self._include_usage:
            return DONE
        return b"data: " + self._head + b'],"usage":' + encode(self.usage) + b"}\n\n" + DONE

    def body(self) -> bytes:
        choices = b",".join(encode(c.whole()) for c in self._choices)
        return self._head + choices + b'],"usage":' + encode(self.usage) + b"}"


class Choice(ABC):
    """One sequence. `finish` is set at its end."""

    def __init__(self, index: int, logprobs: int | None) -> None:
        self.index = index
        self.finish: Literal["stop", "length"] | None = None
        self.logprobs = logprobs
        self._texts: list[str] = []
        self._tokens: list[Logprob] = []

    def keep(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        if piece.logprobs:
            self._tokens += piece.logprobs

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.text or (piece.logprobs and self.logprobs is not None):
            yield self.chunk(piece.text, piece.logprobs)

    @abstractmethod
    def chunk(self, text: str, tokens: Sequence[Logprob] | None) -> dict[str, Any]: ...

    @abstractmethod
    def last(self) -> Iterable[dict[str, Any]]:
        """The chunks that say that it has ended."""

    @abstractmethod
    def whole(self) -> dict[str, Any]: ...


# /v1/completions ----------------------------------------------------------------------------------


COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class TextChoice(Choice):
    """`text_offset` counts characters of this choice's own text."""

    def __init__(self, index: int, logprobs: int | None) -> None:
        super().__init__(index, logprobs)
        self._at = 0  # where the next token begins
        self._written = 0
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def keep(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        for name, column in (self._table(piece.text, piece.logprobs) or {}).items():
            self._columns[name] += column

    def chunk(self, text: str, tokens: Sequence[Logprob] | None) -> dict[str, Any]:
        return self._said(text, self._table(text, tokens), None)

    def last(self) -> Iterable[dict[str, Any]]:
        yield self._said("", None, self.finish)

    def whole(self) -> dict[str, Any]:
        found = self._columns if self.logprobs is not None else None
        return self._said("".join(self._texts), found, self.finish)

    def _said(self, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"text": text, "index": self.index, "logprobs": logprobs, "finish_reason": finish}

    def _table(self, text: str, tokens: Sequence[Logprob] | None) -> dict[str, list[Any]] | None:
        found = None
        if self.logprobs is not None and tokens is not None:
            offsets = []
            for token in tokens:
                offsets.append(self._at)
                self._at += len(token.text.replace(UNSURE, ""))
            columns: tuple[list[Any], ...] = (
                [token.text for token in tokens],
                [_number(token.logprob) for token in tokens],
                list(map(_likeliest, tokens)),
                offsets,
            )
            found = dict(zip(COLUMNS, columns, strict=True))
        self._written += len(text)
        # Tokens that are but parts of a character count for nothing, until it is there.
        self._at = max(self._at, self._written)
        return found


def _likeliest(token: Logprob) -> dict[str, float] | None:
    """The likeliest and the chosen one; null where nothing came before (a prompt's first token)."""
    chosen = _number(token.logprob)
    if chosen is None:
        return None
    table: dict[str, float] = {}
    for _, text, logprob in token.top:
        table.setdefault(text, _finite(logprob))
    table.setdefault(token.text, chosen)
    return table


class TextAnswer(Answer):
    prefix, chunks, whole = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, logprobs: int | None) -> Choice:
        return TextChoice(index, logprobs)


# /v1/chat/completions -----------------------------------------------------------------------------


class ChatChoice(Choice):
    def __init__(self, index: int, logprobs: int | None) -> None:
        super().__init__(index, logprobs)
        self._begun = False

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        yield from self._role()
        yield from super().chunks(piece)

    def _role(self) -> Iterable[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            yield self._said({"role": "assistant", "content": "", "refusal": None}, None, None)

    def chunk(self, text: str, tokens: Sequence[Logprob] | None) -> dict[str, Any]:
        return self._said({"content": text}, tokens, None)

    def last(self) -> Iterable[dict[str, Any]]:
        yield from self._role()
        yield self._said({}, None, self.finish)

    def _said(
        self, delta: dict[str, Any], tokens: Sequence[Logprob] | None, finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._rows(tokens)
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _rows(self, tokens: Sequence[Logprob] | None) -> dict[str, Any] | None:
        if self.logprobs is None or tokens is None:
            return None
        return {"content": [_row(token) for token in tokens], "refusal": None}

    def whole(self) -> dict[str, Any]:
        text = "".join(self._texts)
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._rows(self._tokens),
            "finish_reason": self.finish,
        }


def _row(token: Logprob) -> dict[str, Any]:
    row = _token(token.text, token.logprob)
    row["top_logprobs"] = [_token(text, logprob) for _, text, logprob in token.top]
    return row


def _token(text: str, logprob: float) -> dict[str, Any]:
    """`bytes` null: the token is part of a character, and its text does not tell which."""
    found = None if UNSURE in text else list(text.encode(errors="replace"))
    return {"token": text, "logprob": _finite(logprob), "bytes": found}


class ChatAnswer(Answer):
    prefix, chunks, whole = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def choice(self, index: int, logprobs: int | None) -> Choice:
        return ChatChoice(index, logprobs)


def _number(logprob: float) -> float | None:
    """None where there is none: of the first token of a prompt nothing is known."""
    return None if logprob != logprob else _finite(logprob)


def _finite(logprob: float) -> float:
    return max(logprob, NO_LOGPROB) if logprob == logprob else NO_LOGPROB
