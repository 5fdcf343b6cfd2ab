"""Clients' shared memory: real files in /dev/shm, which their owners may change at any time."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repository.errors import InvalidRequestError, RepositoryError
from server import errors
from server.errors import UnsupportedError
from server.triton.shm import FOLDER, CudaRegions, Regions, UnknownRegionError


class Files:
    """Files of this test's own, by a name that nobody else has."""

    def __init__(self) -> None:
        self._prefix = f"shmtest-{uuid.uuid4().hex[:12]}"
        self.paths: list[Path] = []

    def key(self, name: str = "a", data: bytes | None = b"") -> str:
        path = Path(FOLDER, f"{self._prefix}-{name}")
        self.paths.append(path)
        if data is not None:
            path.write_bytes(data)
        return f"/{path.name}"

    def path(self, key: str) -> Path:
        return Path(FOLDER, key[1:])


@pytest.fixture
def files() -> Iterator[Files]:
    found = Files()
    yield found
    for path in found.paths:
        path.unlink(missing_ok=True)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_region_is_part_of_a_file_and_offsets_begin_with_it(files: Files) -> None:
    regions, key = Regions(allowed=True), files.key(data=b"0123456789")
    regions.register("r", key, 2, 6)
    assert regions.status(None) == [{"name": "r", "key": key, "offset": 2, "byte_size": 6}]
    assert regions.status("r") == regions.status(None)
    assert regions.read("r", 1, 3) == b"345"
    regions.write("r", 4, b"xy")
    assert files.path(key).read_bytes() == b"012345xy89"
    assert regions.read("r", 6, 0) == b""


def test_nothing_is_possible_where_it_was_not_allowed(files: Files) -> None:
    regions, cuda, key = Regions(), CudaRegions(), files.key(data=b"1234")
    asks: list[Callable[[], object]] = [
        lambda: regions.register("r", key, 0, 4),
        lambda: regions.read("r", 0, 1),
        lambda: regions.write("r", 0, b"x"),
        lambda: regions.unregister(None),
        lambda: regions.status(None),
        lambda: cuda.register("r"),
        lambda: cuda.unregister(None),
        lambda: cuda.status(None),
    ]
    for ask in asks:
        with pytest.raises(
            UnsupportedError, match="Start the server with '--allow-client-shm=true'"
        ):
            ask()


def test_a_name_is_registered_once_and_again_when_it_is_free(files: Files) -> None:
    regions = Regions(allowed=True)
    regions.register("r", files.key("a", b"aa"), 0, 2)
    with pytest.raises(match="shared memory region 'r' already in manager") as e:
        regions.register("r", files.key("b", b"bb"), 0, 2)
    assert errors.status_v2(e.value) == 400
    regions.unregister("r")
    regions.unregister("r")
    regions.register("r", files.key("b", b"bb"), 0, 2)
    regions.register("same file", files.key("b", b"bb"), 0, 1)
    assert regions.read("r", 0, 2) == b"bb"
    regions.unregister(None)
    assert regions.status(None) == []


def test_a_region_that_nobody_knows_is_not_found() -> None:
    regions = Regions(allowed=True)
    with pytest.raises(UnknownRegionError, match="Unable to find system shared memory region: 'r'"):
        regions.status("r")
    with pytest.raises(UnknownRegionError, match="Unable to find shared memory region: 'r'") as e:
        regions.read("r", 0, 1)
    assert errors.status_v2(e.value) == 404


@pytest.mark.parametrize(
    "key",
    [
        "", "/", "//", ".", "..", "/..", "/.", "a/b", "/a/b", "../etc/passwd", "/../../etc/passwd",
        "//dev/shm/a", "a\0b", "x" * 300, "triton_python_backend_shm_region_1",
        "/triton_python_backend_shm_region_", "/modeldepot-sheet", "/sem.lock", "/there-is-none",
        "\ud800",
    ],
)  # fmt: skip
def test_a_key_is_the_name_of_a_file_of_a_clients_own(key: str) -> None:
    before = descriptors()
    with pytest.raises(InvalidRequestError):
        Regions(allowed=True).register("r", key, 0, 1)
    gc.collect()
    assert descriptors() == before


