"""The facade over a real folder, real worker processes and a real clock. Promises, not timings."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from contextlib import asynccontextmanager

import numpy as np
import pytest

from repository.errors import (
    DrainingError,
    IncompleteFilesError,
    InvalidNameError,
    InvalidTensorError,
    LoadFailedError,
    ModelNotFoundError,
    NoRoomError,
    UntrustedCodeError,
    VersionNotFoundError,
)
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import add_onnx, python_model

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def serving(root, **options):
    options.setdefault("settle_s", 0.1)
    options.setdefault("state_dir", root.parent / "state")
    models = Repository(Options(root, **options))
    async with models.running():
        yield models


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "models"
    path.mkdir()
    return path


def drop(root, name="m", version=1, value=1.0):
    path = root / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    add_onnx(path, value=value)
    return path


async def ask(models, name="m", version=None):
    """What the model adds to zero."""
    x = np.zeros((1, 4), np.float32)
    with models.lease(name, version) as gen:
        response = await models.infer(gen, InferRequest([Tensor.of("x", x)]))
    return float(response.outputs[0].array()[0, 0])


async def until(models, condition):
    """Waits for events until the condition holds."""
    with models.events.subscribe(after=0) as events:
        if condition():
            return
        async for _ in events:
            if condition():
                return
    raise AssertionError("the events ended first")


def word(models, name="m"):
    return str(models.status(name).state) if name in models.names() else ""


async def test_a_dropped_folder_is_served_and_follows_its_files(root):
    async with serving(root) as models:
        drop(root, value=1.0)
        await until(models, lambda: word(models) == "loaded")
        assert await ask(models) == 1.0
        first = models.lease("m").generation
        drop(root, value=2.0)
        await until(models, lambda: models.lease("m").generation is not first)
        assert await ask(models) == 2.0
        shutil.rmtree(root / "m")
        await until(models, lambda: "m" not in models.names())
        with pytest.raises(ModelNotFoundError):
            models.lease("m")


async def test_a_load_sees_files_that_no_watcher_has_seen(root):
    async with serving(root, mode="explicit", watch="off") as models:
        drop(root, value=3.0)
        report = await models.load("m")
        assert (report.versions, report.already) == ((1,), False)
        assert (await models.load("m")).already
        drop(root, value=4.0)
        assert not (await models.load("m")).already
        assert await ask(models) == 4.0


async def test_a_forced_load_is_a_new_generation_of_the_same_files(root):
    drop(root)
    async with serving(root) as models:
        await models.load("m")
        first = models.lease("m").generation
        report = await models.load("m", force=True)
        assert not report.already
        assert models.lease("m").generation.serial > first.serial
        assert models.lease("m").generation.spec.fingerprint == first.spec.fingerprint


async def test_a_broken_file_leaves_the_old_one_serving_with_the_reason(root):
    path = drop(root, value=1.0)
    async with serving(root) as models:
        await models.load("m")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(IncompleteFilesError, match=r"m/1/model\.onnx"):
            await models.load("m")
        assert await ask(models) == 1.0
        assert "model.onnx" in models.status("m").last_error.message
        drop(root, value=5.0)
        await models.load("m")
        assert await ask(models) == 5.0 and models.status("m").last_error is None


async def test_a_load_that_fails_in_the_model_says_why_and_can_be_asked_again(root):
    path = root / "m" / "1" / "model.py"
    path.parent.mkdir(parents=True)
    path.write_text("raise ValueError('the weights are cursed')\n")
    async with serving(root, trust_code=True) as models:
        with pytest.raises(LoadFailedError, match="the weights are cursed"):
            await models.load("m")
        assert word(models) == "failed"
        assert str(root) not in models.status("m").last_error.message


async def test_code_is_not_run_without_trust(root):
    python_model(root / "m" / "1", "raise SystemExit('it ran')")
    async with serving(root) as models:
        with pytest.raises(UntrustedCodeError, match="--trust-code"):
            await models.load("m")


async def test_unload_gives_every_byte_back_and_stays(root):
    drop(root)
    async with serving(root) as models:
        await models.load("m")
        held = models.devices()[0].reserved
        report = await models.unload("m")
        assert held > 0 and report.bytes_freed == held and models.devices()[0].reserved == 0
        assert (await models.unload("m")).bytes_freed == 0
        with pytest.raises(VersionNotFoundError, match="has no available versions"):
            models.lease("m")
        drop(root, "other")
        await models.load("other")
        assert word(models) == "unloaded"


async def test_unload_all_names_what_ran(root):
    for name in "abc":
        drop(root, name)
    async with serving(root, mode="explicit") as models:
        await models.load("a")
        await models.load("b")
        report = await models.unload_all()
        assert [r.model for r in report.unloaded] == ["a", "b"] and report.errors == {}


async def test_what_does_not_fit_is_foretold_and_refused_with_numbers(root):
    for name in "ab":
        drop(root, name)
        (root / name / "config.yaml").write_text("memory: 60MiB\n")
    (root / "a" / "config.yaml").write_text("memory: 60MiB\npin: true\n")
    async with serving(root, mode="explicit", memory_budget={"cpu": 100 << 20}) as models:
        told = await models.dry_run("a")
        assert (told.would_load, told.bytes_needed, told.bytes_free) == (
            True,
            60 << 20,
            100 << 20,
        )
        await models.load("a")
        assert not (await models.dry_run("a")).would_load
        told = await models.dry_run("b")
        assert not told.would_load and "needs 60MiB" in told.message
        with pytest.raises(NoRoomError) as refused:
            await models.load("b")
        assert (refused.value.needed, refused.value.free) == (60 << 20, 40 << 20)
        await models.unload("a")
        await models.load("b")
        assert word(models, "b") == "loaded"


async def test_an_idle_model_leaves_for_another_and_dry_run_said_so(root):
    for name in "abc":
        drop(root, name)
        (root / name / "config.yaml").write_text("memory: 40MiB\n")
    async with serving(root, mode="explicit", memory_budget={"cpu": 100 << 20}) as models:
        await models.load("a")
        await models.load("b")
        await ask(models, "a")
        assert (await models.dry_run("c")).would_evict == ("b",)
        await models.load("c")
        assert [word(models, m) for m in "abc"] == ["loaded", "unloaded", "loaded"]


async def test_two_versions_serve_and_an_alias_leads_to_them(root):
    drop(root, version=1, value=1.0)
    drop(root, version=2, value=2.0)
    (root / "m" / "config.yaml").write_text("version_policy: all\naliases: [champion]\n")
    async with serving(root) as models:
        assert (await models.load("m")).versions == (2, 1)
        assert await ask(models) == 2.0
        assert await ask(models, version=1) == 1.0
        assert await ask(models, "champion") == 2.0
        with pytest.raises(VersionNotFoundError, match="version 9"):
            models.lease("m", 9)


async def test_a_request_that_does_not_fit_never_reaches_the_worker(root):
    drop(root)
    async with serving(root) as models:
        await models.load("m")
        with models.lease("m") as gen, pytest.raises(InvalidTensorError, match="FP64"):
            await models.infer(gen, InferRequest([Tensor.of("x", np.zeros((1, 4)))]))


@pytest.mark.parametrize("name", ["../x", "a/../b", "", "a//b", ".hidden", "load", "a\x00b"])
async def test_names_that_are_not_names_are_refused(root, name):
    async with serving(root) as models:
        with pytest.raises((InvalidNameError, ModelNotFoundError)):
            await models.load(name)


async def test_a_model_in_a_nested_folder_is_served_under_its_path(root):
    drop(root, "org/name")
    async with serving(root) as models:
        await models.load("org/name")
        assert await ask(models, "org/name") == 1.0


async def test_explicit_mode_loads_what_was_named_and_reloads_it_when_it_changes(root):
    drop(root, "a")
    drop(root, "b")
    async with serving(root, mode="explicit", load=("a",)) as models:
        await until(models, lambda: word(models, "a") == "loaded")
        assert word(models, "b") == "unloaded"
        first = models.lease("a").generation
        drop(root, "a", value=7.0)
        await until(models, lambda: models.lease("a").generation is not first)
        assert await ask(models, "a") == 7.0


async def test_a_killed_worker_is_back_by_itself(root):
    drop(root)
    async with serving(root) as models:
        await models.load("m")
        gen = models.lease("m").generation
        (pid,) = gen.loaded.details["pids"]
        os.kill(pid, signal.SIGKILL)
        await until(
            models,
            lambda: (g := models.status("m").generations[0]) is not gen and g.ready_at is not None,
        )
        assert await ask(models) == 1.0
        assert models.status("m").last_error is None


async def test_four_loads_and_an_unload_at_once_all_end(root):
    drop(root)
    async with serving(root, mode="explicit") as models:
        results = await asyncio.gather(
            models.load("m"),
            models.load("m", force=True),
            models.unload("m"),
            models.load("m"),
            models.load("m"),
            return_exceptions=True,
        )
        assert not isinstance(results[-1], BaseException)
        assert word(models) == "loaded"


async def test_a_broken_version_is_told_and_does_not_keep_the_whole_ones_from_serving(root):
    whole = drop(root, version=1).read_bytes()
    drop(root, version=2, value=2.0)
    (root / "m" / "1" / "model.onnx").write_bytes(whole[: len(whole) // 2])
    (root / "m" / "config.yaml").write_text("version_policy: all\n")
    async with serving(root, mode="explicit") as models:
        with pytest.raises(IncompleteFilesError, match=r"m/1/model\.onnx"):
            await models.load("m")
        assert await ask(models) == 2.0 and word(models) == "loaded"
        drop(root, version=1, value=1.0)
        assert (await models.load("m")).versions == (2, 1)


async def test_a_load_that_the_end_overtakes_is_told_so_and_starts_nothing(root):
    async with serving(root, mode="explicit", settle_s=0.5) as models:
        drop(root)
        load = asyncio.create_task(models.load("m"))
        await asyncio.sleep(0)
        models.drain()
        with pytest.raises(DrainingError):
            await load
        assert models.status("m").generations == ()
