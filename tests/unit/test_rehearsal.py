"""Warm-up and golden checks against a fake host, with real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from repository.config import Checks, ModelConfig, WarmupInput, WarmupRequest
from repository.errors import (
    CheckFailedError,
    InferenceFailedError,
    LoadFailedError,
    WorkerDiedError,
)
from repository.generate import GenerateRequest, Piece
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.rehearsal import rehearse
from repository.spec import ModelSpec
from repository.tensors import DATATYPES, Tensor
from tests.fakes.host import FakeHost

NUMERIC = Loaded(
    (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), max_batch_size=4
)


def spec_of(folder: Path, backend: str = "onnx", **config: Any) -> ModelSpec:
    path = folder / "1"
    path.mkdir(exist_ok=True)
    return ModelSpec("m", 1, "f", folder, path, config=ModelConfig(**config), backend=backend)


def double(request: InferRequest) -> InferResponse:
    return InferResponse([Tensor.of("y", request.inputs[0].array() * 2)])


def broken(request: InferRequest) -> InferResponse:
    raise InferenceFailedError("node 7 overflowed")


def put(folder: Path, name: str = "a.json", y: Any = (2, 4), **more: Any) -> None:
    """A check in checks/ that asks for the double of [[1, 2]]."""
    (folder / "checks").mkdir(exist_ok=True)
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]
    outputs = [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": y}]
    check = {"inputs": inputs, "outputs": outputs} | more
    (folder / "checks" / name).write_text(json.dumps(check))


# warm-up ------------------------------------------------------------------------------------------


async def test_one_request_of_zeros_warms_every_slot(tmp_path: Path):
    host = FakeHost(slots=2)
    note = await rehearse(host, spec_of(tmp_path), NUMERIC)
    assert note == "warm-up of 2 requests; no checks"
    for request in host.batches:
        assert request.inputs[0].shape == (1, 2) and not request.inputs[0].array().any()


@pytest.mark.parametrize(
    ("backend", "loaded"),
    [
        ("python", NUMERIC),
        ("onnx", Loaded()),
        ("onnx", Loaded((TensorSpec("x", "BYTES", (1,)),))),
    ],
)
async def test_nothing_is_sent_where_zeros_may_mean_harm(
    tmp_path: Path, backend: str, loaded: Loaded
):
    host = FakeHost()
    assert await rehearse(host, spec_of(tmp_path, backend), loaded) == "no warm-up; no checks"
    assert host.batches == []


async def test_an_empty_list_switches_warm_up_off(tmp_path: Path):
    host = FakeHost()
    assert await rehearse(host, spec_of(tmp_path, warmup=()), NUMERIC) == "no warm-up; no checks"
    assert host.batches == []


async def test_zeros_that_nobody_asked_for_may_fail(tmp_path: Path):
    note = await rehearse(FakeHost(result=broken), spec_of(tmp_path), NUMERIC)
    assert note == "a warm-up with zeros failed, which is only noted (node 7 overflowed); no checks"


async def test_a_warm_up_that_the_config_asks_for_must_succeed(tmp_path: Path):
    spec = spec_of(tmp_path, warmup=(WarmupRequest(),))
    with pytest.raises(LoadFailedError, match="warm-up 1 of the config failed: node 7 overflowed"):
        await rehearse(FakeHost(result=broken), spec, NUMERIC)


@pytest.mark.parametrize("backend", ["onnx", "python"])
async def test_the_config_says_how_many_and_how_large(tmp_path: Path, backend: str):
    host = FakeHost()
    loaded = Loaded(
        (TensorSpec("x", "INT64", (-1, -1, 3)), TensorSpec("o", "FP32", (-1,), optional=True)),
        max_batch_size=4,
    )
    kinds = (WarmupRequest(batch_size=4, count=3, size=7, data="random"), WarmupRequest())
    note = await rehearse(host, spec_of(tmp_path, backend, warmup=kinds), loaded)
    assert note == "warm-up of 4 requests; no checks"
    assert [[t.shape for t in r.inputs] for r in host.batches] == [[(4, 7, 3)]] * 3 + [[(1, 1, 3)]]
    assert host.batches[0].inputs[0].array().any()


@pytest.mark.parametrize("data", ["zero", "random"])
async def test_every_datatype_can_be_warmed(tmp_path: Path, data: Any):
    host = FakeHost()
    loaded = Loaded(tuple(TensorSpec(name, name, (2, -1)) for name in DATATYPES))
    await rehearse(host, spec_of(tmp_path, warmup=(WarmupRequest(size=3, data=data),)), loaded)
    for tensor in host.batches[0].inputs:
        tensor.check_size()
        assert tensor.shape == (2, 3)


@pytest.mark.parametrize(
    ("loaded", "kind", "text"),
    [
        (NUMERIC, WarmupRequest(batch_size=5), "batch-size must be <= 4"),
        (Loaded(), WarmupRequest(), "declare them"),
        (
            Loaded((TensorSpec("x", "FP32", (-1, -1)),)),
            WarmupRequest(size=10**6),
            "may have 1 ?GiB",
        ),
    ],
)
async def test_an_impossible_warm_up_fails_the_load(
    tmp_path: Path, loaded: Loaded, kind: WarmupRequest, text: str
):
    with pytest.raises(LoadFailedError, match=text):
        await rehearse(FakeHost(), spec_of(tmp_path, warmup=(kind,)), loaded)


async def test_a_worker_that_dies_while_warming_is_never_only_noted(tmp_path: Path):
    host = FakeHost()
    host.kill("exit code -11")
    with pytest.raises(WorkerDiedError):
        await rehearse(host, spec_of(tmp_path), NUMERIC)


# texts --------------------------------------------------------------------------------------------

WRITES = Loaded(abilities=("generate",))
EMBEDS = Loaded(
    (
        TensorSpec("text", "BYTES", (-1,), optional=True),
        TensorSpec("input_ids", "INT32", (-1, -1), optional=True),
    ),
    (TensorSpec("embedding", "FP32", (-1, 4)),),
    max_batch_size=8,
    abilities=("embed",),
)


def refuses(request: GenerateRequest) -> list[Piece]:
    raise InferenceFailedError("node 7 overflowed")


async def test_a_model_that_generates_writes_two_tokens_in_every_slot(tmp_path: Path):
    put(tmp_path)  # tensors, of which it knows nothing
    host = FakeHost(slots=2)
    note = await rehearse(host, spec_of(tmp_path), WRITES)
    assert note == "warm-up of 2 requests; no checks"
    assert [r.sampling.max_tokens for r in host.asked] == [2, 2] and not host.batches
    host = FakeHost()
    kind = WarmupRequest(count=2, batch_size=3, size=5)
    note = await rehearse(host, spec_of(tmp_path, warmup=(kind,)), WRITES)
    assert note == "warm-up of 6 requests; no checks"
    assert {len((r.text or "").split()) for r in host.asked} == {5}


async def test_a_model_that_embeds_is_given_one_text(tmp_path: Path):
    host = FakeHost()
    assert (await rehearse(host, spec_of(tmp_path), EMBEDS)).startswith("warm-up of 1 request;")
    (request,) = host.batches
    assert [(t.name, t.shape, t.array().tolist()) for t in request.inputs] == [
        ("text", (1,), [b"warm"])
    ]
    host = FakeHost()
    spec = spec_of(tmp_path, warmup=(WarmupRequest(batch_size=3),))
    await rehearse(host, spec, EMBEDS)
    assert host.batches[0].inputs[0].shape == (3,)


async def test_a_text_that_fails_is_noted_unless_the_config_asked_for_it(tmp_path: Path):
    note = await rehearse(FakeHost(writes=refuses), spec_of(tmp_path), WRITES)
    assert "a warm-up with a text failed, which is only noted (node 7 overflowed)" in note
    spec = spec_of(tmp_path, warmup=(WarmupRequest(),))
    with pytest.raises(LoadFailedError, match=r"warm-up 1 of the config failed: node 7"):
        await rehearse(FakeHost(writes=refuses), spec, WRITES)
    assert await rehearse(FakeHost(), spec_of(tmp_path, warmup=()), WRITES) == (
        "no warm-up; no checks"
    )


# checks -------------------------------------------------------------------------------------------


async def test_checks_of_the_model_and_of_the_version_must_all_agree(tmp_path: Path):
    put(tmp_path)
    spec = spec_of(tmp_path, warmup=())
    put(spec.path, "b.json")
    arrays = {
        "inputs/x": np.array([[1, 2], [3, 4]], "f4"),
        "outputs/y": np.array([[2, 4], [6, 8]], "f4"),
    }
    np.savez_compressed(tmp_path / "checks" / "c.npz", **arrays)
    host = FakeHost(result=double)
    assert await rehearse(host, spec, NUMERIC) == "no warm-up; 3 checks agree"
    assert len(host.batches) == 3 and host.batches[0].outputs == ("y",)


async def test_a_folder_without_versions_runs_its_checks_once(tmp_path: Path):
    put(tmp_path)
    spec = ModelSpec("m", 1, "f", tmp_path, tmp_path, config=ModelConfig(warmup=()))
    host = FakeHost(result=double)
    assert await rehearse(host, spec, NUMERIC) == "no warm-up; 1 check agrees"


async def test_a_disagreement_names_file_output_and_numbers(tmp_path: Path):
    spec = spec_of(tmp_path, warmup=())
    put(spec.path, y=[[2, 4.5]])
    with pytest.raises(CheckFailedError) as failure:
        await rehearse(FakeHost(result=double), spec, NUMERIC)
    assert str(failure.value) == (
        "1/checks/a.json: output 'y' differs from the golden one in 1 of 2 elements, first at "
        "[0, 1]: got 4, expected 4.5; largest difference 0.5 (atol 1e-05, rtol 0.0001)"
    )


async def test_a_model_that_is_asked_is_warmed_and_checked_by_asking(tmp_path: Path):
    put(tmp_path)
    loaded = replace(NUMERIC, abilities=("ask", "decoupled"))
    host = FakeHost(slots=2, answers=lambda request: [double(request), double(request)])
    note = await rehearse(host, spec_of(tmp_path), loaded)
    assert note == "warm-up of 2 requests; 1 check agrees"
    assert len(host.groups) == 3 and host.batches == []


async def test_one_that_is_asked_and_answers_nothing_is_warm_and_agrees_with_nothing(
    tmp_path: Path,
):
    loaded = replace(NUMERIC, abilities=("ask", "decoupled"))
    host = FakeHost(answers=lambda request: [])
    assert await rehearse(host, spec_of(tmp_path), loaded) == "warm-up of 1 request; no checks"
    put(tmp_path)
    with pytest.raises(CheckFailedError, match="gives no output 'y'"):
        await rehearse(FakeHost(answers=lambda request: []), spec_of(tmp_path), loaded)


async def test_what_a_model_that_is_asked_ends_with_fails_its_warm_up(tmp_path: Path):
    loaded = replace(NUMERIC, abilities=("ask",))
    spec = spec_of(tmp_path, warmup=(WarmupRequest(),))
    with pytest.raises(LoadFailedError, match="warm-up 1 of the config failed: node 7 overflowed"):
        await rehearse(FakeHost(answers=broken), spec, loaded)


async def test_inputs_are_said_one_by_one_and_the_rest_is_filled(tmp_path: Path):
    two = Loaded(
        (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("t", "BYTES", (-1, 1))), max_batch_size=4
    )
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "rows").write_bytes(np.float32([1, 2, 3, 4, 5]).tobytes())
    said = WarmupInput(name="x", datatype="FP32", shape=(2,), data="rows")
    kind = WarmupRequest(batch_size=2, inputs=(said,), name="real")
    host = FakeHost()
    await rehearse(host, spec_of(tmp_path, warmup=(kind,)), two)
    x, t = host.batches[0].inputs
    assert x.array().tolist() == [[1, 2], [3, 4]] and t.array().tolist() == [[b""], [b""]]
    unbatched = Loaded((TensorSpec("x", "FP32", (2,)),))
    with pytest.raises(
        LoadFailedError, match=r"'real'\) .*batch_size is 2, but the model does not"
    ):
        await rehearse(FakeHost(), spec_of(tmp_path, warmup=(kind,)), unbatched)


@pytest.mark.parametrize("file", ["/etc/passwd", "../1/secret", "link", "a/../../secret", "x\0y"])
async def test_no_warm_up_file_leads_out_of_its_folder(tmp_path: Path, file: str):
    folder = tmp_path / "m"
    (folder / "warmup").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(8))
    (folder / "warmup" / "link").symlink_to(tmp_path / "secret")
    said = WarmupInput(name="x", datatype="FP32", shape=(2,), data=file)
    spec = spec_of(folder, warmup=(WarmupRequest(inputs=(said,)),))
    host = FakeHost()
    with pytest.raises(LoadFailedError, match="warmup/"):
        await rehearse(host, spec, NUMERIC)
    assert host.batches == []


async def test_checks_can_be_switched_off(tmp_path: Path):
    put(tmp_path, y=[9, 9])
    spec = spec_of(tmp_path, warmup=(), checks=Checks(enabled=False))
    host = FakeHost(result=double)
    assert await rehearse(host, spec, NUMERIC) == "no warm-up; checks are switched off"


async def test_a_checks_own_tolerance_goes_before_the_configs(tmp_path: Path):
    put(tmp_path, y=[2.25, 4], atol=0.5, rtol=0)
    spec = spec_of(tmp_path, warmup=(), checks=Checks(atol=0, rtol=0))
    await rehearse(FakeHost(result=double), spec, NUMERIC)
    put(tmp_path, y=[2.25, 4])
    with pytest.raises(CheckFailedError, match=r"atol 0, rtol 0"):
        await rehearse(FakeHost(result=double), spec, NUMERIC)


async def test_what_the_model_does_to_a_check_is_told(tmp_path: Path):
    put(tmp_path)
    spec = spec_of(tmp_path, warmup=())
    with pytest.raises(CheckFailedError, match=r"checks/a.json: the model failed: node 7"):
        await rehearse(FakeHost(result=broken), spec, NUMERIC)
    narrow = Loaded((TensorSpec("x", "FP32", (-1, 3)),), max_batch_size=4)
    with pytest.raises(CheckFailedError, match=r"refuses it: unexpected shape for input 'x'"):
        await rehearse(FakeHost(result=double), spec, narrow)
    with pytest.raises(CheckFailedError, match=r"gives no output 'y'; it gives x"):
        await rehearse(FakeHost(), spec, Loaded())
