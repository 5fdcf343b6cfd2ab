"""From texts to rows of token ids, by tokenizer.json alone.

A row is padded behind its tokens to the longest of its company, whatever tokenizer.json says of
padding; a text of more than `most_tokens` is cut. Special tokens are added to texts, never to ids
that came as ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers

from repository.backends import panics
from repository.backends.embed.folder import EncoderFolder
from repository.errors import IncompleteFilesError, InvalidTensorError
from repository.tensors import Array, Tensor

PADDING = -1  # in `input_ids`, behind the last token
# Bytes of a text, and of several at once: one costs up to 150 while it is cut into tokens.
MAX_TEXT = 1 << 20


class Row:
    """The tokens of one text: ids, and types where the tokenizer gives any but 0."""

    __slots__ = ("ids", "types")

    def __init__(self, ids: Sequence[int] | Array, types: Sequence[int] | None = None) -> None:
        self.ids = ids
        self.types = types


class Tokens:
    def __init__(self, folder: EncoderFolder, *, threads: int) -> None:
        # Read by the library when it first works on several texts at once.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        self._most = folder.most_tokens
        self._vocabulary = _count(folder.config.get("vocab_size"))
        padding = _count(folder.config.get("pad_token_id"))
        self._padding = padding if padding < (self._vocabulary or padding + 1) else 0
        self._prompt = folder.prompt
        self._tokenizer = tokenizer = _read(folder.encoder / "tokenizer.json")
        if folder.lower_case:
            own = tokenizer.normalizer
            steps = [normalizers.Lowercase(), *([] if own is None else [own])]
            tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.prompt_tokens = self._count_prompt(folder.prompt)
        tokenizer.enable_truncation(folder.most_tokens, direction=folder.cut)

    def of_texts(self, tensor: Tensor) -> list[Row]:
        """Raises InvalidTensorError naming the row that is not UTF-8, or has no tokens."""
        texts = []
        for at, data in enumerate(tensor.array().reshape(-1).tolist()):
            if len(data) > MAX_TEXT:
                raise InvalidTensorError(
                    f"row {at} of '{tensor.name}' has {len(data)} bytes, at most {MAX_TEXT} are taken; "
                    f"send its beginning: the model reads no more than {self._most} tokens"
                )
            try:
                texts.append(self._prompt + data.decode())
            except UnicodeDecodeError as error:
                raise InvalidTensorError(
                    f"row {at} of '{tensor.name}' is not UTF-8: {error.reason} at byte "
                    f"{error.start}"
                ) from error
        unread = InvalidTensorError(
            f"'{tensor.name}' cannot be cut into tokens: the model's tokenizer gives up on it"
        )
        rows: list[Row] = []
        with panics.refused(unread):  # a pattern of tokenizer.json that never comes to an end
            for some in _together(texts):
                rows += map(_row, self._tokenizer.encode_batch_fast(some))
        return self._checked(tensor.name, rows, "has no tokens: an empty text has no meaning here")

    def of_ids(self, tensor: Tensor) -> list[Row]:
        """Raises InvalidTensorError naming the row that holds what is no token, none, or too many."""
        table = tensor.array()
        kept = table != PADDING
        lengths = kept.sum(axis=1)
        rows = []
        for at, length in enumerate(lengths.tolist()):
            if not kept[at, :length].all():
                raise InvalidTensorError(
                    f"row {at} of '{tensor.name}' has {PADDING} before its last token; it pads "
                    "behind it"
                )
            if length > self._most:
                raise InvalidTensorError(
                    f"row {at} of '{tensor.name}' has {length} tokens; the model takes {self._most}"
                )
            rows.append(Row(table[at, :length]))
        return self._checked(tensor.name, rows, "has no tokens")

    def table(self, rows: Sequence[Row]) -> tuple[Array, Array, Array | None]:
        """(ids, mask, types), int64 [rows, longest]; types None where all are 0."""
        shape = (len(rows), max(len(row.ids) for row in rows))
        ids = np.full(shape, self._padding, np.int64)
        mask = np.zeros(shape, np.int64)
        types = None
        for at, row in enumerate(rows):
            length = len(row.ids)
            ids[at, :length] = row.ids
            mask[at, :length] = 1
            if row.types is not None:
                types = np.zeros(shape, np.int64) if types is None else types
                types[at, :length] = row.types
        return ids, mask, types

    def _checked(self, name: str, rows: list[Row], none: str) -> list[Row]:
        most = self._vocabulary
        for at, row in enumerate(rows):
            if not len(row.ids):
                raise InvalidTensorError(f"row {at} of '{name}' {none}")
            least, last = min(row.ids), max(row.ids)
            if least < 0 or (most and last >= most):
                raise InvalidTensorError(
                    f"row {at} of '{name}' has the token {least if least < 0 else last}; the model's "
                    f"vocabulary has {most}, from 0"
                )
        return rows

    def _count_prompt(self, prompt: str) -> int:
        """Tokens in front of a text that are the prompt's; a closing special token is not."""
        if not prompt:
            return 0
        encoded = self._tokenizer.encode(prompt)
        closing: bool = encoded.special_tokens_mask[-1:] == [1]
        return len(encoded.ids) - closing


def _row(encoded: Any) -> Row:
    """Without what was cut off, which an encoding keeps."""
    types = encoded.type_ids
    return Row(encoded.ids, types if any(types) else None)


def _together(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """All of them in their order, at most MAX_TEXT characters at once (or one text and its prompt)."""
    begin = size = 0
    for at, text in enumerate(texts):
        if begin < at and size + len(text) > MAX_TEXT:
            yield texts[begin:at]
            begin, size = at, 0
        size += len(text)
    yield texts[begin:]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise IncompleteFilesError(
            f"{path.name} is missing; save the tokenizer as a fast one (save_pretrained writes it)"
        )
    try:
        return Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises nothing more special
        raise IncompleteFilesError(f"{path.name} cannot be read: {error}") from error


def _count(said: Any) -> int:
    return said if isinstance(said, int) and said > 0 else 0
