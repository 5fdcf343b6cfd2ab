"""Configs that a load brings, and models that a path names: the facade over real folders and models."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from repository.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    LoadFailedError,
    ModelNotFoundError,
    NoRoomError,
    OutOfBoundsError,
    RepositoryError,
    SupersededError,
)
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import add_onnx, python_model

FILE = "aphrodite_config.yaml"
FAILS = {"outputs": [{"name": "z", "datatype": "FP32", "shape": [-1, 4]}]}  # there is no "z"


@asynccontextmanager
async def serving(root: Path, **options: Any) -> AsyncGenerator[Repository]:
    options = {"settle_s": 0.1, "default_host": "inline", "poll_s": 0.1, **options}
    models = Repository(Options(root, state_dir=root.parent / "state", **options))
    async with models.running():
        yield models


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def drop(folder: Path, value: float = 1.0) -> Path:
    path = folder / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    return add_onnx(path, value=value)


def serves(models: Repository, name: str = "m") -> Generation:
    return models.lease(name).generation


async def ask(models: Repository, name: str = "m") -> float:
    with models.lease(name) as gen:
        request = InferRequest([Tensor.of("x", np.zeros((1, 4), np.float32))])
        response = await models.infer(gen, request)
    return float(response.outputs[0].array()[0, 0])


async def until(models: Repository, condition: Any) -> None:
    with models.events.subscribe(after=0) as events:
        if condition():
            return
        async for _ in events:
            if condition():
                return
    raise AssertionError("the events ended first")


# configs -----------------------------------------------------------------------------------------


async def test_a_config_is_a_new_generation_and_stays_until_a_load_drops_it(root: Path) -> None:
    drop(root / "m")
    (root / "m" / FILE).write_text("served_model_name: folder\n")
    (root / "m" / "config.yaml").write_text("priority: 3\n")
    async with serving(root) as models:
        report = await models.load("m")
        assert report.applied == {"served_model_name": ("folder", "model_dir")}
        first = serves(models)
        report = await models.load("m", config={"pin": True, "served-model-name": "asked"})
        assert not report.already
        assert report.applied == {
            "pin": (True, "uploaded"),
            "served_model_name": ("asked", "uploaded"),
        }
        second = serves(models)
        assert second.serial > first.serial and second.spec.config.pin
        assert second.spec.sources["pin"] == "request"
        assert second.spec.sources["priority"] == "config.yaml:1"
        assert serves(models, "asked") is second
        with pytest.raises(ModelNotFoundError):
            models.lease("folder")
        for again in (await models.load("m"), await models.load("asked", config=report_of(report))):
            assert again.already and again.applied == report.applied
        assert serves(models) is second
        dropped = await models.load("m", config=None)
        assert dropped.applied == {"served_model_name": ("folder", "model_dir")}
        assert not serves(models).spec.config.pin and serves(models, "folder")
        assert await ask(models) == 1.0


def report_of(report: Any) -> dict[str, Any]:
    return {key: value for key, (value, _) in report.applied.items()}


async def test_new_files_come_under_the_config_that_is_in_force(root: Path) -> None:
    drop(root / "m")
    async with serving(root) as models:
        await models.load("m", config={"priority": 7})
        first = serves(models)
        drop(root / "m", value=2.0)
        await until(models, lambda: serves(models) is not first)
        assert serves(models).spec.config.priority == 7 and await ask(models) == 2.0


async def test_a_load_that_fails_leaves_the_config_the_generation_and_the_wish(root: Path) -> None:
    drop(root / "m")
    async with serving(root) as models:
        await models.load("m", config={"priority": 1})
        first = serves(models)
        with pytest.raises(LoadFailedError, match="'z'"):
            await models.load("m", config=FAILS)
        assert serves(models) is first and await ask(models) == 1.0
        status = models.status("m")
        assert not status.reloading and status.last_error is not None
        assert (await models.load("m")).already and serves(models) is first
        assert models.status("m").last_error is None
    async with serving(root) as models:
        assert (await models.load("m")).applied == {"priority": (1, "uploaded")}


async def test_a_load_that_fails_does_not_bring_up_what_was_not_loaded(root: Path) -> None:
    drop(root / "m")
    async with serving(root, mode="explicit") as models:
        with pytest.raises(LoadFailedError):
            await models.load("m", config=FAILS)
        status = models.status("m")
        assert not status.wanted and not any(g.ready_at for g in status.generations)
        assert (await models.load("m")).applied == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_modl_len": 8}, "did you mean 'max_model_len'"),
        ({"max_model_len": 8}, "this model's is onnx"),
        ({"tensor_parallel_size": 2}, "it must be 1"),
        ({"options": {"thread": 2}}, "did you mean 'threads'"),
        ({"model": "other"}, "'model' names 'other', but the load is of 'm'"),
        ({"batching": {"preferred_sizes": [8]}}, "preferred_sizes"),
    ],
)
async def test_what_a_config_may_not_say_is_told_and_changes_nothing(
    root: Path, config: dict[str, Any], message: str
) -> None:
    drop(root / "m")
    async with serving(root) as models:
        await models.load("m")
        first = serves(models)
        with pytest.raises(ConfigError) as caught:
            await models.load("m", config=config)
        assert str(caught.value).startswith("request: ") and message in str(caught.value)
        assert models.status("m").generations == (first,)
        assert (await models.load("m", config={"model": "m"})).model == "m"


async def test_a_model_above_its_share_of_the_device_is_refused_with_the_numbers(
    root: Path,
) -> None:
    drop(root / "m")
    async with serving(root, memory_budget={"cpu": 2**30}) as models:
        await models.load("m")
        first = serves(models)
        assert (await models.dry_run("m")).bytes_needed == 0
        with pytest.raises(NoRoomError, match=r"needs 16MiB on cpu; .* 0.01 is 10.2MiB") as no:
            await models.load("m", config={"gpu_memory_utilization": 0.01})
        assert no.value.needed > 0.01 * 2**30
        assert serves(models) is first and models.status("m").wanted
        await models.load("m", config={"gpu_memory_utilization": 0.5})
        assert serves(models).spec.config.device_share == 0.5


async def test_a_second_name_that_another_model_has_is_refused(root: Path) -> None:
    drop(root / "m")
    drop(root / "other")
    async with serving(root) as models:
        await models.load("other")
        await models.load("m")
        first = serves(models)
        with pytest.raises(ConflictError, match="the alias 'other' is a model's name"):
            await models.load("m", config={"served_model_name": "other"})
        assert serves(models) is first


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_admins_do_at_once_the_last_config_that_loaded_is_in_force(
    root: Path, seed: int
) -> None:
    random = Random(seed)
    drop(root / "m")
    succeeded: list[dict[str, Any] | None] = [None]

    async def admin(n: int) -> None:
        for step in range(4):
            word = random.choice(
                ["good", "good", "bad", "wrong", "none", "unload", "files", "plain"]
            )
            config: Any = {"priority": 10 * n + step}
            try:
                if word == "unload":
                    await models.unload("m")
                elif word == "files":
                    drop(root / "m", value=random.random())
                elif word == "plain":
                    await models.load("m", force=random.random() < 0.3)
                else:
                    config = {"bad": FAILS, "wrong": {"no": 1}, "none": None}.get(word, config)
                    await models.load("m", config=config)
                    succeeded.append(config)
            except RepositoryError:
                if word == "unload":
                    raise

    async with serving(root, mode="explicit", settle_s=0.02) as models:
        await models.load("m")
        await asyncio.gather(*map(admin, range(3)))
        report = await models.load("m")
        wanted = succeeded[-1] or {}
        assert {key: value for key, (value, _) in report.applied.items()} == wanted
        assert serves(models).spec.config.priority == wanted.get("priority", 0)
        assert len([g for g in models.status("m").generations if g.error is None]) >= 1
    async with serving(root, mode="explicit") as models:
        assert (await models.load("m")).applied == report.applied


async def test_two_admins_who_bring_configs_take_turns(root: Path) -> None:
    drop(root / "m")
    async with serving(root) as models:
        configs = [{"priority": n} for n in (1, 2, 3)]
        reports = await asyncio.gather(*(models.load("m", config=c) for c in configs))
        assert [r.applied for r in reports] == [{"priority": (n, "uploaded")} for n in (1, 2, 3)]
        assert serves(models).spec.config.priority == 3


async def test_an_unload_overtakes_a_load_with_a_config_which_is_then_forgotten(root: Path) -> None:
    gate = root.parent / "gate"
    os.mkfifo(gate)
    python_model(root / "m" / "1", waits(gate))
    async with serving(root, mode="explicit", trust_code=True, default_host="process") as models:
        loading = asyncio.create_task(models.load("m", config={"priority": 5}))
        await until(models, lambda: "m" in models.names() and models.status("m").generations)
        await models.unload("m")
        with pytest.raises(SupersededError):
            await loading
        again = asyncio.create_task(models.load("m"))
        await asyncio.to_thread(gate.write_text, "go")
        assert (await again).applied == {}


def waits(gate: Path) -> str:
    return f"""
        class Model:
            def load(self, context):
                with open({str(gate)!r}) as file:
                    file.read()
            def infer(self, inputs):
                return inputs
    """


async def test_a_watched_folder_follows_its_aphrodite_config(root: Path) -> None:
    drop(root / "m")
    async with serving(root) as models:
        await models.load("m")
        first = serves(models)
        (root / "m" / FILE).write_text("served_model_name: other\n")
        await until(models, lambda: serves(models) is not first)
        second = serves(models, "other")
        assert second.spec.sources["aliases"] == f"{FILE}:1"
        (root / "m" / FILE).write_text("served_model_nam: other\n")
        await until(models, lambda: models.status("m").last_error)
        assert "did you mean 'served_model_name'" in models.status("m").last_error.message  # type: ignore[union-attr]
        assert serves(models) is second


# paths -------------------------------------------------------------------------------------------


async def test_a_folder_of_an_allowed_root_becomes_a_model_that_is_followed(root: Path) -> None:
    data = root.parent / "data"
    drop(data / "org" / "m")
    async with serving(root, allowed_roots=(data,)) as models:
        path = f"{data}/org/m"
        with pytest.raises(ModelNotFoundError, match="load it by its path first"):
            models.named(path)
        assert (await models.load(path, config={"priority": 2})).model == "org/m"
        first = serves(models, "org/m")
        assert serves(models, path) is first and first.spec.config.priority == 2
        assert models.named(path) == "org/m" == models.resolve(path)[0]
        assert (await models.load(path)).already
        drop(data / "org" / "m", value=2.0)
        await until(models, lambda: serves(models, "org/m") is not first)
        assert await ask(models, "org/m") == 2.0
        await models.unload(path)
        assert models.names() == ["org/m"]  # listed as long as its folder is there


async def test_what_was_said_by_call_is_there_again_after_a_start(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = root.parent / "data"
    drop(data / "m")
    drop(root / "kept")
    drop(root / "dropped")
    explicit = {"mode": "explicit", "watch": "off", "settle_s": 0.01}
    async with serving(root, allowed_roots=(data,), **explicit) as models:
        await models.load(f"{data}/m", config={"priority": 4})
        await models.load("kept", config={"priority": 5})
        for config in ({"priority": 6}, None):
            await models.load("dropped", config=config)
    async with serving(root, allowed_roots=(data,), **explicit) as models:
        for name, priority in (("m", 4), ("kept", 5), ("dropped", 0)):
            await models.load(name)
            assert serves(models, name).spec.config.priority == priority
    async with serving(root, **explicit) as models:  # the root is not allowed any more
        with pytest.raises(ModelNotFoundError):
            await models.load("m")
        assert "'m', from an allowed root, is left out" in caplog.text
        assert str(data) not in caplog.text
    async with serving(root, allowed_roots=(data,), forget=True, **explicit) as models:
        await models.load("kept")
        assert serves(models, "kept").spec.config.priority == 0
        with pytest.raises(ModelNotFoundError):
            await models.load("m")


async def test_paths_in_the_repository_are_names_and_others_are_out_of_bounds(root: Path) -> None:
    drop(root / "m")
    drop(root.parent / "other")
    async with serving(root) as models:
        assert (await models.load(f"{root}/m")).model == "m" == (await models.load("./m")).model
        for path in (root.parent / "other", root.parent / "nothing", "/etc"):
            for call in (models.load(str(path)), models.dry_run(str(path))):
                with pytest.raises(OutOfBoundsError) as caught:
                    await call
                assert str(path) not in str(caught.value)
        with pytest.raises(ModelNotFoundError):
            await models.load(f"{root}/unknown")


async def test_a_mount_that_fails_or_has_a_name_that_is_taken_is_no_model(root: Path) -> None:
    data = root.parent / "data"
    drop(data / "m")
    drop(root / "m")
    (data / "empty").mkdir()
    broken = drop(data / "broken")
    broken.write_bytes(broken.read_bytes()[:40])
    drop(data / "large")
    async with serving(root, allowed_roots=(data,), memory_budget={"cpu": 2**30}) as models:
        with pytest.raises(ConflictError, match="there is a model 'm' already"):
            await models.load(f"{data}/m")
        for name in ("empty", "nothing"):
            with pytest.raises(ModelNotFoundError, match="no model in the folder"):
                await models.load(f"{data}/{name}")
        with pytest.raises(LoadFailedError):
            await models.load(f"{data}/broken")
        with pytest.raises(NoRoomError):
            await models.load(f"{data}/large", config={"device_share": 0.001})
        with pytest.raises(ConfigError):
            await models.load(f"{data}/large", config={"max_model_len": 1})
        assert models.names() == ["m"]
        assert (await models.load(f"{data}/large")).applied == {}
        assert models.names() == ["large", "m"]


# names and ends ----------------------------------------------------------------------------------


async def test_the_default_is_what_was_configured_or_the_only_model(root: Path) -> None:
    async with serving(root) as models:
        with pytest.raises(InvalidRequestError, match="there is none yet"):
            models.default()
        drop(root / "a")
        await models.load("a")
        assert models.default() == "a"
        drop(root / "b")
        await models.load("b")
        with pytest.raises(InvalidRequestError, match="there are a, b; name one"):
            models.default()
    async with serving(root, default_model="b") as models:
        assert models.default() == "b"


async def test_an_unload_says_how_long_it_drained_and_whether_all_is_surely_back(
    root: Path,
) -> None:
    drop(root / "m")
    async with serving(root) as models:
        await models.load("m")
        assert not (await models.unload("m")).confirmed  # a thread: nobody can tell
        await models.load("m", config={"host": "process"})
        lease = models.lease("m")
        lease.begin()
        unloading = asyncio.create_task(models.unload("m"))
        await until(models, lambda: str(models.status("m").state) == "unloading")
        lease.end()
        report = await unloading
        assert report.confirmed and 0.0 < report.drain_s <= report.took_s
