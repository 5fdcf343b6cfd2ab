"""config.yaml -> a layer. Hostile YAML is refused before a single value is built.

YAML lets 306 bytes stand for more than any memory holds (aliases), and lets a later key silently
replace an earlier one. So the parser's events are read first: no anchors or aliases, no tags, no
duplicate keys, one document, 20 levels, 256 KiB. What remains is plain data; the same pass notes
the line of every key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from repository.errors import ConfigError
from repository.folder.schema import Layer, check_layer

MAX_SIZE = 256 * 1024
MAX_DEPTH = 20
# Numbers, dates and words are short. PyYAML reads 1:2:3... as a number to base 60, in quadratic
# time.
MAX_PLAIN = 1000

# libyaml is ten times faster; PyYAML may have been built without it.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: bytes, source: str = "config.yaml") -> Layer:
    """A model's config. Raises ConfigError with "config.yaml:LINE" for whatever cannot be used."""
    return check_layer(read_mapping(text, source))


def read_mapping(text: bytes, source: str) -> Layer:
    """Any YAML file of ours that is a mapping; what its keys may be is the caller's business."""
    if len(text) > MAX_SIZE:
        raise ConfigError(
            f"the file has more than {MAX_SIZE // 1024} KiB", where=source, hint="is it a config?"
        )
    try:
        plain = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ConfigError("the text is not UTF-8", where=f"{source}:{line}") from error
    try:
        lines = _scan(plain, source)
        values = yaml.load(plain, Loader=LOADER)  # a safe loader, see LOADER
    except yaml.YAMLError as error:
        raise _unreadable(error, source) from error
    except (ValueError, OverflowError) as error:  # a date 2020-13-45, a number of 5,000 digits
        raise ConfigError("a date or number in it cannot be read", where=source) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError("the file must be a mapping of keys to values", where=f"{source}:1")
    return Layer(source, values, lines)


@dataclass(slots=True)
class _Open:
    """A mapping or list that is being read. `key` is the key whose value comes next."""

    path: str
    keys: set[str] | None = field(default_factory=set)  # None: a list
    key: str | None = None
    items: int = 0

    def below(self) -> str:
        name = self.key if self.keys is not None else str(self.items)
        return f"{self.path}.{name}" if self.path else str(name)


def _scan(text: str, source: str) -> dict[str, int]:
    """The line of every key and list item. Raises ConfigError for what plain data does not need."""
    lines: dict[str, int] = {}
    stack: list[_Open] = []
    documents = 0
    for event in yaml.parse(text, Loader=LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 1
        where = f"{source}:{line}"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ConfigError("a second document begins here", where=where, hint="remove '---'")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            stack.pop()
            _value_done(stack)
        elif isinstance(event, yaml.NodeEvent):
            _refuse_tricks(event, where)
            if _is_key(event, stack):
                _note_key(event, stack[-1], where)
                lines.setdefault(stack[-1].below(), line)
                continue
            path = stack[-1].below() if stack else ""
            lines.setdefault(path, line)
            if isinstance(event, yaml.ScalarEvent):
                _value_done(stack)
                continue
            if len(stack) >= MAX_DEPTH:
                raise ConfigError(f"nested deeper than {MAX_DEPTH} levels", where=where)
            is_map = isinstance(event, yaml.MappingStartEvent)
            stack.append(_Open(path, set() if is_map else None))
    return lines


def _refuse_tricks(event: Any, where: str) -> None:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise ConfigError("anchors and aliases (& and *) are not allowed", where=where)
    if getattr(event, "tag", None) is not None:
        raise ConfigError("tags (!) are not allowed", where=where)
    plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
    if plain and len(event.value) > MAX_PLAIN:
        raise ConfigError(
            f"a value without quotes is longer than {MAX_PLAIN} characters", where=where
        )


def _is_key(event: Any, stack: list[_Open]) -> bool:
    return bool(stack) and stack[-1].keys is not None and stack[-1].key is None


def _note_key(event: Any, mapping: _Open, where: str) -> None:
    if not isinstance(event, yaml.ScalarEvent):
        raise ConfigError("a key must be plain text", where=where)
    assert mapping.keys is not None
    if event.value in mapping.keys:
        raise ConfigError(f"the key '{event.value[:40]}' is there twice", where=where)
    if event.value == "<<":
        raise ConfigError("merging (<<) is not allowed", where=where)
    if event.implicit[0] and not _is_text(event.value):
        raise ConfigError(
            f"the key {event.value[:40] or '(empty)'} is not text",
            where=where,
            hint="put it in quotes",
        )
    mapping.keys.add(event.value)
    mapping.key = event.value


def _is_text(plain: str) -> bool:
    """YAML 1.1 reads 1, 1:2, 2020-01-01, on, no, ~ and the like as something else."""
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.get(plain[:1], [])
    return not any(regexp.match(plain) for _, regexp in resolvers)


def _value_done(stack: list[_Open]) -> None:
    if stack:
        stack[-1].key = None
        stack[-1].items += 1


def _unreadable(error: yaml.YAMLError, source: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None)
    where = f"{source}:{mark.line + 1}" if mark is not None else source
    message = f"not YAML: {problem or 'a character that is not allowed'}"
    tab = "found character that cannot start any token" in message
    return ConfigError(message, where=where, hint="indent with spaces, not tabs" if tab else "")
