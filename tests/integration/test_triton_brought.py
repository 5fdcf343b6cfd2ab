"""What a load in Triton's way brings with it, over the whole app: configs, and files."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from server.faces.v2_repository import LONGEST_NOTED, MOST_PARAMETERS, _noted
from tests.integration.triton_depot import (
    BATCHED,
    FAILS,
    Depot,
    brought,
    depot,
    drop,
    encoded,
    is_done,
    until_swept,
)
from tests.models import add_onnx


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


# configs that a load brings ----------------------------------------------------------------------


async def test_a_config_stands_in_place_of_the_file_and_outlives_plain_loads(root: Path) -> None:
    drop(root)
    (root / "m" / "config.pbtxt").write_text("metric_tags { key: 'of' value: 'file' }\n")
    async with depot(root) as d:
        await d.load("m")
        first = d.serves()
        assert first.spec.config.metric_tags == {"of": "file"}
        assert is_done(await d.load("m", config=BATCHED))
        second = d.serves()
        assert second is not first and second.spec.config.max_batch_size == 8
        assert not second.spec.config.metric_tags, "all of the file is replaced"
        for reply in (await d.load("m"), await d.load("m", config='{"max_batch_size":8}')):
            assert is_done(reply) and d.serves() is second
        for wrong in (FAILS, '{"max_batch": 1}', "{", "null"):
            assert (await d.load("m", config=wrong)).status_code in (400, 500)
            assert d.serves() is second
        assert is_done(await d.load("m")) and d.serves() is second
        await d.models.load("m", config=None)
        assert d.serves().spec.config.metric_tags == {"of": "file"}


async def test_a_config_outlives_the_server_and_ends_when_files_change(root: Path) -> None:
    drop(root)
    async with depot(root) as d:
        await d.load("m", config=BATCHED)
    async with depot(root) as d:
        assert is_done(await d.load("m"))
        assert d.serves().spec.config.max_batch_size == 8
        drop(root, value=2.0)
        assert is_done(await d.load("m"))
        assert d.serves().spec.config.max_batch_size == 0 and await d.ask() == 2.0
    async with depot(root) as d:
        await d.load("m")
        assert d.serves().spec.config.max_batch_size == 0


async def test_where_files_are_watched_a_change_ends_the_config_by_itself(root: Path) -> None:
    drop(root)
    async with depot(root, mode="poll", watch="poll", poll_s=0.1) as d:
        await d.load("m", config=BATCHED)
        brought = d.serves()
        (root / "m" / "config.pbtxt").write_text("max_batch_size: 4\n")
        with d.models.events.subscribe(after=0) as events:
            async with asyncio.timeout(20):
                async for _ in events:
                    if d.serves() is not brought:
                        break
        assert d.serves().spec.config.max_batch_size == 4
        assert d.serves().spec.sources["max_batch_size"].startswith("config.pbtxt")


async def test_a_config_does_not_hold_for_files_that_came_while_it_was_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change between the look at them and the load: nobody is told that it holds."""
    drop(root)
    async with depot(root) as d:
        await d.load("m")
        overrides = d.models._overrides
        override = overrides._override

        async def late(*args: Any) -> Any:
            undo = await override(*args)
            drop(root, value=2.0)
            return undo

        monkeypatch.setattr(overrides, "_override", late)
        reply = await d.load("m", config=BATCHED)
        assert reply.status_code == 400
        assert reply.json()["error"].startswith("Newer operation has been applied")
        monkeypatch.undo()
        assert is_done(await d.load("m")) and await d.ask() == 2.0
        assert d.serves().spec.config.max_batch_size == 0
        assert is_done(await d.load("m", config=BATCHED))
        assert d.serves().spec.config.max_batch_size == 8


async def test_one_sort_of_override_at_a_time_and_the_last_wins(root: Path) -> None:
    drop(root)
    async with depot(root) as d:
        await d.models.load("m", config={"priority": 7})
        await d.load("m", config=BATCHED)
        config = d.serves().spec.config
        assert (config.priority, config.max_batch_size) == (0, 8)
        await d.models.load("m", config={"priority": 7})
        config = d.serves().spec.config
        assert (config.priority, config.max_batch_size) == (7, 0)
        await d.load("m")
        assert d.serves().spec.config.priority == 7


