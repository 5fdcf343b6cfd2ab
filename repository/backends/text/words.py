"""From tokens to text as it is written: whole characters only, and nothing of a stop string.

Letters knows tokens and no stop strings; Stops knows text and no tokens. Neither looks at the whole
answer again but once, at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Decode: TypeAlias = Callable[[Sequence[int]], str]

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character (yet)
LONGEST_CHARACTER = 4  # bytes, thus tokens
FARTHEST, NEAR = 256, 2 * LONGEST_CHARACTER  # tokens that are decoded again: never more, at least


class Letters:
    """What `decode` makes of a growing list of tokens, piece by piece.

    What `push` and `rest` return, joined, is `decode` of all tokens. Decoding starts a few tokens
    back, at a place where the text was whole, for decoders that look at their neighbours (a space
    that the first word does not get, bytes that make a character together).
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._said: list[str] = []
        self._begin = 0  # of the tokens that are decoded
        self._whole = 0  # the last place where the text was whole
        self._shown = 0  # characters of theirs that were returned

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode(self._tokens[self._begin :])
        whole = self._whole_part(text)
        new = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if len(whole) == len(text):
            self._move_on()
        if len(self._tokens) - self._begin > FARTHEST:
            self._look_less_far()
        if new:
            self._said.append(new)
        return new

    def _move_on(self) -> None:
        """The text is whole here: decoding may start where it was whole the last time, if there is
        anything to see from there (special tokens leave nothing)."""
        behind = len(self._decode(self._tokens[self._whole :]))
        if behind:
            self._begin, self._shown = self._whole, behind
        self._whole = len(self._tokens)

    def _look_less_far(self) -> None:
        """Tokens that never make the text whole, or that leave none, would be decoded again with each
        that follows. What was held back of them stays held back."""
        self._begin = len(self._tokens) - NEAR
        self._whole = max(self._whole, self._begin)
        self._shown = len(self._whole_part(self._decode(self._tokens[self._begin :])))

    def _whole_part(self, text: str) -> str:
        """Without what the next tokens may still change. Bytes that are no character by now, and
        never will be, come out late rather than never."""
        if not text.endswith(UNKNOWN):
            return text
        if len(self._tokens) - self._whole <= LONGEST_CHARACTER:
            return text.rstrip(UNKNOWN)
        return text[:-1]

    def rest(self) -> str:
        """What was held back; no token follows."""
        text, said = self._decode(self._tokens), "".join(self._said)
        if not text.startswith(said):  # later bytes have changed earlier ones: too late to unsay
            return self._decode(self._tokens[self._begin :])[self._shown :]
        return text[len(said) :]


class Stops:
    """Lets text through up to the first stop string; the first is the one that is complete first.

    What may become one is held back. `found` is the one that ended it: nothing comes after that.
    How the text is cut into pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if self.found is not None or not self._stops:
            return "" if self.found is not None else text
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, begin, self.found = min(ends)
            self._held = ""
            return text[:begin]
        keep = self._may_become(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_become(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0

    def rest(self) -> str:
        """What was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return held
