"""config.pbtxt: what is honoured is mapped, what is not is said, and every mistake has its line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.config import Batching, LevelPolicy
from repository.errors import ConfigError
from repository.folder.layering import merge
from repository.folder.pbtxt_lines import line_map
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.schema import Layer

FULL = """\
name: "digits"
platform: "onnxruntime_onnx"  # a comment with { braces
max_batch_size: 16
input [
  {
    name: "pixels"
    data_type: TYPE_FP32
    dims: [ -1, 64 ]
  },
  { name: "text" data_type: TYPE_STRING dims: 1 dims: 2 optional: true }
]
output { name: "label" data_type: TYPE_INT64 dims: [ 1 ] }
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 1 ] } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 500
  default_queue_policy { max_queue_size: 7 }
}
version_policy: { specific: { versions: [ 1, 3 ] } }
model_warmup [ {
  name: "w" batch_size: 4 count: 2
  inputs { key: "pixels" value { data_type: TYPE_FP32 dims: [ 32, 64 ] random_data: true } }
} ]
default_model_filename: "net.onnx"
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
"""


def read(text: str, model: str = "digits") -> Layer:
    return read_pbtxt(textwrap.dedent(text).encode(), model)


def said(layer: Layer) -> dict[str, Any]:
    """Without the message itself, which holds all of it."""
    return {key: value for key, value in layer.values.items() if key != "triton"}


def refused(text: str, model: str = "digits") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(text, model)
    return caught.value


def test_what_triton_says_is_said_in_our_words() -> None:
    layer = read(FULL)
    assert said(layer) == {
        "backend": "onnx",
        "max_batch_size": 16,
        "inputs": [
            {"name": "pixels", "datatype": "FP32", "shape": [-1, 64]},
            {"name": "text", "datatype": "BYTES", "shape": [1, 2], "optional": True},
        ],
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [1]}],
        "instances": 2,
        "device": "cuda:1",
        "batching": {
            "max_delay_us": 500,
            "preferred_sizes": [4, 8],
            "max_queue": 7,
            "allow_timeout_override": False,
        },
        "version_policy": {"specific": [1, 3]},
        "warmup": [
            {
                "name": "w",
                "batch_size": 4,
                "count": 2,
                "inputs": [
                    {"name": "pixels", "datatype": "FP32", "shape": [32, 64], "data": "random"}
                ],
            }
        ],
        "options": {"threads": 2, "model_file": "net.onnx"},
    }
    assert layer.problems == ()


def test_every_value_knows_its_line() -> None:
    _, sources = merge([read(FULL)])
    for key, line in {
        "backend": 2,
        "max_batch_size": 3,
        "inputs.0.shape": 8,
        "inputs.1.datatype": 10,
        "outputs.0.name": 12,
        "instances": 13,
        "device": 13,
        "batching.preferred_sizes": 15,
        "batching.max_queue": 17,
        "version_policy.specific": 19,
        "warmup.0.count": 20,
        "options.model_file": 24,
    }.items():
        assert sources[key] == f"config.pbtxt:{line}", key
    assert sources["priority"] == "default"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('backend: "python"', {"backend": "triton_python"}),
        ('platform: "onnxruntime_onnx" backend: "onnxruntime"', {"backend": "onnx"}),
        ("max_batch_size: 0", {"max_batch_size": 0}),
        ("instance_group { kind: KIND_CPU }", {"device": "cpu", "instances": 1}),
        ("instance_group { kind: KIND_GPU }", {"devices": ["cuda"]}),
        ("instance_group { count: 3 }", {"instances": 3}),
        ("version_policy { all {} }", {"version_policy": {"all": True}}),
        ("version_policy { latest { num_versions: 2 } }", {"version_policy": {"latest": 2}}),
        ("version_policy { latest {} }", {"version_policy": {"latest": 1}}),
        ("dynamic_batching { }", {"batching": {"allow_timeout_override": False}}),
        ("", {}),
    ],
)
def test_small_configs_are_mapped_key_by_key(text: str, values: dict[str, object]) -> None:
    assert said(read(text)) == values


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("max_batch_size: 4\nmax_batchsize: 3", ":2", "did you mean 'max_batch_size'?"),
        ("input {\n  name: 'x'\n  dimms: 3\n}", ":3", "unknown key 'dimms'; did you mean 'dims'?"),
        ("input [\n{ name: 'x' data_type: TYPE_FOO }]", ":2", "TYPE_FOO"),
        ("input {\n name: 'x' dims: 1 }", ":1", "needs a 'data_type'"),
        ("max_batch_size: 4\nmax_batch_size: 5", ":2", "max_batch_size"),
        ("max_batch_size: -1", ":1", "at least 0"),
        ("input {", ":1", ""),
        ("pin: true\n\nname: 'other'", ":1", ""),
        ("backend: 'python'\nname: 'other'", ":2", "directory name must equal model name"),
        ("\nplatform: 'tensorflow_graphdef'", ":2", "'tensorflow_graphdef' is not supported"),
        ("backend: 'onnxruntim'", ":1", "did you mean 'onnxruntime'?"),
        ("platform: 'onnxruntime_onnx'\nbackend: 'python'", ":2", "contradict"),
        ("default_model_filename: '../x'", ":1", "must lie in the version's folder"),
        ("input { name: 'x' data_type: TYPE_FP32 dims: [ 1,\n -5 ] }", ":1", "at least -1"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str, where: str, message: str) -> None:
    error = refused(text)
    assert error.where == f"config.pbtxt{where}"
    assert message in error.message


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("\noptimization { cuda { graphs: true } }", 2, "optimization"),
        ("instance_group { kind: KIND_GPU\n rate_limiter { priority: 2 } }", 2, "rate_limiter"),
        (
            "dynamic_batching {\n priority_queue_policy { key: 1 value { } }\n}",
            2,
            "dynamic_batching.priority_queue_policy",
        ),
        ("\nmodel_operations { op_library_filename: 'x' }", 2, "model_operations"),
        (
            "backend: 'python'\nparameters { key: 'EXECUTION_ENV_PATH' value { string_value: 'x' } }",
            2,
            "EXECUTION_ENV_PATH",
        ),
    ],
)
def test_what_is_set_and_not_honoured_is_a_warning_at_its_line(
    text: str, line: int, key: str
) -> None:
    (problem,) = read(text).problems
    assert problem.warning and problem.rule == "config"
    assert problem.where == f"config.pbtxt:{line}" and key in problem.message


QUEUES = """\
max_batch_size: 8
dynamic_batching {
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy {
    timeout_action: DELAY
    default_timeout_microseconds: 9000
    allow_timeout_override: true
  }
  priority_queue_policy [
    { key: 3 value: { max_queue_size: 5 } },
    { key: 1 value: { timeout_action: DELAY default_timeout_microseconds: 7 } }
  ]
}
"""


def test_a_queue_policy_is_said_in_our_words_and_silence_of_one_level_is_not_the_default() -> None:
    config, sources = merge([read(QUEUES)])
    batching = config.batching
    assert batching is not None and read(QUEUES).problems == ()
    assert (batching.priorities, batching.default_priority) == (3, 2)
    assert [batching.policy(n) for n in (1, 2, 3)] == [
        LevelPolicy(
            priority=1,
            max_queue=0,
            timeout_us=7,
            timeout_action="delay",
            allow_timeout_override=False,
        ),
        LevelPolicy(
            priority=2,
            max_queue=0,
            timeout_us=9000,
            timeout_action="delay",
            allow_timeout_override=True,
        ),
        LevelPolicy(
            priority=3,
            max_queue=5,
            timeout_us=0,
            timeout_action="reject",
            allow_timeout_override=False,
        ),
    ]
    for key, line in {
        "batching.priorities": 3,
        "batching.timeout_action": 6,
        "batching.timeout_us": 7,
        "batching.allow_timeout_override": 8,
        "batching.by_priority.0.timeout_us": 10,
    }.items():
        assert sources[key] == f"config.pbtxt:{line}", key


def test_whether_a_request_may_shorten_its_wait_is_as_triton_has_it_only_where_triton_says_so() -> (
    None
):
    for text, allowed in (
        ("", True),
        ("dynamic_batching {\n}", False),
        ("dynamic_batching { default_queue_policy { allow_timeout_override: true } }", True),
    ):
        config, _ = merge([read(f"max_batch_size: 8\n{text}")])
        assert (config.batching or Batching()).policy(1).allow_timeout_override is allowed


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("priority_levels: 2", 2, "needs a default_priority of 1 to 2"),
        ("priority_levels: 2\ndefault_priority_level: 3", 3, "needs a default_priority of 1 to 2"),
        ("default_priority_level: 1", 2, "'batching.default_priority' is 1; there are 0"),
        (
            "priority_levels: 2 default_priority_level: 1\n\n"
            "priority_queue_policy { key: 3 value { } }",
            4,
            "names priority 3 and there are 2",
        ),
        (
            "priority_levels: 2 default_priority_level: 1\npreserve_ordering: true",
            3,
            "goes neither with several priorities",
        ),
        (
            "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 }\n"
            "preserve_ordering: true",
            3,
            "nor with timeout_action delay",
        ),
        ("priority_levels: 101 default_priority_level: 1", 2, "at most 100"),
    ],
)
def test_what_triton_refuses_of_a_queue_is_refused_at_its_line(
    text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge([read(f"dynamic_batching {{\n{text} }}")])
    assert caught.value.where == f"config.pbtxt:{line}" and message in str(caught.value)


def test_a_nested_model_may_call_itself_by_its_last_folder() -> None:
    for name in ("bert", "org/bert"):
        assert read(f"name: '{name}'", "org/bert").values == {"triton": {"name": "org/bert"}}
    assert refused("name: 'org'", "org/bert").where == "config.pbtxt:1"


def test_a_file_that_is_too_large_or_not_text_is_refused() -> None:
    for text in (b"# " + b"x" * 2**18, b"name: \xff"):
        with pytest.raises(ConfigError):
            read_pbtxt(text, "m")


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([*"ab {}[]<>:,;'\"#\n1-", "input", "name", "dims"]), max_size=40).map(
        "".join
    )
)
def test_no_text_whatever_raises_anything_but_a_config_error(text: str) -> None:
    line_map(text)
    try:
        read(text)
    except ConfigError as error:
        assert error.where.startswith("config.pbtxt")  # noqa: PT017


def test_scanning_a_repository_without_pbtxt_imports_no_protobuf() -> None:
    code = (
        "import sys, repository.folder.scan, repository.folder.validate;"
        "print([m for m in sys.modules if m.startswith(('google.protobuf', 'grpc', 'torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text",
    [
        'input { name: "x" data_type: 99 dims: 1 }',
        "instance_group { kind: 99 }",
        'model_warmup { inputs { key: "x" value { data_type: 99 zero_data: true } } }',
        "dynamic_batching { default_queue_policy { timeout_action: 9 } }",
    ],
)
def test_a_number_that_no_value_of_an_enum_has_is_told(text):
    assert "no value has that number" in str(refused(text))