def test_links_folders_and_pipes_are_no_regions(files: Files, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    link, folder, pipe = (files.key(name, None) for name in ("link", "folder", "pipe"))
    files.path(link).symlink_to(tmp_path / "secret")
    files.path(folder).mkdir()
    os.mkfifo(files.path(pipe))
    before, regions = descriptors(), Regions(allowed=True)
    for key in (link, folder, pipe):
        with pytest.raises(InvalidRequestError):
            regions.register("r", key, 0, 1)
    gc.collect()
    assert descriptors() == before and regions.status(None) == []
    files.path(folder).rmdir()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 11), (10, 1), (-1, 4), (0, 0), (0, -4), (2**62, 2**62), (0, 2**70)]
)
def test_a_region_lies_within_its_file(files: Files, offset: int, size: int) -> None:
    with pytest.raises(
        InvalidRequestError, match="failed to register shared memory region 'r': inv"
    ):
        Regions(allowed=True).register("r", files.key(data=bytes(10)), offset, size)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 9), (8, 1), (-1, 2), (0, -1), (2**70, 1), (0, 2**70)]
)
def test_what_is_read_and_written_lies_within_the_region(
    files: Files, offset: int, size: int
) -> None:
    regions, key = Regions(allowed=True), files.key(data=b"0123456789")
    regions.register("r", key, 1, 8)
    with pytest.raises(InvalidRequestError, match=r"Invalid offset . byte size .* 'r'"):
        regions.read("r", offset, size)
    if 0 < size < 100:
        with pytest.raises(InvalidRequestError, match=r"Invalid offset . byte size .* 'r'"):
            regions.write("r", offset, bytes(size))
    assert files.path(key).read_bytes() == b"0123456789"


def test_a_file_that_was_truncated_is_an_error_of_a_request_and_does_not_grow(files: Files) -> None:
    regions, key = Regions(allowed=True), files.key(data=bytes(10_000))
    regions.register("r", key, 0, 10_000)
    os.truncate(files.path(key), 100)
    assert regions.read("r", 0, 100) == bytes(100)
    asks: list[Callable[[], object]] = [
        lambda: regions.read("r", 0, 101),
        lambda: regions.write("r", 99, b"12"),
    ]
    for ask in asks:
        with pytest.raises(InvalidRequestError, match="region 'r' has become too short"):
            ask()
    assert files.path(key).stat().st_size == 100


def test_a_file_that_was_removed_is_still_there_for_who_has_it(files: Files) -> None:
    regions, key = Regions(allowed=True), files.key(data=b"abc")
    regions.register("r", key, 0, 3)
    files.path(key).unlink()
    assert regions.read("r", 0, 3) == b"abc"


def test_whoever_found_a_region_keeps_it_when_its_name_goes_to_another(files: Files) -> None:
    before, regions = descriptors(), Regions(allowed=True)
    regions.register("r", files.key("a", b"aaa"), 0, 3)
    found = regions.find("r")
    regions.unregister("r")
    regions.register("r", files.key("b", b"bbb"), 0, 3)
    assert (found.read(0, 3), regions.read("r", 0, 3)) == (b"aaa", b"bbb")
    found.write(0, b"ccc")
    assert regions.read("r", 0, 3) == b"bbb"
    del found
    regions.close()
    gc.collect()
    assert descriptors() == before


def test_there_are_only_so_many_regions(files: Files) -> None:
    before, regions = descriptors(), Regions(allowed=True, most=3)
    key = files.key(data=b"abc")
    for n in range(3):
        regions.register(str(n), key, 0, 3)
    with pytest.raises(InvalidRequestError, match="3 shared memory regions are registered"):
        regions.register("more", key, 0, 3)
    assert descriptors() == before + 3
    regions.unregister("1")
    regions.register("more", key, 0, 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything with any file")
def test_a_file_that_may_only_be_read_takes_no_output(files: Files) -> None:
    regions, key = Regions(allowed=True), files.key(data=b"abc")
    files.path(key).chmod(0o400)
    regions.register("r", key, 0, 3)
    assert regions.read("r", 0, 3) == b"abc"
    with pytest.raises(InvalidRequestError, match="may be read by the server, not written"):
        regions.write("r", 0, b"x")


def test_no_region_of_a_gpu_is_registered() -> None:
    regions = CudaRegions(allowed=True)
    with pytest.raises(
        InvalidRequestError,
        match=r"^failed to register CUDA shared memory region: 'N', GPUs not supported$",
    ):
        regions.register("N")
    assert regions.status(None) == []
    regions.unregister(None)
    with pytest.raises(RepositoryError):
        regions.status("N")
