"""Clients' shared memory: regions that were registered by name, read and written by offset.

A region is never mapped: whoever owns it may truncate it at any time, and touching a mapped page that
is gone ends the process that touches it. It is read and written through the descriptor that was opened
when it was registered; what is missing is then an error of one request.

Rules: nothing without --allow-client-shm. A key is the name of a plain file in /dev/shm: no folder, no
link, none of the names that Triton or we keep for ourselves. A region that was found stays as it is for
whoever found it, also when it is unregistered meanwhile; its descriptor goes with the last of them.
"""

from __future__ import annotations

import os
import resource
import stat
from typing import Any

from repository.errors import AlreadyThereError, InvalidRequestError, NotFoundError
from repository.tensors import Buffer
from server.refusals import UnsupportedError

FOLDER = "/dev/shm"
RESERVED = ("triton_python_backend_shm_region_", "modeldepot", "sem.")
MOST_REGIONS = 1024
SHARE = 4  # of the descriptors that the process may have, the part that regions may take
LONGEST = 255  # bytes of a key, as file systems have it; characters of a name
FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
DISABLED = (
    "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
)


class UnknownRegionError(NotFoundError):
    code = "unknown_region"


class Region:
    """`offset` and `byte_size` say which part of the file it is; offsets given here begin there."""

    __slots__ = ("_fd", "byte_size", "key", "name", "offset", "writable")

    def __init__(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self._fd = -1
        self.name, self.key, self.offset, self.byte_size = name, key, offset, byte_size
        self._fd, self.writable = _opened(key)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or offset + byte_size > found.st_size:
            raise InvalidRequestError(
                f"failed to register shared memory region '{name}': invalid args; bytes {offset} to "
                f"{offset + byte_size} were asked for, and '{key}' has {found.st_size}"
            )

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def check(self, offset: int, size: int) -> None:
        """Raises InvalidRequestError where that is not within the region."""
        if offset < 0 or size < 0 or offset + size > self.byte_size:
            raise InvalidRequestError(
                f"Invalid offset + byte size for shared memory region: '{self.name}'; it has "
                f"{self.byte_size} bytes, and {offset} + {size} were asked for"
            )

    def read(self, offset: int, size: int) -> bytes:
        """A copy. Raises InvalidRequestError, also where the file has become shorter."""
        self.check(offset, size)
        at, end = self.offset + offset, self.offset + offset + size
        parts: list[bytes] = []
        try:
            while at < end:
                part = os.pread(self._fd, end - at, at)
                if not part:
                    raise self._shrunk(end)
                parts.append(part)
                at += len(part)
        except OSError as error:
            raise self._failed("read", error) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Buffer) -> None:
        """Raises InvalidRequestError, among others where the region is too small for the data."""
        left = memoryview(data).cast("B")
        self.check(offset, len(left))
        if not self.writable:
            raise InvalidRequestError(
                f"shared memory region '{self.name}' may be read by the server, not written; give it "
                f"the right to write '{self.key}'"
            )
        at, end = self.offset + offset, self.offset + offset + len(left)
        try:
            if os.fstat(self._fd).st_size < end:  # writing there would make it longer again
                raise self._shrunk(end)
            while left:
                done = os.pwrite(self._fd, left, at)
                left, at = left[done:], at + done
        except OSError as error:
            raise self._failed("written", error) from error

    def _shrunk(self, end: int) -> InvalidRequestError:
        return InvalidRequestError(
            f"shared memory region '{self.name}' has become too short: its file ends before byte "
            f"{end}; unregister it, and register it anew"
        )

    def _failed(self, done: str, error: OSError) -> InvalidRequestError:
        return InvalidRequestError(
            f"shared memory region '{self.name}' could not be {done}: {error.strerror}"
        )

    def shown(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "key": self.key,
            "offset": self.offset,
            "byte_size": self.byte_size,
        }


