"""Decode throughput of the slots engine against a static batch: `python -m bench.text_engine`.

One process, one thread, random weights: the static batch is transformers' own generate() over the
same prompts, all of one length, all written to one length: the best case of a static batch, which
nobody can join or leave. Rounds alternate; tokens are counted by second of CPU time, which neighbours
on the machine change less; the ratio of the medians is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from repository.backends.base import Order
from repository.backends.text.backend import TextBackend
from repository.config import Adapters, ModelConfig
from repository.generate import GenerateRequest, Sampling

WRITE = 64


def build(folder: Path, hidden: int, layers: int) -> torch.nn.Module:
    import transformers as hf

    from tests import tiny

    config = hf.LlamaConfig(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = hf.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return model


def static(model: torch.nn.Module, prompts: list[list[int]]) -> float:
    ids = torch.tensor(prompts)
    begun = time.process_time()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=WRITE,
            max_new_tokens=WRITE,
        )
    return len(prompts) * WRITE / (time.process_time() - begun)


def slots(backend: TextBackend, prompts: list[list[int]], sampling: Sampling) -> float:
    begun = time.process_time()
    for number, prompt in enumerate(prompts):
        backend.begin(number, GenerateRequest(tokens=tuple(prompt), sampling=sampling))
    while backend.unfinished:
        backend.step()
    return len(prompts) * WRITE / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    greedy = Sampling(temperature=0, max_tokens=WRITE, ignore_eos=True)
    drawn = Sampling(
        temperature=0.8, top_k=50, top_p=0.95, max_tokens=WRITE, ignore_eos=True, seed=1
    )
    prompts = [[(7 * i + j) % 7999 + 1 for j in range(asked.prompt)] for i in range(asked.streams)]
    with tempfile.TemporaryDirectory() as place:
        model = build(Path(place), asked.hidden, asked.layers)
        config = ModelConfig(options={"slots": asked.streams}, adapters=Adapters(enabled=False))
        backend = TextBackend()
        backend.load(Order(model="m", version=1, path=Path(place), model_file="", config=config))
        rounds: dict[str, list[float]] = {"static": [], "slots": [], "slots, drawn": []}
        for _ in range(asked.rounds + 1):
            rounds["static"].append(static(model, prompts))
            rounds["slots"].append(slots(backend, prompts, greedy))
            rounds["slots, drawn"].append(slots(backend, prompts, drawn))
        backend.unload()
    base = statistics.median(rounds["static"][1:])
    for name, found in rounds.items():
        middle = statistics.median(found[1:])
        print(f"{name:14s} {middle:8.1f} tokens/s  {middle / base:5.2f}")


if __name__ == "__main__":
    main()
