"""How tokens are chosen, against Hugging Face's own processors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
import transformers as hf

from repository.backends.text.sampling import Choice, Sampler, check
from repository.errors import InvalidRequestError
from repository.generate import Sampling

VOCAB, GRID = 40, 512
PROMPT = [3, 5, 5, 7]


class Steps:
    """Random numbers that go through [0, 1) evenly, from row to row."""

    def __init__(self, at: float) -> None:
        self.at = at

    def getrandbits(self, bits: int) -> int:
        return int(self.at * 2**bits)


def logits(seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def shares(sampling: Sampling, scores: torch.Tensor) -> torch.Tensor:
    """How often each token is chosen, when random numbers are even."""
    rows = [Choice(sampling, PROMPT, frozenset()) for _ in range(GRID)]
    for i, row in enumerate(rows):
        row.random = Steps((i + 0.5) / GRID)  # type: ignore[assignment]
    vocab = scores.shape[1]
    chosen = Sampler(rows, vocab, "cpu").choose(scores.expand(GRID, -1))
    tokens = torch.tensor([one.token for one in chosen])
    return torch.bincount(tokens, minlength=vocab) / GRID


def theirs(scores: torch.Tensor, *processors: Any) -> torch.Tensor:
    scores = hf.LogitsProcessorList(processors)(torch.tensor([PROMPT]), scores.clone())
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        ({}, []),
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        ({"repetition_penalty": 1.7}, [hf.RepetitionPenaltyLogitsProcessor(1.7)]),
        (
            {
                "temperature": 1.5,
                "top_k": 20,
                "top_p": 0.9,
                "min_p": 0.05,
                "repetition_penalty": 1.3,
            },
            [
                hf.RepetitionPenaltyLogitsProcessor(1.3),
                hf.TemperatureLogitsWarper(1.5),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
@pytest.mark.parametrize("vocab", [VOCAB, 700])
def test_tokens_are_drawn_as_often_as_hugging_face_says(
    sampling: dict[str, Any], processors: list[Any], vocab: int
) -> None:
    scores = logits(vocab=vocab)
    got, wanted = shares(Sampling(**sampling), scores), theirs(scores, *processors)
    assert (got - wanted).abs().max() <= 1 / GRID + 1e-6
    assert not got[wanted == 0].any()


def test_penalties_of_the_answer_are_openais() -> None:
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=0)
    row = Choice(sampling, PROMPT, frozenset())
    row.written += [1, 1, 2]
    scores = torch.zeros(1, VOCAB)
    down = torch.zeros(1, VOCAB)
    down[0, 1], down[0, 2] = 2 * 0.25 + 0.5, 0.25 + 0.5
    scores[0, 1], scores[0, 4] = 5.0, 4.1
    chosen = Sampler([row], VOCAB, "cpu").choose(scores)[0]
    expected = (scores - down).log_softmax(-1)[0, 4].item()
    assert chosen.token == 4 and chosen.logprob == pytest.approx(expected, abs=1e-6)


def test_a_sampler_that_goes_on_counts_as_one_that_is_new() -> None:
    settings = Sampling(
        temperature=0, presence_penalty=3, frequency_penalty=2, repetition_penalty=2
    )
    kept, fresh = (Choice(settings, PROMPT, frozenset()) for _ in range(2))
    going = Sampler([kept], VOCAB, "cpu")
    for _ in range(12):
        again = Sampler([fresh], VOCAB, "cpu").choose(logits())[0].token
        token = going.choose(logits())[0].token
        assert token == again and token is not None
        kept.written.append(token)
        fresh.written.append(token)
    assert len(set(kept.written)) > 3


def test_a_bias_changes_what_is_likeliest_and_the_ends_wait_for_min_tokens() -> None:
    biased = Choice(Sampling(temperature=0, logit_bias={9: 100.0}), PROMPT, frozenset())
    waiting = Choice(
        Sampling(temperature=0, logit_bias={9: 100.0}, min_tokens=1), PROMPT, frozenset({9})
    )
    sampler = Sampler([biased, waiting], VOCAB, "cpu")
    first = sampler.choose(logits().expand(2, -1))
    assert first[0].token == 9 and first[1].token == logits().argmax()
    waiting.written.append(1)
    assert sampler.choose(logits().expand(2, -1))[1].token == 9


def test_what_one_row_draws_does_not_depend_on_its_neighbours() -> None:
    def rows() -> list[Choice]:
        kinds: list[dict[str, Any]] = [
            {}, {"top_p": 0.5}, {"top_k": 3}, {"top_p": 0.999}, {"top_k": 400}, {"min_p": 0.2},
            {"temperature": 0}, {"temperature": 1e-9}, {"presence_penalty": 1.0},
        ]  # fmt: skip
        return [Choice(Sampling(**kind, seed=7), PROMPT, frozenset()) for kind in kinds]

    scores = torch.cat([logits(seed, 700) / 4 for seed in range(9)])
    together = [one.token for one in Sampler(rows(), 700, "cpu").choose(scores)]
    alone = [
        Sampler([row], 700, "cpu").choose(scores[i : i + 1])[0].token
        for i, row in enumerate(rows())
    ]
    assert together == alone


def test_logits_that_are_no_numbers_choose_nothing_and_spoil_nobody_else() -> None:
    scores = torch.cat([logits(), torch.full((1, VOCAB), torch.nan), logits()])
    for settings in (Sampling(temperature=0), Sampling(seed=1, top_p=0.5), Sampling(seed=1)):
        rows = [Choice(settings, PROMPT, frozenset()) for _ in range(3)]
        chosen = Sampler(rows, VOCAB, "cpu").choose(scores)
        assert chosen[1].token is None and chosen[0].token == chosen[2].token is not None


def test_a_temperature_of_almost_nothing_chooses_the_likeliest() -> None:
    scores = logits().expand(2, -1)
    kinds = (Sampling(temperature=1e-60, seed=1), Sampling(temperature=1e-60, seed=1, top_p=0.9))
    chosen = Sampler([Choice(kind, PROMPT, frozenset()) for kind in kinds], VOCAB, "cpu").choose(
        scores
    )
    assert [one.token for one in chosen] == scores.argmax(-1).tolist()


def test_a_seed_and_its_negative_draw_differently() -> None:
    one, other = (Choice(Sampling(seed=seed), PROMPT, frozenset()) for seed in (-3, 3))
    assert one.random.random() != other.random.random()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-60}, "repetition_penalty is 1e-60; it must be 0.01 to 100"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logprobs": 101}, "logprobs is 101; it must be 0 to 100"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"logit_bias": {40: 1.0}}, "logit_bias: 40 is no token; there are 0 to 39"),
        ({"logit_bias": {1: float("nan")}}, "no number"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop": ("",)}, "1 to 1024 characters"),
        ({"stop": ("a",) * 33}, "33 stop strings; at most 32"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_name(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check(msgspec.structs.replace(Sampling(), **changes), VOCAB)
