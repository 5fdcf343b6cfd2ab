"""Triton's repository control over the whole app: real folders and models, and what is on the wire."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.triton_depot import (
    BATCHED,
    FAILS,
    brought,
    depot,
    drop,
    is_done,
)

WRONG: list[tuple[str, Any, int, str]] = [
    ("index", {"ready": 1}, 400, "Invalid value for 'ready': expected a boolean"),
    ("index", [], 400, "the body must be a JSON object"),
    ("other/index", None, 501, "'repository_name' specification is not supported"),
    ("other/models/m/load", None, 501, "'repository_name' specification is not supported"),
    ("other/models/m/unload", None, 501, "'repository_name' specification is not supported"),
    ("models/m/reload", None, 404, "Not Found"),
    ("models/load", None, 404, "Not Found"),
    (
        "models/x/load",
        None,
        500,
        "failed to load 'x', failed to poll from model repository: no model 'x'",
    ),
    (
        "models/%2E%2E%2Fm/load",
        None,
        400,
        "invalid model name '../m', model name must not contain path traversal characters",
    ),
    (
        "models/a%2F%2E%2E%2Fm/load",
        None,
        400,
        "invalid model name 'a/../m', model name must not contain path traversal characters",
    ),
    (
        "models/m/load",
        {"parameters": {"what": 1}},
        500,
        "unexpected error on creating Triton parameter",
    ),
    (
        "models/m/load",
        {"parameters": {"config": {}}},
        500,
        "unexpected error on creating Triton parameter",
    ),
    ("models/m/load", {"parameters": []}, 400, "Invalid value for 'parameters'"),
    ("models/m/load", b"{", 400, "the body is not JSON"),
    (
        "models/m/load",
        {"parameters": {"config": '{"max_batch": 8}'}},
        500,
        "failed to load 'm', failed to poll from model repository: request: unknown key",
    ),
    (
        "models/m/load",
        {"parameters": {"file:1/model.onnx": ""}},
        500,
        "failed to load 'm', failed to poll from model repository: files need",
    ),
    (
        "models/m/load",
        {"parameters": {"config": BATCHED, "file:1/a": "no base64!"}},
        400,
        "the content of 'file:1/a' is not base64",
    ),
    (
        "models/m/load",
        {"parameters": {"config": BATCHED, "file:../a": ""}},
        400,
        "invalid file name '../a'",
    ),
    ("models/m/unload", {"parameters": {"unload_dependents": 1}}, 400, "must be a boolean"),
    ("models/m/load", b" " * (2 << 20), 200, ""),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


# the wire ----------------------------------------------------------------------------------------


async def test_load_index_and_unload_are_on_the_wire_as_tritons(root: Path) -> None:
    drop(root)
    drop(root, "org/n")
    async with depot(root) as d:
        assert (await d.post("index")).content == b'[{"name":"m"},{"name":"org/n"}]'
        assert is_done(await d.load("m")) and is_done(await d.load("org%2Fn"))
        assert (await d.post("index", {"ready": True})).content == (
            b'[{"name":"m","version":"1","state":"READY"},'
            b'{"name":"org/n","version":"1","state":"READY"}]'
        )
        assert is_done(await d.unload("org/n")) and is_done(await d.unload("nothing"))
        assert is_done(await d.unload("..%2Fx"))
        assert (await d.index())[1] == {
            "name": "org/n", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded",
        }  # fmt: skip
        assert await d.index() != [] and len((await d.post("index", {"ready": True})).json()) == 1
        drop(root, "dropped")
        assert {"name": "dropped"} in await d.index(), "at once"
        shutil.rmtree(root / "dropped")
        assert "dropped" not in str(await d.index())


async def test_a_wrong_call_is_told_in_tritons_words_and_changes_nothing(root: Path) -> None:
    drop(root)
    async with depot(root) as d:
        await d.load("m")
        before = d.serves()
        for path, body, status, text in WRONG:
            reply = await d.post(path, body)
            assert reply.status_code == status, f"{path} {body}: {reply.text}"
            assert reply.headers["content-type"] == "application/json"
            assert text in reply.text.replace("\\", ""), f"{path}: {reply.text}"
            assert reply.content.startswith(b'{"error":"') or status == 200
        assert d.serves() is before and brought(root) == []


async def test_a_get_is_told_the_verb_that_would_do(root: Path) -> None:
    async with depot(root) as d:
        for path in ("index", "models/m/load"):
            reply = await d.client.get(f"/v2/repository/{path}")
            assert (reply.status_code, reply.content) == (405, b'{"error":"Method Not Allowed"}')


async def test_a_management_call_is_small_unless_files_may_be_brought(root: Path) -> None:
    drop(root)
    async with depot(root, files=False) as d:
        reply = await d.post("models/m/load", b" " * (2 << 20))
        assert reply.status_code == 400 and "--allow-file-override" in reply.json()["error"]
        reply = await d.load("m", config=BATCHED, **{"file:1/model.onnx": ""})
        assert reply.status_code == 501 and "'--allow-file-override'" in reply.json()["error"]


# what a load does --------------------------------------------------------------------------------


async def test_what_has_not_changed_is_not_loaded_again_and_a_broken_one_serves_on(
    root: Path,
) -> None:
    drop(root)
    async with depot(root) as d:
        await d.load("m")
        first = d.serves()
        assert is_done(await d.load("m")) and d.serves() is first
        (root / "m" / "1" / "model.onnx").write_bytes(b"no model")
        reply = await d.load("m")
        assert reply.status_code in (400, 500)
        assert "failed" in reply.json()["error"] and "'m'" in reply.json()["error"]
        (entry,) = await d.index()
        assert entry["state"] == "READY" and entry["reason"], entry
        assert d.serves() is first and await d.ask() == 1.0
        drop(root, value=3.0)
        assert is_done(await d.load("m")) and await d.ask() == 3.0
        assert await d.index() == [{"name": "m", "version": "1", "state": "READY"}]


async def test_what_a_model_failed_with_is_told_for_each_version(root: Path) -> None:
    drop(root)
    async with depot(root) as d:
        reply = await d.load("m", config=FAILS)
        assert reply.status_code == 400
        text = reply.json()["error"]
        assert text.startswith(
            "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: "
        )
        assert text.endswith(";\n") and "'z'" in text
        (entry,) = await d.index()
        assert entry["state"] == "UNAVAILABLE" and entry["reason"].startswith("Internal: ")


@pytest.mark.parametrize("mode", ["poll", "none"])
async def test_loads_are_not_refused_in_any_mode(root: Path, mode: str) -> None:
    drop(root)
    async with depot(root, mode=mode) as d:
        assert is_done(await d.load("m")) and is_done(await d.unload("m"))
        assert (await d.client.get("/v2/models/m/ready")).status_code != 200
        assert is_done(await d.load("m")) and await d.ask() == 1.0


@pytest.mark.parametrize(
    "how",
    [
        "rsync -a --delete {old}/ {live}/",
        "cp -rp {old}/. {live}/",
        "tar -C {old} -c . | tar -C {live} -x",
        "mv {live} {live}.away && mv {old} {live}",
    ],
)
async def test_an_older_version_that_is_put_back_with_its_times_is_seen(
    root: Path, tmp_path: Path, how: str
) -> None:
    live, old = root / "m", tmp_path / "old"
    drop(root, value=1.0)
    for path in (live / "1" / "model.onnx", live / "1", live):
        os.utime(path, (1.6e9, 1.6e9))
    shutil.copytree(live, old)
    async with depot(root) as d:
        drop(root, value=2.0)
        await d.load("m")
        assert await d.ask() == 2.0
        command = how.format(old=old, live=live)
        await asyncio.to_thread(subprocess.run, command, shell=True, check=True)
        assert os.stat(live / "1" / "model.onnx").st_mtime == 1.6e9
        assert is_done(await d.load("m"))
        assert await d.ask() == 1.0


async def test_a_load_that_is_overtaken_says_so_in_tritons_words(root: Path) -> None:
    drop(root)
    async with depot(root) as d:
        loading = asyncio.create_task(d.load("m"))
        async with asyncio.timeout(20):
            with d.models.events.subscribe(after=0) as events:
                async for event in events:
                    if event.kind == "model.state" and event.model == "m":
                        break
        await d.unload("m")
        reply = await loading
        assert reply.status_code == 400
        assert reply.json()["error"].startswith(
            "Newer operation has been applied to the model lifecycle, current load operation is "
            "out-dated."
        )


async def test_a_new_version_leaves_the_others_as_they_are(root: Path) -> None:
    drop(root)
    (root / "m" / "config.pbtxt").write_text("version_policy { all {} }\n")
    async with depot(root) as d:
        await d.load("m")
        first = d.models.lease("m", 1).generation
        drop(root, value=2.0, version=2)
        assert is_done(await d.load("m"))
        assert d.models.lease("m", 1).generation is first and await d.ask() == 2.0


# several folders ---------------------------------------------------------------------------------


async def test_a_name_in_two_folders_is_not_loadable_and_the_index_says_why(
    root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    drop(root)
    drop(other, value=2.0)
    drop(other, "n", value=3.0)
    async with depot(root, other) as d:
        assert is_done(await d.load("n")) and await d.ask("n") == 3.0
        reply = await d.load("m")
        assert reply.status_code == 500
        assert "model appears in two or more repositories" in reply.json()["error"]
        assert (await d.index())[0] == {
            "name": "m", "state": "UNAVAILABLE",
            "reason": "model appears in two or more repositories",
        }  # fmt: skip
        shutil.rmtree(root / "m")
        assert is_done(await d.load("m")) and await d.ask() == 2.0
