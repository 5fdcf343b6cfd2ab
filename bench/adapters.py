"""LoRA adapters in a model, without a server: python -m bench.adapters [--device cpu] [--rounds 7]

A llama of hidden size 768 and 8 layers with random weights; adapters of rank 16 on q, k, v and o, in
8 slots. One thread on a CPU. In one run, in alternating turns:

    decode    8 rows of one token: no adapter, one for all rows, 8 different ones, 8 in disorder
    prefill   8 rows of 32 tokens: the same
    swap      host memory → slot, beside a plain copy of as many bytes

and with 1,000 adapters of rank 4 registered, host memory for 100 of them, slots for 8: what one
registration costs, and takes at random, some adapters asked for more than others (Zipf), with what the
layers give checked against a direct computation. Ratios say something, times only of this machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from bench.figures import MIB, Row, table, write
from repository.backends.lora.adapters import LoraAdapters
from repository.config import Adapters
from tests import lora as files

SLOTS, ROWS, PROMPT = 8, 8, 32
RATIO = 1.25
KINDS: dict[str, Sequence[int]] = {
    "one adapter x8": [3] * ROWS,
    "8 different": list(range(1, ROWS + 1)),
    "8 in disorder": [3, 8, 1, 7, 2, 6, 4, 5],
    "4 different, 4 none": [0, 3, 0, 1, 8, 0, 2, 0],
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(hidden: int, layers: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
    )
    model: nn.Module = LlamaForCausalLM(config).eval().to(device)
    return model


def layers_of(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets
    }


def timed(work: Callable[[], object], device: str) -> float:
    """In ms."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def forwards(model: nn.Module, lora: LoraAdapters, device: str, rounds: int) -> list[Row]:
    found: list[Row] = []
    for what, tokens, repeat in (("decode", 1, 4), ("prefill", PROMPT, 1)):
        x = torch.randint(3, 1000, (ROWS, tokens), device=device)
        took: dict[str, list[float]] = {name: [] for name in ("base", *KINDS)}

        def turn(slots: Sequence[int], x: torch.Tensor = x, repeat: int = repeat) -> None:
            for _ in range(repeat):
                lora.rows(slots)
                model(x)

        for round_ in range(rounds + 1):
            for name in took:
                ms = timed(lambda name=name: turn(KINDS.get(name, [0] * ROWS)), device)
                if round_:
                    took[name].append(ms / repeat)
        found.append(Row(f"{what} {ROWS}x{tokens}, base", statistics.median(took["base"]), "ms"))
        for name in KINDS:
            ratios = [a / b for a, b in zip(took[name], took["base"], strict=True)]
            found.append(Row(f"{what}, {name} / base", statistics.median(ratios), "x", aim=RATIO))
    lora.rows([0] * ROWS)
    return found


def swaps(lora: LoraAdapters, names: Sequence[str], device: str) -> list[Row]:
    """All in host memory, more than there are slots, in turn: each take is a swap."""
    (size,) = {report.bytes for report in lora.adapt([])}
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu").fill_(1)
    target = torch.empty(2 * SLOTS, size, dtype=torch.uint8, device=device).fill_(2)
    swap: list[float] = []
    copy: list[float] = []
    for turn in range(5):
        for at, name in enumerate(names):
            ms = timed(lambda name=name: lora.give(lora.take(name) or 0), device)
            plain = timed(
                lambda at=at: target[at % len(target)].copy_(source, non_blocking=True), device
            )
            if turn:
                swap.append(ms)
                copy.append(plain)
    swapped, copied = statistics.median(swap), statistics.median(copy)
    return [
        Row(f"swap host -> slot, {size / MIB:.1f} MiB", swapped, "ms", aim=3 * copied + 1),
        Row("a plain copy of as many bytes", copied, "ms"),
    ]


