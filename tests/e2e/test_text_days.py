"""Text on good days and bad ones: reloads under streams, workers that die, clients that leave,
adapters that come and go. Real tiny models, a real server, OpenAI's own client."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import tiny
from tests.e2e.changes import Told, shown
from tests.e2e.processes import started
from tests.e2e.server import WITHIN_S, Running

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(180),
    # PEFT asks transformers by a name that it will lose.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

PROMPT = "the quick brown fox"
TOKENS = 40
SEEDS = (0, 1, 2)
FLAGS = ("--settle", "0.2")
LONG = 20_000


def said_by(model: Any, prompt: str = PROMPT) -> str:
    """What plain `generate` writes, greedily."""
    tokenizer = tiny.tokenizer()
    asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = asked["input_ids"].shape[1]
    # No end of its own: `ignore_eos` lets it write on.
    found = model.generate(**asked, max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1)
    text: str = tokenizer.decode(found[0, length:], skip_special_tokens=True)
    return text


@asynccontextmanager
async def writing(
    repo: Path, *flags: str
) -> AsyncIterator[tuple[Running, httpx.AsyncClient, Told, openai.AsyncOpenAI]]:
    async with (
        started(repo, *FLAGS, *flags) as (server, http, told),
        openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WITHIN_S
        ) as client,
    ):
        await told.ready("writer")
        yield server, http, told, client


async def written(
    client: openai.AsyncOpenAI, model: str = "writer", **more: Any
) -> tuple[str, str | None]:
    """A stream's text, and how it ended."""
    stream = await client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
        **more,
    )
    text, finish = "", None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            finish = choice.finish_reason or finish
    return text, finish


async def test_reloads_under_streams_break_none(repo: Path) -> None:
    expected = {said_by(tiny.model_of("llama", seed=seed)) for seed in SEEDS}
    assert len(expected) == len(SEEDS)
    folders = [
        tiny.write_text_model(repo.parent / f"next-{seed}", "llama", seed=seed) for seed in SEEDS
    ]
    shutil.copytree(folders[0], repo / "writer")
    heard: list[tuple[str, str | None]] = []
    async with writing(repo) as (_, http, told, client):
        over = asyncio.Event()

        async def reader() -> None:
            while not over.is_set():
                heard.append(await written(client))

        async with asyncio.TaskGroup() as readers:
            for _ in range(6):
                readers.create_task(reader())
            for folder in folders[1:]:
                last = told.generations("writer")[-1]
                # In place: what a copy over the files of the model that serves does.
                shutil.copytree(folder, repo / "writer", dirs_exist_ok=True)
                await told.ready("writer", after=last)
            over.set()
        heard.append(await written(client))  # begun after the last reload
        assert {finish for _, finish in heard} == {"length"}
        assert {text for text, _ in heard} == expected, "an answer came from no one generation"
        assert told.failures() == []
        assert (await shown(http, "writer"))["last_error"] is None


def long_writer(repo: Path) -> None:
    tiny.write_text_model(repo / "writer", "llama", max_position_embeddings=LONG)
    options = f"options: {{slots: 1, max_len: {LONG}}}\n"
    (repo / "writer" / "config.yaml").write_text(f"backend: text\n{options}")


async def begun(client: openai.AsyncOpenAI) -> Any:
    """A stream that would go on for minutes; its first piece has come."""
    stream = await client.completions.create(
        model="writer",
        prompt=PROMPT,
        max_tokens=LONG - 100,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    await anext(aiter(stream))
    return stream


async def test_who_leaves_frees_the_slot_and_a_killed_worker_says_so_and_comes_back(
    repo: Path,
) -> None:
    long_writer(repo)
    async with writing(repo) as (_, http, told, client):
        for _ in range(3):
            stream = await begun(client)
            waiting = asyncio.create_task(written(client))
            await stream.close()
            assert (await waiting)[1] == "length"
        (serving,) = (await shown(http, "writer"))["generations"]
        assert serving["leases"] == 0

        stream = await begun(client)
        os.kill(serving["loaded"]["details"]["pids"][0], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="died"):
            async for _ in stream:
                pass
        await told.ready("writer", after=serving["serial"])
        assert (await written(client))[1] == "length"


# adapters -----------------------------------------------------------------------------------------


def adapted(seed: int) -> Any:
    """The model with that adapter, by PEFT itself."""
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny.model_of("llama"), ADAPTERS[seed]).eval()


ADAPTERS: dict[int, Path] = {}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    home = tmp_path_factory.mktemp("adapters")
    model = tiny.model_of("llama")
    for seed in range(8):
        ADAPTERS[seed] = tiny.write_adapter(home / str(seed), model, seed=seed)
    return ADAPTERS


async def until_it_writes(client: openai.AsyncOpenAI, model: str, text: str) -> None:
    """What the folder says now is in use a moment later."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            with suppress(openai.NotFoundError, openai.InternalServerError):  # not yet there
                if (await written(client, model))[0] == text:
                    return
            await asyncio.sleep(0.02)


async def until_it_is_gone(client: openai.AsyncOpenAI, model: str) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                await written(client, model)
            except openai.NotFoundError:
                return


async def test_adapters_come_change_and_go_while_the_model_serves_and_share_its_batches(
    repo: Path, adapters: dict[int, Path]
) -> None:
    base = said_by(tiny.model_of("llama"))
    texts = [said_by(adapted(seed)) for seed in adapters]
    assert len({base, *texts}) == 1 + len(adapters)
    tiny.write_text_model(repo / "writer", "llama")
    # Fewer places than adapters: some sequences wait for one.
    config = "backend: text\nadapters: {slots: 5}\noptions: {slots: 8}\n"
    (repo / "writer" / "config.yaml").write_text(config)
    home = repo / "writer" / "adapters"
    async with writing(repo) as (_, http, told, client):
        with pytest.raises(openai.NotFoundError):
            await written(client, "writer:a0")
        half = home / "half"
        half.mkdir(parents=True)
        shutil.copy(adapters[0] / "adapter_config.json", half)
        for seed, folder in adapters.items():
            shutil.copytree(folder, home / f"a{seed}")
        for seed, text in enumerate(texts):
            await until_it_writes(client, f"writer:a{seed}", text)
        with pytest.raises(openai.APIStatusError, match=r"adapter_model\.safetensors is missing"):
            await written(client, "writer:half")

        expected = {"writer": base} | {f"writer:a{i}": text for i, text in enumerate(texts)}
        names = list(expected) * 2
        answers = await asyncio.gather(*[written(client, name) for name in names])
        assert [text for text, _ in answers] == [expected[name] for name in names]

        shutil.copytree(adapters[1], home / "a0", dirs_exist_ok=True)
        await until_it_writes(client, "a0", texts[1])
        order = {"model_name": "writer", "force_reload": True}
        assert (await http.post("/v1/models/load", json=order)).status_code == 200
        assert await written(client, "writer:a0") == (texts[1], "length")

        shutil.rmtree(home / "a0")
        await until_it_is_gone(client, "writer:a0")
        assert await written(client) == (base, "length")
        assert len(told.generations("writer")) == 2, "an adapter must not reload its model"
