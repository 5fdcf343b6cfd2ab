"""Adapters of a model on a GPU: the same as on a CPU, through page-locked memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from repository.backends.lora.adapters import LoraAdapters
from repository.config import Adapters
from tests.lora import Mlp, order, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


def test_adapters_on_a_gpu_give_what_they_give_on_a_cpu(tmp_path: Path) -> None:
    model, plain = Mlp().eval().to("cuda"), Mlp().eval()
    lora = LoraAdapters(model, Adapters(slots=2, max_rank=8))
    made = {name: write(tmp_path / name, seed=seed, r=4) for seed, name in enumerate("abc")}
    assert not any(r.error for r in lora.adapt([order(m.path, n) for n, m in made.items()]))
    x = torch.randn(4, 3, 16)
    with torch.inference_mode():
        alone = model(x.to("cuda"))
        for one, other in (("a", "b"), ("c", "a"), ("b", "c")):  # each turn is a swap
            slots = [lora.take(one), lora.take(other)]
            assert slots[0] and slots[1]
            lora.rows([slots[1], 0, slots[0], slots[1]])
            y = model(x.to("cuda"))
            lora.rows([0] * 4)
            assert torch.equal(y[1], alone[1])
            for row, name in ((0, other), (2, one), (3, other)):
                expected = made[name].mlp(plain, x)[row]
                torch.testing.assert_close(y[row].cpu(), expected, atol=1e-3, rtol=1e-3)
            for slot in slots:
                lora.give(slot or 0)
    assert all(layer.a.is_cuda for layer in lora._layers._layers.values())
