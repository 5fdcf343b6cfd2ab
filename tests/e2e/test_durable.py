"""What a call was answered for survives the server's end, whatever that end is."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from tests.adapters import write_adapter
from tests.e2e.forked import Forked, ended, forking
from tests.e2e.server import Running, serving
from tests.extent import drawn
from tests.models import python_model

pytestmark = pytest.mark.e2e

SEED = 20
ROUNDS = drawn(8, long=20)
CALLS = 200  # of a round, if nobody killed the server
CLIENTS = 5
OURS = 2  # models of each client: nobody else speaks of them
QUICK = ("--settle", "0", "--watch", "off", "--default-host", "inline")

SOURCE = """
    class Model:
        inputs = outputs = [("x", "FP32", (2,))]
        def add_adapter(self, name, path, options):
            pass
        def remove_adapter(self, name):
            pass
        def infer(self, inputs, adapters):
            return inputs
"""


def add(repo: Path, name: str, config: str = "") -> None:
    python_model(repo / name / "1", SOURCE)
    (repo / name / "config.yaml").write_text(f"max_batch_size: 8\n{config}")
    write_adapter(repo / name / "adapters" / "own")


def allowed(repo: Path) -> Path:
    """A root beside the repository, with two adapters."""
    root = repo.parent / "loras"
    for name in ("one", "two"):
        write_adapter(root / name)
    return root


class Adapter(NamedTuple):
    """As it is listed."""

    src: str
    pin: bool
    preload: bool


OWN = Adapter("adapters/own", pin=False, preload=False)
Said = bool | Adapter | None  # does the model serve; how the adapter is registered
Key = tuple[str, str]  # model, adapter; "": the model itself


async def ready(server: Running) -> None:
    await server.said("ready after")


async def standing(client: httpx.AsyncClient, models: list[str]) -> dict[Key, Said]:
    """All there is to see of them: what serves, and each adapter that is registered."""
    loaded = (await client.get("/v1/models/status")).json()["loaded"]
    found: dict[Key, Said] = {(model, ""): model in loaded for model in models}
    for model in models:
        listed = (await client.get(f"/models/{model}/adapters")).json()["adapters"]
        for one in listed:
            found[model, one["name"]] = Adapter(one["src"], one["pin"], one["preload"])
    return found


class Clients:
    """`may_be`: for each fact what it may be now: what was acknowledged last, and what was asked for
    since and not answered. What is not there is None. `kill_at`: answers until the server is killed."""

    def __init__(self, loras: Path, chance: random.Random) -> None:
        self.loras = loras
        self.chance = chance
        self.may_be: dict[Key, set[Said]] = {}
        self.acknowledged = 0
        self.kill_at = 0
        self.workers: list[psutil.Process] = []  # of the server that was killed

    def check(self, found: dict[Key, Said]) -> None:
        """From here on it is as it was found."""
        wrong = {
            key: (found.get(key), may_be)
            for key, may_be in self.may_be.items()
            if found.get(key) not in may_be
        }
        assert not wrong, f"{wrong} (is, may be); seed {SEED}"
        assert found.keys() <= self.may_be.keys() or not self.may_be, found
        self.may_be = {key: {found.get(key)} for key in {*self.may_be, *found}}

    async def work(self, client: httpx.AsyncClient, server: Forked, models: list[str]) -> None:
        for _ in range(CALLS // CLIENTS):
            key, new, call = self.choose(client, self.chance.choice(models))
            self.may_be[key] = {*self.may_be.get(key, {None}), new}
            try:
                answer = await call
            except httpx.TransportError:
                assert self.acknowledged >= self.kill_at
                return  # it may have been done, or not
            assert answer.status_code == 200, f"{key}: {answer.text}; seed {SEED}"
            self.may_be[key] = {new}
            self.acknowledged += 1
            if self.acknowledged == self.kill_at:
                self.workers = server.children()
                server.kill()

    def choose(
        self, client: httpx.AsyncClient, model: str
    ) -> tuple[Key, Said, Awaitable[httpx.Response]]:
        """A call that changes something, and what holds after it."""
        if self.chance.random() < 0.3:
            (loaded,) = self.may_be[model, ""]
            url = "/v1/models/unload" if loaded else "/v1/models/load"
            return (model, ""), not loaded, client.post(url, json={"model_name": model})
        name = self.chance.choice(["a", "b", "c", "own"])
        (now,) = self.may_be.get((model, name), {None})
        url, pin = f"/models/{model}/adapters", self.chance.random() < 0.5
        if not isinstance(now, Adapter):
            lora = self.chance.choice(["one", "two"])
            src, told = str(self.loras / lora), f"loras/{lora}"
            if name == "own":
                src = told = OWN.src
            said = {"name": name, "src": src, "pin": pin}
            return (model, name), Adapter(told, pin, True), client.post(url, json=said)
        if self.chance.random() < 0.5:
            return (model, name), None, client.delete(f"{url}/{name}")
        new = Adapter(now.src, pin, now.preload or pin)
        return (model, name), new, client.post(f"{url}/{name}/update", json={"pin": pin})


async def test_what_was_acknowledged_survives_many_kills_at_any_moment(repo: Path) -> None:
    chance = random.Random(SEED)
    models = [f"m{n}" for n in range(CLIENTS * OURS)]
    for model in models:
        add(repo, model, "host: process\n" if model == "m0" else "")
    loras = allowed(repo)
    clients = Clients(loras, chance)
    state = str(repo.parent / "state")
    where = ("--port", "0", "--no-allow-grpc", "--state-dir", state, "--allowed-root", str(loras))
    async with forking("serve", str(repo), "--trust-code", *where, *QUICK) as server:
        for _ in range(ROUNDS):
            await server.start()
            async with server.client() as client:
                clients.check(await standing(client, models))
                clients.acknowledged, clients.kill_at = 0, chance.randrange(1, CALLS - CLIENTS)
                ours = [models[n::CLIENTS] for n in range(CLIENTS)]
                await asyncio.gather(*(clients.work(client, server, mine) for mine in ours))
            assert await server.code() == -signal.SIGKILL
            assert ended(clients.workers)
        await server.start()
        async with server.client() as client:
            clients.check(await standing(client, models))


async def test_the_last_word_about_a_model_and_pins_hold_in_every_mode_until_they_are_forgotten(
    repo: Path,
) -> None:
    for name in ("by-hand", "plain", "wished"):
        add(repo, name)
    models, loras = ["by-hand", "plain", "wished"], allowed(repo)

    async def found(*flags: str, then: Any = None) -> dict[Key, Said]:
        async with (
            serving(repo, *QUICK, "--allowed-root", str(loras), *flags) as server,
            server.client() as client,
        ):
            await ready(server)
            stands = await standing(client, models)
            if then is not None:
                await then(client)
            server.signal(signal.SIGTERM)
            assert await server.code() == 0, server.log
            return stands

    async def say(client: httpx.AsyncClient) -> None:
        url = "/models/wished/adapters"
        for call in (
            client.post("/v1/models/unload", json={"model_name": "by-hand"}),
            client.post("/v1/models/load", json={"model_name": "wished"}),
            client.post(url, json={"name": "a", "src": str(loras / "one"), "pin": True}),
            client.post(f"{url}/own/update", json={"pin": True}),
            client.delete("/models/plain/adapters/own"),
        ):
            assert (await call).status_code == 200

    fresh = {(m, name): value for m in models for name, value in (("", True), ("own", OWN))}
    assert await found(then=say) == fresh
    said: dict[Key, Said] = {
        ("by-hand", ""): False,
        ("by-hand", "own"): OWN,
        ("plain", ""): True,
        ("wished", ""): True,
        ("wished", "own"): Adapter("adapters/own", True, True),
        ("wished", "a"): Adapter("loras/one", True, True),
    }
    assert await found() == said
    explicit = ("--model-control-mode", "explicit", "--load-model", "by-hand")
    assert await found(*explicit) == {**said, ("plain", ""): False}
    assert await found("--forget") == fresh
    assert list((repo.parent / "state").glob("journal.forgotten-*.sqlite"))


async def test_a_start_that_is_refused_says_why_in_one_line(repo: Path) -> None:
    add(repo, "m")

    async def refused() -> list[str]:
        async with serving(repo, *QUICK, wait_for="") as server:
            assert await server.code() == 1
            return [line for line in server.log if " ERROR " in line]

    async with serving(repo, *QUICK) as first:
        why, *_ = await refused()
        assert f"another server (pid {first.process.pid})" in why and "--state-dir" in why
    journal = repo.parent / "state" / "journal.sqlite"
    journal.write_bytes(b"no journal" * 1000)
    lines = await refused()
    assert "journal.sqlite in the state folder" in lines[0] and "--forget" in lines[0]
    assert len(lines) == 3 and "Traceback" not in str(lines) and str(repo.parent) not in lines[0]
