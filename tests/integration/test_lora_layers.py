"""Which layers an adapter can change, and what is refused with its reason."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from repository.backends.lora.adapters import LoraAdapters
from repository.config import Adapters
from repository.errors import InferenceFailedError
from tests import lora
from tests.lora import PREFIX, Mlp, order, write

NEAR = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with lora.one_thread():
        yield


def lora_of(model: nn.Module, **config: Any) -> LoraAdapters:
    return LoraAdapters(model, Adapters(**{"slots": 3, "max_rank": 8, **config}))


def refusal(model: nn.Module, path: Path, **wishes: bool) -> str:
    (report,) = lora_of(model).adapt([order(path, "a", **wishes)])
    assert report.error and "/" not in report.error.replace("and/or", "")
    return report.error


def slot_of(loras: LoraAdapters, path: Path, name: str = "a") -> int:
    (report,) = loras.adapt([order(path, name)])
    assert report.error == ""
    slot = loras.take(name)
    assert slot is not None
    return slot


class Around(nn.Module):
    """A model with another one inside."""

    def __init__(self, **inside: nn.Module) -> None:
        super().__init__()
        for name, module in inside.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self._modules.values():
            x = module(x)
        return x


def test_an_adapter_made_for_the_model_inside_or_around_is_understood(tmp_path: Path) -> None:
    x = torch.randn(1, 16)
    inside = write(tmp_path / "inside")
    around = write(tmp_path / "around", {f"model.{n}": size for n, size in lora.MLP.items()})
    for model, made in ((Around(model=Mlp()), inside), (Mlp(), around)):
        loras = lora_of(model)
        slot = slot_of(loras, made.path)
        loras.rows([slot])
        expected = inside.mlp(Mlp(), x)  # both have the same numbers
        torch.testing.assert_close(model(x), expected, **NEAR)


def test_where_a_name_may_mean_two_layers_the_adapter_is_refused(tmp_path: Path) -> None:
    twice = Around(
        left=nn.ModuleDict({"fc": nn.Linear(4, 4)}), right=nn.ModuleDict({"fc": nn.Linear(4, 4)})
    )
    text = refusal(twice, write(tmp_path / "a", {"fc": (4, 4)}).path)
    assert "fc may mean left.fc or right.fc" in text


def test_an_adapter_for_another_model_is_refused_with_names_of_both(tmp_path: Path) -> None:
    text = refusal(Mlp(), write(tmp_path / "a", {f"h.{i}.q": (8, 8) for i in range(5)}).path)
    assert "matches no layer of this model: it changes h.0.q, h.1.q, h.2.q and 2 more" in text
    assert "the model has fc1, fc2" in text
    text = refusal(Mlp(), write(tmp_path / "b", {**lora.MLP, "fc3": (8, 8)}).path)
    assert "has 1 layers of 3 that this model has not: it changes fc3" in text
    text = refusal(Mlp(), write(tmp_path / "c", {"fc1": (32, 8)}).path)
    assert "fc1 has 8 features in and 32 out, the model's has 16 and 32" in text


def test_layers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model = Around(
        emb=nn.Embedding(9, 4), conv=nn.Conv1d(4, 4, 1), attn=nn.MultiheadAttention(4, 1)
    )
    assert "emb is a Embedding" in refusal(model, write(tmp_path / "a", {"emb": (4, 9)}).path)
    assert "conv is a Conv1d" in refusal(model, write(tmp_path / "b", {"conv": (4, 4)}).path)
    text = refusal(model, write(tmp_path / "c", {"attn.out_proj": (4, 4)}).path)
    assert "belongs to a torch.nn.MultiheadAttention" in text
    ints = Mlp()
    ints.fc1.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    assert "floating weights" in refusal(ints, write(tmp_path / "d").path)


def test_a_layer_with_two_names_is_changed_once(tmp_path: Path) -> None:
    shared = nn.Linear(8, 8)
    model, x = Around(one=shared, two=shared), torch.randn(1, 8)
    made = {name: write(tmp_path / name, {name: (8, 8)}) for name in ("one", "two")}
    loras = lora_of(model)
    slots = {name: slot_of(loras, each.path, name) for name, each in made.items()}
    assert loras.device_bytes == 4 * 8 * 16 * 4
    a, b, scaling = made["one"].parts["one"]
    weight = shared.weight + b @ a * scaling
    for slot in slots.values():  # the same numbers
        loras.rows([slot])
        layer = nn.functional.linear
        torch.testing.assert_close(
            model(x), layer(layer(x, weight, shared.bias), weight, shared.bias), **NEAR
        )
    loras.rows([0])
    text = refusal(model, write(tmp_path / "both", {"one": (8, 8), "two": (8, 8)}).path)
    assert "one and two are the same layer" in text


def test_torchs_own_transformer_layer_does_not_pass_by_the_adapter(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        plain = layer(x)
        loras = lora_of(layer)
        slot = slot_of(loras, write(tmp_path / "a", {"linear1": (16, 8)}).path)
        loras.rows([slot, 0])
        mixed = layer(x)
        loras.rows([0, 0])
        assert torch.equal(layer(x), plain)
    assert (mixed[0] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(mixed[1], plain[1], **NEAR)


class Flat(nn.Module):
    """[rows, n, 8] -> its layer sees [rows * n, 8]; `drop`: fewer."""

    def __init__(self, drop: int = 0) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        result: torch.Tensor = self.fc(input=flat[: len(flat) - self.drop])
        return result


def test_a_layer_that_is_given_the_rows_flattened_knows_whose_they_are(tmp_path: Path) -> None:
    model, x = Flat(), torch.randn(3, 5, 8)
    plain = model(x).view(3, 5, 8)
    made = write(tmp_path / "a", {"fc": (8, 8)})
    loras = lora_of(model)
    slot = slot_of(loras, made.path)
    loras.rows([0, slot, 0])
    y = model(x).view(3, 5, 8)
    a, b, scaling = made.parts["fc"]
    torch.testing.assert_close(y[1], plain[1] + x[1] @ a.t() @ b.t() * scaling, **NEAR)
    assert torch.equal(y[0], plain[0]) and torch.equal(y[2], plain[2])
    model.drop = 1
    with pytest.raises(InferenceFailedError, match=r"layer fc was given \[14, 8\] in a batch of 3"):
        model(x)
    loras.rows([slot] * 3)
    assert model(x).shape == (14, 8)  # all the same: no matter whose they are


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_and_models_of_every_floating_datatype(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(2, 16, dtype=dtype)
    near = {"atol": 5e-2, "rtol": 5e-2}
    made = write(tmp_path / "a", dtype=dtype)
    for model_type in (torch.float32, dtype):
        model = Mlp().eval().to(model_type)
        loras = lora_of(model)
        slot = slot_of(loras, made.path)
        loras.rows([slot, 0])
        y = model(x.to(model_type))
        assert y.dtype == model_type
        torch.testing.assert_close(y[0].float(), made.mlp(Mlp(), x.float())[0], **near)


def test_a_forward_under_autocast_gives_what_autocast_gives(tmp_path: Path) -> None:
    model, x = Mlp().eval(), torch.randn(2, 16)
    made = write(tmp_path / "a")
    loras = lora_of(model)
    slot = slot_of(loras, made.path)
    for rows in ([slot, slot], [0, slot]):
        loras.rows(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y[1].float(), made.mlp(Mlp(), x)[1], atol=0.1, rtol=0.1)


def test_the_weight_that_peft_saves_beside_a_head_must_be_the_models_own(tmp_path: Path) -> None:
    tensors = lora.tensors({"fc2": (8, 32)})
    own = {f"{PREFIX}fc2.base_layer.weight": Mlp().fc2.weight.detach().clone()}
    write(tmp_path / "a", {"fc2": (8, 32)})
    save_file(tensors | own, tmp_path / "a" / "adapter_model.safetensors")
    assert slot_of(lora_of(Mlp()), tmp_path / "a")
    assert "the layer itself was trained" in refusal(Mlp(seed=1), tmp_path / "a")
    own[f"{PREFIX}fc2.base_layer.weight"] = torch.zeros(9, 32)
    save_file(tensors | own, tmp_path / "a" / "adapter_model.safetensors")
    assert "the layer itself was trained or resized" in refusal(Mlp(), tmp_path / "a")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_no_number_is_refused_when_it_is_read(tmp_path: Path, bad: float) -> None:
    tensors = lora.tensors(lora.MLP)
    tensors[f"{PREFIX}fc2.lora_B.weight"][3, 2] = bad
    write(tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    assert "fc2 holds what is no number" in refusal(Mlp().half(), tmp_path / "a", preload=True)


def test_files_that_are_not_whole_or_no_files_are_refused(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    weights = made.path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert "adapter_model.safetensors: its tensors need" in refusal(Mlp(), made.path)
    weights.write_bytes(whole[:5])
    assert "the file has 5 bytes" in refusal(Mlp(), made.path)
    weights.unlink()
    (made.path / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.safetensors is not there" in refusal(Mlp(), made.path)
    os.mkfifo(weights)
    assert "adapter_model.safetensors is no file" in refusal(Mlp(), made.path)
    weights.unlink()
    weights.mkdir()
    assert "adapter_model.safetensors is no file" in refusal(Mlp(), made.path)


def test_where_adapters_are_switched_off_they_are_refused(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    for config in ({"enabled": False}, {"slots": 0}):
        (report,) = lora_of(Mlp(), **config).adapt([order(made.path, "a")])
        assert "switched off" in report.error


def test_rows_of_a_slot_that_does_not_exist_are_an_error() -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        lora_of(Mlp()).rows([4])


def test_a_model_with_adapters_goes_as_soon_as_nobody_holds_it(tmp_path: Path) -> None:
    model = Mlp()
    loras = lora_of(model)
    loras.rows([slot_of(loras, write(tmp_path / "a").path)])  # it goes in the middle of its work
    gone = weakref.ref(model.fc1)
    gc.disable()
    try:
        del model, loras
        assert gone() is None
    finally:
        gc.enable()
