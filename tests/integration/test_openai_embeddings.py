"""/v1/embeddings and the models' list through the pip `openai` client, on a real socket."""

from __future__ import annotations

import asyncio
import base64
import random
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from repository.errors import InferenceFailedError
from repository.reports import AdapterView
from tests.fakes.writers import DIMENSIONS, ROWS, Writers, vector_of
from tests.openai_clients import in_a_thread, writing


async def test_vectors_come_in_order_and_exactly_whatever_their_spelling() -> None:
    """The client asks for base64 unless it is told otherwise."""
    texts = ["x" * n for n in range(1, 9)]
    wanted = np.array([vector_of(n) for n in range(1, 9)])
    async with writing() as (_, models, client):
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            models.parts.clear()
            how: Any = form
            found = await client.embeddings.create(model="embedder", input=texts, **how)
            assert found.object == "list" and found.model == "embedder"
            assert [e.index for e in found.data] == list(range(8))
            vectors = [
                np.frombuffer(base64.b64decode(e.embedding), "<f4")
                if isinstance(e.embedding, str)
                else np.array(e.embedding, np.float32)
                for e in found.data
            ]
            assert np.array_equal(np.array(vectors), wanted)
            assert (found.usage.prompt_tokens, found.usage.total_tokens) == (8, 8)
            assert [p.inputs[0].shape[0] for p in models.parts] == [3, 3, 2]


async def test_token_ids_are_padded_to_the_longest_of_their_part() -> None:
    async with writing() as (_, models, client):
        one = await client.embeddings.create(model="embedder", input=[4, 5, 6])
        assert np.allclose(one.data[0].embedding, vector_of(15)) and one.usage.prompt_tokens == 3
        two = await client.embeddings.create(model="embedder", input=[[1, 2, 3], [9]])
        assert two.usage.total_tokens == 4
        assert models.parts[1].inputs[0].array().tolist() == [[1, 2, 3], [9, -1, -1]]
        assert models.parts[1].outputs == ("embedding", "tokens")


async def test_what_cannot_be_embedded_is_refused_with_the_field() -> None:
    async with writing() as (depot, models, client):
        create = client.embeddings.create
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"input": ""}, "input"),
            ({"input": ["a", ""]}, "input[1]"),
            ({"input": []}, "input"),
            ({"input": [[]]}, "input[0]"),
            ({"input": ["a", 1]}, "input"),
            ({"input": [-1]}, "input"),
            ({"input": ["a"] * 2049}, "input"),
            ({"input": "a", "dimensions": DIMENSIONS + 1}, "dimensions"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
            ({"input": ["a", "b"], "extra_body": {"adapters": ["x"]}}, "adapters"),
        ]
        for asked, param in wrong:
            with pytest.raises(openai.BadRequestError) as raised:
                await create(model="embedder", **asked)
            assert raised.value.param == param, asked
        assert models.parts == []
        with pytest.raises(openai.BadRequestError, match="models that do: embedder"):
            await create(model="talker", input="a")
        same = await create(model="embedder", input="a", dimensions=DIMENSIONS, user="me")
        assert len(same.data[0].embedding) == DIMENSIONS
        counts = await depot.counts()
        good = [k for k in counts if 'protocol="openai"' in k and "success" in k]
        assert [counts[k] for k in good] == [1]


async def test_a_long_list_asks_for_a_few_parts_at_a_time_and_leaving_drops_them() -> None:
    models = Writers()
    models.embeds = False
    async with writing(models) as (depot, _, client):
        asking = asyncio.ensure_future(
            client.embeddings.create(model="embedder", input=["a"] * (10 * ROWS))
        )
        await depot.until(lambda: len(models.late) == 4)
        assert models.leases == 1 and len(models.parts) == 4
        futures = [future for future, _ in models.late]
        asking.cancel()
        await depot.until(lambda: all(future.cancelled() for future in futures))
        await depot.until(lambda: models.leases == 0)
        assert len(models.parts) == 4


async def test_a_part_that_fails_fails_the_request() -> None:
    models = Writers()
    models.embeds = False
    async with writing(models) as (depot, _, client):
        asking = asyncio.ensure_future(
            client.embeddings.create(model="embedder", input=["a"] * (10 * ROWS))
        )
        await depot.until(lambda: len(models.late) == 4)
        models.late[1][0].set_exception(InferenceFailedError("the model failed: no such luck"))
        models.late.pop(1)
        models.release()
        with pytest.raises(openai.InternalServerError, match="no such luck"):
            await asking


async def test_adapters_of_embeddings_are_parameters_of_the_inference() -> None:
    models = Writers()
    models.known["embedder"] = ("law", "med")
    async with writing(models) as (_, _models, client):
        create = client.embeddings.create
        await create(model="embedder:law", input="a")
        await create(model="med", input="a")
        await create(model="embedder", input="a", extra_query={"adapter": "law"})
        await create(
            model="embedder", input=list("abcd"), extra_body={"adapters": ["law"] * 3 + [""]}
        )
        await create(model="embedder", input=list("ab"), extra_body={"adapters": ["law", "med"]})
        assert [p.parameters for p in models.parts] == [
            {"adapter": "law"}, {"adapter": "med"}, {"adapter": "law"}, {"adapter": "law"}, {},
            {"adapters": ["law", "med"]},
        ]  # fmt: skip


