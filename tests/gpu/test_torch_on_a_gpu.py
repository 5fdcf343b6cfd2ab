"""Torch models on a real GPU: weights through the pinned ring, answers as torch gives them there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from repository.backends import weights
from repository.backends.base import Room
from tests.hosting import ask
from tests.torch_models import answer, given, loaded, mlp, order_of, write_mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
ROWS = np.random.default_rng(7).normal(size=(2000, 4)).astype(np.float32)


@pytest.mark.parametrize("chunk", [4096, 1 << 20, weights.CHUNK])
def test_weights_arrive_on_the_device_bytes_exact(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(weights, "CHUNK", chunk)
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(100 + i, 333) for i in range(30)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    tensors |= {"half": torch.randn(7).bfloat16(), "flags": torch.tensor([True, False, True])}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    got = weights.read_weights([path], device="cuda:0")
    for name, want in load_file(path).items():
        assert got[name].is_cuda and (got[name].dtype, got[name].shape) == (want.dtype, want.shape)
        assert got[name].cpu().equal(want), name


def test_a_model_answers_as_torch_does_and_its_unload_returns_the_memory(tmp_path):
    torch.cuda.init()
    # cuBLAS keeps a workspace from the first product on, which is torch's memory too.
    torch.ones(4, 4, device="cuda:0") @ torch.ones(4, 4, device="cuda:0")
    before = torch.cuda.memory_allocated(0)
    with loaded(order_of(write_mlp(tmp_path / "1"), device="cuda:0")) as (backend, told):
        assert torch.cuda.memory_allocated(0) - before >= told.memory["weights"]
        want = mlp().cuda()(torch.from_numpy(ROWS).cuda()).cpu().numpy()
        assert answer(backend.infer(ask(*given(x=ROWS))))["output"].tobytes() == want.tobytes()
        memory = bytearray(1 << 20)
        response = backend.infer_into(ask(*given(x=ROWS)), Room(memoryview(memory)))
        assert bytes(memory[: want.nbytes]) == want.tobytes()
        del response
    assert torch.cuda.memory_allocated(0) == before
