"""ONNX models in a worker: every datatype, the signature against the config, errors that help."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from repository.config import TensorConfig
from repository.errors import (
    IncompleteFilesError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.hosts.zygotes import Zygotes
from repository.messages import TensorSpec
from repository.tensors import DATATYPES, Tensor
from tests import models
from tests.hosting import ask, fails, forking, hosted, make, one

pytestmark = pytest.mark.asyncio(loop_scope="module")

X = Tensor.of("x", np.zeros((1, 4), np.float32))


def listed(name: str, datatype: str = "FP32", shape: tuple[int, ...] = (4,)) -> Any:
    return TensorConfig(name=name, datatype=datatype, shape=shape)


def sample(datatype: str) -> np.ndarray[Any, Any]:
    if datatype == "BYTES":
        return np.array([["", "a", "bé", "x\0y"], ["c"] * 4], dtype=object)
    if datatype == "BOOL":
        return np.array([[True, False, True, True]])
    return np.array([[0, 1, 2, 100]]).astype(DATATYPES[datatype].dtype)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygotes() -> AsyncIterator[Zygotes]:
    """For all tests: their workers are forked from the same."""
    async with forking() as found:
        yield found


async def refused(
    zygotes: Zygotes, path: Path, tmp_path: Path, kind: type = LoadFailedError, **config: Any
) -> str:
    """The text with which a model does not load."""
    spec = models.spec_of(path, **config)
    host = make(spec, tmp_path / "state", zygotes)
    text = await fails(lambda: host.load(spec, ["cpu"]), kind)
    await host.stop(5.0)
    assert str(tmp_path) not in text
    return text


async def test_every_datatype_makes_the_round_trip_unchanged(zygotes, tmp_path):
    for datatype in DATATYPES:
        path = models.identity_onnx(tmp_path / f"{datatype}/1/model.onnx", datatype)
        async with hosted(models.spec_of(path), tmp_path / "s", zygotes) as (host, loaded):
            assert loaded.inputs == (TensorSpec("x", datatype, (-1, 4)),)
            sent = Tensor.of("x", sample(datatype), datatype)
            (got,) = (await host.infer(ask(sent))).outputs
            assert (got.name, got.datatype, tuple(got.shape)) == ("y", datatype, sent.shape)
            assert bytes(got.data) == bytes(sent.data)


async def test_empty_and_scalar_tensors_make_the_round_trip(zygotes, tmp_path):
    for datatype in ("FP32", "BF16", "BYTES"):
        dtype = DATATYPES[datatype].dtype
        for name, dims, array in (
            ("empty", (-1, 4), np.zeros((0, 4), dtype)),
            ("scalar", (), np.array(b"7" if datatype == "BYTES" else 7, dtype)),
        ):
            path = models.identity_onnx(tmp_path / f"{name}{datatype}/1/m.onnx", datatype, dims)
            async with hosted(models.spec_of(path), tmp_path / "s", zygotes) as (host, _):
                sent = Tensor.of("x", array, datatype)
                (got,) = (await host.infer(ask(sent))).outputs
                assert tuple(got.shape) == array.shape
                assert bytes(got.data) == bytes(sent.data)


async def test_only_the_outputs_asked_for_come_in_their_order(zygotes, tmp_path):
    spec = models.spec_of(models.two_by_two_onnx(tmp_path / "m/1/model.onnx"))
    a, b = (Tensor.of(n, np.full((1, 4), v, np.float32)) for n, v in (("a", 5), ("b", 2)))
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        both = await host.infer(ask(b, a))
        assert {t.name: t.array()[0, 0] for t in both.outputs} == {"total": 7, "difference": 3}
        some = await host.infer(ask(a, b, outputs=("difference", "total")))
        assert [t.name for t in some.outputs] == ["difference", "total"]
        assert one(await host.infer(ask(a, b, outputs=("total",)))).tolist() == [[7.0] * 4]


async def test_requests_that_do_not_fit_are_the_clients_fault(zygotes, tmp_path):
    spec = models.spec_of(models.two_by_two_onnx(tmp_path / "m/1/model.onnx"))
    a, b = (Tensor.of(n, np.zeros((1, 4), np.float32)) for n in "ab")
    wrong_shape = Tensor.of("b", np.zeros((1, 5), np.float32))
    cases = {
        "no input 'c'": ask(a, b, Tensor.of("c", np.zeros(1))),
        "no output 'none'": ask(a, b, outputs=("none",)),
        "is FP64; the model wants FP32": ask(a, Tensor.of("b", np.zeros((1, 4)))),
        "(?i)missing": ask(a),
        "(?i)dimension": ask(a, wrong_shape),
        "size mismatch": ask(a, Tensor("b", "FP32", (1, 4), b"123")),
    }
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        for text, request in cases.items():
            with pytest.raises(InvalidTensorError, match=text):
                await host.infer(request)
        assert (await host.infer(ask(a, b))).outputs


async def test_text_that_is_not_utf8_is_refused(zygotes, tmp_path):
    spec = models.spec_of(models.identity_onnx(tmp_path / "m/1/model.onnx", "BYTES"))
    sent = Tensor.of("x", np.array([[b"\xff", b"", b"", b""]], dtype=object))
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with pytest.raises(InvalidTensorError, match="not UTF-8"):
            await host.infer(ask(sent))


async def test_a_graph_that_breaks_on_good_input_is_the_models_fault(zygotes, tmp_path):
    spec = models.spec_of(models.reshape_onnx(tmp_path / "m/1/model.onnx"))
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with pytest.raises(InferenceFailedError, match="Reshape"):
            await host.infer(ask(Tensor.of("x", np.zeros(4, np.float32))))
        assert one(await host.infer(ask(Tensor.of("x", np.zeros(6, np.float32))))).shape == (2, 3)


async def test_a_config_that_agrees_adds_the_batch_axis_and_chooses_outputs(zygotes, tmp_path):
    path = models.two_by_two_onnx(tmp_path / "m/1/model.onnx")
    spec = models.spec_of(
        path,
        max_batch_size=8,
        inputs=(listed("b"), listed("a", shape=(-1,))),
        outputs=(listed("difference"),),
    )
    async with hosted(spec, tmp_path / "s", zygotes) as (_, loaded):
        assert loaded.max_batch_size == 8
        assert loaded.inputs == (
            TensorSpec("a", "FP32", (-1, 4)),
            TensorSpec("b", "FP32", (-1, 4)),
        )
        assert loaded.outputs == (TensorSpec("difference", "FP32", (-1, 4)),)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"inputs": (listed("a"),), "max_batch_size": 2}, "not 'b', which the model needs"),
        ({"outputs": (listed("sum"),)}, "the model has 'total' .*, 'difference'"),
        (
            {"inputs": (listed("a", "INT32"), listed("b")), "max_batch_size": 2},
            "'a' is INT32 in the config; in the model it is FP32",
        ),
        ({"outputs": (listed("total"),)}, r"shape \[4\] by the config; in the model .* \[-1, 4\]"),
        (
            {"outputs": (listed("total", shape=(5,)),), "max_batch_size": 2},
            r"shape \[-1, 5\] by the config; in the model .* \[-1, 4\]",
        ),
        ({"options": {"thread": 2}}, "options.thread: .* did you mean 'threads'"),
        ({"options": {"threads": "two"}}, "options.threads is 'two'; it must be of type int"),
        ({"options": {"optimization": "most"}}, "must be one of none, basic, extended, all"),
    ],
)
async def test_a_config_that_disagrees_fails_the_load(zygotes, tmp_path, config, text):
    path = models.two_by_two_onnx(tmp_path / "m/1/model.onnx")
    assert re.search(text, await refused(zygotes, path, tmp_path, **config))


async def test_batching_needs_a_dynamic_first_axis(zygotes, tmp_path):
    path = models.add_onnx(tmp_path / "m/1/model.onnx", shape=(1, 4))
    text = await refused(zygotes, path, tmp_path, max_batch_size=4)
    assert "its first axis must be dynamic (-1)" in text and "[1, 4]" in text


async def test_a_damaged_or_missing_file_fails_with_a_reason_and_no_path(zygotes, tmp_path):
    path = models.add_onnx(tmp_path / "m/1/model.onnx")
    path.write_bytes(path.read_bytes()[:40])
    assert await refused(zygotes, path, tmp_path)
    path.unlink()
    text = await refused(zygotes, path, tmp_path, IncompleteFilesError)
    assert text == "model.onnx is missing"
    (path.parent / "notes.txt").write_text("alone no more")
    assert await refused(zygotes, path, tmp_path, IncompleteFilesError) == text


async def test_a_wish_for_a_gpu_that_is_not_there_fails_unless_cpu_is_allowed(zygotes, tmp_path):
    path = models.add_onnx(tmp_path / "m/1/model.onnx")
    for options, extra in (({}, {}), ({"allow_cpu_fallback": False}, {"cpu_fallback": True})):
        spec = models.spec_of(path, options=options)
        host = make(spec, tmp_path / "s", zygotes, extra=extra)
        text = await fails(
            lambda host=host, spec=spec: host.load(spec, ["cuda:7"]), LoadFailedError
        )
        assert "cuda:7" in text and "set device to cpu" in text
        await host.stop(5.0)
    spec = models.spec_of(path, options={"allow_cpu_fallback": True})
    host = make(spec, tmp_path / "s", zygotes)
    loaded = await host.load(spec, ["cuda:7"])
    assert loaded.details["providers"] == ["CPUExecutionProvider"]
    await host.stop(5.0)


async def test_overwriting_external_data_does_not_change_live_weights(zygotes, tmp_path):
    path = models.external_onnx(tmp_path / "m/1/model.onnx", 2.0)
    weights = path.parent / "weights.bin"
    sent = Tensor.of("x", np.zeros((1, 4096), np.float32))
    spec = models.spec_of(path, instances=2)
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with weights.open("r+b") as file:
            file.write(b"\0" * weights.stat().st_size)
        os.truncate(weights, 0)
        for _ in range(2):
            assert (one(await host.infer(ask(sent))) == 2.0).all()
    assert not list((tmp_path / "s/snapshots").iterdir())


async def test_external_data_that_is_short_missing_or_elsewhere_is_refused(zygotes, tmp_path):
    path = models.external_onnx(tmp_path / "m/1/model.onnx")
    weights = path.parent / "weights.bin"
    outside = tmp_path / "m/secret.bin"
    outside.write_bytes(weights.read_bytes())
    os.truncate(weights, 100)
    text = await refused(zygotes, path, tmp_path, IncompleteFilesError)
    assert "'weights.bin' holds 100 bytes; the model needs 16384" in text
    weights.rename(path.parent / "other.bin")
    assert "is missing" in await refused(zygotes, path, tmp_path, IncompleteFilesError)
    weights.symlink_to(outside)
    assert "is a symbolic link" in await refused(zygotes, path, tmp_path)
    models.relocate_external(path, "../secret.bin")
    assert "lies outside" in await refused(zygotes, path, tmp_path)
    models.relocate_external(path, str(outside))
    await refused(zygotes, path, tmp_path)
