"""Adapters give what PEFT itself gives with the same files, alone and together in a batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from repository.adapters.orders import AdapterReport
from repository.backends.lora.adapters import LoraAdapters
from repository.config import Adapters
from tests import lora, tiny
from tests.unit.test_adapters_peft import PATTERNS

NEAR = {"atol": 1e-5, "rtol": 1e-4}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with lora.one_thread():
        yield


class Case:
    """One model with adapters in it, ours and PEFT's."""

    def __init__(self, home: Path, model: nn.Module, adapters: dict[str, dict[str, Any]]) -> None:
        self.model = model
        self.base = copy.deepcopy(model)
        self.paths = {
            name: write(home / name, model, seed, **how)
            for seed, (name, how) in enumerate(adapters.items())
        }
        self.lora = LoraAdapters(model, Adapters(slots=len(adapters), max_rank=16))
        orders = [lora.order(path, name) for name, path in self.paths.items()]
        self.reports = self.lora.adapt(orders)
        assert [r.error for r in self.reports] == [""] * len(orders)
        with quiet():
            names = iter(self.paths.items())
            name, path = next(names)
            self.peft = PeftModel.from_pretrained(copy.deepcopy(model), path, adapter_name=name)
            for name, path in names:
                self.peft.load_adapter(path, adapter_name=name)
            self.peft.eval()

    def ours(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        slots = [self.lora.take(name) for name in names]
        assert None not in slots
        taken = [slot for slot in slots if slot is not None]
        self.lora.rows(taken)
        with torch.inference_mode():
            result = logits(self.model(x))
        self.lora.rows([0] * len(names))
        for slot in taken:
            self.lora.give(slot)
        return result

    def pefts(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), quiet():
            return logits(self.peft(x, adapter_names=[name or "__base__" for name in names]))


def logits(answer: Any) -> torch.Tensor:
    result: torch.Tensor = getattr(answer, "logits", answer)
    return result


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


def write(path: Path, model: nn.Module, seed: int, **how: Any) -> Path:
    with quiet():
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, **how})
        wrapped = get_peft_model(copy.deepcopy(model), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.05)
        wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    pattern = {"rank_pattern": {"v_proj": 2, r"^model.layers.1.*q_proj": 8}}
    return Case(
        tmp_path_factory.mktemp("llama"),
        tiny.model_of("llama", initializer_range=0.05),
        {
            "qv": {"target_modules": ["q_proj", "v_proj"]},
            "all": {"target_modules": list(ALL), "r": 16},
            "rs": {"target_modules": list(ATTENTION), "r": 8, "use_rslora": True},
            "patterns": {
                "target_modules": list(ATTENTION),
                "alpha_pattern": {"layers.0.self_attn.q_proj": 32, "k_proj": 1},
                **pattern,
            },
            "linear": {"target_modules": "all-linear", "r": 1},
            "one": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        },
    )


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(3, 400, (8, 7))


def test_every_sort_of_adapter_gives_what_peft_gives(llama: Case, prompt: torch.Tensor) -> None:
    plain = llama.ours([""] * 8, prompt)
    for name in llama.paths:
        ours = llama.ours([name] * 8, prompt)
        torch.testing.assert_close(ours, llama.pefts([name] * 8, prompt), **NEAR)
        assert (ours - plain).abs().max() > 1e-3


def test_different_adapters_and_none_share_a_batch(llama: Case, prompt: torch.Tensor) -> None:
    names = ["rs", "", "qv", "all", "all", "patterns", "one", "linear"]
    for x in (prompt, prompt[:, :1]):
        torch.testing.assert_close(llama.ours(names, x), llama.pefts(names, x), **NEAR)
    odd = ["", "qv", "qv", "qv", "rs"]  # groups of unequal sizes
    torch.testing.assert_close(llama.ours(odd, prompt[:5]), llama.pefts(odd, prompt[:5]), **NEAR)


def test_rows_without_adapter_have_the_very_bits_of_the_model_alone(
    llama: Case, prompt: torch.Tensor
) -> None:
    with torch.inference_mode():
        alone = llama.base(prompt).logits
    assert torch.equal(llama.ours([""] * 8, prompt), alone)
    mixed = llama.ours(["rs", "", "qv", "", "", "all", "one", ""], prompt)
    for row in (1, 3, 4, 7):
        assert torch.equal(mixed[row], alone[row])
    ordered = llama.ours(["", "", "", "", "qv", "all", "rs", "patterns"], prompt)
    assert torch.equal(ordered[:4], alone[:4])


def test_reports_tell_rank_and_bytes(llama: Case) -> None:
    told = {report.name: report for report in llama.reports}
    assert told["all"].rank == 16 and told["patterns"].rank == 8
    assert told["qv"] == AdapterReport("qv", "", "registered", 4, 2 * 4 * (64 + 64 + 64 + 32) * 4)


def test_conv1d_of_gpt2_gives_what_peft_gives(tmp_path: Path, prompt: torch.Tensor) -> None:
    case = Case(
        tmp_path,
        tiny.model_of("gpt2", initializer_range=0.05),
        {
            "attn": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
            "all": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 8},
            "head": {"target_modules": ["c_fc", "lm_head"], "fan_in_fan_out": True},
        },
    )
    assert case.model.lm_head.weight is case.model.transformer.wte.weight  # type: ignore[union-attr]
    names = ["all", "", "attn", "attn", "head", "all", "head", ""]
    torch.testing.assert_close(case.ours(names, prompt), case.pefts(names, prompt), **NEAR)
    assert torch.equal(case.ours([""] * 8, prompt), logits(case.base(prompt)))


def test_a_module_of_ones_own_gives_what_peft_gives(tmp_path: Path) -> None:
    case = Case(
        tmp_path,
        lora.Mlp().eval(),
        {"a": {"target_modules": ["fc1", "fc2"]}, "b": {"target_modules": ["fc2"], "r": 2}},
    )
    names = ["b", "", "a", "a", "b"]
    for shape in ((5, 16), (5, 3, 16), (5, 2, 3, 16)):
        x = torch.randn(shape)
        expected = torch.cat(
            [case.pefts([name], x[i : i + 1]) for i, name in enumerate(names)]  # by itself each
        )
        torch.testing.assert_close(case.ours(names, x), expected, **NEAR)


@pytest.mark.parametrize(("patterns", "path", "value"), PATTERNS)
def test_patterns_match_as_pefts_own_function_does(
    patterns: dict[str, int], path: str, value: int
) -> None:
    assert patterns.get(get_pattern_key(list(patterns), path), 0) == value
