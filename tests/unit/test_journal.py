"""What was said by call is on disk when `kept` returns: in order, together, and for the next start."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import threading
from contextlib import contextmanager, suppress

import pytest

from repository.errors import NotKeptError
from repository.events import EventBus
from repository.journal import Journal, KeptAdapter
from repository.statefile import StateFile
from tests.fakes.journal import opened

A = KeptAdapter("adapters/a", "/m/a", pin=True, preload=True, options={"k": "vé\udc80"})


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def writes(monkeypatch):
    """The batches that were written, in order."""
    batches = []
    write = StateFile.write

    def noted(self, facts):
        batches.append(dict(facts))
        write(self, facts)

    monkeypatch.setattr(StateFile, "write", noted)
    return batches


class Gate:
    """Holds the writer before it writes, and breaks it as a disk would."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        self.error = None
        self.tries = 0
        write = StateFile.write

        def gated(file, facts):
            self.tries += 1
            self.reached.set()
            assert self.open.wait(20)
            if self.error is not None:
                raise self.error
            write(file, facts)

        monkeypatch.setattr(StateFile, "write", gated)

    async def stands(self):
        assert await asyncio.to_thread(self.reached.wait, 20)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


async def test_what_was_noted_is_there_at_the_next_start(state):
    async with opened(state) as journal:
        journal.word("a", "load")
        journal.word("b/c", "unload")
        journal.adapter("a", "x", A)
        journal.away("a", "y")
        journal.override("a", {"max_model_len": 4096, "deep": {"x": [1.5, None]}})
        journal.mount("far", "/elsewhere/far")
        await journal.kept()
    for _ in range(2):
        async with opened(state) as journal:
            assert journal.words == {"a": "load", "b/c": "unload"}
            assert journal.adapters == {"a": {"x": A, "y": None}}
            assert journal.overrides == {"a": {"max_model_len": 4096, "deep": {"x": [1.5, None]}}}
            assert journal.mounts == {"far": "/elsewhere/far"}
    async with opened(state) as journal:
        journal.word("a", None)
        journal.no_adapter("a", "x")
        journal.no_adapter("a", "y")
        journal.override("a", None)
        journal.mount("far", None)
    async with opened(state) as journal:
        assert (journal.words, journal.adapters) == ({"b/c": "unload"}, {})
        assert (journal.overrides, journal.mounts) == ({}, {})


async def test_what_is_noted_together_is_one_transaction_and_the_last_note_counts(state, writes):
    async with opened(state) as journal:
        for n in range(100):
            journal.word("a", "load" if n % 2 else "unload")
            journal.word(f"m{n}", "load")
        await asyncio.gather(*(journal.kept() for _ in range(50)))
        (batch,) = writes
        assert len(batch) == 101 and batch["word", "a", ""] == '"load"'


async def test_what_comes_while_a_batch_is_written_goes_together_in_the_next_one(
    state, gate, writes
):
    async with opened(state) as journal:
        journal.word("a", "load")
        first = asyncio.ensure_future(journal.kept())
        await gate.stands()
        journal.word("a", "unload")
        journal.word("b", "load")
        second = asyncio.ensure_future(journal.kept())
        assert not first.done() and not second.done()
        gate.open.set()
        await asyncio.gather(first, second)
        assert gate.tries == 2
    async with opened(state) as journal:
        assert journal.words == {"a": "unload", "b": "load"}


async def test_a_note_that_changes_nothing_is_not_written_and_nobody_waits_for_it(state, writes):
    async with opened(state) as journal:
        journal.word("a", "load")
        await journal.kept()
        journal.word("a", "load")
        journal.word("b", None)
        await journal.kept()
    assert len(writes) == 1


async def test_a_caller_that_leaves_takes_nothing_with_it(state, gate):
    async with opened(state) as journal:
        journal.word("a", "load")
        caller = asyncio.ensure_future(journal.kept())
        await gate.stands()
        caller.cancel()
        gate.open.set()
        await journal.kept()
    async with opened(state) as journal:
        assert journal.words == {"a": "load"}


async def test_what_nobody_waited_for_is_written_too(state):
    async with opened(state) as journal:
        journal.word("a", "load")
    async with opened(state) as journal:
        assert journal.words == {"a": "load"}