def measured(home: Path, device: str, rounds: int) -> list[Row]:
    model = llama(768, 8, device)
    lora = LoraAdapters(model, Adapters(slots=SLOTS, host_memory=1 << 30))
    wanted = layers_of(model, TARGETS)
    names = [f"a{i}" for i in range(2 * SLOTS)]
    for seed, name in enumerate(names):
        made = files.write(home / name, wanted, seed=seed, r=16, alpha=0.1)
        (report,) = lora.adapt([files.order(made.path, name, preload=True)])
        assert not report.error, report.error
    for name in names[:SLOTS]:
        lora.give(lora.take(name) or 0)
    with torch.inference_mode():
        found = forwards(model, lora, device, rounds)
    return [*found, *swaps(lora, names, device), Row("slots", lora.device_bytes / MIB, "MiB")]


def many(home: Path, device: str, count: int, takes: int) -> list[Row]:
    """Registered, then taken at random."""
    model = llama(256, 4, device)
    wanted = layers_of(model, ("q_proj", "v_proj"))
    made = {f"m{i}": files.write(home / f"m{i}", wanted, seed=i) for i in range(count)}
    size = sum(4 * 4 * sum(features) for features in wanted.values())
    lora = LoraAdapters(model, Adapters(slots=SLOTS, host_memory=100 * size))
    process = psutil.Process()
    before = process.memory_info().rss
    orders = [files.order(each.path, name) for name, each in made.items()]
    began = time.perf_counter()
    reports = lora.adapt(orders)
    registered = time.perf_counter() - began
    assert not any(report.error for report in reports)

    chance = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(count)]
    names = chance.choices(list(made), weights, k=takes)
    _walk(lora, names[: takes // 5])  # until host memory is full
    middle = process.memory_info().rss
    began = time.perf_counter()
    hits = _walk(lora, names)
    took = time.perf_counter() - began
    after = process.memory_info().rss
    wrong = _wrong(lora, model, made, chance.choices(list(made), weights, k=200))
    return [
        Row(f"registration of one of {count}", registered / count * 1e3, "ms"),
        Row("takes at random", takes / took, "/s"),
        Row("of them in a slot already", 100 * sum(hits) / takes, "%"),
        Row("wrong among 200 checked", wrong, "", aim=0),
        Row("resident set: registering them, first takes", (middle - before) / MIB, "MiB"),
        Row(f"resident set: {takes} takes", (after - middle) / MIB, "MiB", aim=8),
        Row("host memory of adapters", lora.host_bytes / MIB, "MiB", aim=100 * size / MIB),
    ]


def _walk(lora: LoraAdapters, names: Sequence[str]) -> list[bool]:
    """Which of them were in a slot when they were taken: the same slot is found, nothing is copied."""
    hits = []
    for name in names:
        hits.append(lora._table.find(lora._known[name].key) is not None)
        lora.give(lora.take(name) or 0)
    return hits


def _wrong(
    lora: LoraAdapters, model: nn.Module, made: dict[str, files.Made], names: Sequence[str]
) -> int:
    """Two at a time in one batch, beside a row without."""
    layer_name = next(name for name in layers_of(model, ("q_proj",)))
    layer = model.get_submodule(layer_name)
    assert isinstance(layer, nn.Linear)
    wrong = 0
    with torch.inference_mode():
        for pair in zip(names[::2], names[1::2], strict=True):
            slots = [lora.take(name) or 0 for name in pair]
            x = torch.randn(3, layer.in_features, device=layer.weight.device)
            lora.rows([*slots, 0])
            y = layer(x)
            lora.rows([0, 0, 0])
            expected = layer(x)
            wrong += not torch.equal(y[2], expected[2])
            for row, name in enumerate(pair):
                a, b, scaling = made[name].parts[layer_name]
                change = x[row] @ a.t().to(x.device) @ b.t().to(x.device) * scaling
                near = torch.allclose(y[row], expected[row] + change, atol=1e-3, rtol=1e-3)
                wrong += not near
            for slot in slots:
                lora.give(slot)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu | cuda:N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--takes", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("bench/out/adapters.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        found = measured(Path(home), options.device, options.rounds)
        found += many(Path(home), options.device, options.count, options.takes)
    where = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "one thread"
    title = f"adapters, {options.device} ({where})"
    print(table(title, found))
    write(options.out, title, found)


if __name__ == "__main__":
    main()
