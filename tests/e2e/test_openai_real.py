"""Real tiny models in a real server, through the pip `openai` client: what it says is what Hugging
Face's own `generate` says, and streams outlive a reload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from openai import AsyncOpenAI

from tests import tiny
from tests.e2e.server import WITHIN_S, Running, serving

pytestmark = pytest.mark.e2e

PROMPT = "the quick brown fox"
TALK: Any = [{"role": "user", "content": "drop a folder"}]
WRITES = 24


class Said(NamedTuple):
    """By Hugging Face itself, greedily."""

    prompt: str
    talk: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    repo = tmp_path_factory.mktemp("text") / "models"
    folder = tiny.write_text_model(repo / "writer")
    tiny.write_encoder(repo / "encoder")
    tiny.write_adapter(repo / "writer" / "adapters" / "poet", tiny.model_of("llama"))
    return repo, _said(folder)


def _said(folder: Path) -> Said:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def go_on(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITES, do_sample=False
            )
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    talk = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    return Said(go_on(PROMPT), go_on(talk))


@asynccontextmanager
async def depot(repo: Path) -> AsyncIterator[tuple[Running, AsyncOpenAI]]:
    async with serving(repo, "--settle", "0.1") as running:
        await running.said(r"ready after")
        async with AsyncOpenAI(
            base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=WITHIN_S
        ) as client:
            yield running, client


async def test_real_models_answer_the_openai_client(made: tuple[Path, Said]) -> None:
    """One server for all of it: a start costs seconds."""
    repo, said = made
    async with depot(repo) as (running, client):
        await _says_what_hugging_face_says(client, said)
        await _eight_at_once_say_the_same(client, said)
        await _is_told_what_does_not_fit(client)
        await _embeds(client)
        await _leaves_nothing_behind(running, client)
        await _outlives_a_reload(running, client)
        await _speaks_through_an_adapter(client)


async def _says_what_hugging_face_says(client: AsyncOpenAI, said: Said) -> None:
    found = await client.completions.create(
        model="writer", prompt=PROMPT, max_tokens=WRITES, temperature=0, echo=True, logprobs=2
    )
    (choice,) = found.choices
    assert choice.text == PROMPT + said.prompt
    assert found.usage is not None and found.usage.completion_tokens <= WRITES
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert len(logprobs.tokens) == found.usage.total_tokens
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    talk: dict[str, Any] = {"model": "writer", "messages": TALK, "temperature": 0}
    whole = await client.chat.completions.create(**talk, max_completion_tokens=WRITES)
    assert whole.choices[0].message.content == said.talk
    stream = await client.chat.completions.create(**talk, max_tokens=WRITES, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == said.talk


async def _eight_at_once_say_the_same(client: AsyncOpenAI, said: Said) -> None:
    async def one(length: int) -> None:
        stream = await client.completions.create(
            model="writer", prompt=PROMPT, max_tokens=length, temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert said.prompt.startswith(text.rstrip("\ufffd"))
        assert length < WRITES or text == said.prompt

    await asyncio.gather(*map(one, (4, 8, 12, 16, 20, WRITES, WRITES, WRITES)))
    seeded = [
        await client.completions.create(model="writer", prompt=PROMPT, seed=5, n=3)
        for _ in range(2)
    ]
    texts = [[choice.text for choice in found.choices] for found in seeded]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


async def _is_told_what_does_not_fit(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token"):
        await client.completions.create(model="writer", prompt="x y z " * 1000)
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="writer", prompt=[10**6])
    with pytest.raises(openai.BadRequestError, match="models that do: writer"):
        await client.completions.create(model="encoder", prompt="x")


async def _embeds(client: AsyncOpenAI) -> None:
    texts = [PROMPT, "a", PROMPT]
    found = await client.embeddings.create(model="encoder", input=texts)
    first, other, again = (e.embedding for e in found.data)
    assert len(first) == tiny.SIZES["hidden"] and found.usage.prompt_tokens > 3
    assert max(abs(a - b) for a, b in zip(first, again, strict=True)) < 1e-6
    assert max(abs(a - b) for a, b in zip(first, other, strict=True)) > 1e-3


async def _leaves_nothing_behind(running: Running, client: AsyncOpenAI) -> None:
    """Eight streams without an end fill all slots; when they are closed, the next is served."""

    async def leave() -> None:
        stream = await client.completions.create(
            model="writer", prompt=PROMPT, max_tokens=200, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        await anext(stream)
        await stream.close()

    await asyncio.gather(*(leave() for _ in range(16)))
    async with running.client() as web, asyncio.timeout(WITHIN_S):
        while True:
            shown = (await web.get("/v1/models/writer")).json()["generations"][0]
            if shown["leases"] == 0:
                break
            await asyncio.sleep(0.01)
        page = (await web.get("/metrics")).text
        assert 'modeldepot_tokens_total{kind="completion",model="writer",version="1"}' in page


async def _outlives_a_reload(running: Running, client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="writer", prompt=PROMPT, max_tokens=200, stream=True, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    first = await anext(stream)
    async with running.client() as web:
        again = {"model_name": "writer", "force_reload": True}
        reload = asyncio.ensure_future(web.post("/v1/models/load", json=again))
        rest = [chunk async for chunk in stream]
        assert rest[-1].choices[0].finish_reason == "length"
        assert {chunk.id for chunk in rest} == {first.id}
        assert (await reload).status_code == 200
    found = await client.completions.create(  # chance may end a text at once
        model="writer", prompt=PROMPT, max_tokens=2, temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.choices[0].finish_reason == "length"


async def _speaks_through_an_adapter(client: AsyncOpenAI) -> None:
    listed = {m.id for m in (await client.models.list()).data}
    assert {"writer", "encoder", "writer:poet"} <= listed
    plain, poet, bare = [
        (
            await client.completions.create(
                model=name, prompt=PROMPT, max_tokens=WRITES, temperature=0
            )
        ).choices[0].text
        for name in ("writer", "writer:poet", "poet")
    ]  # fmt: skip
    assert plain != poet == bare
    assert (await client.models.retrieve("writer:poet")).id == "writer:poet"
