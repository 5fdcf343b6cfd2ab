"""Models that leave a real GPU for host memory and come back to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from repository.backends.abilities import Sleeps
from repository.backends.ferry import CudaFerry, movable
from tests import models, tiny
from tests.hosting import ask, forking, hosted, make, one
from tests.torch_models import export, given, loaded, mlp, order_of, write_mlp
from tests.writers import Writer, asked, order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
ROWS = np.random.default_rng(7).normal(size=(64, 4)).astype(np.float32)
GPU = "cuda:0"


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [bytes(t.cpu().contiguous().view(torch.uint8).numpy()) for t in tensors]


def test_views_ties_and_strides_come_back_and_the_device_was_empty() -> None:
    whole = torch.randn(4096, 1024, device=GPU)
    tensors = [whole[:100], whole.t(), whole, torch.randn(3, device=GPU, dtype=torch.float64)]
    tensors += [torch.randn(1 << 20, device=GPU)[5:], torch.empty(0, 7, device=GPU)]
    large = torch.randint(0, 255, (300 << 20,), dtype=torch.uint8, device=GPU)  # several blocks
    tensors.append(large)
    mine = movable(GPU, lambda: {"weights": tensors})
    before, strides = bits(tensors), [t.stride() for t in tensors]
    held = torch.cuda.memory_allocated(0)
    for _ in range(3):
        mine.sleep()
        assert torch.cuda.memory_allocated(0) <= held - large.numel() - whole.nbytes
        assert mine.memory()["host"]["weights"] >= 300 << 20
        assert "weights" not in mine.memory().get(GPU, {})  # the context may be another test's
        mine.wake()
        assert bits(tensors) == before and [t.stride() for t in tensors] == strides
        assert "host" not in mine.memory()
    whole[0, 0] = 9.0
    assert tensors[0][0, 0] == tensors[1][0, 0] == 9.0


def test_host_memory_is_locked_and_given_back() -> None:
    ferry = CudaFerry(torch.device(GPU))
    made = list(ferry.memory([1 << 20, 4096, 512]))
    assert [each.numel() for each in made] == [1 << 20, 4096, 512]
    assert all(each.is_pinned() for each in made) and len(ferry._locked) == 3
    ferry.give(made)
    assert made == [] and not ferry._locked


def test_a_module_and_a_program_answer_as_before(tmp_path: Any) -> None:
    folder = write_mlp(tmp_path / "1")
    program = export(tmp_path / "2/model.pt2", mlp(), torch.from_numpy(ROWS))
    for how in (
        order_of(folder, device=GPU),
        order_of(program.parent, "torch_export", model_file=program.name, device=GPU),
    ):
        with loaded(how) as (backend, told):
            assert "sleep" in told.abilities
            before = one(backend.infer(ask(*given(x=ROWS)))).tobytes()
            sleeps: Sleeps = backend
            for _ in range(5):
                sleeps.sleep()
                sleeps.wake()
                assert one(backend.infer(ask(*given(x=ROWS)))).tobytes() == before


def test_texts_are_the_same_and_their_cache_is_gone_meanwhile(tmp_path: Any) -> None:
    from repository.backends.text.backend import TextBackend

    backend = TextBackend()
    folder = tiny.write_text_model(tmp_path / "m")
    writer = Writer(backend, backend.load(order(folder, {"slots": 3}, device=GPU)))
    prompt = [5, 6, 7, 8]
    before = writer.ask(prompt, max_tokens=12, ignore_eos=True).tokens
    kv = backend.memory()[GPU]["kv"]
    assert kv > 0
    backend.sleep()
    assert all("kv" not in kinds for kinds in backend.memory().values())
    backend.wake()
    assert backend.memory()[GPU]["kv"] == kv
    assert writer.ask(prompt, max_tokens=12, ignore_eos=True).tokens == before
    assert writer.write(asked(prompt, max_tokens=12, ignore_eos=True))[0].tokens == before
    backend.unload()


async def test_an_onnx_model_sleeps_and_wakes_on_the_gpu_and_nowhere_else(tmp_path: Any) -> None:
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx", 2.0))
    async with forking() as zygotes:
        host = make(spec, tmp_path / "s", zygotes)
        told = await host.load(spec, [GPU])
        assert "CUDAExecutionProvider" in told.details["providers"]
        for _ in range(3):
            await host.sleep()
            assert set((await host.memory())[GPU]) == {"context"}
            await host.wake()
            assert one(await host.infer(ask(*given(x=ROWS)))).tolist() == (ROWS + 2).tolist()
        await host.stop(5)


async def test_a_worker_that_is_measured_on_the_cpu_starts_no_cuda(tmp_path: Any) -> None:
    spec = models.spec_of(write_mlp(tmp_path / "m/1"), "torch_module")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        assert set(await host.memory()) == {"cpu"}
