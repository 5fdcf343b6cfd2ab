"""/v1/completions and /v1/chat/completions through the pip `openai` client, on a real socket."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import openai
import pytest

from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    ModelNotReadyError,
    RepositoryError,
    WorkerDiedError,
)
from server.metrics import names
from tests.fakes.writers import PROMPT_TOKENS, WORDS, Writers
from tests.openai_clients import in_a_thread, writing

HI: Any = [{"role": "user", "content": "hi"}]
TEXT = "".join(WORDS)


async def test_a_chat_is_answered_with_all_that_the_client_reads() -> None:
    async with writing() as (_, models, client):
        found = await client.chat.completions.create(
            model="talker",
            messages=[{"role": "developer", "content": "be short"}, *HI],
            seed=3, temperature=0, stop=["\n"], max_completion_tokens=9,
            extra_body={"top_k": 5, "chat_template_kwargs": {"thinking": False}},
        )  # fmt: skip
        assert found.object == "chat.completion" and found.id.startswith("chatcmpl-")
        assert found.model == "talker" and found.created > 1.7e9
        assert found.system_fingerprint == "fp_print-talker"
        (choice,) = found.choices
        assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
        assert choice.finish_reason == "stop" and choice.logprobs is None
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (PROMPT_TOKENS, 4)
        assert found.usage.total_tokens == PROMPT_TOKENS + 4
        assert found._request_id  # it is on every answer
        (pen,) = models.pens
        asked = pen.request
        assert asked.messages == ({"role": "system", "content": "be short"}, HI[0])
        assert asked.template == {"thinking": False} and asked.add_generation_prompt
        assert (asked.sampling.seed, asked.sampling.temperature) == (3, 0)
        assert (asked.sampling.stop, asked.sampling.top_k) == (("\n",), 5)
        assert asked.sampling.max_tokens == 9


async def test_a_completion_has_openais_defaults_and_says_when_it_was_cut() -> None:
    async with writing() as (_, models, client):
        found = await client.completions.create(model="plain", prompt="Once")
        assert found.object == "text_completion" and found.id.startswith("cmpl-")
        assert found.choices[0].text == TEXT and found.choices[0].finish_reason == "stop"
        sampling = models.pens[0].request.sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
        cut = await client.completions.create(model="plain", prompt=[1, 2, 3], max_tokens=2)
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("Hello wör", "length")
        assert models.pens[1].request.tokens == (1, 2, 3)


async def test_several_prompts_and_choices_come_in_their_order_with_seeds_of_their_own() -> None:
    async with writing() as (depot, models, client):
        found = await client.completions.create(
            model="talker", prompt=["a", "b"], n=2, seed=7, echo=True
        )
        assert [c.index for c in found.choices] == [0, 1, 2, 3]
        assert [c.text for c in found.choices] == ["a" + TEXT, "a" + TEXT, "b" + TEXT, "b" + TEXT]
        assert [p.request.sampling.seed for p in models.pens] == [7, 8, 7, 8]
        assert found.usage is not None  # a prompt is read once, however many answers it has
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (2 * PROMPT_TOKENS, 16)
        assert models.leases == 0
        page = (await depot.metrics.render())[0].decode()
        labels = '{kind="%s",model="talker",version="1"}'
        assert f"{names.TOKENS.full}_total{labels % 'prompt'} 10.0" in page
        assert f"{names.TOKENS.full}_total{labels % 'completion'} 16.0" in page
        assert f'{names.FIRST_TOKEN.full}_count{{model="talker",version="1"}} 1.0' in page


async def test_a_stream_has_the_same_text_role_usage_and_end() -> None:
    async with writing() as (_, _models, client):
        stream = await client.chat.completions.create(
            model="talker", messages=HI, stream=True, n=2, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert {c.object for c in chunks} == {"chat.completion.chunk"}
        assert len({c.id for c in chunks}) == 1 and len({c.created for c in chunks}) == 1
        for index in (0, 1):
            deltas = [d for c in chunks for d in c.choices if d.index == index]
            assert deltas[0].delta.role == "assistant"
            assert "".join(d.delta.content or "" for d in deltas) == TEXT
            assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8
        assert all(c.usage is None for c in chunks[:-1])
        plain = await client.completions.create(model="plain", prompt="x", stream=True)
        texts = [c.choices[0] async for c in plain]
        assert "".join(t.text for t in texts) == TEXT and texts[-1].finish_reason == "stop"


async def test_the_client_that_waits_in_a_thread_is_served_alike() -> None:
    def talk(port: int) -> tuple[Any, Any, Any]:
        with in_a_thread(port) as client:
            whole = client.chat.completions.create(model="talker", messages=HI)
            with client.chat.completions.stream(model="talker", messages=HI) as stream:
                final = stream.get_final_completion()
            return whole, final, client.models.list()

    async with writing() as (depot, _, _client):
        whole, final, models = await asyncio.to_thread(talk, depot.port)
        assert whole.choices[0].message.content == TEXT == final.choices[0].message.content
        assert "talker" in [m.id for m in models.data]


async def test_logprobs_of_a_chat_have_openais_shape() -> None:
    async with writing() as (_, _models, client):
        found = await client.chat.completions.create(
            model="talker", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2
        )
        logprobs = found.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        first, second = logprobs.content
        assert (first.token, first.logprob) == ("Hello", -0.5)
        assert second.bytes == list(" wör".encode())
        assert [(t.token, t.logprob) for t in second.top_logprobs] == [
            (" wör", -0.5),
            ("<1>", -1.5),
        ]
        stream = await client.chat.completions.create(
            model="talker", messages=HI, logprobs=True, stream=True
        )
        rows = [c.choices[0].logprobs async for c in stream]
        tokens = [t.token for row in rows if row and row.content for t in row.content]
        assert tuple(tokens) == WORDS


async def test_logprobs_of_a_completion_have_openais_older_shape() -> None:
    async with writing() as (_, _models, client):
        found = await client.completions.create(
            model="talker", prompt="ab", logprobs=1, echo=True, max_tokens=2
        )
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["ab", "Hello", " wör"]
        assert logprobs.token_logprobs == [None, -0.5, -0.5]
        assert logprobs.text_offset == [0, 2, 7]
        assert logprobs.top_logprobs == [None, {"Hello": -0.5}, {" wör": -0.5}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InferenceFailedError("the model failed: no such luck"), openai.InternalServerError),
        (WorkerDiedError("its worker has died"), openai.InternalServerError),
        (ModelNotReadyError("not now", retry_after_s=2), openai.InternalServerError),
    ],
)
async def test_what_fails_in_the_model_raises_the_clients_own_error(
    error: RepositoryError, kind: type[openai.APIStatusError]
) -> None:
    """Also in a stream, as long as nothing of it was told."""
    async with writing() as (_, models, client):
        for stream in (False, True):
            asking = asyncio.ensure_future(
                client.chat.completions.create(model="held", messages=HI, stream=stream)
            )
            await models.asked.wait()
            models.asked.clear()
            models.pens[-1].fail(error)
            with pytest.raises(kind) as raised:
                await asking
            body: Any = raised.value.body
            assert set(body) == {"message", "type", "param", "code"}
            assert body["code"] == error.code and str(error) in body["message"]


async def test_of_several_prompts_an_error_says_which_one_it_is_about() -> None:
    async with writing() as (depot, models, client):
        asking = asyncio.ensure_future(
            client.completions.create(model="held", prompt=["good", "bad"], n=2)
        )
        await depot.until(lambda: len(models.pens) == 4)
        models.pens[2].fail(InvalidRequestError("it is too long"))
        with pytest.raises(openai.BadRequestError, match=r"prompt\[1\]: it is too long"):
            await asking


async def test_what_is_asked_wrongly_raises_the_clients_own_error() -> None:
    async with writing() as (depot, models, client):
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="gpt-4o") as missing:
            await create(model="gpt-4o", messages=HI)
        assert missing.value.code == "model_not_found"
        for name in ("no such/../name", "talker:novelist", "a\ud7ffb"):
            with pytest.raises(openai.NotFoundError):
                await create(model=name, messages=HI)
        with pytest.raises(openai.BadRequestError, match=r"<= 2\.0") as bad:
            await create(model="talker", messages=HI, temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="models that do: held, talker"):
            await create(model="embedder", messages=HI)
        with pytest.raises(openai.BadRequestError, match="chat_template"):
            await create(model="plain", messages=HI)
        with pytest.raises(openai.BadRequestError, match="256 fit"):
            await client.completions.create(model="talker", prompt="x" * 2000)
        with pytest.raises(openai.BadRequestError, match="did you mean 'top_p'"):
            await create(model="talker", messages=HI, extra_body={"topp": 1})
        with pytest.raises(openai.APIStatusError, match="has not been registered") as unknown:
            await create(model="talker", messages=HI, extra_body={"adapter": "novelist"})
        assert unknown.value.status_code == 424
        assert models.leases == 0
        counts = await depot.counts()
        outcomes = {k: v for k, v in counts.items() if "inference_requests_total" in k}
        assert sum(outcomes.values()) == 10 and all('protocol="openai"' in k for k in outcomes)


async def test_a_full_queue_is_said_with_a_time_and_the_client_comes_again() -> None:
    models = Writers(max_queue=1)
    async with writing(models, retries=3) as (depot, _, client):
        five = asyncio.ensure_future(  # 4 slots and 1 place: all of it
            client.completions.create(model="held", prompt=list("abcde"))
        )
        await depot.until(lambda: len(models.pens) == 5)
        with pytest.raises(openai.InternalServerError) as full:
            await client.with_options(max_retries=0).completions.create(model="held", prompt="f")
        assert full.value.status_code == 503 and full.value.response.headers["retry-after"] == "1"
        again = asyncio.ensure_future(client.completions.create(model="held", prompt="g"))
        shed = depot.metrics.observer.server.frozen
        await depot.until(lambda: shed()[names.LOAD_SHED][("queue_full",)] == 2)
        models.release()
        assert len((await five).choices) == 5
        await depot.until(lambda: len(models.pens) == 6)
        models.release()
        assert (await again).choices[0].finish_reason == "stop"


async def test_adapters_are_named_in_four_ways_and_the_later_wins() -> None:
    async with writing() as (_, models, client):
        create = client.completions.create
        await create(model="talker:poet", prompt="x")
        await create(model="clerk", prompt="x")
        await create(model="talker:poet", prompt="x", extra_body={"adapter": "clerk"})
        both: Any = {"extra_body": {"adapter": "poet"}, "extra_query": {"adapter": "clerk"}}
        await create(model="talker", prompt="x", **both)
        said = {"X-Amzn-SageMaker-Adapter-Identifier": "poet"}
        await create(model="talker", prompt="x", extra_headers=said, **both)
        await create(model="talker:poet", prompt="x", extra_body={"adapter": ""})
        assert [p.request.adapter for p in models.pens] == [
            "poet", "clerk", "clerk", "clerk", "poet", ""
        ]  # fmt: skip
        models.pens.clear()
        # Of one that is not registered the model's name is only to blame if it brought it.
        for said, status in (({}, 404), ({"extra_query": {"adapter": "dancer"}}, 424)):
            with pytest.raises(openai.APIStatusError, match="dancer has not been") as unknown:
                await create(model=f"talker:{'poet' if said else 'dancer'}", prompt="x", **said)
            assert unknown.value.status_code == status
        models.pens.clear()
        rows = {"adapters": ["poet", "", "clerk"]}
        await create(model="talker", prompt=["a", "b", "c"], n=2, extra_body=rows)
        assert [p.request.adapter for p in models.pens] == [
            "poet",
            "poet",
            "",
            "",
            "clerk",
            "clerk",
        ]


async def test_a_key_that_is_missing_or_too_weak_raises_the_clients_own_error(
    tmp_path: Path,
) -> None:
    lines = ["keys:\n"]
    for scope in ("inference", "metrics"):
        digest = hashlib.sha256(f"key-{scope}".encode()).hexdigest()
        lines.append(f'  - {{name: {scope}, sha256: "{digest}", scopes: [{scope}]}}\n')
    (tmp_path / "keys.yaml").write_text("".join(lines))
    async with writing(api_keys=tmp_path / "keys.yaml") as (depot, _, client):
        create = client.completions.create
        with pytest.raises(openai.AuthenticationError) as unknown:
            await create(model="plain", prompt="x")
        assert unknown.value.code == "unauthorized"
        with pytest.raises(openai.PermissionDeniedError):
            await client.with_options(api_key="key-metrics").completions.create(
                model="plain", prompt="x"
            )
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        good = client.with_options(api_key="key-inference")
        assert (await good.completions.create(model="plain", prompt="x")).choices
        counts = await depot.counts()
        requests = {k: v for k, v in counts.items() if "inference_requests_total" in k}
        assert sum(requests.values()) == 1  # without a key it is no request
