"""Text through a real server against the same model stepped as one fixed batch in a process of its own.

python -m bench.text [ROUNDS] [--hidden N] [--layers N] [--tokens N]

The limits: `static`, the plain forward of Hugging Face over STREAMS rows that all begin and end
together, with its own growing cache, in a loop of three lines; and `generate`, its own loop. Ours: as
many clients of /v1/completions that stream, each row joining and leaving as it comes, over loopback
on the same cores. Limits and ours take turns; look at the ratios of the same round. Prompts are short
and different, all write the same number of tokens, greedily. The last row: each of the streams with a
LoRA adapter of its own (rank RANK on all attention projections), against our own rows without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.depot import serving
from tests import tiny

STREAMS = 8
PROMPT = "the quick brown fox jumps over the lazy dog and a model server loads models "
NAME = "writer"
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def prompts(count: int) -> list[str]:
    return [PROMPT[: 20 + 5 * i] for i in range(count)]


# the limits: a process of its own, a line in, a figure out ---------------------------------------


def limits(folder: str, tokens: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"
    asked = tokenizer(prompts(STREAMS), return_tensors="pt", padding=True)
    asked.pop("token_type_ids", None)

    @torch.inference_mode()
    def static() -> None:
        mask, found = asked["attention_mask"], model(**asked, use_cache=True, logits_to_keep=1)
        for _ in range(tokens - 1):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            found = model(
                input_ids=found.logits[:, -1].argmax(-1, keepdim=True),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=found.past_key_values,
            )

    @torch.inference_mode()
    def generate() -> None:
        said = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        model.generate(**asked, **said)

    programs = {"static": static, "generate": generate}
    static()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        programs[line.strip()]()
        print(STREAMS * tokens / (time.perf_counter() - began), flush=True)


# ours ---------------------------------------------------------------------------------------------


class Stream:
    """One client: what it heard and when."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.gaps_s: list[float] = []
        self.tokens = 0

    async def run(self, port: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        began = last = time.perf_counter()
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if not self.first_s:
                self.first_s = now - began
            else:
                self.gaps_s.append(now - last)
            last = now
            if b'"usage":{' in line:
                usage = json.loads(line[6:]).get("usage") or {}
                self.tokens = usage.get("completion_tokens", self.tokens)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def streams(
    port: int, tokens: int, *, stream: bool, adapters: bool = False
) -> tuple[float, list[Stream]]:
    """Tokens per second of STREAMS clients at once."""
    made = [Stream() for _ in range(STREAMS)]
    names = [f"{NAME}:a{i}" if adapters else NAME for i in range(STREAMS)]
    said: dict[str, Any] = {
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if stream:
        said |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    if stream:
        asked = zip(made, names, prompts(STREAMS), strict=True)
        bodies = [(one, {**said, "model": name, "prompt": p}) for one, name, p in asked]
        await asyncio.gather(*[one.run(port, body) for one, body in bodies])
        count = sum(one.tokens for one in made)
    else:
        import httpx

        async with httpx.AsyncClient(timeout=300) as client:
            url = f"http://127.0.0.1:{port}/v1/completions"
            asked = [{**said, "model": NAME, "prompt": p} for p in prompts(STREAMS)]
            calls = [client.post(url, json=body) for body in asked]
            answers = await asyncio.gather(*calls)
        count = sum(a.raise_for_status().json()["usage"]["completion_tokens"] for a in answers)
    took_s = time.perf_counter() - began
    if count != STREAMS * tokens:
        raise SystemExit(f"{count} tokens came, {STREAMS * tokens} were asked for")
    return count / took_s, made


def compare(rounds: int, tokens: int, folder: Path, sizes: dict[str, Any]) -> None:
    repo = folder / "repository"
    model = tiny.write_text_model(repo / NAME, "llama", **sizes)
    (model / "config.yaml").write_text(
        f"backend: text\nadapters: {{slots: {STREAMS}, max_rank: {RANK}}}\n"
        f"options: {{slots: {STREAMS}, max_len: {tokens + 128}}}\n"
    )
    bare = tiny.model_of("llama", **sizes)
    for i in range(STREAMS):
        home = model / "adapters" / f"a{i}"
        tiny.write_adapter(home, bare, seed=i, r=RANK, targets=TARGETS)
    command = [sys.executable, "-m", "bench.text", "--limits", str(model), "--tokens", str(tokens)]
    rates: dict[str, list[float]] = {}
    firsts: list[float] = []
    gaps: list[float] = []
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as limit,
        serving(repo, folder / "state") as (depot, client),
    ):
        assert limit.stdin is not None and limit.stdout is not None
        limit.stdout.readline()
        client.post("/v1/models/load", json={"model_name": NAME}).raise_for_status()
        shown = client.get(f"/v1/models/{NAME}").json()["generations"][-1]["loaded"]
        print(f"{NAME}: {shown['details']}, {shown['memory']}", flush=True)
        port = int(depot.url.rpartition(":")[2])
        asyncio.run(streams(port, tokens, stream=True))
        for _ in range(rounds):
            for name in ("static", "generate"):
                limit.stdin.write(f"{name}\n")
                limit.stdin.flush()
                rates.setdefault(name, []).append(float(limit.stdout.readline()))
            rate, heard = asyncio.run(streams(port, tokens, stream=True))
            rates.setdefault("ours, streaming", []).append(rate)
            firsts += [one.first_s for one in heard]
            gaps += [gap for one in heard for gap in one.gaps_s]
            rate, _ = asyncio.run(streams(port, tokens, stream=False))
            rates.setdefault("ours, whole answers", []).append(rate)
            rate, _ = asyncio.run(streams(port, tokens, stream=True, adapters=True))
            rates.setdefault("ours, 8 adapters", []).append(rate)
        limit.stdin.close()
    for name, found in rates.items():
        ratios = [mine / its for mine, its in zip(found, rates["static"], strict=True)]
        print(
            f"{name:20} {statistics.median(found):8.0f} tokens/s"
            f" | {statistics.median(ratios):.2f}x of static ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    pairs = zip(rates["ours, streaming"], rates["ours, 8 adapters"], strict=True)
    slower = [without / with_them for without, with_them in pairs]
    print(f"8 adapters: {statistics.median(slower):.2f}x the time of none")
    gaps.sort()
    print(
        f"first token p50 {statistics.median(firsts) * 1e3:.0f} ms; between tokens p50 "
        f"{statistics.median(gaps) * 1e3:.1f} ms, p99 {gaps[int(len(gaps) * 0.99)] * 1e3:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--limits", default="")
    said = parser.parse_args()
    if said.limits:
        limits(said.limits, said.tokens)
        return
    sizes = {
        "hidden_size": said.hidden,
        "intermediate_size": 3 * said.hidden,
        "num_hidden_layers": said.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    with tempfile.TemporaryDirectory() as name:
        compare(said.rounds, said.tokens, Path(name), sizes)


if __name__ == "__main__":
    main()
