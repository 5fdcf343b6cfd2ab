"""Models that sleep, in processes of their own: they answer as before, and memory moves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import Dim

from repository.backends import pages
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    LoadFailedError,
)
from repository.generate import GenerateRequest, Sampling
from repository.hosts.base import Host
from repository.lifecycle.placement import Memory
from repository.spec import ModelSpec
from tests import models, tiny
from tests.embedding import order_of, texts
from tests.hosting import ask, fails, hosted, make, one, open_files
from tests.lora import Mlp
from tests.lora import order as lora_order
from tests.lora import write as write_lora
from tests.torch_models import export, given, listed, loaded, mlp, write, write_mlp
from tests.torch_models import order_of as torch_order

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)
TIED = """
    import torch
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 1 << 18, bias=False)
            self.down = torch.nn.Linear(4, 1 << 18, bias=False)
            self.down.weight = self.up.weight
            self.register_buffer("count", torch.zeros(1))
        def forward(self, x):
            self.count += 1
            y = self.up(x) @ self.down.weight
            return {"y": y, "count": self.count.expand(len(x), 1)}
"""
COUNTS = """
    import numpy as np
    class Model:
        def load(self, context):
            self.state = "awake"
            self.calls = []
        def infer(self, inputs):
            return {"y": inputs["x"] + len(self.calls)}
        def sleep(self):
            self.calls.append("sleep")
        def wake(self):
            self.calls.append("wake")
