"""Triton's ModelConfig -> a layer: from config.pbtxt, or from the JSON that a request to load brings.

What we honour is mapped to our keys (`repository.folder.pbtxt`); what is set and not honoured becomes
a warning, so that nobody believes in it; what would give wrong answers if it were ignored is an error.
The message as a whole is kept as `triton`. The protobuf classes take a while to import, so they are
imported when the first such text is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from repository.errors import ConfigError
from repository.folder.pbtxt.honoured import warn_of_rest
from repository.folder.pbtxt.names import read_backend, read_name
from repository.folder.pbtxt.page import Page
from repository.folder.pbtxt.running import read_groups, read_options, read_warmup
from repository.folder.pbtxt.scheduling import read_scheduling
from repository.folder.pbtxt.tensors import read_tensors
from repository.folder.pbtxt_lines import line_map
from repository.folder.read_yaml import MAX_SIZE
from repository.folder.schema import Layer, check_layer, nearest
from repository.names import shown
from repository.plain import plain

SOURCE = "config.pbtxt"
REQUEST = "request"
_LABEL = re.compile("[a-zA-Z0-9_]{1,100}")


def read_pbtxt(text: bytes, model: str, source: str = SOURCE, files: Collection[str] = ()) -> Layer:
    """`model` is the folder's name, which `name` must repeat if it is there (for "org/m" also "m").
    `files`: of its newest version, relative to that, which tell the backend where the text does not.

    Raises ConfigError with "config.pbtxt:LINE".
    """
    if len(text) > MAX_SIZE:
        raise ConfigError(f"the file has more than {MAX_SIZE // 1024} KiB", where=source)
    try:
        told = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ConfigError("the text is not UTF-8", where=f"{source}:{line}") from error
    message = _parse(told, source)
    _check_enums(message, source)
    return _read(Page(message, model=model, source=source, lines=line_map(told), files=files))


def triton_layer(text: str, model: str, files: Collection[str] = ()) -> Layer:
    """The ModelConfig that a request says in place of the model's config file, as protobuf's JSON:
    names of enums in either case, 64-bit numbers as numbers or text, keys in either spelling.

    Raises ConfigError with "request" for everything else, unknown keys included.
    """
    if len(text.encode("utf-8", "replace")) > MAX_SIZE:
        raise ConfigError(f"it has more than {MAX_SIZE // 1024} KiB", where=REQUEST)
    message = _parse_json(text)
    _check_enums(message, REQUEST)
    return _read(Page(message, model=model, source=REQUEST, lines={}, files=files))


def _read(page: Page) -> Layer:
    read_name(page)
    read_backend(page)
    if page.message.max_batch_size or page.has("max_batch_size"):
        page.set("max_batch_size", page.message.max_batch_size, "max_batch_size")
    read_tensors(page)
    read_groups(page)
    read_scheduling(page)
    _version_policy(page)
    read_warmup(page)
    read_options(page)
    if page.message.model_transaction_policy.decoupled:
        page.set("decoupled", True, "model_transaction_policy")
    if page.message.response_cache.enable:
        page.set("response_cache", True, "response_cache")
    _metric_tags(page)
    page.values["triton"] = {**plain(page.message), "name": page.model}
    warn_of_rest(page)
    return check_layer(page.layer())


def _metric_tags(page: Page) -> None:
    tags = dict(sorted(page.message.metric_tags.items()))
    for name in [name for name in tags if not _LABEL.fullmatch(name)]:
        page.warn("metric_tags", f"'metric_tags': '{shown(name)}' cannot be the name of a label")
        del tags[name]
    if tags:
        page.set("metric_tags", tags, "metric_tags")


def _version_policy(page: Page) -> None:
    policy = page.message.version_policy
    match policy.WhichOneof("policy_choice"):
        case "latest":
            value: dict[str, Any] = {"latest": policy.latest.num_versions or 1}
        case "specific":
            value = {"specific": list(policy.specific.versions)}
        case "all":
            value = {"all": True}
        case _:
            return
    page.set("version_policy", value, "version_policy")


# protobuf -----------------------------------------------------------------------------------------


def _parse(text: str, source: str) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        line = error.GetLine()
        where = f"{source}:{line}" if line else source
        said = re.sub(r"^\d+:\d+ : ", "", str(error)).replace("inference.", "")
        unknown = re.search(r'Message type "(\w+)" has no field named "(\w+)"', said)
        if unknown:
            known = getattr(model_config_pb2, unknown[1], None)
            fields = [f.name for f in known.DESCRIPTOR.fields] if known else []
            said = f"unknown key '{unknown[2]}'{nearest(unknown[2], fields)}"
        raise ConfigError(said[:300], where=where) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            "the file cannot be read as a model configuration", where=source
        ) from error


def _check_enums(message: Any, source: str) -> None:
    """protobuf takes any number for one of an enum's names, also those that have none."""
    for field, value in message.ListFields():
        items = value if field.is_repeated else (value,)
        if field.enum_type is not None:
            known = field.enum_type.values_by_number
            for item in items:
                if item not in known:
                    why = f"'{field.name}' is {item}, and no value has that number"
                    raise ConfigError(why, where=source, hint="write its name")
        elif field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                held = field.message_type.fields_by_name["value"]
                items = value.values() if held.message_type is not None else ()
            for item in items:
                _check_enums(item, source)


def _parse_json(text: str) -> Any:
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    message = model_config_pb2.ModelConfig()
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError("a model configuration is a JSON object", where=REQUEST)
        json_format.ParseDict(_in_capitals(values, message.DESCRIPTOR), message)
    except json_format.ParseError as error:
        raise ConfigError(_in_words(str(error)), where=REQUEST) from error
    except (RecursionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError("it is no JSON of a model configuration", where=REQUEST) from error
    return message


def _in_words(said: str) -> str:
    said = re.sub(r"^Failed to parse (\w+) field: ", r"'\1': ", said.replace("inference.", ""))
    unknown = re.search(r'has no field named "([^"]{0,60})" at "([^"]{0,100})"', said)
    return f"unknown key '{unknown[1]}' in {unknown[2]}" if unknown else said[:300]


def _in_capitals(value: Any, kind: Any) -> Any:
    """`value` of the message type `kind`, with the names of its enums in capitals, as protobuf wants
    them. What does not fit is left for protobuf to refuse."""
    if isinstance(value, list):
        return [_in_capitals(item, kind) for item in value]
    if not isinstance(value, dict) or kind is None:
        return value
    if kind.GetOptions().map_entry:
        held = kind.fields_by_name["value"].message_type
        return {key: _in_capitals(item, held) for key, item in value.items()}
    fields = {name: f for f in kind.fields for name in (f.name, f.json_name)}
    return {key: _field(item, fields.get(key)) for key, item in value.items()}


def _field(value: Any, field: Any) -> Any:
    if field is None:
        return value
    if field.enum_type is not None:
        return _shouted(value)
    return _in_capitals(value, field.message_type)


def _shouted(value: Any) -> Any:
    if isinstance(value, list):
        return [_shouted(item) for item in value]
    return value.upper() if isinstance(value, str) else value
