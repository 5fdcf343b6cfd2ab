"""The slots engine on a GPU: what it writes there is what generate writes there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.writers import Writer, asked, order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
PROMPTS = [[(5 + 7 * i + 3 * j) % 400 for j in range(3 + 13 * i)] for i in range(5)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mamba"])
def test_greedy_text_on_a_gpu_equals_generate_there(kind: str, tmp_path: Path) -> None:
    from repository.backends.text.backend import TextBackend

    tiny.write_text_model(tmp_path, kind)
    model = tiny.model_of(kind).to("cuda")
    backend = TextBackend()
    writer = Writer(
        backend,
        backend.load(order(tmp_path, {"slots": 3, "prefill_chunk": 16}, device="cuda:0")),
    )
    settings = {"max_tokens": 20, "ignore_eos": True}
    answers = writer.write(*[asked(prompt, **settings) for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, eos_token_id=None
        )
        assert answer.tokens == wanted[0, len(prompt) :].tolist()
    drawn = asked(PROMPTS[0], temperature=1, seed=1, top_p=0.9, presence_penalty=1, logprobs=2)
    one, other = writer.write(drawn, drawn)
    assert one.tokens == other.tokens and len(one.logprobs) == len(one.tokens)
    backend.unload()