"""


def total(memory: Memory, *devices: str) -> int:
    return sum(sum(kinds.values()) for device, kinds in memory.items() if device in devices)


async def resident(pids: list[int]) -> int:
    def read() -> int:
        found = 0
        for pid in pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Private_"):
                    found += int(line.split()[1]) * 1024
        return found

    return await asyncio.to_thread(read)


def spec_of_kind(kind: str, folder: Path) -> ModelSpec:
    if kind == "torch_module":
        return models.spec_of(
            write_mlp(folder), kind, max_batch_size=8, inputs=(listed("x", shape=(4,)),)
        )
    if kind == "torch_export":
        export(
            folder / "model.pt2",
            mlp(),
            torch.from_numpy(ROWS),
            dynamic_shapes=({0: Dim.DYNAMIC},),
        )
        return replace(models.spec_of(folder, kind), model_file="model.pt2")
    if kind == "torchscript":
        folder.mkdir(parents=True)
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.script(mlp()).save(str(folder / "model.pt"))
        return replace(models.spec_of(folder, kind), model_file="model.pt")
    if kind == "external":
        return models.spec_of(models.external_onnx(folder / "model.onnx"))
    return models.spec_of(models.add_onnx(folder / "model.onnx", 2.0))


@pytest.mark.parametrize(
    "kind", ["torch_module", "torch_export", "torchscript", "onnx", "external"]
)
async def test_ten_naps_change_no_bit_of_the_answers(tmp_path, kind, zygotes):
    spec = spec_of_kind(kind, tmp_path / "m/1")
    rows = np.resize(ROWS, (5, 4096)) if kind == "external" else ROWS
    async with hosted(spec, tmp_path / "s", zygotes, instances=2) as (host, _):
        files = open_files()
        before = one(await host.infer(ask(*given(x=rows)))).copy()
        for _ in range(10):
            await host.sleep()
            await host.wake()
            for _ in range(2):
                assert one(await host.infer(ask(*given(x=rows)))).tobytes() == before.tobytes()
        assert not host.died.done() and open_files() == files


async def test_nothing_runs_while_a_model_sleeps_and_sleep_is_not_asked_twice(tmp_path, zygotes):
    spec = spec_of_kind("torch_module", tmp_path / "m/1")
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        await fails(host.wake, InvalidRequestError)
        await host.sleep()
        for _ in range(2):
            with pytest.raises(InferenceFailedError, match="the model sleeps"):
                await host.infer(ask(*given(x=ROWS)))
        await fails(host.sleep, InvalidRequestError)
        await host.wake()
        one(await host.infer(ask(*given(x=ROWS))))


async def test_tied_weights_stay_tied_and_a_changed_buffer_keeps_its_number(tmp_path, zygotes):
    torch.manual_seed(1)
    weights = {"up.weight": torch.randn(1 << 18, 4), "count": torch.zeros(1)}
    spec = models.spec_of(write(tmp_path / "m/1", TIED, weights), "torch_module")
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        first = {t.name: t.array().copy() for t in (await host.infer(ask(*given(x=ROWS)))).outputs}
        held = (await host.memory())["cpu"]["weights"]
        assert 4 << 20 <= held < 5 << 20, "what is tied counts once"
        await host.sleep()
        await host.wake()
        again = {t.name: t.array() for t in (await host.infer(ask(*given(x=ROWS)))).outputs}
        assert again["y"].tobytes() == first["y"].tobytes()
        assert (first["count"] == 1).all() and (again["count"] == 2).all()


async def test_figures_add_up_to_what_the_processes_have(tmp_path, zygotes):
    spec = models.spec_of(tiny.write_text_model(tmp_path / "m/1"), "text")
    async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        pids = loaded.details["pids"]
        awake = await host.memory()
        assert set(awake["cpu"]) == {"weights", "kv", "workspace"}
        assert abs(total(awake, "cpu", "host") - await resident(pids)) < 2 << 20
        await host.sleep()
        asleep = await host.memory()
        assert set(asleep["host"]) == {"weights"} and set(asleep["cpu"]) == {"workspace"}
        assert abs(total(asleep, "cpu", "host") - await resident(pids)) < 2 << 20
        await host.wake()
        again = (await host.memory())["cpu"]["kv"]
        assert abs(again - awake["cpu"]["kv"]) <= 4 * pages.PAGE


async def test_keys_and_values_are_really_given_back(tmp_path, zygotes):
    spec = models.spec_of(
        tiny.write_text_model(tmp_path / "m/1", max_position_embeddings=4096),
        "text",
        options={"slots": 64, "max_len": 4096},
    )
    async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        kv = loaded.memory["kv"]
        assert kv > 100 << 20
        before = await resident(loaded.details["pids"])
        await host.sleep()
        assert before - await resident(loaded.details["pids"]) >= 0.95 * kv
        await host.wake()


async def test_mapped_weights_are_really_given_back(tmp_path):
    torch.manual_seed(0)
    weights = {"w": torch.randn(1 << 22)}
    source = """
        import torch
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.w = torch.nn.Parameter(torch.empty(1 << 22))
            def forward(self, x):
                return x + self.w.sum()
    """
    order = torch_order(write(tmp_path / "m/1", source, weights), private=True)
    with loaded(order) as (backend, _):
        before = one(backend.infer(ask(*given(x=ROWS)))).copy()
        assert backend.memory()["cpu"]["weights"] >= 16 << 20
        backend.sleep()
        assert sum(backend.memory().get("host", {}).values()) <= 2 * pages.PAGE
        backend.wake()
        assert one(backend.infer(ask(*given(x=ROWS)))).tobytes() == before.tobytes()


# texts --------------------------------------------------------------------------------------------


def writes(prompt: str, tokens: int = 12, **more: object) -> GenerateRequest:
    settings = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, **more}
    return GenerateRequest(text=prompt, sampling=Sampling(**settings))


async def written(host: Host, request: GenerateRequest) -> list[int]:
    found: list[int] = []
    await host.generate(request, lambda piece: found.extend(piece.tokens))
    return found


@pytest.mark.parametrize("kind", ["llama", "mamba"])  # by slots, by generate
async def test_texts_after_a_nap_are_those_before_it(tmp_path, kind, zygotes):
    folder = tiny.write_text_model(tmp_path / "m/1", kind)
    async with hosted(models.spec_of(folder, "text"), tmp_path / "s", zygotes) as (host, _):
        before = [await written(host, writes(p)) for p in ("a", "the quick brown", "x y z" * 9)]
        for _ in range(3):
            await host.sleep()
            with pytest.raises(InvalidRequestError, match="sleeps"):
                await host.generate(writes("a"), lambda piece: None)
            await host.wake()
            again = [await written(host, writes(p)) for p in ("a", "the quick brown", "x y z" * 9)]
            assert again == before


async def test_sleep_waits_for_a_text_that_was_given_up_a_moment_ago(tmp_path, zygotes):
    folder = tiny.write_text_model(tmp_path / "m/1")
    async with hosted(models.spec_of(folder, "text"), tmp_path / "s", zygotes) as (host, _):
        before = await written(host, writes("a"))
        heard = asyncio.Event()
        text = host.generate(writes("b", 200), lambda piece: heard.set())
        await heard.wait()
        text.cancel()
        await host.sleep()
        await host.wake()
        assert await written(host, writes("a")) == before


# adapters -----------------------------------------------------------------------------------------


async def test_adapters_sleep_with_their_model_and_are_the_same_afterwards(tmp_path, zygotes):
    folder = tiny.write_encoder(tmp_path / "m/1")
    for seed in (0, 1):
        tiny.write_adapter(
            tmp_path / f"a{seed}", tiny.model_of("bert"), seed=seed, targets=("query", "value")
        )
    asked = [texts("one", "two"), texts("one", "two", adapters=("a0", "a1"))]
    async with hosted(models.spec_of(folder, "embed"), tmp_path / "s", zygotes) as (host, _):
        reports = await host.adapt([order_of(tmp_path / name) for name in ("a0", "a1")])
        assert [report.error for report in reports] == ["", ""]
        before = [(await host.infer(request)).outputs[0].array().copy() for request in asked]
        assert before[0].tobytes() != before[1].tobytes()
        assert (await host.memory())["cpu"]["adapters"] > 0
        for _ in range(3):
            await host.sleep()
            await host.wake()
            after = [(await host.infer(request)).outputs[0].array() for request in asked]
            assert [each.tobytes() for each in after] == [each.tobytes() for each in before]
        assert all(r.residence == "device" for r in await host.adapt([]))


async def test_an_adapter_may_be_added_after_a_nap(tmp_path, zygotes):
    made = write_lora(tmp_path / "a", seed=3, r=4)
    source = """
        import torch
        from torch import nn
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1 = nn.Linear(16, 32)
                self.norm = nn.LayerNorm(32)
                self.fc2 = nn.Linear(32, 8)
            def forward(self, x):
                return self.fc2(torch.relu(self.fc1(x)))
    """
    folder = write(tmp_path / "m/1", source, Mlp().state_dict())
    spec = models.spec_of(folder, "torch_module", max_batch_size=4)
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        await host.sleep()
        await host.wake()
        (report,) = await host.adapt([lora_order(made.path, "a")])
        assert report.error == ""


# the user's own ------------------------------------------------------------------------------------


async def test_a_python_model_sleeps_by_its_own_methods_in_a_process_and_inline(tmp_path, zygotes):
    spec = models.spec_of(models.python_model(tmp_path / "m/1", COUNTS), "python")
    for how in (zygotes, None):
        async with hosted(spec, tmp_path / "s", how) as (host, loaded):
            assert loaded.abilities == ("sleep",)
            await host.sleep()
            with pytest.raises(InferenceFailedError, match="the model sleeps"):
                await host.infer(ask(*given(x=ROWS)))
            await host.wake()
            assert one(await host.infer(ask(*given(x=ROWS)))).tolist() == (ROWS + 2).tolist()


async def test_half_of_it_is_refused_and_none_cannot_sleep(tmp_path, zygotes):
    half = COUNTS.replace("def wake", "def awake")
    spec = models.spec_of(models.python_model(tmp_path / "h/1", half), "python")
    host = make(spec, tmp_path / "s", zygotes)
    text = await fails(lambda: host.load(spec, ["cpu"]), LoadFailedError)
    assert "write both or neither" in text
    await host.stop(5)
    none = half.replace("def sleep", "def asleep")
    spec = models.spec_of(models.python_model(tmp_path / "n/1", none), "python")
    for how in (zygotes, None):
        async with hosted(spec, tmp_path / "s", how) as (awake, loaded):
            assert loaded.abilities == ()
            await fails(awake.sleep, InvalidRequestError)
            await fails(awake.wake, InvalidRequestError)
            one(await awake.infer(ask(*given(x=ROWS))))


# what is given back beside it ------------------------------------------------------------------------


async def test_the_shared_memory_of_a_sleeping_model_is_given_back(tmp_path, zygotes):
    spec = models.spec_of(models.identity_onnx(tmp_path / "m/1/model.onnx", "FP32", (-1,)))
    sent = np.arange(1 << 22, dtype=np.float32)
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        for _ in range(2):
            assert np.array_equal(one(await host.infer(ask(*given(x=sent)))), sent)
        kept = one(await host.infer(ask(*given(x=sent))))
        arena = host._arena
        await host.sleep()
        span = (arena._base, arena.size)
        assert (pages.resident([span]) or 0) <= kept.nbytes + (1 << 20)
        assert np.array_equal(kept, sent), "an answer that somebody still has stays whole"
        await host.wake()
        assert np.array_equal(one(await host.infer(ask(*given(x=sent)))), sent)