# files that a load brings ------------------------------------------------------------------------


async def test_files_replace_the_folder_until_a_load_brings_none(
    root: Path, tmp_path: Path
) -> None:
    drop(root, version=3)
    async with depot(root) as d:
        await d.load("m")
        files = {"file:1/model.onnx": encoded(tmp_path, 5.0)}
        assert is_done(await d.load("m", config="{}", **files))
        assert d.serves().spec.version == 1 and await d.ask() == 5.0
        before = d.serves()
        assert is_done(await d.load("m", config="{}", **files)) and d.serves() is before
        assert len(brought(root)) == 1 and not (root / "m" / "1").exists()
        await d.models.load("m", config={"priority": 7})
        assert (d.serves().spec.version, d.serves().spec.config.priority) == (3, 7)
        assert is_done(await d.load("m", config="{}", **files)) and await d.ask() == 5.0
        assert is_done(await d.load("m"))
        assert d.serves().spec.version == 3 and await d.ask() == 1.0
        await until_swept(d, root)


async def test_files_make_a_model_without_a_folder(root: Path, tmp_path: Path) -> None:
    async with depot(root) as d:
        files = {"file:1/model.onnx": encoded(tmp_path, 5.0)}
        assert is_done(await d.load("new", config='{"backend":"onnxruntime"}', **files))
        assert await d.ask("new") == 5.0
        assert await d.index() == [{"name": "new", "version": "1", "state": "READY"}]
        reply = await d.load("new")
        assert reply.status_code == 500
        assert "failed to load 'new', failed to poll from model" in reply.json()["error"]
        assert await d.ask("new") == 5.0, "what served goes on"
        assert is_done(await d.unload("new"))
        assert await d.index() == []
        await until_swept(d, root)


async def test_files_outlive_the_server_as_long_as_they_are_wanted(
    root: Path, tmp_path: Path
) -> None:
    files = {"file:1/model.onnx": encoded(tmp_path, 5.0)}
    async with depot(root) as d:
        await d.load("kept", config="{}", **files)
        await d.load("gone", config="{}", **files)
        await d.unload("gone")
    (root.parent / "state" / "brought" / "left").mkdir()
    async with depot(root) as d:
        assert len(brought(root)) == 1
        await d.models.load("kept")
        assert await d.ask("kept") == 5.0
        assert [entry["name"] for entry in await d.index()] == ["kept"]


async def test_files_that_cannot_be_loaded_leave_what_served_and_nothing_on_the_disk(
    root: Path, tmp_path: Path
) -> None:
    drop(root)
    code = base64.b64encode(b"class TritonPythonModel: pass").decode()
    broken = base64.b64encode(b"no model").decode()
    async with depot(root) as d:
        await d.load("m")
        before = d.serves()
        for parameters in (
            {"config": FAILS, "file:1/model.onnx": encoded(tmp_path, 5.0)},
            {"config": "{}", "file:1/model.onnx": broken},
            {"config": '{"backend":"python"}', "file:1/model.py": code},
            {"config": "{}", "file:labels.txt": broken},
        ):
            reply = await d.load("m", **parameters)
            assert reply.status_code in (400, 500), reply.text
            assert str(root.parent) not in reply.text
            assert d.serves() is before and await d.ask() == 1.0
        await until_swept(d, root)
        assert is_done(await d.load("m")) and d.serves() is before


async def test_files_come_with_their_own_code_only_where_code_is_trusted(root: Path) -> None:
    file = base64.b64encode(b"raise SystemExit(9)").decode()
    config = json.dumps(
        {
            "backend": "python",
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
            "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
        }
    )
    async with depot(root) as d:
        reply = await d.load("m", config=config, **{"file:1/model.py": file})
        assert reply.status_code == 500 and "--trust-code" in reply.json()["error"]
        assert await d.index() == []
        await until_swept(d, root)


