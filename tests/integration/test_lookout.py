"""The lookout over a real folder: what it sees through, and that it never goes blind."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from repository import lookout
from repository.errors import ModelNotReadyError
from repository.folder.scan import Scanner
from repository.folder.settle import Settler
from repository.folder.watch import Watcher
from repository.lookout import Lookout
from repository.observer import Observer
from repository.snapshot import Snapshot
from tests.models import add_onnx

SETTLE_S = 0.05


class Eyes(Scanner):
    """A scanner that counts, and fails as often as it is told to."""

    def __init__(self, root):
        super().__init__(root, trust_code=False)
        self.scans, self.failures = 0, []
        self.began = threading.Event()

    def _fail(self):
        if self.failures:
            raise self.failures.pop(0)

    def scan(self, now=None):
        self.scans += 1
        self.began.set()
        self._fail()
        return super().scan(now)

    def scan_model(self, name, now=None):
        self._fail()
        return super().scan_model(name, now)


class Looking:
    def __init__(self, root):
        self.eyes, self.told, self.actions = Eyes(root), [Snapshot()], []
        self.changed = asyncio.Event()
        observer = Observer()
        observer.watched = lambda action, model: self.actions.append((action, model))
        self.lookout = Lookout(self.eyes, Settler(SETTLE_S), self.tell, observer, settle_s=SETTLE_S)

    def tell(self, snapshot):
        self.told.append(snapshot)
        self.changed.set()

    @property
    def names(self):
        return list(self.told[-1].models)


@asynccontextmanager
async def looking(root):
    found = Looking(root)
    try:
        yield found
    finally:
        found.lookout.close()


@asynccontextmanager
async def watching(root):
    async with looking(root) as found:
        task = asyncio.create_task(found.lookout.watch(Watcher(root, "poll", 0.05)))
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.wait([task])


async def until(found, condition):
    async with asyncio.timeout(30):
        while not condition():
            found.changed.clear()
            await found.changed.wait()


def drop(root, name):
    (root / name / "1").mkdir(parents=True)
    add_onnx(root / name / "1" / "model.onnx")


NOISE = OSError(errno.EIO, "Input/output error"), RecursionError("a very strange folder")


@pytest.mark.parametrize("error", NOISE, ids=["disk", "bug"])
async def test_the_watch_goes_on_after_a_scan_that_failed(tmp_path, error):
    async with watching(tmp_path) as found:
        await until(found, lambda: len(found.told) > 1)
        found.eyes.failures = [error]
        drop(tmp_path, "a")
        await until(found, lambda: found.names == ["a"])
        assert not found.eyes.failures


async def test_the_start_goes_on_after_a_scan_that_failed(tmp_path):
    drop(tmp_path, "a")
    async with looking(tmp_path) as found:
        found.eyes.failures = [OSError(errno.ESTALE, "Stale file handle")]
        await found.lookout.settle(10)
        assert found.names == ["a"]


async def test_many_who_ask_at_once_share_a_scan_and_each_change_is_told_once(tmp_path):
    names = [f"m{i}" for i in range(20)]
    for name in names:
        drop(tmp_path, name)
    async with looking(tmp_path) as found:
        await asyncio.gather(*[found.lookout.fresh(name) for name in names])
        assert found.names == sorted(names)
        assert found.eyes.scans < len(names)
        added = [name for action, name in found.actions if action == "added"]
        assert sorted(added) == sorted(names)


async def test_a_look_sees_what_was_there_when_it_was_asked_for(tmp_path):
    async with looking(tmp_path) as found:
        first = asyncio.create_task(found.lookout.settle(10))
        await asyncio.sleep(0)
        drop(tmp_path, "a")
        assert (await found.lookout.fresh("a")).name == "a"
        await first


async def test_a_load_while_the_disk_fails_is_told_to_ask_again(tmp_path):
    async with looking(tmp_path) as found:
        found.eyes.failures = [OSError(errno.EIO, "Input/output error", str(tmp_path))]
        with pytest.raises(ModelNotReadyError, match="cannot be read now") as caught:
            await found.lookout.fresh("a")
        assert str(tmp_path) not in str(caught.value)


async def test_one_who_leaves_does_not_take_the_scan_of_the_others_away(tmp_path):
    drop(tmp_path, "a")
    async with looking(tmp_path) as found:
        impatient = asyncio.create_task(found.lookout.fresh("a"))
        patient = asyncio.create_task(found.lookout.fresh("a"))
        await asyncio.to_thread(found.eyes.began.wait, 10)
        impatient.cancel()
        assert (await patient).name == "a"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
async def test_a_repository_that_is_unmounted_is_not_an_empty_one(tmp_path):
    """What is left of a mount is an empty folder on another file system."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as mounted:
        bare = tmp_path / "bare"
        bare.mkdir()
        if os.stat(bare).st_dev == os.stat(mounted).st_dev:
            pytest.skip("needs a second file system")
        root = tmp_path / "root"
        root.symlink_to(mounted)
        drop(root, "a")
        async with looking(root) as found:
            await found.lookout.settle(10)
            root.unlink()
            root.symlink_to(bare)
            with pytest.raises(OSError, match="another file system"):
                await found.lookout.look()
            root.unlink()
            root.symlink_to(mounted)
            await found.lookout.look()
            assert found.names == ["a"]


class Ears:
    """A watcher that pokes as it is told to."""

    def __init__(self):
        self.pokes_, self.for_safety = asyncio.Queue(), False

    def poke(self, *, event):
        self.pokes_.put_nowait(event)

    async def pokes(self):
        while True:
            self.for_safety = not await self.pokes_.get()
            yield set()


@asynccontextmanager
async def overheard(root, monkeypatch):
    monkeypatch.setattr(lookout, "TOLD_WITHIN_S", 0.2)
    async with looking(root) as found:
        found.missed, found.ears = asyncio.Event(), Ears()
        found.lookout._observer.missed = found.missed.set
        task = asyncio.create_task(found.lookout.watch(found.ears))
        try:
            await until(found, lambda: len(found.told) > 1)
            yield found
        finally:
            task.cancel()
            await asyncio.wait([task])


async def test_a_change_that_only_a_regular_look_finds_was_lost_by_the_watcher(
    tmp_path, monkeypatch
):
    async with overheard(tmp_path, monkeypatch) as found:
        drop(tmp_path, "a")
        found.ears.poke(event=False)
        async with asyncio.timeout(30):
            await found.missed.wait()
        await until(found, lambda: found.names == ["a"])


@pytest.mark.parametrize("late", [False, True])
async def test_a_change_that_an_event_tells_was_not_lost_even_if_it_comes_late(
    tmp_path, monkeypatch, late
):
    async with overheard(tmp_path, monkeypatch) as found:
        drop(tmp_path, "a")
        if late:
            found.ears.poke(event=False)
        found.ears.poke(event=True)
        await until(found, lambda: found.names == ["a"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(found.missed.wait(), 0.4)


async def test_a_regular_look_that_finds_nothing_says_nothing(tmp_path, monkeypatch):
    async with overheard(tmp_path, monkeypatch) as found:
        scans = found.eyes.scans
        found.ears.poke(event=False)
        await until(found, lambda: found.eyes.scans > scans)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(found.missed.wait(), 0.4)
