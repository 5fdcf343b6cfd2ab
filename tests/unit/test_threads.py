"""Threads of a worker: who may say so, and how many cores there really are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from repository.config import ModelConfig
from repository.hosts.threads import MOST, cores, threads_for

HERE = len(os.sched_getaffinity(0))


def groups(tmp_path: Path, lines: str, **files: str) -> tuple[Path, Path]:
    """A /proc and control groups; in the names of files "__" stands for "/"."""
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(lines)
    for name, text in files.items():
        path = mount / name.replace("__", "/").replace("_max", ".max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, mount


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu_max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu_max": "max 100000\n"}, HERE),
        ("0::/a/b\n", {"a__cpu_max": "100000 100000", "a__b__cpu_max": "max 100000"}, 1),
        ("0::/outside/name\n", {"cpu_max": "150000 100000"}, 1),
        ("0::/\n", {"cpu_max": "10000 100000"}, 1),
        ("0::/\n", {"cpu_max": "99999999 100000"}, HERE),
        ("0::/\n", {"cpu_max": "not a number"}, HERE),
        ("0::/\n", {"cpu_max": "0 0"}, HERE),
        ("0::/\n", {}, HERE),
        ("", {}, HERE),
        (
            "3:cpu,cpuacct:/a\n0::/\n",
            {"cpu__a__cfs_quota_us": "100000\n", "cpu__a__cfs_period_us": "100000\n"},
            1,
        ),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu__a__cfs_quota_us": "-1\n", "cpu__a__cfs_period_us": "100000\n"},
            HERE,
        ),
        ("3:cpuset:/a\n", {"cpu__a__cfs_quota_us": "1", "cpu__a__cfs_period_us": "1"}, HERE),
    ],
)
def test_a_control_group_may_leave_fewer_cores_than_there_are(
    tmp_path: Path, lines: str, files: dict[str, str], expected: int
) -> None:
    assert cores(*groups(tmp_path, lines, **files)) == expected


def test_without_proc_the_affinity_alone_counts(tmp_path: Path) -> None:
    assert cores(tmp_path / "none", tmp_path) == HERE


def test_the_cores_are_divided_among_the_instances_and_everyone_gets_one() -> None:
    config = ModelConfig()
    assert threads_for(config, 1) == min(cores(), MOST)
    assert threads_for(config, 2) == max(1, cores() // 2)
    assert threads_for(config, 64) == 1


def test_a_models_own_option_goes_before_what_the_server_was_told() -> None:
    assert threads_for(ModelConfig(options={"threads": 3}), 8, told=5) == 3
    assert threads_for(ModelConfig(), 8, told=5) == 5
    for nonsense in ("two", 0, -1, True, None):
        assert threads_for(ModelConfig(options={"threads": nonsense}), 8, told=5) == 5
