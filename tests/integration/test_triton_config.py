"""Folders with a config.pbtxt, loaded and asked: shapes, what is left out, labels, warm-up, groups."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from onnx import helper, numpy_helper
from tritonclient.grpc import model_config_pb2

from repository.errors import InvalidTensorError, LoadFailedError, RepositoryError
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.snapshot import Problem
from repository.tensors import Array, Tensor
from server.codecs.v2_paths import Route
from server.triton.config import config_of
from tests.models import add_onnx, identity_onnx, onnx_model

pytestmark = pytest.mark.timeout(60)
Io = tuple[str, str, tuple[int, ...]]


@asynccontextmanager
async def serving(root: Path, **options: Any) -> AsyncGenerator[Repository]:
    """With every model loaded that can be."""
    known: dict[str, Any] = {"settle_s": 0.0, "mode": "explicit", "default_host": "inline"}
    models = Repository(Options(root, state_dir=root.parent / "state", **(known | options)))
    async with models.running():
        for name in models.names():
            with suppress(RepositoryError):
                await models.load(name)
        yield models


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def put(root: Path, config: str, *, name: str = "m", files: dict[str, bytes] | None = None) -> Path:
    """The folder of a model; its ONNX file is written to 1/model.onnx by whoever calls."""
    folder = root / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config)
    for path, data in (files or {}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return folder / "1" / "model.onnx"


def graph(path: Path, nodes: list[Any], ins: list[Io], outs: list[Io], **constants: Any) -> None:
    model = onnx_model(nodes, ins, outs)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, path)


async def ask(models: Repository, model: str = "m", **inputs: Any) -> dict[str, Array]:
    tensors = [Tensor.of(name, np.asarray(value)) for name, value in inputs.items()]
    with models.lease(model) as gen:
        response = await models.infer(gen, InferRequest(tensors))
        return {t.name: t.array().copy() for t in response.outputs}


def shown(models: Repository, model: str = "m") -> dict[str, Any]:
    """GET .../config, which protobuf must understand."""
    found = config_of(models, Route(model, None))
    json_format.ParseDict(found, model_config_pb2.ModelConfig())
    return found


def problems_of(models: Repository, model: str) -> tuple[Problem, ...]:
    folder = models.status(model).folder
    assert folder is not None
    return folder.problems


def shapes(models: Repository, model: str = "m") -> dict[str, list[int]]:
    with models.lease(model) as gen:
        assert gen.signature is not None
        metadata = gen.signature.metadata()
        return {t["name"]: t["shape"] for t in (*metadata["inputs"], *metadata["outputs"])}


def floats(*dims: int) -> Array:
    return np.arange(np.prod(dims, dtype=int), dtype=np.float32).reshape(dims)


# shapes -------------------------------------------------------------------------------------------

RESHAPED = """\
backend: "onnxruntime"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] reshape { shape: [ 2, 2 ] } }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }
output { name: "same" data_type: TYPE_FP32 dims: [ 4, 1 ] reshape { shape: [ 2, 2 ] } }
"""


async def test_clients_see_dims_and_the_model_its_reshape(root: Path) -> None:
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    graph(
        put(root, RESHAPED),
        nodes,
        [("x", "FP32", (-1, 2, 2))],
        [("y", "FP32", (-1,)), ("same", "FP32", (-1, 2, 2))],
        axes=np.array([1, 2]),
    )
    async with serving(root) as models:
        assert shapes(models) == {"x": [-1, 4], "y": [-1, 1], "same": [-1, 4, 1]}
        for _ in range(3):  # the same form again takes other ways
            found = await ask(models, x=floats(3, 4))
            assert found["y"].tolist() == [[6.0], [22.0], [38.0]]
            assert found["same"].shape == (3, 4, 1)
        with pytest.raises(InvalidTensorError, match="unexpected shape for input 'x'"):
            await ask(models, x=floats(3, 2, 2))
        assert shown(models)["input"][0]["reshape"] == {"shape": [2, 2]}


async def test_a_free_axis_keeps_its_size_through_a_reshape(root: Path) -> None:
    config = """\
        backend: "onnxruntime"
        input { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] reshape { shape: [ -1, 2, 2 ] } }
        output { name: "y" data_type: TYPE_FP32 dims: [ 2, -1 ] reshape { shape: [ 1, 2, -1 ] } }"""
    node = helper.make_node("Reshape", ["x", "form"], ["y"])
    path = put(root, config)
    graph(path, [node], [("x", "FP32", (-1, 2, 2))], [("y", "FP32", (1, 2, -1))], form=[1, 2, -1])
    async with serving(root) as models:
        assert (await ask(models, x=floats(3, 4)))["y"].shape == (2, 6)


async def test_a_reshape_that_the_model_does_not_have_is_told_at_the_load(root: Path) -> None:
    identity_onnx(put(root, RESHAPED.split("output")[0]), "FP32", (-1, 4))
    async with serving(root) as models:
        with pytest.raises(LoadFailedError, match=r"shape \[-1, 2, 2\] by the config"):
            await models.load("m")


# what is left out -----------------------------------------------------------------------------------


async def test_a_model_that_batches_gets_four_rows_and_a_batcher_as_with_triton(root: Path) -> None:
    add_onnx(put(root, "# nothing at all\n"))
    async with serving(root) as models:
        assert shapes(models) == {"x": [-1, 4], "y": [-1, 4]}
        assert (await ask(models, x=floats(4, 4)))["y"].shape == (4, 4)
        with pytest.raises(InvalidTensorError, match="batch-size must be <= 4 for 'm'"):
            await ask(models, x=floats(5, 4))
        found = shown(models)
        assert found["name"] == "m" and found["platform"] == "onnxruntime_onnx"
        assert found["backend"] == "onnxruntime" and found["max_batch_size"] == 4
        assert found["version_policy"] == {"latest": {"num_versions": 1}}
        (x,), (y,) = found["input"], found["output"]
        assert (x["name"], x["data_type"], x["dims"]) == ("x", "TYPE_FP32", [4])
        assert x["optional"] is False and x["format"] == "FORMAT_NONE" and "reshape" not in x
        assert (y["name"], y["label_filename"]) == ("y", "")
        assert found["dynamic_batching"]["preferred_batch_size"] == [4]
        assert found["default_model_filename"] == "model.onnx"
        assert found["optimization"]["input_pinned_memory"] == {"enable": True}
        (group,) = found["instance_group"]
        assert (group["name"], group["kind"], group["count"]) == ("m", "KIND_CPU", 1)
        assert (group["gpus"], group["passive"], group["host_policy"]) == ([], False, "")
        assert found["parameters"] == {} and found["model_warmup"] == []


async def test_a_folder_without_a_config_of_tritons_is_not_held_to_four_rows(root: Path) -> None:
    add_onnx(put(root, ""))
    (root / "m" / "config.pbtxt").unlink()
    async with serving(root) as models:
        assert (await ask(models, x=floats(9, 4)))["y"].shape == (9, 4)
        found = shown(models)
        assert found["max_batch_size"] == 0 and found["input"][0]["dims"] == [-1, 4]
        assert found["instance_group"][0]["kind"] == "KIND_CPU"


async def test_a_scalar_is_one_element_to_clients(root: Path) -> None:
    graph(
        put(root, 'platform: "onnxruntime_onnx"'),
        [helper.make_node("Neg", ["x"], ["y"])],
        [("x", "FP32", ())],
        [("y", "FP32", ())],
    )
    async with serving(root) as models:
        assert shapes(models) == {"x": [1], "y": [1]}
        assert (await ask(models, x=np.float32([3])))["y"].tolist() == [-3.0]
        (x,) = shown(models)["input"]
        assert (x["dims"], x["reshape"]) == ([1], {"shape": []})
        assert shown(models)["max_batch_size"] == 0 and "dynamic_batching" not in shown(models)


async def test_a_model_that_cannot_batch_refuses_a_batch_size(root: Path) -> None:
    add_onnx(put(root, 'backend: "onnxruntime" max_batch_size: 2'), shape=(3, 4))
    async with serving(root) as models:
        with pytest.raises(LoadFailedError, match="autofill failed for model 'm'"):
            await models.load("m")


async def test_one_side_that_is_written_with_whole_shapes_keeps_the_model_from_batching(
    root: Path,
) -> None:
    inputs = "input { name: 'x' data_type: TYPE_FP32 dims: [ -1, 4 ] }"
    add_onnx(put(root, f"backend: 'onnxruntime' {inputs}"))
    async with serving(root) as models:
        assert shown(models)["max_batch_size"] == 0
        assert (await ask(models, x=floats(7, 4)))["y"].shape == (7, 4)


async def test_where_completing_is_switched_off_the_config_must_say_all(root: Path) -> None:
    add_onnx(put(root, 'backend: "onnxruntime"'))
    add_onnx(put(root, "", name="plain"))
    (root / "plain" / "config.pbtxt").unlink()
    async with serving(root, completes=False) as models:
        (problem,) = problems_of(models, "m")
        assert "must specify 'input' for model 'm'" in problem.message
        assert (await ask(models, "plain", x=floats(1, 4)))["y"].shape == (1, 4)


async def test_a_config_by_name_stands_in_place_of_the_usual_one(root: Path) -> None:
    small = {"configs/small.pbtxt": b"max_batch_size: 2", "configs/other.pbtxt": b"nonsense"}
    for name, files in (("a", small), ("b", {})):
        add_onnx(put(root, "max_batch_size: 6", name=name, files=files))
    async with serving(root, config_name="small") as models:
        sizes = [shown(models, name)["max_batch_size"] for name in "ab"]
        assert sizes == [2, 6] and models.names() == ["a", "b"]


# labels, warm-up, inputs that may be left out -------------------------------------------------------

LABELLED = """\
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }
"""


async def test_labels_are_read_with_the_model(root: Path) -> None:
    add_onnx(put(root, LABELLED, files={"labels.txt": "cat\r\n\ngröße\n".encode()}))
    async with serving(root) as models:
        with models.lease("m") as gen:
            assert dict(gen.spec.labels) == {"y": ("cat", "", "größe")}
        assert shown(models)["output"][0]["label_filename"] == "labels.txt"


async def test_labels_that_are_not_there_or_lie_elsewhere_are_the_models_fault(root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_text("no label")
    add_onnx(put(root, LABELLED))
    add_onnx(put(root, LABELLED, name="linked"))
    (root / "linked" / "labels.txt").symlink_to(secret)
    async with serving(root) as models:
        (problem,) = problems_of(models, "m")
        assert problem.where == "m/config.pbtxt:3" and "labels.txt" in problem.message
        assert not models.status("linked").serving_version
        assert "no label" not in str(problems_of(models, "linked"))


WARM = """\
max_batch_size: 4
model_warmup [ {{
  name: "real" batch_size: 2 count: 2
  inputs {{ key: "x" value: {{ data_type: TYPE_FP32 dims: [ 4 ] {data} }} }}
}} ]
"""


async def test_warm_up_reads_its_files_before_the_model_serves(root: Path) -> None:
    files = {"warmup/rows": floats(2, 4).tobytes() + b"and more"}
    add_onnx(put(root, WARM.format(data='input_data_file: "rows"'), files=files))
    async with serving(root) as models:
        (gen,) = models.status("m").generations
        assert "warm-up of 2 requests" in str([step.note for step in gen.story])


@pytest.mark.parametrize(
    ("data", "files", "why"),
    [
        ('input_data_file: "rows"', {}, "warmup/rows cannot be read"),
        (
            'input_data_file: "rows"',
            {"warmup/rows": b"1234"},
            r"warmup/rows has 4 bytes; input 'x' of shape \[2, 4\] needs 32",
        ),
        ('input_data_file: "../1/model.onnx"', {}, "leads out of the folder warmup"),
    ],
)
async def test_a_warm_up_that_fails_fails_the_load(
    root: Path, data: str, files: dict[str, bytes], why: str
) -> None:
    add_onnx(put(root, WARM.format(data=data), files=files))
    async with serving(root) as models:
        with pytest.raises(LoadFailedError, match=why) as caught:
            await models.load("m")
        assert "warm-up 1 ('real') of the config failed" in str(caught.value)


async def test_warm_up_of_texts_is_files_as_the_wire_has_them(root: Path) -> None:
    data = b"".join(len(t).to_bytes(4, "little") + t for t in (b"a", b"bc", b"", b"d"))
    warm = WARM.replace("TYPE_FP32", "TYPE_STRING").format(data='input_data_file: "texts"')
    identity_onnx(
        put(root, warm.replace("[ 4 ]", "[ 2 ]"), files={"warmup/texts": data}), "BYTES", (-1, 2)
    )
    async with serving(root) as models:
        assert (await models.load("m")).versions == (1,)


async def test_an_input_with_a_value_in_the_file_may_be_left_out(root: Path) -> None:
    config = """\
        input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] },
                { name: "by" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ]
        output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }"""
    node = helper.make_node("Mul", ["x", "by"], ["y"])
    path = put(root, config)
    ins: list[Io] = [("x", "FP32", (-1,)), ("by", "FP32", (1,))]
    graph(path, [node], ins, [("y", "FP32", (-1,))], by=np.float32([3]))
    async with serving(root) as models:
        assert (await ask(models, x=floats(3)))["y"].tolist() == [0, 3, 6]
        assert (await ask(models, x=floats(3), by=np.float32([2])))["y"].tolist() == [0, 2, 4]
        with pytest.raises(InvalidTensorError, match=r"missing required input\(s\) \['x'\]"):
            await ask(models, by=np.float32([2]))


# instances, warnings --------------------------------------------------------------------------------


async def test_several_groups_are_so_many_instances(root: Path) -> None:
    add_onnx(put(root, "instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_CPU } ]"))
    async with serving(root) as models:
        with models.lease("m") as gen:
            assert gen.chosen.devices == ("cpu", "cpu", "cpu")
        assert (await ask(models, x=floats(1, 4)))["y"].shape == (1, 4)
        groups = shown(models)["instance_group"]
        assert [(g["name"], g["count"], g["kind"]) for g in groups] == [
            ("m_0", 2, "KIND_CPU"), ("m_1", 1, "KIND_CPU"),
        ]  # fmt: skip


async def test_options_of_onnxruntime_reach_it(root: Path) -> None:
    keys = {
        "intra_op_thread_count": "1", "inter_op_thread_count": "2", "execution_mode": "1",
        "enable_mem_pattern": "0", "memory.enable_memory_arena_shrinkage": "cpu:0;gpu:0",
    }  # fmt: skip
    text = "".join(
        f"parameters {{ key: '{k}' value {{ string_value: '{v}' }} }}\n" for k, v in keys.items()
    )
    add_onnx(put(root, f"optimization {{ graph {{ level: -1 }} }}\n{text}"))
    async with serving(root) as models:
        for _ in range(3):
            assert (await ask(models, x=floats(1, 4)))["y"].shape == (1, 4)
        assert shown(models)["parameters"]["execution_mode"] == {"string_value": "1"}
        assert shown(models)["optimization"]["graph"] == {"level": -1}


async def test_what_is_not_honoured_is_in_the_models_status_while_it_serves(root: Path) -> None:
    add_onnx(put(root, "response_cache { enable: true }\n"))
    async with serving(root) as models:
        status = models.status("m")
        assert status.serving_version == 1
        (problem,) = problems_of(models, "m")
        assert problem.warning and problem.where == "m/config.pbtxt:1"
        assert problem.message == (
            "'response_cache': every request is run, unless the server is started with "
            "--response-cache-size"
        )
