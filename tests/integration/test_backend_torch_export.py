"""Exported programs and TorchScript: what they answer, and that none of them runs code unasked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

from repository.backends import torch_export
from repository.errors import (
    IncompleteFilesError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
    UntrustedCodeError,
)
from repository.messages import TensorSpec
from tests.hosting import ask
from tests.pt2_traps import Trap, doctored, pickled, traps, without
from tests.torch_models import answer, export, given, listed, loaded, mlp, order_of, quiet

ROWS = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)
FREE = Dim.DYNAMIC


class Two(torch.nn.Module):
    """Of two inputs, one with a tensor constant; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.plus = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(
        self, a: torch.Tensor, by: float, b: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        assert b is not None
        return {"total": a + b + self.plus, "scaled": (a * by).to(torch.bfloat16)}


class Pair(torch.nn.Module):
    """A pair without names comes out."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sum(1), x + 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pt2")
    x = torch.from_numpy(ROWS)
    export(home / "mlp.pt2", mlp(), x, dynamic_shapes=({0: FREE},))
    a = {0: FREE}
    export(home / "two.pt2", Two(), x, 2.0, x.clone(), dynamic_shapes=(a, None, a))
    export(home / "pair.pt2", Pair(), x, dynamic_shapes=({0: FREE},))
    export(home / "fixed.pt2", Pair(), x)
    return home


def order(home: Path, name: str, **config: Any) -> Any:
    return order_of(home, "torch_export", model_file=f"{name}.pt2", **config)


# programs -------------------------------------------------------------------------------------------


def test_the_signature_is_the_programs_and_outputs_keep_their_keys(home):
    with loaded(order(home, "two", max_batch_size=4)) as (backend, told):
        assert told.inputs == tuple(TensorSpec(n, "FP32", (-1, 4)) for n in "ab")
        assert told.outputs == (
            TensorSpec("total", "FP32", (-1, 4)),
            TensorSpec("scaled", "BF16", (-1, 4)),
        )
        got = answer(backend.infer(ask(*given(b=ROWS, a=2 * ROWS))))
        assert got["total"].tolist() == (2 * ROWS + ROWS + np.float32([1, 2, 3, 4])).tolist()
        scaled = torch.from_numpy(4 * ROWS).bfloat16().view(torch.uint16).numpy()
        assert got["scaled"].tolist() == scaled.tolist()
        some = backend.infer(ask(*given(b=ROWS, a=ROWS), outputs=("scaled",)))
        assert [t.name for t in some.outputs] == ["scaled"]
        for request, text in (
            (ask(*given(a=ROWS)), "'b' is missing"),
            (ask(*given(a=ROWS, b=ROWS, c=ROWS)), "no input 'c'"),
            (ask(*given(a=ROWS, b=ROWS), outputs=("no",)), "no output 'no'"),
            (ask(*given(a=ROWS, b=ROWS[:2])), "was exported for"),
            (ask(*given(a=ROWS, b=ROWS.astype(np.float64))), "is FP64; the model wants FP32"),
        ):
            with pytest.raises(InvalidTensorError, match=text):
                backend.infer(request)


def test_outputs_without_names_get_the_configs_or_numbers(home):
    with loaded(order(home, "pair")) as (backend, told):
        assert [spec.name for spec in told.outputs] == ["output_0", "output_1"]
    config = {"outputs": (listed("sum", shape=()), listed("more", shape=(4,)))}
    with loaded(order(home, "pair", max_batch_size=4, **config)) as (backend, told):
        assert told.outputs == (
            TensorSpec("sum", "FP32", (-1,)),
            TensorSpec("more", "FP32", (-1, 4)),
        )
        assert answer(backend.infer(ask(*given(x=ROWS))))["more"].tolist() == (ROWS + 1).tolist()


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("fixed", {"max_batch_size": 4}, r"shape \[5, 4\] .* must be dynamic"),
        ("mlp", {"inputs": (listed("y", shape=(-1, 4)),)}, "lists input 'y'; the model has 'x'"),
        ("two", {"outputs": (listed("scaled", "FP32", (-1, 4)),)}, "in the model it is BF16"),
        ("mlp", {"options": {"dtype": "float16"}}, "options.dtype: .*does not know"),
    ],
)
def test_a_config_that_disagrees_fails_the_load(home, name, config, text):
    with pytest.raises(LoadFailedError, match=text), loaded(order(home, name, **config)):
        pass


@pytest.mark.parametrize("size", [0, 30, 3000, -1])
def test_a_half_copied_archive_is_refused(tmp_path, home, size):
    (tmp_path / "m.pt2").write_bytes((home / "mlp.pt2").read_bytes()[:size])
    with pytest.raises(IncompleteFilesError, match=r"m\.pt2 is"), loaded(order(tmp_path, "m")):
        pass


@pytest.mark.parametrize("name", traps(Path("x")))
def test_an_archive_that_could_run_code_is_refused_before_it_does(tmp_path, home, name):
    marker = tmp_path / "it-ran"
    source, changes, text = traps(marker)[name]
    doctored(home / f"{source}.pt2", tmp_path / "m.pt2", changes)
    with pytest.raises(UntrustedCodeError, match=text) as told, loaded(order(tmp_path, "m")):
        pass
    assert "--trust-code" in str(told.value) and str(tmp_path) not in str(told.value)
    assert not marker.exists()


def test_a_pickle_is_looked_at_whatever_the_case_of_its_name(tmp_path, home):
    evil = {"data/sample_inputs/MODEL.PT": pickled({"x": Trap(tmp_path / "it-ran")})}
    doctored(home / "mlp.pt2", tmp_path / "m.pt2", evil)
    with pytest.raises(UntrustedCodeError, match="two members of one name"):
        loaded(order(tmp_path, "m")).__enter__()
    less = without(home / "mlp.pt2", tmp_path / "less.pt2", "data/sample_inputs/model.pt")
    doctored(less, tmp_path / "m.pt2", evil)
    with pytest.raises(UntrustedCodeError, match=r"MODEL\.PT.* is a pickle of more than tensors"):
        loaded(order(tmp_path, "m")).__enter__()
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["sample inputs", "weights", "a size", "a value called metadata"])
def test_the_traps_are_real_with_trust_they_run(tmp_path, home, name, caplog):
    marker = tmp_path / "it-ran"
    source, changes, _ = traps(marker)[name]
    doctored(home / f"{source}.pt2", tmp_path / "m.pt2", changes)
    trusting = order_of(tmp_path, "torch_export", model_file="m.pt2", extra={"trust_code": True})
    with quiet(), pytest.raises(Exception, match=""), loaded(trusting):  # noqa: PT011 - any
        pass
    assert marker.exists()


def test_an_archive_that_was_only_written_anew_is_served(tmp_path, home):
    doctored(home / "two.pt2", tmp_path / "m.pt2", {"extra/notes.txt": b"hello"})
    with loaded(order(tmp_path, "m")) as (backend, _):
        assert answer(backend.infer(ask(*given(a=ROWS, b=ROWS))))["total"].shape == (5, 4)


def test_programs_of_many_kinds_pass_the_judgement(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(20, 8)
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.words(ids) + torch.arange(ids.shape[1]).unsqueeze(-1)
            x = self.layer(x).masked_fill(~mask.unsqueeze(-1), 0.0)
            y = torch.cond(mask.all(), lambda x: x.sin(), lambda x: x.cos(), (x,))
            half = y[:, : y.shape[1] // 2].clamp(max=3.5).reshape(y.shape[0], -1)
            return {"a": torch.einsum("bij,bkj->bik", x, y), "b": half}

    args = (torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    free = {0: FREE, 1: FREE}
    export(tmp_path / "m.pt2", Net().eval(), *args, dynamic_shapes=(free, free))
    with loaded(order(tmp_path, "m")) as (backend, told):
        assert told.inputs == (
            TensorSpec("ids", "INT64", (-1, -1)),
            TensorSpec("mask", "BOOL", (-1, -1)),
        )
        sent = given(ids=np.ones((3, 8), np.int64), mask=np.ones((3, 8), bool))
        assert answer(backend.infer(ask(*sent)))["b"].shape == (3, 32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(
    "MODELDEPOT_TEST_AOTI" not in os.environ,
    reason="compiling takes a minute of two cores: set MODELDEPOT_TEST_AOTI to do it",
)
def test_a_compiled_package_is_served_where_it_is_trusted_and_only_there(tmp_path):
    model, x = mlp(), torch.from_numpy(ROWS)
    with quiet():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: FREE},))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "m.pt2"))
    with pytest.raises(UntrustedCodeError, match="AOTInductor"), loaded(order(tmp_path, "m")):
        pass
    trusting = order_of(
        tmp_path,
        "torch_export",
        model_file="m.pt2",
        extra={"trust_code": True},
        max_batch_size=8,
        inputs=(listed("x", shape=(4,)),),
    )
    with quiet(), loaded(trusting) as (backend, told):
        assert told.details["kind"] == "AOTInductor package"
        for rows in (5, 2):
            got = answer(backend.infer(ask(*given(x=ROWS[:rows]))))["output"]
            np.testing.assert_allclose(got, model(x[:rows]).numpy(), rtol=1e-5, atol=1e-6)


def test_unload_leaves_nothing_to_ask(home):
    backend = torch_export.TorchExportBackend()
    backend.load(order(home, "mlp"))
    backend.unload()
    with pytest.raises(InferenceFailedError):
        backend.infer(ask(*given(x=ROWS)))
