"""What may be asked of a text model, what is told of its answer, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repository.backends.text import prompts
from repository.errors import InvalidRequestError
from repository.generate import GenerateRequest, Sampling
from repository.messages import InferRequest
from tests import tiny
from tests.writers import GREEDY, Writer, asked, writing

FOX = "the quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def writer(folder: Path) -> Iterator[Writer]:
    with writing(folder) as writer:
        yield writer


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def chat(*messages: dict[str, Any], **more: Any) -> GenerateRequest:
    return GenerateRequest(
        messages=messages, sampling=Sampling(temperature=0, max_tokens=6), **more
    )


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_a_text_and_its_tokens_are_the_same_prompt(writer: Writer, tokenizer: Any) -> None:
    ids = tokenizer(FOX)["input_ids"]
    one, other = writer.ask(FOX, max_tokens=9), writer.ask(ids, max_tokens=9)
    assert one.tokens == other.tokens and one.ended is not None
    assert one.ended.prompt_tokens == len(ids)


def test_the_text_is_what_the_tokenizer_makes_of_all_tokens(writer: Writer, tokenizer: Any) -> None:
    settings = {"temperature": 1.5, "max_tokens": 60, "ignore_eos": True}
    for answer in writer.write(*[asked(FOX, seed=seed, **settings) for seed in range(16)]):
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    biased = writer.ask(FOX, logit_bias={1: 100.0}, max_tokens=3)  # <|user|>
    assert biased.text == ""
    assert writer.ask(FOX, logit_bias={1: 100.0}, max_tokens=3, skip_special_tokens=False).text == (
        "<|user|>" * 3
    )


def test_a_conversation_goes_through_the_chat_template(writer: Writer, tokenizer: Any) -> None:
    assert writer.loaded.abilities == ("generate", "chat", "sleep")
    messages = (user("drop a folder"), {"role": "assistant", "content": "why"}, user("see it"))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    parts = [{"type": "text", "text": "drop "}, {"type": "text", "text": "a folder"}]
    said, joined = writer.write(chat(*messages), chat(user(parts), *messages[1:]))
    assert said.tokens == joined.tokens == writer.ask(ids, max_tokens=6).tokens
    going_on = writer.write(chat(*messages, add_generation_prompt=False))[0]
    assert going_on.ended is not None and going_on.ended.prompt_tokens == len(ids) - 1


def test_a_template_gets_what_else_was_said_and_its_refusal_is_shown(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% if mood is not defined %}{{ raise_exception('no mood') }}{% endif %}"
        "{{ mood }} {{ messages[0].content }}{{ messages[5].content.x }}"
    )
    stored = folder / "chat_template.jinja"
    before = stored.read_text()
    stored.write_text(template.split("{{ messages[5]")[0])
    try:
        with writing(folder) as writer:
            request = chat(user("fox"), template={"mood": "the quick"})
            told = writer.write(GenerateRequest(text="the quick fox", sampling=GREEDY), request)[1]
            assert told.ended is not None and told.ended.prompt_tokens > 3
            with pytest.raises(InvalidRequestError, match="the chat template refuses: no mood"):
                writer.backend.begin(99, chat(user("fox")))
            with pytest.raises(InvalidRequestError, match="cannot be given 'chat_template'"):
                writer.backend.begin(99, chat(user("fox"), template={"chat_template": "x"}))
        stored.write_text(template)
        with writing(folder) as writer, pytest.raises(InvalidRequestError, match="refuses"):
            writer.backend.begin(99, chat(user("fox"), template={"mood": ""}))
        assert "auto_map" not in config
    finally:
        stored.write_text(before)


def test_a_template_that_asks_for_all_memory_or_says_too_much_is_a_refusal(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path, "llama")
    for template, says in (
        ("{{ 'x' * 10**15 }}", "^the chat template refuses: MemoryError$"),
        ("{{ raise_exception('no ' * 10**6) }}", "^the chat template refuses: [no ]{1000}$"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with (
            writing(tmp_path) as writer,
            pytest.raises(InvalidRequestError, match=says),
        ):
            writer.backend.begin(1, chat(user("x")))


def test_a_text_that_the_tokenizer_gives_up_on_harms_nobody_else(tmp_path: Path) -> None:
    """A pattern that tries too often makes the library panic, which is no Exception."""
    tiny.write_text_model(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text())
    pattern = {"Regex": r"(?=(a+)+b)x|(\w+\s?)+!"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, said["pre_tokenizer"]]}
    path.write_text(json.dumps(said))
    with writing(tmp_path) as writer:
        with pytest.raises(InvalidRequestError, match="tokenizer gives up on it"):
            writer.backend.begin(1, asked("a" * 60 + "c"))
        assert len(writer.ask("a", max_tokens=3).tokens) == 3


def test_a_template_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_S", 0.1)
    tiny.write_text_model(tmp_path)
    rounds = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(rounds)
    with writing(tmp_path) as writer:
        with pytest.raises(InvalidRequestError, match="had not ended after"):
            writer.backend.begin(1, chat(user("fox")))
        assert writer.backend.unfinished == 0


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path, chat=False)
    with writing(tmp_path) as writer:
        assert writer.loaded.abilities == ("generate", "sleep")
        with pytest.raises(InvalidRequestError, match="no chat template; send a plain prompt"):
            writer.backend.begin(1, chat(user("hello")))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (GenerateRequest(), "exactly one of"),
        (GenerateRequest(text="a", tokens=(1,)), "exactly one of"),
        (GenerateRequest(text=""), "the prompt is empty"),
        (GenerateRequest(tokens=()), "the prompt is empty"),
        (GenerateRequest(tokens=(400,)), "token 400; the model knows 0 to 399"),
        (GenerateRequest(tokens=(-1,)), "token -1"),
        (GenerateRequest(tokens=(1,) * 256), "256 tokens; the model holds 256 with the answer"),
        (GenerateRequest(text="a " * 5_000_000), "10000000 characters, at least [0-9]+ tokens"),
        (GenerateRequest(text="half \ud800"), "no text that UTF-8 can write"),
        (chat(), "0 messages"),
        (chat({"content": "x"}), "must have a role"),
        (chat(user([{"type": "image_url"}])), "a part of type 'image_url'"),
        (chat(user(7)), "a text or a list of parts"),
        (chat(user(["x"])), "a part of type 'str'"),
        (asked("a", top_p=2.0), "top_p is 2.0"),
        (GenerateRequest(text="a", adapter="x"), "takes no adapters"),
    ],
)
def test_what_cannot_run_is_refused_at_its_begin(
    writer: Writer, request_: GenerateRequest, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        writer.backend.begin(12345, request_)
    assert writer.backend.unfinished == 0


def test_infer_points_to_where_text_is_written(writer: Writer) -> None:
    with pytest.raises(InvalidRequestError, match="/v1/completions or /v1/chat/completions"):
        writer.backend.infer(InferRequest(inputs=[]))


def test_a_stop_string_ends_the_answer_and_is_not_shown(writer: Writer) -> None:
    whole = writer.ask(FOX, max_tokens=40, ignore_eos=True)
    middle = whole.text[len(whole.text) // 2 :]
    stop = middle[:4]
    answer = writer.ask(FOX, max_tokens=40, ignore_eos=True, stop=("nowhere", stop))
    assert answer.ended is not None
    assert (answer.ended.finish, answer.ended.stopped_by) == ("stop", stop)
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.tokens == whole.tokens[: len(answer.tokens)]
    assert answer.ended.completion_tokens == len(answer.tokens) < 40


def test_an_answer_ends_with_a_stop_token_but_not_before_min_tokens(writer: Writer) -> None:
    whole = writer.ask(FOX, max_tokens=20, ignore_eos=True)
    token = whole.tokens[3]
    answer = writer.ask(FOX, max_tokens=20, ignore_eos=True, stop_token_ids=(token,))
    assert answer.ended is not None and answer.tokens == whole.tokens[:4]
    assert (answer.ended.finish, answer.ended.stopped_by) == ("stop", token)
    longer = writer.ask(FOX, max_tokens=20, stop_token_ids=(token,), min_tokens=8)
    assert len(longer.tokens) > 8 and token not in longer.tokens[:8]
    stop = whole.text[2:4]
    patient = writer.ask(FOX, max_tokens=9, ignore_eos=True, stop=(stop,), min_tokens=9)
    assert len(patient.tokens) == 9


def test_logprobs_are_those_of_the_model(writer: Writer) -> None:
    answer = writer.ask(FOX, max_tokens=8, logprobs=3, ignore_eos=True)
    model = tiny.model_of("llama")
    start = writer.ask(FOX, max_tokens=1).ended
    assert start is not None
    echoed = writer.write(
        GenerateRequest(
            text=FOX,
            sampling=Sampling(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True),
            echo=True,
        )
    )[0]
    ids = echoed.tokens
    assert echoed.pieces[0].text == FOX and echoed.tokens[start.prompt_tokens :] == answer.tokens
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert math.isnan(echoed.logprobs[0].logprob) and echoed.logprobs[0].token == ids[0]
    for place, one in enumerate(echoed.logprobs[1:]):
        assert one.token == ids[place + 1]
        assert one.logprob == pytest.approx(wanted[place, one.token].item(), abs=1e-3)
        best = wanted[place].topk(3)
        assert [token for token, _, _ in one.top] == best.indices.tolist()
        assert [p for _, _, p in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert answer.logprobs == pytest.approx(answer.logprobs)
    assert [one.token for one in answer.logprobs] == answer.tokens


def test_a_long_echo_has_a_logprob_for_every_token(folder: Path) -> None:
    prompt = tuple((5 * j) % 400 for j in range(70))
    request = GenerateRequest(
        tokens=prompt, sampling=Sampling(temperature=0, max_tokens=2, logprobs=0), echo=True
    )
    with writing(folder, prefill_chunk=16) as short, writing(folder) as whole:
        one, other = short.write(request)[0], whole.write(request)[0]
    assert [a.token for a in one.logprobs[:70]] == list(prompt)
    assert one.tokens == other.tokens and not one.logprobs[3].top
    pairs = zip(one.logprobs[1:], other.logprobs[1:], strict=True)
    assert all(a.logprob == pytest.approx(b.logprob, abs=1e-3) for a, b in pairs)


def test_an_answer_says_how_long_it_took(writer: Writer) -> None:
    ended = writer.ask(FOX, max_tokens=5).ended
    assert ended is not None
    assert 0 <= ended.wait_s <= ended.prompt_s <= ended.total_s