async def test_a_plain_load_behind_one_that_brings_files_goes_back_to_the_repository(
    root: Path, tmp_path: Path
) -> None:
    """They take turns: whoever asked last has the last word."""
    drop(root)
    async with depot(root) as d:
        files = {"file:1/model.onnx": encoded(tmp_path, 5.0)}
        replies = await asyncio.gather(
            d.load("m", config="{}", **files), d.load("m", config=BATCHED), d.load("m")
        )
        assert all(map(is_done, replies)) and await d.ask() == 1.0
        assert d.serves().spec.config.max_batch_size == 8
        replies = await asyncio.gather(d.load("m", config="{}", **files), d.load("m"))
        assert all(map(is_done, replies)) and await d.ask() == 1.0
        await until_swept(d, root)


async def test_large_files_are_taken_and_the_audit_log_does_not_hold_them(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = base64.b64encode(os.urandom(3 << 20)).decode()
    async with depot(root) as d:
        files = {"file:1/model.onnx": encoded(tmp_path, 5.0), "file:1/extra.bin": large}
        with caplog.at_level("INFO", "modeldepot.audit"):
            assert is_done(await d.load("m", config="{}", **files))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "modeldepot.audit"]
    assert f"<{len(large)} characters>" in line and large[:50] not in line
    assert "'/v2/repository/models/m/load'" in line and "status=200" in line


async def test_of_a_long_load_the_audit_log_is_given_the_beginning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Long(str):
        def __repr__(self) -> str:
            raise AssertionError("all of it is written out, to keep 200 characters")

    assert repr(_noted("config", Long("x" * 10_000))) == repr("x" * LONGEST_NOTED)
    many = {f"k{n}": "x" for n in range(MOST_PARAMETERS + 1)}
    async with depot(root) as d:
        with caplog.at_level("INFO", "modeldepot.audit"):
            reply = await d.load("m", **many)
    assert reply.status_code == 400 and "2001 parameters; at most 2000" in reply.text
    (line,) = [r.getMessage() for r in caplog.records if r.name == "modeldepot.audit"]
    assert "k7" not in line and "status=400" in line


async def test_a_full_disk_is_told_as_such_and_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(root)
    async with depot(root) as d:
        await d.load("m")
        before = d.serves()

        def full(path: str, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr("repository.brought._write", full)
        files = {"file:1/model.onnx": encoded(tmp_path, 5.0)}
        reply = await d.load("m", config="{}", **files)
        assert reply.status_code == 507 and "No space left" in reply.json()["error"]
        assert d.serves() is before and brought(root) == []


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_is_asked_at_once_ends_and_nothing_is_left(
    root: Path, tmp_path: Path, seed: int
) -> None:
    """Loads of every sort, unloads and changes of files by six clients: each is answered, in Triton's
    words where it fails, and afterwards the last word holds."""
    chance = Random(seed)
    drop(root, "a")
    drop(root, "b")
    files = [{"file:1/model.onnx": encoded(tmp_path, value)} for value in (5.0, 6.0)]
    wrong: list[str] = []

    async def act(d: Depot) -> None:
        for _ in range(8):
            name = chance.choice("ab")
            match chance.randrange(6):
                case 0:
                    reply = await d.load(name)
                case 1:
                    reply = await d.load(name, config=chance.choice([BATCHED, "{}", FAILS]))
                case 2 | 3:
                    reply = await d.load(name, config="{}", **chance.choice(files))
                case 4:
                    reply = await d.unload(name)
                case _:
                    made = add_onnx(tmp_path / "next.onnx", value=chance.choice([1.0, 2.0]))
                    os.replace(made, root / name / "1" / "model.onnx")
                    reply = await d.post("index")
            told = reply.status_code == 200 or "Newer operation" in reply.text
            if not told and "'z'" not in reply.text and reply.status_code != 503:
                wrong.append(f"{reply.status_code} {reply.text}")

    async with depot(root) as d:
        async with asyncio.timeout(60):
            await asyncio.gather(*(act(d) for _ in range(6)))
        assert wrong == []
        for name in "ab":
            drop(root, name, value=7.0)
            assert is_done(await d.load(name)) and await d.ask(name) == 7.0
            assert is_done(await d.unload(name))
        await until_swept(d, root)
