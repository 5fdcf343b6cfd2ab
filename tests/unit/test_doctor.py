"""What `modeldepot doctor` finds wrong with a machine: its folders, its disks, its limits."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from server.cli.checkup import folders, machine
from server.cli.checkup.finding import Level, ok
from server.cli.checkup.mounts import is_network, kind_of
from tests.checkup import only, settings
from tests.models import add_onnx

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


def mounted(tmp_path: Path, *rows: tuple[str, str]) -> Path:
    """A mountinfo: (where, file system)."""
    file = tmp_path / "mountinfo"
    text = [f"{n} 1 0:{n} / {at} rw,relatime - {kind} none rw" for n, (at, kind) in enumerate(rows)]
    file.write_text("\n".join(text) + "\n")
    return file


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    add_onnx(tmp_path / "models/plus/1/model.onnx")
    return tmp_path / "models"


# mounts -------------------------------------------------------------------------------------------


def test_the_deepest_and_last_mount_is_the_one_a_path_is_on(tmp_path: Path) -> None:
    file = mounted(
        tmp_path,
        ("/", "overlay"),
        ("/models", "nfs4"),
        ("/models/a\\040b", "ext4"),
        ("/models", "xfs"),
    )
    kinds = [kind_of(Path(p), file) for p in ("/srv", "/models/x", "/models/a b/c", "/modelsx")]
    assert kinds == ["overlay", "xfs", "ext4", "overlay"]
    assert kind_of(Path("/"), tmp_path / "none") == ""
    assert is_network("nfs4") and is_network("fuse.s3fs") and not is_network("ext4")


# the repository -----------------------------------------------------------------------------------


def test_a_repository_that_is_well(repo: Path, tmp_path: Path) -> None:
    one = only(folders.repository(settings(tmp_path)))
    assert one.level is OK and "1 model " in one.said


def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    assert only(folders.repository(settings(tmp_path))).level is FAIL


def test_a_repository_without_models_and_one_with_problems(repo: Path, tmp_path: Path) -> None:
    (repo / "plus/1/model.onnx").write_bytes(b"no model")
    one = only(folders.repository(settings(tmp_path)))
    assert one.level is WARN and "problems; the first: plus" in one.said
    assert "modeldepot validate" in one.todo
    (tmp_path / "empty").mkdir()
    one = only(folders.repository(settings(tmp_path, repo=tmp_path / "empty")))
    assert one.level is WARN and "modeldepot init" in one.todo


# inotify ------------------------------------------------------------------------------------------


def proc_with(tmp_path: Path, watches: int, instances: int, used: int) -> Path:
    """A /proc of one process with one inotify instance that watches `used` folders."""
    limits = tmp_path / "proc/sys/fs/inotify"
    limits.mkdir(parents=True)
    (limits / "max_user_watches").write_text(f"{watches}\n")
    (limits / "max_user_instances").write_text(f"{instances}\n")
    for folder in ("fd", "fdinfo"):
        (tmp_path / "proc/7" / folder).mkdir(parents=True)
    (tmp_path / "proc/7/fd/3").symlink_to("anon_inode:inotify")
    (tmp_path / "proc/7/fdinfo/3").write_text("pos: 0\n" + "inotify wd:1 ino:2\n" * used)
    return tmp_path / "proc"


def test_enough_inotify_watches(repo: Path, tmp_path: Path) -> None:
    here = mounted(tmp_path, ("/", "ext4"))
    one = only(folders.watching(settings(tmp_path), proc_with(tmp_path, 100, 10, 5), here))
    assert one.level is OK and "3 folders; 5 of 100" in one.said


def test_too_few_inotify_watches_for_the_folders(repo: Path, tmp_path: Path) -> None:
    here = mounted(tmp_path, ("/", "ext4"))
    one = only(folders.watching(settings(tmp_path), proc_with(tmp_path, 100, 10, 98), here))
    assert one.level is WARN
    assert "max_user_watches=256" in one.todo and "--watch poll" in one.todo


def test_no_inotify_instance_left(repo: Path, tmp_path: Path) -> None:
    here = mounted(tmp_path, ("/", "ext4"))
    one = only(folders.watching(settings(tmp_path), proc_with(tmp_path, 100, 1, 5), here))
    assert one.level is WARN and "max_user_instances=2" in one.todo


def test_a_kernel_that_does_not_tell_its_limits(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    here = mounted(tmp_path, ("/", "ext4"))
    assert only(folders.watching(settings(tmp_path), tmp_path / "proc", here)).level is WARN


@pytest.mark.parametrize("kind", ["nfs4", "9p", "fuse.sshfs", "overlay"])
def test_file_systems_whose_changes_inotify_does_not_see(
    repo: Path, tmp_path: Path, kind: str
) -> None:
    here = mounted(tmp_path, ("/", kind))
    one = only(folders.watching(settings(tmp_path), mountinfo=here))
    assert one.level is WARN and "--watch poll" in one.todo
    polled = settings(tmp_path, watch="poll")
    assert only(folders.watching(polled, mountinfo=here)).level is OK


def test_our_own_watches_are_counted(tmp_path: Path) -> None:
    from watchfiles._rust_notify import RustNotify

    before = folders.in_use()
    notify = RustNotify([str(tmp_path)], False, False, 0, True, True)
    try:
        assert folders.in_use() == (before[0] + 1, before[1] + 1)
    finally:
        notify.close()


# the state folder ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "state"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tiny tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_state_folder_that_is_well_is_left_as_it_was(repo: Path, tmp_path: Path) -> None:
    found = folders.state(settings(tmp_path), free=lambda _: 1 << 40)
    assert [one.level for one in found] == [OK, OK]  # its room, and how copies are made
    assert not (tmp_path / "state").exists()
    (tmp_path / "state").mkdir()
    found = folders.state(settings(tmp_path), free=lambda _: 1 << 40)
    assert {one.level for one in found} == {OK}
    assert list((tmp_path / "state").iterdir()) == []


def test_a_state_folder_on_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):  # noqa: PT012 - until it is full
        for n in range(100):
            (small_disk / str(n)).write_bytes(bytes(4096))
    one = only(folders.state(settings(tmp_path)))
    assert one.level is FAIL and "No space left" in one.said and "free some room" in one.todo


def test_a_state_folder_that_is_read_only(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    one = only(folders.state(settings(tmp_path)))
    assert one.level is FAIL and "Read-only" in one.said and "--state-dir" in one.todo


def test_a_file_in_the_place_of_the_state_folder(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert only(folders.state(settings(tmp_path))).level is FAIL
    below = settings(tmp_path, state_dir=tmp_path / "state/deeper")
    assert only(folders.state(below)).level is FAIL


@pytest.mark.parametrize(("left", "level"), [(2 << 30, OK), (500 << 20, WARN), (1 << 20, FAIL)])
def test_little_room_in_the_state_folder(tmp_path: Path, left: int, level: Level) -> None:
    found = folders.state(settings(tmp_path), free=lambda _: left)
    assert only(found, "state").level is level


def test_a_state_folder_on_a_network_file_system(tmp_path: Path) -> None:
    here = mounted(tmp_path, ("/", "nfs"))
    found = folders.state(settings(tmp_path), here, free=lambda _: 1 << 40)
    assert found[0].level is WARN and "SQLite" in found[0].said


def test_a_file_system_whose_clock_is_off(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    found = folders.state(settings(tmp_path), free=lambda _: 1 << 40, clock=lambda: 1.0)
    assert found[0].level is WARN and "clock" in found[0].said


def test_the_server_that_has_the_state_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (tmp_path / "state/journal.lock").open("w") as file:
        file.write("4711\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        found = folders.state(settings(tmp_path), free=lambda _: 1 << 40)
    assert found[-1] == ok("state", "in use by the server with pid 4711")


# the machine --------------------------------------------------------------------------------------


def meminfo(tmp_path: Path, total: int, limit: int | None = None) -> Mapping[str, Path]:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {total >> 10} kB\nMemAvailable: 1 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "cg").mkdir()
    if limit is not None:
        (tmp_path / "cg/memory.max").write_text(f"{limit}\n")
        (tmp_path / "cg/cpu.max").write_text("100000 100000\n")
    return {"proc": tmp_path / "proc", "cgroups": tmp_path / "cg"}


def test_memory_and_cores_as_the_control_group_allows(tmp_path: Path) -> None:
    here = meminfo(tmp_path, 64 << 30, 8 << 30)
    one = only(machine.memory(settings(tmp_path), **here))
    assert one.level is OK and "of 8GiB" in one.said and "64GiB" in one.said
    one = only(machine.cores(**here))
    assert one.level is OK and one.said.startswith("1 of")


def test_more_memory_promised_than_there_is(tmp_path: Path) -> None:
    here = meminfo(tmp_path, 8 << 30)
    one = only(
        machine.memory(settings(tmp_path, memory_budget="cpu=6GiB", host_tier="4GiB"), **here)
    )
    assert one.level is WARN and "--host-tier" in one.todo


def test_very_little_memory(tmp_path: Path) -> None:
    one = only(machine.memory(settings(tmp_path), **meminfo(tmp_path, 512 << 20)))
    assert one.level is WARN


@pytest.mark.parametrize(
    ("hard", "level"), [(1024, WARN), (20_000, OK), (resource.RLIM_INFINITY, OK)]
)
def test_open_files(hard: int, level: Level) -> None:
    assert only(machine.files(lambda: (256, hard))).level is level


def test_shared_memory_that_is_refused() -> None:
    def refused(name: str, flags: int) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    assert only(machine.shared_memory()).level is OK
    one = only(machine.shared_memory(refused))
    assert one.level is FAIL and "seccomp" in one.todo


def test_a_clock_that_is_behind_our_own_files() -> None:
    assert only(machine.clock()).level is OK
    assert only(machine.clock(now=lambda: 1e9, newest=1.7e9)).level is WARN
