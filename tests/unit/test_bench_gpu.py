"""What the benchmark of a GPU does, on a machine without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import gpu
from repository.backends.asleep import Ferry
from tests.integration.test_asleep import Lane


class Here:
    device = "cpu"

    def lane(self) -> Here:
        return self

    def ferry(self) -> Ferry:
        return Lane()

    def finished(self) -> None: ...

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Callable[[], None]:
        return lambda: None


def test_a_round_measures_all_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BLOCK", 1 << 20)
    path = tmp_path / "m.safetensors"
    assert gpu.written(path, 3 << 20, width=256) >= 3 << 20
    found = gpu.one_round(Here(), path)
    assert set(found) == {"preadv", "pinned", "load", "sleep", "wake", "making"}
    assert all(rate > 0 for rate in found.values())


def test_ratios_are_of_one_round_and_judged() -> None:
    fast = {"preadv": 10e9, "pinned": 50e9, "load": 9e9, "sleep": 20e9, "wake": 48e9, "making": 1e9}
    slow = {name: rate / 10 for name, rate in fast.items()}
    rows = {row.what: row for row in gpu.ratios([fast, slow, slow])}
    assert rows["load / min(preadv, pinned)"].value == pytest.approx(0.9)
    assert rows["load / min(preadv, pinned)"].reached and rows["wake / pinned"].reached
    assert not rows["sleep / pinned"].reached


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(out)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1 and "finds no GPU here" in done.stderr
    assert not out.exists()
