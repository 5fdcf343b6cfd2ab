"""Models that slots cannot hold are written by transformers' generate, with the same settings."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from repository.errors import LoadFailedError
from tests import tiny
from tests.integration.test_text_engine import PROMPTS, plainly
from tests.writers import asked, writing

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "mistral": ({}, "sees the last 16 tokens"),
    "mamba": ({}, "it keeps a state"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_cache_is_not_plain_writes_through_generate(
    kind: str, tmp_path: Path
) -> None:
    reference = tiny.model_of(kind)
    ends = [plainly(reference, PROMPTS[0], 9)[-1]]
    tiny.write_text_model(tmp_path, kind, eos_token_id=ends)
    changes, why = KINDS[kind]
    with writing(tmp_path, slots=2, **changes) as writer:
        details = writer.loaded.details
        assert details["engine"] == "generate" and why in details["why"]
        assert writer.loaded.memory["kv"] == 0
        answers = writer.write(*[asked(prompt, max_tokens=14) for prompt in PROMPTS[:3]])
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            assert answer.tokens == plainly(reference, prompt, 14, ends)
        stopped = writer.ask(PROMPTS[1], stop_token_ids=(answers[1].tokens[4],)).ended
        assert stopped is not None
        assert (stopped.finish, stopped.stopped_by) == ("stop", answers[1].tokens[4])
        drawn = asked(PROMPTS[1], temperature=1, seed=3, top_p=0.9, max_tokens=9, logprobs=2)
        one, other = writer.write(drawn, drawn)
        assert one.tokens == other.tokens and len(one.logprobs) == len(one.tokens)


def test_both_engines_draw_the_same_and_echo_the_same(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path, "llama")
    request = asked("the quick brown fox", temperature=0.9, seed=4, max_tokens=12, logprobs=1)
    request = type(request)(text=request.text, sampling=request.sampling, echo=True)
    answers = []
    for engine in ("slots", "generate"):
        with writing(tmp_path, engine=engine) as writer:
            assert writer.loaded.details["engine"] == engine
            answers.append(writer.write(request)[0])
    assert answers[0].tokens == answers[1].tokens and answers[0].text == answers[1].text
    pairs = zip(answers[0].logprobs[1:], answers[1].logprobs[1:], strict=True)
    assert all(a.logprob == pytest.approx(b.logprob, abs=1e-3) for a, b in pairs)


def test_a_cancelled_generate_ends_its_thread(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path, "llama")
    before = threading.active_count()
    with writing(tmp_path, engine="generate", slots=2) as writer:
        for number in range(3):
            writer.begin(number, asked(PROMPTS[number], ignore_eos=True))
        writer.step()
        assert threading.active_count() == before + 2
        writer.backend.cancel(0)
        writer.step()
        ended = writer.answers[0].ended
        assert ended is not None and ended.finish == "cancelled"
        writer.step()
        assert writer.answers[2].pieces  # its slot is taken by the one that waited
    assert threading.active_count() == before


def test_slots_that_are_demanded_and_cannot_be_fail_the_load_with_the_reason(
    tmp_path: Path,
) -> None:
    tiny.write_text_model(tmp_path, "mamba")
    with (
        pytest.raises(
            LoadFailedError, match="slots, which cannot run this model: it keeps a state"
        ),
        writing(tmp_path, engine="slots"),
    ):
        pass


def test_a_window_that_is_never_reached_runs_in_slots(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path, "mistral", sliding_window=64)
    reference = tiny.model_of("mistral", sliding_window=64)
    with writing(tmp_path, max_len=64) as writer:
        assert writer.loaded.details["engine"] == "slots"
        answer = writer.ask(PROMPTS[2], max_tokens=30, ignore_eos=True)
        assert answer.tokens == plainly(reference, PROMPTS[2], 30)


def test_angles_that_depend_on_the_longest_row_are_not_for_slots(tmp_path: Path) -> None:
    """Phi-3's: beyond a length all positions of a forward mean something else."""
    half = 8
    angles = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    tiny.write_text_model(tmp_path, rope_parameters=angles)
    with writing(tmp_path, max_len=64) as writer:
        assert writer.loaded.details["engine"] == "slots"
        alone = writer.ask(PROMPTS[0], max_tokens=20, ignore_eos=True).tokens
    with writing(tmp_path) as writer:
        assert "beyond 64 tokens" in writer.loaded.details["why"]
        long = asked([(3 * j) % 400 for j in range(100)], max_tokens=25, ignore_eos=True)
        short = asked(PROMPTS[0], max_tokens=20, ignore_eos=True)
        assert writer.write(long, short)[1].tokens == alone
