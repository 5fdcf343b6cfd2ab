"""What a load will need, before anything is loaded: exact where it can be."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

from repository.adapters.sources import AdapterFacts, AdapterSource
from repository.config import Adapters, ModelConfig
from repository.folder.estimate import BASES, MIB, adapter_bytes, adapter_layers, kv_bytes
from repository.folder.files import Files
from repository.folder.huggingface import Described, describe
from repository.folder.scan import Scanner
from tests import hub, tiny

BASE = 48 * MIB + 9 * len(hub.TOKENIZER)  # of text and embed: a worker and its tokenizer


def needed(root: Path, files: hub.Files, **config: Any) -> int:
    hub.lay(root / "m", {**files, "config.yaml": json.dumps(config).encode()})
    model = Scanner(root, trust_code=True).scan().models["m"]
    assert not model.problems
    return model.specs[1].bytes_needed


def described(folder: Path, config: dict[str, Any]) -> Described:
    hub.lay(folder, {"config.json": json.dumps(config).encode()})
    return describe(Files(str(folder.resolve()), str(folder.resolve()), {"config.json": 1}))


def text(**options: Any) -> ModelConfig:
    return ModelConfig(backend="text", options=options)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 24, "num_hidden_layers": 3}),
        ("gpt2", {"n_layer": 3}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_keys_and_values_are_counted_as_hugging_faces_own_cache_holds_them(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    import torch

    model = tiny.model_of(kind, **changes)
    with torch.inference_mode():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 5
    about = described(tmp_path, model.config.to_dict())
    assert about.positions == tiny.SIZES["positions"]
    assert kv_bytes(text(slots=3, max_len=70), about, 4) == 3 * 70 * per_token
    assert kv_bytes(text(), about, 4) == 8 * tiny.SIZES["positions"] * per_token


def test_what_is_reserved_for_a_text_model_is_what_it_takes(tmp_path: Path) -> None:
    from repository.backends.base import Order
    from repository.backends.registry import make

    folder = tiny.write_text_model(tmp_path / "m", "gpt2")
    hub.lay(folder, {"config.yaml": b"options: {slots: 2, max_len: 40}"})
    spec = Scanner(tmp_path, trust_code=False).scan().models["m"].specs[1]
    backend = make(spec.backend)
    try:
        held = backend.load(Order("m", 1, spec.path, spec.model_file, spec.config)).memory
    finally:
        backend.unload()
    words = 9 * (folder / "tokenizer.json").stat().st_size
    assert spec.bytes_needed == 48 * MIB + words + held["weights"] + held["kv"]


@pytest.mark.parametrize(
    ("config", "per_token", "positions"),
    [
        # 32 layers, 8 heads of 128 numbers; 12 of 64; 24 layers, 2 heads of 64
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
          "hidden_size": 4096, "max_position_embeddings": 131072}, 131072, 4096),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, 36864, 1024),
        ({"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
          "hidden_size": 896, "max_position_embeddings": 32768}, 12288, 4096),
        ({"text_config": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}},
         128, 4096),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "multi_query": True},
         64, 4096),
        ({"num_hidden_layers": 24, "hidden_size": 768, "state_size": 16}, 0, 4096),
    ],
    ids=["llama-8b", "gpt2", "qwen2-0.5b", "nested", "one head for all", "no heads"],
)  # fmt: skip
def test_keys_and_values_of_known_sizes(
    tmp_path: Path, config: dict[str, Any], per_token: int, positions: int
) -> None:
    about = described(tmp_path, {"architectures": ["XForCausalLM"], **config})
    assert kv_bytes(text(), about, 2) == per_token * 8 * positions


def test_a_text_model_needs_its_weights_its_slots_and_a_worker(tmp_path: Path) -> None:
    tensors = save({"a": np.ones((5, 7), np.float32), "b": np.ones(3, np.int64)})
    files = {**hub.text_files(), "model.safetensors": tensors}
    files["consolidated.safetensors"] = hub.weights(numbers=1000)  # the same once more: not loaded
    per_token = 2 * 3 * 2 * 8  # numbers: layers, heads, their size
    # Its config says bfloat16: so it is loaded, and so it computes.
    assert needed(tmp_path, files) == BASE + 35 * 2 + 24 + per_token * 8 * 512 * 2
    options: dict[str, Any] = {"dtype": "float32", "slots": 2, "max_len": 100}
    one = BASE + 35 * 4 + 24 + per_token * 2 * 100 * 4
    assert needed(tmp_path, files, options=options) == one
    assert needed(tmp_path, files, options=options, instances=3) == 3 * one
    assert needed(tmp_path, files, options={"slots": "8", "dtype": 5}) == needed(tmp_path, files)
    assert needed(tmp_path, files, memory="1GiB") == 2**30


def test_sizes_beyond_any_memory_are_still_a_number_that_can_be_told(tmp_path: Path) -> None:
    sizes = ("num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings")
    huge = hub.text_files(**dict.fromkeys(sizes, 2**31 - 1))
    assert msgspec.json.encode(100 * needed(tmp_path, huge, instances=64))
    assert needed(tmp_path, huge) == needed(tmp_path, huge, options={"slots": 2**62}) == 2**56


def test_all_shards_are_counted(tmp_path: Path) -> None:
    options = {"slots": 1, "max_len": 1, "dtype": "float32"}
    assert needed(tmp_path, hub.sharded_files(3), options=options) == BASE + 3 * 24 + 96 * 4


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), ("float32", 4), ("bfloat16", 2)])
def test_an_encoder_is_counted_as_it_lies_or_as_it_is_loaded(
    tmp_path: Path, dtype: str | None, size: int
) -> None:
    files = {**hub.embed_files(), "model.safetensors": hub.weights(np.float16, 50)}
    options = {"dtype": dtype} if dtype else {}
    assert needed(tmp_path, files, options=options) == BASE + 50 * size


def source(name: str, **modules: tuple[int, int]) -> AdapterSource:
    return AdapterSource(name, Path(name), "f", facts=AdapterFacts(dict(modules), 4, 100))


def test_adapters_need_room_for_every_slot_at_every_layer_that_one_of_them_changes() -> None:
    broken = AdapterSource("c", Path("c"), "f", problem="half a file")
    of = {
        "a": source("a", q=(64, 32), v=(16, 32)),
        "b": source("b", q=(64, 32), up=(8, 4)),
        "c": broken,
    }
    config = ModelConfig(backend="text", adapters=Adapters(slots=3, max_rank=16))
    layers = adapter_layers(of)
    assert adapter_bytes(config, layers, 2) == 4 * 16 * (96 + 48 + 12) * 2
    assert adapter_bytes(config, {}, 2) == 0
    off = ModelConfig(backend="text", adapters=Adapters(enabled=False))
    assert (
        adapter_bytes(off, layers, 2) == adapter_bytes(ModelConfig(backend="onnx"), layers, 2) == 0
    )


def test_adapters_that_come_change_what_the_next_load_needs_and_nothing_else(
    tmp_path: Path,
) -> None:
    hub.lay(tmp_path / "m", hub.text_files())
    scanner = Scanner(tmp_path, trust_code=False)
    before = scanner.scan().models["m"].specs[1]
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {f"{layer}A.weight": (4, 64), f"{layer}B.weight": (32, 4)}
    adapter = {
        "adapter_config.json": b'{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"]}',
        "adapter_model.safetensors": save({n: np.ones(s, np.float32) for n, s in shapes.items()}),
    }
    hub.lay(tmp_path / "m" / "adapters" / "a", adapter)
    model = scanner.scan().models["m"]
    assert model.adapters["a"].problem == ""
    after = model.specs[1]
    assert after.bytes_needed == before.bytes_needed + 9 * 16 * (64 + 32) * 2
    assert after.fingerprint == before.fingerprint and after.files == before.files
    later = time.time() + 3600
    kept = scanner.scan(later).models["m"]
    assert scanner.scan(later).models["m"] is kept and kept.specs[1] == after


def test_every_backend_has_a_base_and_a_place_in_each_table_of_the_front() -> None:
    from repository.backends.registry import BACKENDS
    from repository.folder.estimate import TAKES_ADAPTERS, USES_GPU
    from repository.folder.guess import USUAL_FILE
    from repository.folder.kind import RUNS_CODE
    from repository.folder.schema import BACKENDS as NAMES

    # An ensemble is no backend: nothing loads it, and it needs no memory.
    assert BACKENDS.keys() | {"ensemble"} == set(NAMES) == BASES.keys() == USUAL_FILE.keys()
    assert {n for n, e in BACKENDS.items() if e.runs_code} == RUNS_CODE
    assert {n for n, e in BACKENDS.items() if e.gpu} == USES_GPU
    assert BACKENDS.keys() > TAKES_ADAPTERS
