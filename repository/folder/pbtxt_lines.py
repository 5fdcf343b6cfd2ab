"""On which line each key of a protobuf text file stands. protobuf's own parser does not tell.

Only the outer form is read: names, braces, brackets, strings and comments. protobuf has accepted
the text before, so that no mistakes need to be found here, only the way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""
    (?P<skip>\s+|\#[^\n]*|[,;:])
  | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<open>[{<\[])
  | (?P<close>[}>\]])
  | (?P<word>[A-Za-z_][\w.]*)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(slots=True)
class _Message:
    path: str
    is_list: bool = False  # between [ and ]: messages or scalars of one key
    counts: dict[str, int] = field(default_factory=dict)


def line_map(text: str) -> dict[str, int]:
    """ "input.0.dims" -> 7. A key that may repeat is there with its number ("input.1") and, for the
    first time it appears, without."""
    lines: dict[str, int] = {}
    stack = [_Message("")]
    key = ""  # the last key of the innermost message
    line = 1
    for token in _TOKEN.finditer(text):
        sort, said = token.lastgroup, token.group()
        if sort == "open":
            stack.append(_opened(stack, key, said, lines, line))
        elif sort == "close" and len(stack) > 1:
            closed = stack.pop()
            key = closed.path.rpartition(".")[2] if closed.is_list else ""
        elif sort == "word" and not stack[-1].is_list and _is_key(text, token.end()):
            key = said
            path = f"{stack[-1].path}.{key}" if stack[-1].path else key
            lines.setdefault(path, line)
        line += said.count("\n")
    return lines


def _opened(
    stack: list[_Message], key: str, bracket: str, lines: dict[str, int], line: int
) -> _Message:
    above = stack[-1]
    if bracket == "[":
        return _Message(f"{above.path}.{key}" if above.path else key, is_list=True)
    if above.is_list:  # one of several messages between brackets
        holder, name = stack[-2], above.path.rpartition(".")[2]
    else:
        holder, name = above, key
    number = holder.counts.get(name, 0)
    holder.counts[name] = number + 1
    base = f"{holder.path}.{name}" if holder.path else name
    lines.setdefault(f"{base}.{number}", line)
    # A message that stands alone is named without a number by whoever asks for it.
    return _Message(base if name in SINGLE else f"{base}.{number}")


def _is_key(text: str, at: int) -> bool:
    """A word before a colon or a brace is a key; other words are values."""
    rest = text[at : at + 200].lstrip()
    return rest.startswith((":", "{", "<", "["))


# Messages that appear at most once in their holder.
SINGLE = frozenset(
    {
        "all", "cuda", "default_queue_policy", "direct", "dynamic_batching", "ensemble_scheduling",
        "execution_accelerators", "graph", "input_pinned_memory", "latest", "model_metrics",
        "model_operations", "model_repository_agents", "model_transaction_policy", "oldest",
        "optimization", "output_pinned_memory", "rate_limiter", "reshape", "response_cache",
        "sequence_batching", "specific", "version_policy",
    }
)  # fmt: skip
