"""Triton's ModelConfig field by field: what each becomes here, and what each that we lack is told as."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from repository.errors import ConfigError
from repository.folder.instances import spread
from repository.folder.layering import merge
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.schema import Layer

X = "name: 'x' data_type: TYPE_FP32 dims: [ 4 ]"


def read(text: str, files: tuple[str, ...] = ()) -> Layer:
    return read_pbtxt(textwrap.dedent(text).encode(), "m", files=files)


def value(text: str, key: str) -> Any:
    """Of our config, as it is after all layers."""
    return getattr(merge([read(text)])[0], key)


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        merge([read(text)])
    return str(caught.value)


# names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "files", "backend"),
    [
        ("backend: 'onnxruntime'", (), "onnx"),
        ("platform: 'onnxruntime_onnx'", (), "onnx"),
        ("platform: 'pytorch_libtorch'", (), "torchscript"),
        ("backend: 'pytorch'", (), "torchscript"),
        ("backend: 'libtorch'", (), "torchscript"),
        ("platform: 'torch_aoti' backend: 'pytorch'", (), "torch_export"),
        ("backend: 'python'", (), "triton_python"),
        ("", ("model.py", "model.pt", "model.onnx"), "onnx"),
        ("", ("model.py", "model.pt"), "torchscript"),
        ("", ("model.py",), "triton_python"),
        ("", ("model.py", "model.safetensors"), None),
        ("default_model_filename: 'net.onnx'", ("model.py",), "onnx"),
        ("default_model_filename: 'net.pt2'", ("net.pt2",), "torch_export"),
        ("", ("weights.bin",), None),
    ],
)
def test_the_backend_is_what_is_said_or_what_the_files_tell_in_tritons_order(
    text: str, files: tuple[str, ...], backend: str | None
) -> None:
    assert read(text, files).values.get("backend") == backend


@pytest.mark.parametrize("name", ["tensorrt", "openvino", "tensorflow", "vllm", "fil"])
def test_a_backend_that_is_not_here_is_an_error_that_lists_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(f"backend: '{name}'")
    assert f"'{name}' is not supported" in caught.value.message
    assert "onnxruntime" in caught.value.hint and "pytorch" in caught.value.hint


# tensors ------------------------------------------------------------------------------------------


def test_a_tensor_says_its_shape_for_clients_and_that_of_the_model() -> None:
    (x,) = value(
        "input { name: 'x' data_type: TYPE_STRING dims: [ 1 ] reshape: { shape: [ ] } optional: true }",
        "inputs",
    )
    assert (x.datatype, x.shape, x.reshape, x.optional) == ("BYTES", (1,), (), True)
    (y,) = value(
        "output { name: 'y' data_type: TYPE_BF16 dims: [ -1, 4 ] label_filename: 'names.txt' "
        "reshape { shape: [ -1, 2, 2 ] } }",
        "outputs",
    )
    assert (y.datatype, y.reshape, y.labels) == ("BF16", (-1, 2, 2), "names.txt")


@pytest.mark.parametrize(
    ("dims", "shape", "why"),
    [
        ("[ 4 ]", "[ ]", "it holds 1 elements, where the shape holds 4"),
        ("[ 4 ]", "[ 2, 3 ]", "it holds 6 elements, where the shape holds 4"),
        ("[ -1 ]", "[ 4 ]", "it has 0 sizes that are -1, where the shape has 1"),
        ("[ 2, -1, 3 ]", "[ 3, -1, 2 ]", "it holds 3 elements, where the shape holds 2"),
    ],
)
def test_a_reshape_that_would_change_how_many_elements_there_are_is_refused(
    dims: str, shape: str, why: str
) -> None:
    text = f"input {{ name: 'x' data_type: TYPE_FP32 dims: {dims} reshape {{ shape: {shape} }} }}"
    assert f"'reshape' of 'x' does not go with it: {why}" in refused(text)


def test_what_would_give_wrong_answers_is_refused() -> None:
    ragged = f"input {{ {X} allow_ragged_batch: true }}"
    assert "'allow_ragged_batch' is not supported" in refused(f"backend: 'onnxruntime' {ragged}")
    assert (
        read(f"backend: 'python' {ragged}").problems == ()
    )  # it is given one request after another
    batch = "batch_input { kind: BATCH_ELEMENT_COUNT target_name: 'n' data_type: TYPE_INT32 }"
    assert "'batch_input' is not supported" in refused(batch)
    for labels in ("/etc/passwd", "../x", "a/../../x"):
        text = f"output {{ name: 'y' data_type: TYPE_FP32 dims: 1 label_filename: '{labels}' }}"
        assert "must lie in the model's folder" in refused(text)


# where it runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "two", "none"),
    [
        ("{ count: 2 kind: KIND_GPU }", ["cuda:0", "cuda:1"] * 2, None),
        ("{ kind: KIND_GPU gpus: [ 0, 1 ] }", ["cuda:0", "cuda:1"], None),
        ("{ count: 2 kind: KIND_GPU gpus: [ 0, 1 ] }", ["cuda:0"] * 2 + ["cuda:1"] * 2, None),
        (
            "{ count: 1 kind: KIND_GPU gpus: 1 }, { count: 2 kind: KIND_CPU }",
            ["cuda:1", "cpu", "cpu"],
            None,
        ),
        ("{ count: 1 }, { count: 1 kind: KIND_CPU }", ["cuda:0", "cuda:1", "cpu"], ["cpu", "cpu"]),
    ],
)
def test_groups_say_of_each_instance_where_it_is(
    groups: str, two: list[str], none: list[str] | None
) -> None:
    config, _ = merge([read(f"backend: 'onnxruntime' instance_group [ {groups} ]")])
    found = spread(config, ["cuda:0", "cuda:1"])
    assert list(found.devices or ()) == two and found.instances == len(two)
    if none is None:
        with pytest.raises(ConfigError, match="this machine has no GPU"):
            spread(config, [])
    else:
        assert list(spread(config, []).devices or ()) == none


def test_one_group_without_gpus_leaves_the_place_to_the_server() -> None:
    config, _ = merge([read("instance_group { count: 3 }")])
    assert (config.instances, config.device, config.devices) == (3, "auto", None)
    config, _ = merge([read("instance_group [ { count: 2 kind: KIND_GPU gpus: 1 } ]")])
    assert (config.instances, config.device, config.devices) == (2, "cuda:1", None)
    (problem,) = read("instance_group { kind: KIND_MODEL }").problems
    assert "KIND_MODEL: the server chooses the device" in problem.message


def test_what_is_said_later_of_devices_holds_for_all_instances() -> None:
    file = read("instance_group { kind: KIND_GPU gpus: [ 0, 1 ] }")
    config, _ = merge([file, Layer("request", {"device": "cpu"})])
    assert (config.devices, config.device) == (None, "cpu")


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ("{ kind: KIND_CPU gpus: 1 }", "has kind KIND_CPU but specifies one or more GPUs"),
        ("{ count: -1 }", "must be 1 to 64, not -1"),
        ("{ count: 65 }", "must be 1 to 64, not 65"),
        ("{ count: 64 }, { count: 1 kind: KIND_CPU }", "asks for 65 instances"),
        ("{ gpus: -1 }", "which is no GPU"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: str, why: str) -> None:
    assert why in refused(f"instance_group [ {groups} ]")


def test_parameters_of_onnxruntime_are_options_here() -> None:
    text = """\
        platform: "onnxruntime_onnx"
        optimization { graph { level: 1 } }
        parameters [
          { key: "intra_op_thread_count" value: { string_value: "3" } },
          { key: "inter_op_thread_count" value: { string_value: "0" } },
          { key: "execution_mode" value: { string_value: "1" } },
          { key: "enable_mem_arena" value: { string_value: "0" } },
          { key: "enable_mem_pattern" value: { string_value: "0" } },
          { key: "memory.enable_memory_arena_shrinkage" value: { string_value: "cpu:0;gpu:0" } },
          { key: "gpu_mem_limit" value: { string_value: "4294967200" } },
          { key: "cudnn_conv_algo_search" value: { string_value: "0" } }
        ]"""
    layer = read(text)
    assert layer.values["options"] == {
        "optimization": "extended",
        "threads": 3,
        "execution": "parallel",
        "arena": False,
        "mem_pattern": False,
        "arena_shrinkage": "cpu:0;gpu:0",
        "gpu_mem_limit": 4294967200,
    }
    assert [p.message for p in layer.problems] == [
        "the parameter 'cudnn_conv_algo_search' is not honoured"
    ]
    for key, wrong in (
        ("intra_op_thread_count", "many"),
        ("execution_mode", "2"),
        ("memory.enable_memory_arena_shrinkage", "cpu"),
    ):
        given = f"{{ key: '{key}' value {{ string_value: '{wrong}' }} }}"
        text = f"backend: 'onnxruntime' parameters {given}"
        assert f"the parameter '{key}' cannot be '{wrong}'" in refused(text)


def test_a_python_model_gets_all_its_parameters() -> None:
    text = "backend: 'python' parameters { key: 'threads' value { string_value: 'x' } }"
    assert read(text).values["options"] == {"parameters": {"threads": "x"}}


def test_the_rest_of_what_is_honoured() -> None:
    assert value("model_transaction_policy { decoupled: true }", "decoupled") is True
    assert value("response_cache { enable: true }", "response_cache") is True
    tags = "metric_tags { key: 'team' value: 'vision' }"
    assert value(tags, "metric_tags") == {"team": "vision"}
    layer = read("metric_tags { key: 'a b' value: 'c' }")
    assert "metric_tags" not in layer.values
    assert "'a b' cannot be the name of a label" in layer.problems[0].message
    warmup = """\
        model_warmup [ {
          name: "real" batch_size: 2 count: 3
          inputs { key: "a" value: { data_type: TYPE_STRING dims: [ 2 ] input_data_file: "texts" } }
          inputs { key: "b" value: { data_type: TYPE_FP32 dims: [ ] zero_data: true } }
          inputs { key: "c" value: { data_type: TYPE_INT8 dims: [ 1 ] input_data_file: "zero" } }
        } ]"""
    (request,) = value(warmup, "warmup")
    assert (request.name, request.batch_size, request.count) == ("real", 2, 3)
    assert [(i.name, i.datatype, i.shape, i.data) for i in request.inputs] == [
        ("a", "BYTES", (2,), "texts"),
        ("b", "FP32", (), "zero"),
        ("c", "INT8", (1,), "./zero"),
    ]


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ("", "needs 'inputs'"),
        ("inputs { key: 'a' value { dims: 1 zero_data: true } }", "needs a 'data_type'"),
        ("inputs { key: 'a' value { data_type: TYPE_FP32 } }", "one of 'zero_data'"),
        (
            "inputs { key: 'a' value { data_type: TYPE_FP32 dims: -1 zero_data: true } }",
            "has a -1 in 'dims'",
        ),
    ],
)
def test_a_warm_up_that_is_not_whole_is_refused(inputs: str, why: str) -> None:
    assert why in refused(f"model_warmup {{ {inputs} }}")


@pytest.mark.parametrize(
    "text",
    [
        "runtime: 'x'",
        "optimization { priority: PRIORITY_MAX }",
        "optimization { cuda { graphs: true } }",
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' } } }",
        "optimization { input_pinned_memory { enable: true } }",
        "optimization { eager_batching: true }",
        "instance_group { profile: 'a' }",
        "instance_group { passive: true }",
        "instance_group { host_policy: 'numa' }",
        "instance_group { secondary_devices { kind: KIND_NVDLA } }",
        "instance_group { rate_limiter { resources { name: 'r' count: 1 } } }",
        f"input {{ {X} is_shape_tensor: true }}",
        f"input {{ {X} is_non_linear_format_io: true }}",
        f"output {{ {X} is_shape_tensor: true }}",
        "cc_model_filenames { key: '7.5' value: 'model.plan' }",
        "model_operations { op_library_filename: 'libmine.so' }",
        "model_repository_agents { agents { name: 'checksum' } }",
        "model_metrics { metric_control { metric_identifier { family: 'nv_x' } } }",
        "sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 "
        "use_same_buffer_for_input_output: true } }",
        "sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 "
        "use_growable_memory: true } }",
    ],
)
def test_what_is_not_honoured_is_one_warning_that_names_it(text: str) -> None:
    (problem,) = read(text).problems
    assert problem.warning and problem.where == "config.pbtxt:1"
    assert "is not honoured" in problem.message


def test_what_is_switched_off_asks_for_nothing() -> None:
    for text in ("response_cache { enable: false }", "optimization { cuda { } }"):
        assert read(text).problems == ()