# disks that cannot be written --------------------------------------------------------------------


async def test_a_disk_that_cannot_be_written_is_told_once_and_nothing_is_lost(state, gate, caplog):
    gate.open.set()
    gate.error = OSError(28, "No space left on device")
    events = EventBus()
    journal = Journal(state, events, retry_s=1000)
    await journal.open()
    with events.subscribe(after=0) as told:
        journal.word("a", "load")
        for _ in range(3):
            with pytest.raises(NotKeptError, match=r"cannot be written \(No space left on device"):
                await journal.kept()
        journal.word("b", "unload")
        with pytest.raises(NotKeptError):
            await journal.kept()
        assert gate.tries == 4
        gate.error = None
        journal.word("a", "unload")
        await journal.kept()
        assert (await anext(told)).kind == "journal.failed"
        assert (await anext(told)).kind == "journal.mended"
    errors = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    await journal.close()
    async with opened(state) as journal:
        assert journal.words == {"a": "unload", "b": "unload"}


async def test_it_is_tried_again_though_nobody_asks(state, gate):
    gate.open.set()
    gate.error = OSError(5, "Input/output error")
    events = EventBus()
    journal = Journal(state, events, retry_s=0.01)
    await journal.open()
    with events.subscribe() as told:
        journal.word("a", "load")
        assert (await anext(told)).kind == "journal.failed"
        gate.error = None
        assert (await anext(told)).kind == "journal.mended"
    await journal.kept()
    await journal.close()


async def test_what_could_not_be_kept_at_the_end_is_told(state, gate, caplog):
    gate.open.set()
    gate.error = OSError(30, "Read-only file system")
    async with opened(state, retry_s=1000) as journal:
        journal.word("a", "load")
        with pytest.raises(NotKeptError):
            await journal.kept()
    assert "1 things that were said by call are not remembered" in caplog.text
    journal.word("b", "load")
    with pytest.raises(NotKeptError, match="the server is ending"):
        await journal.kept()


async def test_a_file_that_was_moved_away_is_no_place_to_write_to(state):
    async with opened(state, retry_s=1000) as journal:
        path = state / "journal.sqlite"
        path.rename(state / "elsewhere")
        journal.word("a", "load")
        with pytest.raises(
            NotKeptError, match=r"journal\.sqlite was moved or removed; put it back"
        ):
            await journal.kept()
        (state / "elsewhere").rename(path)
        await journal.kept()
    async with opened(state) as journal:
        assert journal.words == {"a": "load"}


@contextmanager
def no_file_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_file_that_may_not_grow_keeps_what_it_has_and_takes_the_rest_later(state):
    async with opened(state, retry_s=1000) as journal:
        journal.word("a", "load")
        await journal.kept()
        with no_file_longer_than((state / "journal.sqlite-wal").stat().st_size):
            journal.word("a", "unload")
            journal.word("b", "load")
            with pytest.raises(NotKeptError):
                await journal.kept()
        await journal.kept()
    async with opened(state) as journal:
        assert journal.words == {"a": "unload", "b": "load"}


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_on_a_full_disk_what_was_kept_stays_and_the_rest_comes_when_there_is_room(tiny_disk):
    async with opened(tiny_disk, retry_s=1000) as journal:
        journal.word("a", "load")
        await journal.kept()
        ballast = tiny_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        journal.override("m", {"long": "x" * 20_000})
        journal.word("a", "unload")
        with pytest.raises(NotKeptError, match="No space left on device"):
            await journal.kept()
        ballast.unlink()
        await journal.kept()
    async with opened(tiny_disk) as journal:
        assert journal.words == {"a": "unload"} and "m" in journal.overrides


async def test_a_start_says_how_much_it_remembers(state, caplog):
    caplog.set_level("INFO", logger="modeldepot.state")
    async with opened(state) as journal:
        assert "remembered from before: nothing" in caplog.text
        journal.word("a", "unload")
        journal.word("b", "unload")
        journal.adapter("a", "x", A)
        journal.away("a", "y")
        await journal.kept()
    async with opened(state):
        said = "2 models unloaded by call, 1 adapter, 1 adapter unregistered"
        assert f"remembered from before: {said}" in caplog.text
