"""What Aphrodite's bodies ask for, and what is said of those that cannot be read."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import InvalidRequestError
from server.codecs.aphrodite_body import Order, read_load, read_unload

FORM, JSON = "multipart/form-data", "application/json"
BOUNDARY = "b0und4ry"


def part(name: str, content: str | bytes, file: str = "", kind: str = "") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
    head += f'; filename="{file}"' if file else ""
    head += f"\r\nContent-Type: {kind}" if kind else ""
    body = content.encode() if isinstance(content, str) else content
    return f"{head}\r\n\r\n".encode() + body + b"\r\n"


def form(*parts: bytes) -> Order:
    raw = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return read_load(FORM, {"boundary": BOUNDARY}, raw)


def upload(content: str | bytes, name: str = "config.yaml") -> bytes:
    """As curl's -F config=@config.yaml sends it."""
    return part("config", content, name, "application/octet-stream")


def sent(body: Any) -> Order:
    return read_load(JSON, {}, json.dumps(body).encode())


def refused(read: Any, *args: Any) -> str:
    with pytest.raises(InvalidRequestError) as raised:
        read(*args)
    return str(raised.value)


# what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", JSON, "application/x-www-form-urlencoded", "text/plain"])
def test_no_body_means_the_default_model_whatever_type_it_has(kind: str) -> None:
    assert read_load(kind, {}, b"") == Order(None, None, "server")
    assert Order().bare


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": None, "config": None}])
def test_json_that_says_nothing_is_like_no_body(body: Any) -> None:
    assert sent(body).bare


def test_json_names_the_model_and_its_config_nested_or_flat() -> None:
    nested = sent({"model": "m", "config": {"max_model_len": 32, "dtype": "auto"}})
    assert nested == Order("m", {"max_model_len": 32, "dtype": "auto"}, "request")
    assert sent({"model": "m", "max_model_len": 32, "dtype": "auto"}) == nested
    assert sent({"model": "m"}) == Order("m", None, "request")
    assert sent({"max_model_len": 32}) == Order(None, {"max_model_len": 32}, "server")


def test_an_empty_config_is_a_config_and_null_is_none() -> None:
    assert sent({"model": "m", "config": {}}).config == {}
    assert sent({"model": "m", "config": None}).config is None


def test_nested_wins_over_flat_and_loses_nothing() -> None:
    order = sent({"model": "m", "config": {"dtype": "auto"}, "dtype": "half", "max-model-len": 9})
    assert order.config == {"dtype": "auto", "max_model_len": 9}


def test_a_form_brings_yaml_as_curl_sends_it() -> None:
    yaml = "max-model-len: 8192\ngpu_memory_utilization: 0.9\n"
    found = {"max_model_len": 8192, "gpu_memory_utilization": 0.9}
    assert form(upload(yaml)) == Order(None, found, "server")
    assert form(upload(yaml), part("model", "m")) == Order("m", found, "request")
    assert form(part("config", yaml), part("model", "m")) == Order("m", found, "request")
    assert form(upload(yaml.replace("\n", "\r\n"))).config == found
    assert form(part("model", "m")) == Order("m", None, "request")


@pytest.mark.parametrize("name", ["", "odd name.yaml", "../../etc/passwd", "c.json"])
def test_a_file_may_be_called_anything(name: str) -> None:
    assert form(upload("model: m\n", name)).model == "m"


def test_the_config_may_name_the_model() -> None:
    assert form(upload("model: m\ndtype: auto\n")) == Order("m", {"dtype": "auto"}, "uploaded")
    assert sent({"config": {"model": "m", "dtype": "auto"}}).named_by == "uploaded"
    assert form(upload("model: m\n"), part("model", "m")).named_by == "request"


LATIN = st.text(st.characters(max_codepoint=0x24F), max_size=9)  # beyond, JSON's \u is not YAML's


@given(
    model=st.none() | st.text(min_size=1, max_size=9).filter(lambda t: t.isprintable()),
    values=st.dictionaries(
        st.text("abcdefgh-_", min_size=1, max_size=9).filter(
            lambda k: k not in ("model", "config")
        ),
        st.none() | st.booleans() | st.integers(-(2**62), 2**62) | LATIN,
        min_size=1,
        max_size=5,
    ),
)
@settings(max_examples=60, deadline=None)
def test_nested_flat_and_uploaded_ask_for_the_same(model: str | None, values: Any) -> None:
    """JSON is YAML: the same bytes can be uploaded."""
    if len({key.replace("-", "_") for key in values}) < len(values):
        values = {"k": 1}
    named = {} if model is None else {"model": model}
    wanted = {key.replace("-", "_"): value for key, value in values.items()}
    nested, flat = sent({**named, "config": values}), sent({**named, **values})
    quoted = json.dumps(values, ensure_ascii=True)
    fields = [] if model is None else [part("model", model)]
    assert nested == flat == form(upload(quoted), *fields)
    assert nested == Order(model, wanted, "server" if model is None else "request")


# what cannot be read ------------------------------------------------------------------------------

