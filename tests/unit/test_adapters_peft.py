"""PEFT's files, judged by their config and header alone."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from repository.adapters.patterns import Patterns
from repository.adapters.peft import MAX_CONFIG, read_facts, scalings
from repository.errors import AdapterRefusedError

Header = dict[str, tuple[str, tuple[int, ...]]]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def config(**fields: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}).encode()


def pair(layer: str, r: int = 4, out: int = 32, into: int = 64, dtype: str = "F32") -> Header:
    return {
        f"base_model.model.{layer}.lora_A.weight": (dtype, (r, into)),
        f"base_model.model.{layer}.lora_B.weight": (dtype, (out, r)),
    }


def why(said: bytes, header: Header) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        read_facts(said, header)
    return str(caught.value)


def test_an_adapters_layers_rank_bytes_and_base_are_known_from_its_header() -> None:
    header = {**pair(Q), **pair(V, r=2, dtype="BF16")}
    said = config(
        rank_pattern={"v_proj": 2},
        base_model_name_or_path="org/base",
        layers_to_transform=[7],
        target_modules="all-linear",
        exclude_modules=["x"],
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        a_field_of_the_future={"x": 1},
        use_something_new=False,
    )
    facts = read_facts(said, header)
    assert facts.modules == {Q: (32, 64), V: (32, 64)}
    assert facts.rank == 4
    assert facts.bytes == 4 * 4 * 96 + 2 * 2 * 96
    assert facts.base == "org/base"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("ensure_weight_tying", True),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("use_what_comes_next", True),
        ("what_comes_next_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_what_would_change_the_mathematics_is_refused_by_its_name(field: str, value: Any) -> None:
    assert field in why(config(**{field: value}), pair(Q))


def test_fields_that_say_nothing_are_no_reason_to_refuse() -> None:
    empty = {
        "use_dora": False,
        "modules_to_save": [],
        "layer_replication": None,
        "arrow_config": {},
    }
    begun = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "megatron_config": {"x": 1}}
    read_facts(config(**empty, **begun), pair(Q))


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b'{"peft_type": "IA3"}', "IA3"),
        (b'{"r": 4}', "no peft_type"),
        (b"[]", "cannot be read"),
        (b'{"peft_type": "LORA", "r": 4', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"peft_type":"LORA","eva_config":' + b"[" * 5000 + b"]" * 5000 + b"}", "cannot be read"),
        (config(r="4"), "cannot be read"),
        (config(r=4.5), "cannot be read"),
        (config(r=0), "a rank of 0"),
        (config(rank_pattern={"q_proj": -1}), "a rank of -1"),
        (config(lora_alpha=None), "cannot be read"),
        (b" " * (MAX_CONFIG + 1), "at most"),
        (config(r=8), "says 8"),
        (config(rank_pattern={"q_proj": 2}), "says 2"),
    ],
)
def test_a_config_that_cannot_be_of_this_adapter_is_refused(said: bytes, text: str) -> None:
    assert text in why(said, pair(Q))


A, B = (f"base_model.model.{Q}.{part}.weight" for part in ("lora_A", "lora_B"))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({}, "no tensors"),
        ({A: ("F32", (4, 64))}, "no lora_B"),
        ({B: ("F32", (32, 4))}, "no lora_A"),
        ({A: ("F32", (4, 64)), B: ("F32", (32, 8))}, "are not [rank, in] and [out, rank]"),
        ({A: ("F32", (0, 64)), B: ("F32", (32, 0))}, "are not [rank, in] and [out, rank]"),
        ({A: ("F32", (4, 64, 3, 3)), B: ("F32", (32, 4, 1, 1))}, "convolutions"),
        ({A: ("I8", (4, 64)), B: ("F32", (32, 4))}, "is I8"),
        ({A: ("F8_E4M3", (4, 64)), B: ("F32", (32, 4))}, "is F8_E4M3"),
        ({**pair(Q), f"base_model.model.{Q}.lora_B.bias": ("F32", (32,))}, "trained bias"),
        (pair(Q) | {"base_model.model.e.lora_embedding_A": ("F32", (4, 9))}, "embedding"),
        (pair(Q) | {f"base_model.model.{Q}.lora_magnitude_vector": ("F32", (9,))}, "DoRA"),
        (pair(Q) | {"base_model.model.model.embed_tokens.weight": ("F32", (9, 9))}, "no lora_A or"),
        (pair(Q) | {"base_model.model.lm_head.base_layer.weight": ("F32", (9, 9))}, "without LoRA"),
        ({A.replace("lora_A", "lora_A.default"): ("F32", (4, 64))}, "bears the name of an adapter"),
        ({f"{Q}.lora_A.weight": ("F32", (4, 64))}, "does not begin with"),
        ({"base_model.model..lora_A.weight": ("F32", (4, 64))}, "bears the name"),
        ({"x" * 501: ("F32", (4, 64))}, "501 characters"),
    ],
)
def test_tensors_that_are_no_lora_of_linear_layers_are_refused(header: Header, text: str) -> None:
    assert text in why(config(), header)


def test_scalings_are_alpha_by_rank_with_patterns_and_by_its_root_for_rslora() -> None:
    ranks = {Q: 4, V: 16}
    assert scalings(config(), ranks) == {Q: 2.0, V: 0.5}
    assert scalings(config(alpha_pattern={"v_proj": 32}), ranks) == {Q: 2.0, V: 2.0}
    assert scalings(config(use_rslora=True, lora_alpha=3), ranks) == {Q: 1.5, V: 0.75}


PATTERNS: list[tuple[dict[str, int], str, int]] = [
    ({"q_proj": 1}, "layers.0.q_proj", 1),
    ({"q_proj": 1}, "q_proj", 1),
    ({"q_proj": 1}, "layers.0.not_q_proj", 0),
    ({"layers.0": 1}, "layers.0.q_proj", 0),
    ({"layers.0.q_proj": 1}, "model.layers.0.q_proj", 1),
    ({"^layers.0.q_proj": 1}, "model.layers.0.q_proj", 0),
    ({"^layers.0.q_proj": 1}, "layers.0.q_proj", 1),
    ({r"layers\.[0-3]\..*_proj": 1}, "model.layers.2.mlp.up_proj", 1),
    ({r"layers\.[0-3]\..*_proj": 1}, "model.layers.4.mlp.up_proj", 0),
    ({r".*\.(q_proj|v_proj)": 1}, "model.layers.4.v_proj", 1),
    ({r"layers\.\d+\.q_proj": 1}, "layers.12.q_proj", 1),
    ({"q_proj": 1, "layers.0.q_proj": 2}, "layers.0.q_proj", 1),
]


@pytest.mark.parametrize(("patterns", "path", "value"), PATTERNS)
def test_patterns_match_as_pefts_do(patterns: dict[str, int], path: str, value: int) -> None:
    assert Patterns("rank_pattern", patterns).of(path, 0) == value


@pytest.mark.parametrize(
    "key",
    ["(a+)+", "(.*)*x", "(?=x)", "a{1,9}", r"(a)\1", "x" * 301, ".*.*.*.*", "[z-a]", "(a|a)(b|b)"],
)
def test_a_pattern_that_is_not_simple_is_refused(key: str) -> None:
    assert "rank_pattern" in why(config(rank_pattern={key: 4}), pair(Q))


def test_patterns_cannot_keep_the_server_busy() -> None:
    header: Header = {}
    for i in range(500):
        header |= pair(("a" * 200) + str(i))
    began = time.perf_counter()
    assert "too long" in why(config(alpha_pattern={"a*a*a*x": 4}), header)
    assert "too long" in why(config(rank_pattern={f"{i}.*.*x": 4 for i in range(99)}), header)
    many = {f"{i}.x": 4 for i in range(3000)}
    assert "3000 entries" in why(config(rank_pattern=many), header)
    assert time.perf_counter() - began < 10
    plain = {f"layers.{i}.q_proj": 4 for i in range(200)}
    big = {f"model.layers.{i}.q_proj": 4 for i in range(200)}
    found = scalings(config(alpha_pattern=plain), big)
    assert math.isclose(sum(found.values()), 200)
