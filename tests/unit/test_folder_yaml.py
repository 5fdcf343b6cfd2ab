"""config.yaml: hostile text is refused early, and every mistake is told with its line."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.read_yaml import read_yaml

BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghij"
)


def refused(text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text.encode() if isinstance(text, str) else text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (BOMB, 1, "anchors"),
        ("pin: true\noptions: *x\n", 2, "anchors"),
        ("options:\n  a: &x 1\n", 2, "anchors"),
        ("pin: true\npriority: 1\npin: false\n", 3, "twice"),
        ("options:\n  a: 1\n  b: {c: 1, c: 2}\n", 3, "twice"),
        ("options: !!python/object/apply:os.system [x]\n", 1, "tags"),
        ("options: {a: !!binary aGk=}\n", 1, "tags"),
        ("pin: true\n---\npin: false\n", 2, "second document"),
        ("options: {<<: {a: 1}}\n", 1, "<<"),
        ("options: {[1, 2]: x}\n", 1, "key"),
        ("options:\n  a: " + "[" * 30 + "]" * 30, 2, "deeper than 20"),
        ("options: {a: " + "1:" * 2000 + "1}", 1, "longer than 1000"),
        ("options:\n\ta: 1\n", 2, "cannot start any token"),
        ("options: {a: 1\n", 2, "not YAML"),
        (b"pin: true\npriority: \xff\n", 2, "UTF-8"),
        ("- a\n- b\n", 1, "mapping"),
        ("just text", 1, "mapping"),
    ],
    ids=lambda v: str(v)[:24] if isinstance(v, str) else None,
)  # fmt: skip
def test_what_plain_data_does_not_need_is_refused_at_its_line(
    text: str | bytes, line: int, word: str
) -> None:
    error = refused(text)
    assert error.where == f"config.yaml:{line}"
    assert word in error.message


@pytest.mark.parametrize(
    "text",
    [
        b"#" * (256 * 1024 + 1),
        b"options: {a: 2020-13-45}",
        b"options: {a: " + b"9" * 999 + b"}\xc3",
    ],
    ids=["large", "date", "utf-8"],
)
def test_a_file_that_is_too_large_or_unreadable_is_refused(text: bytes) -> None:
    assert refused(text).where.startswith("config.yaml")


def test_deep_nesting_is_refused_without_deep_recursion() -> None:
    assert "deeper" in refused("options: " + "[" * 100_000).message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("pin: true\nmax_batchsize: 8\n", 2, "'max_batchsize'; did you mean 'max_batch_size'?"),
        ("inputs:\n- name: x\n  dtype: FP32\n", 3, "'dtype' in 'inputs.0'; did you mean 'datatype'?"),
        ("batching:\n  max_delay_ms: 3\n", 2, "did you mean 'max_delay_us'?"),
        ("checks:\n  zzz: 3\n", 2, "unknown key 'zzz' in 'checks'"),
        ("pin: true\non: 1\n", 2, "the key on is not text"),
        ("max_batch_size: eight\n", 1, "'max_batch_size' must be a whole number, not 'eight'"),
        ("instances: true\n", 1, "'instances' must be a whole number, not true"),
        ("instances:\n", 1, "not nothing"),
        ("pin: 1\n", 1, "'pin' must be true or false, not 1"),
        ("reload: never\n", 1, "'reload' must be one of"),
        ("inputs: {name: x}\n", 1, "'inputs' must be a list, not a mapping"),
        ("inputs:\n- name: x\n  datatype: FP32\n  shape: [1, a]\n", 4, "'inputs.0.shape.1' must be a"),
        ("inputs:\n- name: x\n  shape: [1]\n", 2, "'inputs.0' needs the key 'datatype'"),
        ("ttl_s: .nan\n", 1, "'ttl_s' must be a number"),
        ("options: 3\n", 1, "'options' must be a mapping"),
        ("options: {1: 2}\n", 1, "is not text"),
        ("options: {a: 2020-01-01}\n", 1, "put it in quotes"),
        ("max_batch_size: 65537\n", 1, "at most 65536"),
        ("pin: true\ninstances: 0\n", 2, "'instances' must be at least 1, not 0"),
        ("ttl_s: 0\n", 1, "at least 0.001"),
        ("memory: 0\n", 1, "at least 1"),
        ("memory: 2 bananas\n", 1, "not a size"),
        ("backend: onxx\n", 1, "unknown backend 'onxx'; did you mean 'onnx'?"),
        ("device: gpu\n", 1, "'device' must be auto"),
        ("device: cuda:x\n", 1, "'device' must be auto"),
        ("inputs:\n- {name: x, datatype: float32, shape: [1]}\n", 2, "did you mean 'FP32'?"),
        ("inputs:\n- {name: x, datatype: TYPE_INT64, shape: [1]}\n", 2, "did you mean 'INT64'?"),
        ("inputs:\n- {name: x, datatype: FP32, shape: [-2]}\n", 2, "at least -1"),
        ("inputs:\n" + "- {name: x, datatype: FP32, shape: []}\n" * 2, 3, "named 'x'"),
        ("version_policy: {latest: 1, all: true}\n", 1, "exactly one"),
        ("version_policy: {specific: []}\n", 1, "exactly one"),
        ("version_policy: some\n", 1, "'version_policy' must be a mapping"),
        ("version_policy:\n  latest: 0\n", 2, "at least 1"),
        ("aliases:\n- fine\n- ../bad\n", 3, "invalid model name"),
        ("options:\n  model_file: ../../etc/passwd\n", 2, "must lie in the version's folder"),
        ("options: {model_file: /etc/passwd}\n", 1, "must lie in the version's folder"),
        ("warmup:\n- count: 0\n", 2, "'warmup.0.count' must be at least 1"),
        ("batching: 3\n", 1, "'batching' must be a mapping"),
        ("batching:\n  timeout_action: drop\n", 2, "must be one of delay, reject"),
        ("batching:\n  priorities: 101\n", 2, "at most 100"),
        ("batching:\n  by_priority:\n  - {priority: 0}\n", 3, "at least 1"),
        ("batching:\n  by_priority:\n  - {max_queue: 3}\n", 3, "needs the key 'priority'"),
        ("batching:\n  by_priority:\n  - {priority: 1, timeout: 3}\n", 3, "mean 'timeout_us'?"),
        ("instances: 0x" + "f" * 900, 1, "at most 64"),
    ],
)  # fmt: skip
def test_a_wrong_key_type_or_value_is_told_with_file_line_and_what_is_expected(
    text: str, line: int, message: str
) -> None:
    error = refused(text)
    assert error.where == f"config.yaml:{line}"
    assert message in error.message
    assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("version_policy: all", "version_policy", {"all": True}),
        ("version_policy: {latest: 2}", "version_policy", {"latest": 2}),
        ("version_policy: {specific: [1, 3]}", "version_policy", {"specific": [1, 3]}),
        ("checks: false", "checks", {"enabled": False}),
        ("checks: {atol: 1}", "checks", {"atol": 1}),
        ("batching: off", "batching", {"enabled": False}),
        ("batching: {enabled: true}", "batching", {"enabled": True}),
        ("warmup: false", "warmup", []),
        ("warmup: true", "warmup", [{}]),
        ("warmup: [{count: 3}]", "warmup", [{"count": 3}]),
        ("memory: 300MiB", "memory", 300 * 2**20),
        ("memory: 4096", "memory", 4096),
        ("device: cuda:11", "device", "cuda:11"),
    ],
)  # fmt: skip
def test_documented_spellings_are_spelled_out_and_fit_the_schema(
    text: str, key: str, value: object
) -> None:
    layer = read_yaml(text.encode())
    assert layer.values == {key: value}
    msgspec.convert(layer.values, ModelConfig)


def test_every_key_and_item_knows_its_line() -> None:
    layer = read_yaml(
        b"\xef\xbb\xbf# a comment\nmax_batch_size: 8\n\ninputs:\n  - name: x\n    datatype: FP32\n"
        b"    shape:\n      - 1\n      - 2\noptions: {a: {b: 1}}\n"
    )
    assert layer.lines["max_batch_size"] == 2
    assert layer.lines["inputs.0.name"] == 5
    assert layer.lines["inputs.0.shape.1"] == 9
    assert layer.place("options.a.b") == "config.yaml:10"
    assert layer.place("inputs.0.shape.1.deeper") == "config.yaml:9"
    assert layer.place("never.written") == "config.yaml"


def test_an_empty_file_says_nothing() -> None:
    assert read_yaml(b"").values == {} == read_yaml(b"# only a comment\n").values


YAMLISH = st.text(alphabet=st.sampled_from(list("ab:{}[],-&*!|>'\"#%@?\n \t012.<~")), max_size=60)


@settings(deadline=None, max_examples=300)
@given(YAMLISH.map(str.encode) | st.binary(max_size=60))
def test_no_text_whatever_raises_anything_but_a_config_error(text: bytes) -> None:
    for wrapped in (text, b"options:\n  a: " + text):
        try:
            layer = read_yaml(wrapped)
        except ConfigError:
            continue
        msgspec.json.encode(layer.values)