def _opened(key: str) -> tuple[int, bool]:
    """A descriptor, and whether it may be written to."""
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise InvalidRequestError(
            f"shared memory key {key[:64]!r} is no name of a POSIX shared memory object; use one like "
            f"'/my_region'"
        )
    if name.startswith(RESERVED) or len(name.encode(errors="replace")) > LONGEST:
        raise InvalidRequestError(
            f"shared memory key '{key[:64]}' is too long, or begins with a name that is reserved; "
            f"choose another"
        )
    path = f"{FOLDER}/{name}"
    try:
        try:
            return os.open(path, os.O_RDWR | FLAGS), True
        except PermissionError:
            return os.open(path, os.O_RDONLY | FLAGS), False
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"Unable to open shared memory region: '{key}'") from error


class Regions:
    """All of a server. `allowed`: clients may have some; without it everything is refused."""

    def __init__(self, *, allowed: bool = False, most: int | None = None) -> None:
        self._allowed = allowed
        self._most = _most() if most is None else most
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises UnsupportedError, AlreadyThereError, InvalidRequestError."""
        self._ask()
        if name in self._regions:
            raise AlreadyThereError(f"shared memory region '{name}' already in manager")
        if not 0 < len(name) <= LONGEST:
            raise InvalidRequestError(f"a region's name has 1 to {LONGEST} characters")
        if offset < 0 or byte_size <= 0:
            raise InvalidRequestError(
                f"failed to register shared memory region '{name}': invalid args; an offset is not "
                f"negative, and a size is more than 0"
            )
        if len(self._regions) >= self._most:
            raise InvalidRequestError(
                f"{self._most} shared memory regions are registered, and no more may be; unregister "
                f"those that are not needed"
            )
        self._regions[name] = Region(name, key, offset, byte_size)

    def unregister(self, name: str | None) -> None:
        """None: all of them. One that is not there: nothing."""
        self._ask()
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)

    def status(self, name: str | None) -> list[dict[str, Any]]:
        """Of all, or of one. Raises UnsupportedError, UnknownRegionError."""
        self._ask()
        if name is None:
            return [region.shown() for region in self._regions.values()]
        found = self._regions.get(name)
        if found is None:
            raise UnknownRegionError(f"Unable to find system shared memory region: '{name}'")
        return [found.shown()]

    def find(self, name: str) -> Region:
        """Raises UnsupportedError, UnknownRegionError."""
        self._ask()
        found = self._regions.get(name)
        if found is None:
            raise UnknownRegionError(f"Unable to find shared memory region: '{name}'")
        return found

    def read(self, region: str, offset: int, size: int) -> bytes:
        """As `Region.read`, by name."""
        return self.find(region).read(offset, size)

    def write(self, region: str, offset: int, data: Buffer) -> None:
        """As `Region.write`, by name."""
        self.find(region).write(offset, data)

    def close(self) -> None:
        """The server ends."""
        self._regions.clear()

    def _ask(self) -> None:
        if not self._allowed:
            raise UnsupportedError(DISABLED)


def _most() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_REGIONS if soft < 0 else min(MOST_REGIONS, soft // SHARE)


class CudaRegions:
    """Regions in a GPU's memory, of which there are none: this server opens no client's handle."""

    def __init__(self, *, allowed: bool = False) -> None:
        self._allowed = allowed

    def register(self, name: str) -> None:
        """Raises InvalidRequestError, always; UnsupportedError where not even that is allowed."""
        self._ask()
        raise InvalidRequestError(
            f"failed to register CUDA shared memory region: '{name}', GPUs not supported"
        )

    def unregister(self, name: str | None) -> None:
        self._ask()

    def status(self, name: str | None) -> list[dict[str, Any]]:
        self._ask()
        if name is not None:
            raise UnknownRegionError(f"Unable to find cuda shared memory region: '{name}'")
        return []

    def _ask(self) -> None:
        if not self._allowed:
            raise UnsupportedError(DISABLED)
