"""The journal's file: one server at a time, read at the start or told why not, there after a kill."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap

import pytest

from repository.errors import ConfigError
from repository.journal import Journal
from repository.statefile import StateFile
from tests.fakes.journal import opened


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


async def test_the_file_is_for_its_owner_alone(state):
    async with opened(state) as journal:
        journal.word("a", "load")
        await journal.kept()
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in state.iterdir()}
    assert modes == {"journal.sqlite": 0o600, "journal.sqlite-wal": 0o600, "journal.lock": 0o600}
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert sorted(os.listdir(state)) == ["journal.lock", "journal.sqlite"]


# who may have it ---------------------------------------------------------------------------------


async def test_a_second_server_is_refused_and_told_who_has_it(state):
    async with opened(state):
        with pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}\).*--state-dir"):
            async with opened(state, forget=True):
                pass
    async with opened(state):
        pass


async def test_a_server_that_is_just_ending_is_waited_for(state):
    async with opened(state) as first:
        first.word("a", "load")
        second = Journal(state, lock_wait_s=20)
        opening = asyncio.ensure_future(second.open())
        await asyncio.wait([opening], timeout=0.1)
        assert not opening.done()
    await opening
    assert second.words == {"a": "load"}
    await second.close()


def _hold(folder, at, done):
    file = StateFile(folder)
    file.open()
    file.write({("word", "a", ""): '"load"'})
    at.set()
    done.wait()


async def test_what_a_killed_server_had_written_is_there_and_nothing_is_locked(state):
    spawn = multiprocessing.get_context("spawn")
    at, done = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(state, at, done))
    holder.start()
    assert await asyncio.to_thread(at.wait, 30)
    with pytest.raises(ConfigError, match=f"pid {holder.pid}"):
        async with opened(state):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    await asyncio.to_thread(holder.join)
    holder.close()
    async with opened(state) as journal:
        assert journal.words == {"a": "load"}


# files that cannot be read -----------------------------------------------------------------------


def spoil(state, how):
    state.mkdir()
    path = state / "journal.sqlite"
    if isinstance(how, bytes):
        path.write_bytes(how)
        return
    base = sqlite3.connect(path)
    base.executescript(how)
    base.close()


FACTS = """
    PRAGMA journal_mode = WAL;
    CREATE TABLE facts(kind TEXT, model TEXT, name TEXT, value TEXT);
    PRAGMA user_version = 1;
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (b"not a database at all" * 100, r"cannot be read \(file is not a database\)"),
        ("CREATE TABLE t(x);", "another program's"),
        ("PRAGMA user_version = 7;", r"of a newer server \(version 7, this one knows 1\)"),
        (FACTS + "INSERT INTO facts VALUES ('word', 'm', '', '\"fly\"')", "what it says of 'm'"),
        (FACTS + "INSERT INTO facts VALUES ('word', 'm', '', '{')", "what it says of 'm'"),
        (FACTS + "INSERT INTO facts VALUES ('adapter', 'm', 'a', '{}')", "what it says of 'm'"),
        (FACTS + "INSERT INTO facts VALUES ('x', 'm', '', '1')", "unknown kind 'x'"),
        ("PRAGMA user_version = 1;", "no such table: facts"),
    ],
)
async def test_a_file_that_cannot_be_read_stops_the_start_in_one_line_until_it_is_forgotten(
    state, how, why
):
    spoil(state, how)
    before = (state / "journal.sqlite").read_bytes()
    with pytest.raises(ConfigError, match=why) as told:
        async with opened(state):
            pass
    text = str(told.value)
    assert text.startswith("journal.sqlite in the state folder: ") and "--forget" in text
    assert "\n" not in text and str(state) not in text
    assert (state / "journal.sqlite").read_bytes() == before
    async with opened(state, forget=True) as journal:
        assert journal.words == {}
        journal.word("a", "load")
    (aside,) = state.glob("journal.forgotten-*.sqlite")
    assert aside.read_bytes() == before
    async with opened(state) as journal:
        assert journal.words == {"a": "load"}


async def test_a_damaged_page_is_found_at_the_start(state):
    async with opened(state) as journal:
        for n in range(500):
            journal.word(f"m{n:04}", "load")
    path = state / "journal.sqlite"
    text = bytearray(path.read_bytes())
    assert len(text) > 3 * 4096
    text[4096:8192] = os.urandom(4096)
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        async with opened(state):
            pass


async def test_forgetting_moves_the_old_file_aside_with_all_that_it_said(state):
    for name in ("a", "b"):
        async with opened(state, forget=True) as journal:
            assert journal.words == {}
            journal.word(name, "load")
    async with opened(state, forget=True):
        pass
    found = []
    for path in state.glob("journal.forgotten-*.sqlite"):
        base = sqlite3.connect(path)
        found += [row[0] for row in base.execute("SELECT model FROM facts")]
        base.close()
    assert sorted(found) == ["a", "b"]


async def test_a_folder_that_cannot_be_used_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state folder cannot be used \(Not a directory\)"):
        async with opened(tmp_path / "file" / "state"):
            pass
    (tmp_path / "journal.sqlite").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="state folder cannot be used"):
        async with opened(tmp_path):
            pass


async def test_a_file_with_which_nothing_is_wrong_is_not_called_unreadable(state):
    async with opened(state):
        pass
    base = sqlite3.connect(state / "journal.sqlite", isolation_level=None)
    base.execute("BEGIN EXCLUSIVE")
    journal = Journal(state, lock_wait_s=0.1)
    with pytest.raises(ConfigError, match="another program has it open") as told:
        await journal.open()
    await journal.close()
    base.close()
    assert "--forget" not in str(told.value) and str(state) not in str(told.value)
    async with opened(state):
        pass


async def test_a_disk_that_is_full_at_the_start_is_told_as_what_it_is(state):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be used \(Input/output error\)"):
            async with opened(state):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    async with opened(state) as journal:
        assert not journal.words


KILLED = """
    import asyncio, sys
    from pathlib import Path
    from repository.journal import Journal

    async def main():
        journal = Journal(Path(sys.argv[1]))
        await journal.open()
        for n in range(100000):
            journal.word(f"m{n % 7}", "load" if n % 2 else "unload")
            await journal.kept()
            print(n, flush=True)

    asyncio.run(main())
"""


def test_what_was_kept_survives_the_kill_of_its_process_at_any_moment(state):
    kept = 0
    for lines in (1, 7, 40):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(state)], stdout=subprocess.PIPE
        ) as process:
            for _ in range(lines):
                kept = int(process.stdout.readline())
            process.kill()
            kept = int([kept, *process.stdout.read().split()][-1])
        file = StateFile(state)
        facts = file.open()
        file.close()
        expected = {f"m{n % 7}": n % 2 for n in range(kept + 1)}
        found = {model: int(value == '"load"') for (_, model, _), value in facts.items()}
        after = {**expected, f"m{(kept + 1) % 7}": (kept + 1) % 2}  # noted, and not answered
        stale = {m: v for m, v in found.items() if m not in expected}
        assert {**stale, **expected} == found or {**stale, **after} == found
