"""What the slots engine writes is what transformers' generate writes, whoever comes and goes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.writers import Writer, asked, writing

KINDS = ("llama", "gpt2", "qwen2", "qwen3")
PROMPTS = [[(5 + 7 * i + 3 * j) % 400 for j in range(3 + 13 * i)] for i in range(7)]


def plainly(model: Any, prompt: list[int], count: int, ends: list[int] | None = None) -> list[int]:
    """What greedy generate writes."""
    torch.set_num_threads(1)
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return list(found[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model_of("llama")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Writer]:
    with writing(folder, slots=3, prefill_chunk=16) as writer:
        yield writer


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_generate_while_others_join_and_leave(kind: str, tmp_path: Path) -> None:
    reference = tiny.model_of(kind)
    ends = [plainly(reference, PROMPTS[0], 9)[-1], 399]
    tiny.write_text_model(tmp_path, kind, eos_token_id=ends)
    with writing(tmp_path, slots=3, prefill_chunk=16) as writer:
        assert writer.loaded.details["engine"] == "slots"
        for number, prompt in enumerate(PROMPTS):
            writer.begin(number, asked(prompt, max_tokens=12 + 5 * number))
            writer.step()
            writer.step()
        writer.finish()
        finishes = set()
        for number, prompt in enumerate(PROMPTS):
            answer = writer.answers[number]
            assert answer.tokens == plainly(reference, prompt, 12 + 5 * number, ends)
            assert answer.ended is not None
            assert answer.ended.completion_tokens == len(answer.tokens)
            assert answer.ended.prompt_tokens == len(prompt)
            assert (answer.ended.finish == "stop") == (answer.tokens[-1] in ends)
            finishes.add(answer.ended.finish)
        assert finishes == {"stop", "length"}


def test_a_long_prompt_does_not_stop_those_who_write(shared: Writer, model: Any) -> None:
    long = [(3 * j) % 400 for j in range(200)]
    first = max(shared.answers, default=0) + 1
    shared.begin(first, asked(PROMPTS[1], max_tokens=30))
    shared.step()
    shared.begin(first + 1, asked(long, max_tokens=3))
    steps = 0
    while not shared.answers[first + 1].tokens:
        before = len(shared.answers[first].tokens)
        shared.step()
        steps += 1
        assert len(shared.answers[first].tokens) == before + 1
    assert steps >= 200 // 16
    shared.finish()
    assert shared.answers[first].tokens == plainly(model, PROMPTS[1], 30)
    assert shared.answers[first + 1].tokens == plainly(model, long, 3)


def test_a_cancelled_sequence_frees_its_slot_at_the_next_step(shared: Writer, model: Any) -> None:
    first = max(shared.answers, default=0) + 1
    for number in range(first, first + 4):  # one more than there are slots
        shared.begin(number, asked(PROMPTS[0], max_tokens=50))
    shared.step()
    assert not shared.answers[first + 3].pieces
    shared.backend.cancel(first)
    shared.step()
    ended = shared.answers[first].ended
    assert ended is not None and ended.finish == "cancelled"
    assert shared.backend.unfinished == 3
    assert shared.answers[first + 3].pieces  # the one that waited has its slot
    shared.backend.cancel(first)  # it has ended: nothing
    shared.backend.cancel(first + 1)
    shared.begin(first + 4, asked(PROMPTS[1], max_tokens=5))
    shared.backend.cancel(first + 4)  # it has not started
    shared.finish()
    waited = shared.answers[first + 4].ended
    assert waited is not None and (waited.finish, waited.completion_tokens) == ("cancelled", 0)
    assert shared.answers[first + 2].tokens == plainly(model, PROMPTS[0], 50)
    assert shared.answers[first + 3].tokens == plainly(model, PROMPTS[0], 50)


def test_the_same_seed_writes_the_same_whatever_else_runs(shared: Writer) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_p": 0.9},
        {"temperature": 1.3, "seed": 3, "top_k": 10, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 4, "min_p": 0.05, "frequency_penalty": 0.5},
        {"logit_bias": {7: 3.0}},
        {},
    ]
    requests = [
        asked(PROMPTS[i % 3], max_tokens=15 + i, ignore_eos=True, **kind)
        for i, kind in enumerate(kinds)
    ]
    together = shared.write(*requests)
    alone = [shared.write(request)[0] for request in reversed(requests)][::-1]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    other = asked(PROMPTS[0], max_tokens=15, temperature=1.0, seed=5, ignore_eos=True)
    assert shared.write(other)[0].tokens != together[0].tokens


@pytest.mark.parametrize("seed", range(3))
def test_nobody_notices_who_comes_and_goes(seed: int, shared: Writer) -> None:
    chance = random.Random(seed)
    requests = [
        asked(
            [chance.randrange(1, 400) for _ in range(chance.choice((1, 3, 9, 17, 40, 70)))],
            max_tokens=chance.randint(1, 25),
            ignore_eos=True,
            **chance.choice(({}, {"temperature": 1.0, "seed": chance.randrange(99)})),
        )
        for _ in range(14)
    ]
    alone = [shared.write(request)[0].tokens for request in requests]
    first = max(shared.answers) + 1
    numbers = list(range(first, first + len(requests)))
    for number, request in zip(numbers, requests, strict=True):
        shared.begin(number, request)
        for _ in range(chance.randrange(5)):
            shared.step()
        if chance.random() < 0.3:
            shared.backend.cancel(chance.choice(numbers))
    shared.finish()
    for number, tokens in zip(numbers, alone, strict=True):
        answer = shared.answers[number]
        assert answer.ended is not None
        if answer.ended.finish == "cancelled":
            tokens = tokens[: len(answer.tokens)]
        assert answer.tokens == tokens


def test_without_a_seed_every_answer_is_another(shared: Writer) -> None:
    request = asked(PROMPTS[0], max_tokens=15, temperature=1.0, ignore_eos=True)
    one, other = shared.write(request, request)
    assert one.tokens != other.tokens


def test_keys_and_values_are_counted_to_the_byte(folder: Path) -> None:
    with writing(folder, slots=5, max_len=100) as writer:
        layers, both, heads, size, floats = 2, 2, 2, 16, 4
        assert writer.loaded.memory["kv"] == layers * both * 5 * heads * 100 * size * floats
        weights = sum(p.nbytes for p in tiny.model_of("llama").parameters())
        assert weights <= writer.loaded.memory["weights"] <= weights + 1024  # rotary tables
        assert writer.loaded.details == {
            "engine": "slots",
            "slots": 5,
            "max_len": 100,
            "dtype": "float32",
            "vocab": 400,
            "layers": 2,
        }


def test_an_answer_ends_where_the_model_is_full(folder: Path, model: Any) -> None:
    with writing(folder, max_len=40) as writer:
        answer = writer.ask(PROMPTS[1], max_tokens=1000, ignore_eos=True)
        assert answer.ended is not None and answer.ended.finish == "length"
        assert answer.tokens == plainly(model, PROMPTS[1], 40 - len(PROMPTS[1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_datatypes_prove_themselves_too(folder: Path, dtype: str) -> None:
    with writing(folder, dtype=dtype) as writer:
        details = writer.loaded.details
        assert (details["engine"], details["dtype"]) == ("slots", dtype)
        assert len(writer.ask(PROMPTS[2], max_tokens=8, ignore_eos=True).tokens) == 8


def test_a_sequence_whose_numbers_break_ends_with_an_error_and_spoils_nobody(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][391] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with writing(tmp_path, slots=2) as writer:
        spoilt, fine = writer.write(asked([5, 391, 6]), asked(PROMPTS[0], max_tokens=9))
        assert spoilt.error is not None and "no number" in str(spoilt.error)
        assert fine.tokens == plainly(model, PROMPTS[0], 9)
        again = writer.write(*[asked(PROMPTS[0], max_tokens=9)] * 2)
        assert [one.tokens for one in again] == [fine.tokens] * 2


def test_numbers_that_break_leave_nothing_to_who_comes_next(folder: Path, model: Any) -> None:
    reference = plainly(model, PROMPTS[0], 9)
    broken = [391] * 40
    with writing(folder, slots=2, prefill_chunk=16) as writer:
        spoil(writer, 391)
        writer.begin(0, asked(broken))
        writer.step()  # half of its prompt
        writer.backend.cancel(0)
        writer.finish()
        assert writer.write(asked(PROMPTS[0], max_tokens=9))[0].tokens == reference
    with writing(folder, slots=2, prefill_chunk=128) as writer:
        spoil(writer, 391)
        # Both have read their prompts in one step, and the first leaves before the other.
        short, spoilt = writer.write(asked(PROMPTS[0] * 13, max_tokens=1), asked(broken))
        assert short.ended is not None and spoilt.error is not None
        again = writer.write(*[asked(PROMPTS[0], max_tokens=9)] * 2)
        assert [one.tokens for one in again] == [reference] * 2


def test_a_prompt_is_filled_up_with_tokens_that_it_has(folder: Path, model: Any) -> None:
    with writing(folder, slots=2, prefill_chunk=128) as writer:
        spoil(writer, 0)
        answers = writer.write(
            asked(PROMPTS[0], max_tokens=9, logit_bias={0: -100.0}),
            asked(PROMPTS[2], max_tokens=9, logit_bias={0: -100.0}),
        )
        assert [one.error for one in answers] == [None, None]


def spoil(writer: Writer, token: int) -> None:
    """Its embedding is no number any more."""
    engine: Any = writer.backend._engine
    with torch.inference_mode():
        engine._run.model.get_input_embeddings().weight[token] = torch.nan


def test_an_end_that_is_no_token_of_the_model_harms_nobody(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path, eos_token_id=[0, 500])
    with writing(tmp_path, slots=2) as writer:
        answer = writer.ask(PROMPTS[0], max_tokens=4, min_tokens=2)
        assert answer.ended is not None and len(answer.tokens) >= 2


def test_it_writes_the_same_from_a_private_snapshot(folder: Path, model: Any) -> None:
    from repository.backends.text.backend import TextBackend
    from tests.writers import order

    backend = TextBackend()
    writer = Writer(backend, backend.load(order(folder, private=True)))
    assert writer.ask(PROMPTS[3], max_tokens=9).tokens == plainly(model, PROMPTS[3], 9)
    backend.unload()


def test_a_sharded_model_is_read_whole(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    tiny.write_tokenizer(tmp_path)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    with writing(tmp_path) as writer:
        assert writer.ask(PROMPTS[3], max_tokens=9).tokens == plainly(model, PROMPTS[3], 9)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    tied = tiny.model_of("llama", tie_word_embeddings=True)
    tiny.write_text_model(tmp_path, "llama", tie_word_embeddings=True)
    with writing(tmp_path) as writer:
        weights = sum(p.nbytes for p in tied.parameters())
        assert weights <= writer.loaded.memory["weights"] <= weights + 1024
        assert writer.ask(PROMPTS[1], max_tokens=9).tokens == plainly(tied, PROMPTS[1], 9)
