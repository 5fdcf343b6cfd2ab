"""The watcher on a real folder: what it pokes for, what it survives, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from repository.folder import watch
from repository.folder.watch import Watcher

Pokes = asyncio.Queue[set[str]]


@asynccontextmanager
async def watching(
    root: Path,
    how: Literal["notify", "poll", "off"] = "notify",
    poll_s: float = 0.1,
    safety_s: float = 60.0,
) -> AsyncGenerator[Pokes]:
    watcher = Watcher(root, how, poll_s, safety_s)
    pokes: Pokes = asyncio.Queue()

    async def listen() -> None:
        async for changed in watcher.pokes():
            pokes.put_nowait(changed)

    before = set(threading.enumerate())
    task = asyncio.create_task(listen())
    try:
        await asyncio.wait_for(watcher.watching.wait(), 10)
        yield pokes
        assert not task.done()
    finally:
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait([task])
        left = {t for t in threading.enumerate() if t.name.startswith("watch")} - before
        assert not left


async def until(pokes: Pokes, path: str) -> None:
    """Waits for a poke that names the path (or, in polling, for any)."""
    async with asyncio.timeout(20):
        while True:
            changed = await pokes.get()
            if path in changed or (not path and not changed):
                return


async def test_a_name_that_is_not_utf_8_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is there, somebody looks every now and then; afterwards events come again."""
    monkeypatch.setattr(watch, "AGAIN_S", 0.3)
    async with watching(tmp_path) as pokes:
        strange = os.fsencode(tmp_path) + b"/\xff\xfe"
        await asyncio.to_thread(os.mkdir, strange)
        for _ in range(5):
            await until(pokes, "")
        await asyncio.to_thread(os.rmdir, strange)
        for name in map(str, range(1000)):
            (tmp_path / name).touch()
            async with asyncio.timeout(20):
                changed = await pokes.get()
            if name in changed:
                return
        raise AssertionError("no event came any more")


async def test_every_sort_of_change_is_a_poke_with_relative_paths(tmp_path: Path) -> None:
    async with watching(tmp_path) as pokes:
        (tmp_path / "m" / "1").mkdir(parents=True)
        await until(pokes, "m")
        (tmp_path / "m" / "config.yaml").write_text("a")
        await until(pokes, "m/config.yaml")
        (tmp_path / "m" / "config.yaml").write_text("b")
        await until(pokes, "m/config.yaml")
        os.utime(tmp_path / "m" / "config.yaml", ns=(10**18, 10**18))
        await until(pokes, "m/config.yaml")
        os.rename(tmp_path / "m", tmp_path / "n")
        await until(pokes, "n")
        (tmp_path / "n" / "1" / "model.onnx").write_text("x")
        await until(pokes, "n/1/model.onnx")
        shutil.rmtree(tmp_path / "n")
        await until(pokes, "n")


async def test_polling_pokes_without_any_event(tmp_path: Path) -> None:
    async with watching(tmp_path, "poll", poll_s=0.01) as pokes:
        for _ in range(3):
            await until(pokes, "")


async def test_off_never_pokes(tmp_path: Path) -> None:
    async with watching(tmp_path, "off", poll_s=0.001) as pokes:
        (tmp_path / "m").mkdir()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pokes.get(), 0.2)


async def test_a_safety_poke_comes_without_any_event(tmp_path: Path) -> None:
    async with watching(tmp_path, safety_s=0.2) as pokes:
        await until(pokes, "")
        await until(pokes, "")


async def test_a_root_that_vanishes_and_comes_back_is_watched_again(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    async with watching(root) as pokes:
        os.rename(root, tmp_path / "away")
        await until(pokes, ".")
        root.mkdir()
        await until(pokes, "")
        (root / "m").mkdir()
        await until(pokes, "m")


async def test_a_root_that_is_a_link_is_watched_where_it_leads_to_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "TURN_S", 0.05)
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
    root = tmp_path / "current"
    root.symlink_to("v1")
    async with watching(root) as pokes:
        (tmp_path / "next").symlink_to("v2")
        os.replace(tmp_path / "next", root)
        await until(pokes, "")
        (tmp_path / "v2" / "m").mkdir()
        await until(pokes, "m")


async def test_a_root_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "later", "notify", 0.01)
    pokes = watcher.pokes()
    first = asyncio.ensure_future(anext(pokes))
    await asyncio.sleep(0)
    (tmp_path / "later").mkdir()
    assert await asyncio.wait_for(first, 10) == set()
    await pokes.aclose()


async def test_where_inotify_is_refused_it_polls_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "OS file watch limit reached.")

    monkeypatch.setattr(watch, "RustNotify", refuse)
    with caplog.at_level(logging.WARNING):
        async with watching(tmp_path, poll_s=0.01) as pokes:
            await until(pokes, "")
    assert "OS file watch limit reached" in caplog.text and "looking every 0.01 s" in caplog.text
    assert str(tmp_path) not in caplog.text
