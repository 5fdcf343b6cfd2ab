"""The file that the journal is written to: one table of facts in SQLite, and who may have it open.

    <state folder>/
      journal.sqlite    kind, model, name -> a fact as JSON; with -wal beside it while a server runs
      journal.lock      held as long as a server runs; its pid, so that a second one can name it

Everything here blocks: the journal calls it from one thread of its own. A fact is on disk when `write`
returns. A file that cannot be read is never mended by guessing and never deleted: the start stops, and
says what to do. No text carries a path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from repository.errors import ConfigError

NAME = "journal.sqlite"
LOCK = "journal.lock"
BESIDE = ("-wal", "-shm", "-journal", "")  # the file itself last: without it they mean nothing
VERSION = 1
LOCK_WAIT_S = 3.0  # for the server before this one, which may be just ending
LOOK_S = 0.05

WHERE = f"{NAME} in the state folder"
WHAT_TO_DO = "put a good copy in its place, or start once with --forget, which moves it aside"
TABLE = """
    CREATE TABLE facts(
        kind TEXT NOT NULL, model TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY (kind, model, name)
    ) STRICT, WITHOUT ROWID
"""
PUT = (
    "INSERT INTO facts VALUES (?, ?, ?, ?) "
    "ON CONFLICT (kind, model, name) DO UPDATE SET value = excluded.value"
)
DROP = "DELETE FROM facts WHERE kind = ? AND model = ? AND name = ?"

Key: TypeAlias = tuple[str, str, str]  # kind, model, name ("" where a model has one such fact)


class StateFile:
    """`lock_wait_s`: how long another server may take to end."""

    def __init__(self, folder: Path, *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._folder = folder.absolute()
        self._path = self._folder / NAME
        self._lock_wait_s = lock_wait_s
        self._lock: int | None = None
        self._base: sqlite3.Connection | None = None
        self._inode = 0

    def open(self, *, forget: bool = False) -> dict[Key, str]:
        """All facts. `forget`: what was there is moved aside, and there are none. Raises ConfigError."""
        with _unusable_folder():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_lock()
            if forget:
                self._move_aside()
            self._create()
        try:
            base = self._connect()
            self._check(base)
            rows = base.execute("SELECT kind, model, name, value FROM facts").fetchall()
            self._begin_log(base)
            return {(kind, model, name): value for kind, model, name, value in rows}
        except sqlite3.Error as error:
            raise _not_now(error) or _spoilt(str(error)) from error

    def write(self, facts: Mapping[Key, str | None]) -> None:
        """All of them or none; None: it is one no longer. On disk when this returns. Raises OSError,
        whose strerror says why not; it may be called again."""
        try:
            self._still_there()
            base = self._base or self._begin_log(self._connect())
            base.execute("BEGIN IMMEDIATE")
            base.executemany(DROP, [key for key, value in facts.items() if value is None])
            base.executemany(PUT, [(*k, v) for k, v in facts.items() if v is not None])
            base.execute("COMMIT")
        except sqlite3.Error as error:
            self._let_go()
            raise _as_os_error(error) from error

    def close(self) -> None:
        self._let_go()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # who may have it ------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self._folder / LOCK, how, 0o600)
        deadline = time.monotonic() + self._lock_wait_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise self._taken() from None
            time.sleep(LOOK_S)
        with suppress(OSError):  # a full disk: then it is not named
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _taken(self) -> ConfigError:
        assert self._lock is not None
        pid = os.pread(self._lock, 20, 0).decode(errors="replace").strip()
        who = f"another server (pid {pid})" if pid.isdigit() else "another server"
        return ConfigError(
            f"{who} uses this state folder; stop it, or give this one a folder of its own with "
            f"--state-dir",
            where="--state-dir",
        )

    # the file -------------------------------------------------------------------------------------

    def _move_aside(self) -> None:
        if not os.path.lexists(self._path):
            return
        day = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        number, aside = 1, f"journal.forgotten-{day}.sqlite"
        while os.path.lexists(self._folder / aside):
            number += 1
            aside = f"journal.forgotten-{day}-{number}.sqlite"
        for end in BESIDE:
            with suppress(FileNotFoundError):
                os.rename(f"{self._path}{end}", f"{self._folder / aside}{end}")

    def _create(self) -> None:
        """For its owner alone; SQLite gives what it puts beside it the same mode."""
        file = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
        try:
            os.fchmod(file, 0o600)
            self._inode = os.fstat(file).st_ino
        finally:
            os.close(file)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _connect(self) -> sqlite3.Connection:
        """Locked for good, so that nobody else writes to it and no memory need be shared for it. What
        is not ours is not changed."""
        base = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=self._lock_wait_s,
        )
        self._base = base
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        return base

    def _begin_log(self, base: sqlite3.Connection) -> sqlite3.Connection:
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        return base

    def _check(self, base: sqlite3.Connection) -> None:
        (version,) = base.execute("PRAGMA user_version").fetchone()
        (tables,) = base.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if version > VERSION:
            raise ConfigError(
                f"it is of a newer server (version {version}, this one knows {VERSION}); start that "
                f"one, or start once with --forget, which moves the file aside",
                where=WHERE,
            )
        if version == 0 and tables == 0:
            base.execute("BEGIN IMMEDIATE")
            base.execute(TABLE)
            base.execute(f"PRAGMA user_version = {VERSION}")
            base.execute("COMMIT")
        elif version != VERSION:
            raise _spoilt("it is another program's")
        (found,) = base.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _spoilt(str(found).replace("\n", " "))

    def _still_there(self) -> None:
        """What is written to a file that has no name any more is lost."""
        try:
            inode = os.stat(self._path).st_ino
        except FileNotFoundError:
            inode = None
        if inode != self._inode:
            raise OSError(errno.ENOENT, f"{NAME} was moved or removed; put it back")

    def _let_go(self) -> None:
        """Of the connection: after an error what it knows of the file is not relied on."""
        base, self._base = self._base, None
        if base is not None:
            with suppress(sqlite3.Error):
                base.close()


def _spoilt(why: str) -> ConfigError:
    return ConfigError(f"it cannot be read ({why}); {WHAT_TO_DO}", where=WHERE, hint=WHAT_TO_DO)


def _not_now(error: sqlite3.Error) -> ConfigError | None:
    """Nothing is wrong with what the file says; None: there is."""
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        why: str | None = "another program has it open"
        what = "end that"
    elif code.startswith(("SQLITE_FULL", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
        why, what = _as_os_error(error).strerror, "free some room there or mend that"
    else:
        return None
    return ConfigError(
        f"it cannot be used ({why}); {what}, or name another --state-dir", where=WHERE
    )


@contextmanager
def _unusable_folder() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the state folder cannot be used ({error.strerror}); mend that, or name another one",
            where="--state-dir",
        ) from error


def _as_os_error(error: sqlite3.Error) -> OSError:
    code = getattr(error, "sqlite_errorname", "")
    for begin, number in (
        ("SQLITE_FULL", errno.ENOSPC),
        ("SQLITE_READONLY", errno.EROFS),
        ("SQLITE_IOERR", errno.EIO),
    ):
        if code.startswith(begin):
            return OSError(number, os.strerror(number))
    return OSError(errno.EIO, str(error))