async def test_models_and_their_adapters_are_listed_and_retrieved() -> None:
    models = Writers()
    models.of_models["talker"] = [
        AdapterView("clerk", "adapters/clerk", "loaded"),
        AdapterView("mute", "adapters/mute", "failed", error="no"),
        AdapterView("poet", "adapters/poet", "registered"),
    ]
    async with writing(models) as (depot, _, client):
        listed = [m async for m in await client.models.list()]
        assert [m.id for m in listed] == [
            "embedder", "held", "plain", "talker", "talker:clerk", "talker:poet", "tensors"
        ]  # fmt: skip
        assert {m.owned_by for m in listed} == {"modeldepot"}
        poet: Any = next(m for m in listed if m.id == "talker:poet")
        assert (poet.object, poet.parent, poet.root) == ("model", "talker", "talker")
        for name in ("talker", "talker:poet"):
            one = await client.models.retrieve(name)
            assert (one.id, one.object, one.owned_by) == (name, "model", "modeldepot")
            assert isinstance(one.created, int)
        for name in ("nobody", "talker:mute", "nobody:poet"):
            with pytest.raises(openai.NotFoundError) as missing:
                await client.models.retrieve(name)
            assert missing.value.code == "model_not_found" and missing.value.param is None

        def sync() -> list[str]:
            with in_a_thread(depot.port) as client:
                return [m.id for m in client.models.list()]

        assert len(await asyncio.to_thread(sync)) == 7


async def test_a_body_that_is_no_request_is_refused_in_openais_words() -> None:
    async with writing() as (depot, _, _client), httpx.AsyncClient() as web:
        url = f"http://127.0.0.1:{depot.port}/v1"
        good = b'{"model":"talker","prompt":"x"}'
        json = {"content-type": "application/json"}
        deep = b'{"model":"talker","prompt":"x","metadata":' + b"[" * 10000 + b"]" * 10000 + b"}"
        twice = b'{"model":"talker","prompt":"x","model":"other"}'
        for body, headers, status, word in (
            (b"", json, 400, "empty"),
            (b"[1]", json, 400, "object"),
            (good[:-1], json, 400, "JSON"),
            (b"\xff\xfe", json, 400, "JSON"),
            (deep, json, 400, "deep"),
            (twice, json, 400, "twice"),
            (good.replace(b'"x"', b'"x","seed":1e999'), json, 400, "seed"),
            (good.replace(b'"x"', b'"x","max_tokens":' + b"9" * 5000), json, 400, "max_tokens"),
            (good, {"content-type": "text/plain"}, 415, "application/json"),
            (good, {**json, "content-encoding": "gzip"}, 415, "compression"),
            (b" " * (8 * 1024**2 + 1), json, 413, "8388608"),
        ):
            answer = await web.post(f"{url}/completions", content=body, headers=headers)
            error = answer.json()["error"]
            assert answer.status_code == status and word in error["message"], (word, error)
            assert set(error) == {"message", "type", "param", "code"}
            assert answer.headers["x-request-id"]
        unsaid = await web.post(f"{url}/completions", content=good)  # no media type at all
        assert unsaid.status_code == 200 and unsaid.json()["choices"]
        wrong = await web.get(f"{url}/chat/completions")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
        odd = await web.post(f"{url}//chat//completions/", json={"model": "talker"})
        assert odd.status_code == 400 and odd.json()["error"]["param"] == "messages"


async def test_no_body_made_of_known_fields_and_odd_values_is_an_error_of_ours() -> None:
    odd: list[Any] = [
        None,
        True,
        -1,
        0.5,
        10**30,
        "",
        "talker",
        "a:b",
        [],
        ["x"],
        [1],
        [[]],
        {},
        {"1": 1},
    ]
    bases: dict[str, dict[str, Any]] = {
        "completions": {"model": "talker", "prompt": "x"},
        "chat/completions": {
            "model": "talker", "messages": [{"role": "user", "content": "x"}]
        },
        "embeddings": {"model": "embedder", "input": "x"},
    }  # fmt: skip
    fields = ("model", "prompt", "messages", "input", "n", "stop", "stream", "seed", "logit_bias",
              "logprobs", "top_p", "adapter", "adapters", "max_tokens", "stream_options",
              "dimensions", "chat_template_kwargs", "echo")  # fmt: skip
    dice = random.Random(4)
    async with writing() as (depot, models, _client), httpx.AsyncClient() as web:
        for _ in range(150):
            where, base = dice.choice(list(bases.items()))
            change = {dice.choice(fields): dice.choice(odd) for _ in range(dice.randint(1, 2))}
            url = f"http://127.0.0.1:{depot.port}/v1/{where}"
            answer = await web.post(url, json={**base, **change})
            assert answer.status_code in (200, 400, 404, 424), (where, change, answer.text)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert models.leases == 0