YAML = {
    "two keys, one name": ("a-b: 1\na_b: 2\n", "'a_b' is there twice"),
    "broken": ("a: [1\n", "config.yaml:2: not YAML"),
    "tabs": ("a:\n\tb: 1\n", "spaces, not tabs"),
    "a list": ("- a\n", "must be a mapping"),
    "a word": ("hello\n", "must be a mapping"),
    "nothing": ("", "there is nothing in it"),
    "a comment": ("# later\n", "there is nothing in it"),
    "aliases": ("a: &x [1]\nb: *x\n", "aliases"),
    "a tag": ("a: !!python/object:os.system x\n", "tags"),
    "deep": ("a: " + "[" * 40 + "]" * 40 + "\n", "nested deeper"),
    "long": ("a: '" + "x" * 300_000 + "'\n", "more than 256 KiB"),
    "a date": ("a: 2020-01-01\n", "put it in quotes"),
    "no number": ("a: .nan\n", "nan is no number"),
    "a list in a model's place": ("model: [m]\n", "'model' must be the name"),
    "not UTF-8": (b"a: \xff\n", "not UTF-8"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_cannot_be_used_is_told_by_line_and_reason(case: str) -> None:
    text, why = YAML[case]
    said = refused(form, upload(text))
    assert said.startswith("Invalid YAML config file: ") and why in said


BODIES = {
    "malformed": b'{"model": ',
    "not an object": b'["m"]',
    "a text": b'"m"',
    "null": b"null",
    "not UTF-8": b'{"model": "\xff"}',
    "a config that is a list": b'{"config": [1]}',
    "deep": b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
    "very deep": b'{"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "a large number": b'{"a": 1%s}' % (b"0" * 30),
    "an endless number": b'{"a": 1e999}',
    "blanks": b"  ",
    "a form": part("model", "m"),
}


@pytest.mark.parametrize("case", BODIES)
def test_json_that_cannot_be_used_is_refused_and_never_read_as_nothing(case: str) -> None:
    assert refused(read_load, JSON, {}, BODIES[case]).startswith("Invalid JSON in request body: ")


@pytest.mark.parametrize("model", ["", 5, ["m"], {"a": 1}, True])
def test_a_model_is_named_by_a_text(model: Any) -> None:
    assert "must be the name" in refused(sent, {"model": model})


@pytest.mark.parametrize(
    "read",
    [
        lambda: sent({"model": "a", "config": {"model": "b"}}),
        lambda: form(upload("model: b\n"), part("model", "a")),
    ],
)
def test_two_names_are_one_too_many(read: Any) -> None:
    said = refused(read)
    assert "'a'" in said and "'b'" in said


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "application/octet-stream", "?"]
)
def test_json_that_is_called_something_else_is_refused_with_what_to_do(kind: str) -> None:
    for read in (lambda: read_load(kind, {}, b'{"model": "m"}'), lambda: read_unload(kind, b"{}")):
        said = refused(read)
        assert kind in said and "Content-Type: application/json" in said


FORMS = {
    "empty": b"",
    "no end": part("model", "m"),
    "JSON": b'{"model": "m"}',
    "another boundary": part("model", "m").replace(BOUNDARY.encode(), b"other") + b"--other--\r\n",
    "no parts": f"--{BOUNDARY}--\r\n".encode(),
    "no name": f"--{BOUNDARY}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
    "unknown": part("max_model_len", "5") + f"--{BOUNDARY}--\r\n".encode(),
    "twice": part("model", "m") * 2 + f"--{BOUNDARY}--\r\n".encode(),
    "many": part("model", "m") * 50 + f"--{BOUNDARY}--\r\n".encode(),
    "not UTF-8": part("model", b"\xff") + f"--{BOUNDARY}--\r\n".encode(),
    "no model": part("model", "") + f"--{BOUNDARY}--\r\n".encode(),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_form_that_cannot_be_used_is_refused(case: str) -> None:
    assert refused(read_load, FORM, {"boundary": BOUNDARY}, FORMS[case])
    assert refused(read_load, FORM, {}, FORMS[case])  # without a boundary no form is one


@given(st.binary(max_size=300), st.sampled_from(["", JSON, FORM]))
@settings(max_examples=150, deadline=None)
def test_no_bytes_break_it(raw: bytes, kind: str) -> None:
    whole = part("config", raw, "c.yaml") + f"--{BOUNDARY}--\r\n".encode()
    for body in (raw, whole):
        with suppress(InvalidRequestError):  # the one way to say no
            assert isinstance(read_load(kind, {"boundary": BOUNDARY}, body), Order)


# unload -------------------------------------------------------------------------------------------


def test_an_unload_names_one_model_or_none_for_all() -> None:
    assert read_unload(JSON, b'{"model": "m"}') == "m"
    assert read_unload("", b"") is None
    assert read_unload(JSON, b"{}") is None


@pytest.mark.parametrize("model", [b"null", b'""', b"5", b"[]"])
def test_an_unload_of_what_is_no_name_is_not_an_unload_of_all(model: bytes) -> None:
    assert "'model' must be" in refused(read_unload, JSON, b'{"model": %s}' % model)


def test_an_unload_with_a_misspelt_key_is_not_an_unload_of_all() -> None:
    assert "unknown key 'modle'" in refused(read_unload, JSON, b'{"modle": "m"}')
    said = refused(read_unload, FORM, part("model", "m"))
    assert "multipart/form-data" in said and "YAML" not in said  # an unload takes no form
