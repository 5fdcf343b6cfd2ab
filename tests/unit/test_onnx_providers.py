"""onnxruntime says nothing when it runs on the CPU in place of a GPU: whoever asked for one hears it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from repository.backends.base import Order
from repository.backends.device_use import DeviceUse
from repository.backends.onnx_session import CPU, CUDA, Sessions
from repository.config import ModelConfig
from repository.errors import FilesChangedError, LoadFailedError
from repository.hosts import visible
from tests.models import add_onnx


class Ort:
    """As much of onnxruntime as sessions are made by. `works`: what CUDA does when it is asked for,
    session by session."""

    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_ALL=99)

    def __init__(self, *works: bool, built: bool = True) -> None:
        self._works = list(works)
        self._built = built
        self.made: list[tuple[Any, list[Any]]] = []

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU] if self._built else [CPU]

    def preload_dlls(self) -> None: ...

    def SessionOptions(self) -> Any:  # noqa: N802 - onnxruntime's name
        return SimpleNamespace(add_session_config_entry=lambda key, value: None)

    def InferenceSession(self, source: Any, options: Any, providers: list[Any]) -> Any:  # noqa: N802
        self.made.append((source, providers))
        there = [CUDA, CPU] if self._works.pop(0) else [CPU]
        return SimpleNamespace(get_providers=lambda: there, disable_fallback=lambda: None)


def sessions(
    ort: Ort, folder: Path, *, extra: dict[str, Any] | None = None, **more: Any
) -> Sessions:
    if not (folder / "model.onnx").exists():
        add_onnx(folder / "model.onnx")
    order = Order(
        "m", 1, folder, "model.onnx", ModelConfig(**more), device="cuda:3", extra=extra or {}
    )
    return Sessions(ort, order, use=lambda device: DeviceUse(3, None))


def test_a_session_on_the_cpu_in_place_of_the_gpu_is_a_failed_load(tmp_path: Path) -> None:
    with pytest.raises(
        LoadFailedError, match=r"cuda:3.*would run on the CPU.*--allow-cpu-fallback"
    ):
        sessions(Ort(False), tmp_path).first()
    with pytest.raises(LoadFailedError, match=r"built without CUDA.*onnxruntime-gpu"):
        sessions(Ort(built=False), tmp_path).first()


def test_it_is_allowed_by_the_model_or_for_all_and_a_models_no_wins(tmp_path: Path) -> None:
    sessions(Ort(False), tmp_path, options={"allow_cpu_fallback": True}).first()
    sessions(Ort(False), tmp_path, extra={"cpu_fallback": True}).first()
    with pytest.raises(LoadFailedError):
        sessions(
            Ort(False),
            tmp_path,
            extra={"cpu_fallback": True},
            options={"allow_cpu_fallback": False},
        ).first()


def test_a_model_that_wakes_on_the_cpu_has_not_woken(tmp_path: Path) -> None:
    mine = sessions(Ort(True, False), tmp_path)
    mine.first()
    mine.keep()
    with pytest.raises(LoadFailedError, match="would run on the CPU"):
        mine.again()


def test_what_wakes_is_made_of_what_fell_asleep(tmp_path: Path) -> None:
    ort = Ort(True, True)
    mine = sessions(ort, tmp_path)
    mine.first()
    mine.keep()
    whole = (tmp_path / "model.onnx").read_bytes()
    assert mine.memory()["host"] == {"weights": len(whole)}
    (tmp_path / "model.onnx").unlink()
    mine.again()
    assert ort.made[1][0] == whole and ort.made[0][1] == ort.made[1][1]
    assert "host" not in mine.memory()


def test_a_file_that_was_written_over_is_not_what_was_loaded(tmp_path: Path) -> None:
    mine = sessions(Ort(True), tmp_path)
    mine.first()
    add_onnx(tmp_path / "model.onnx", 7.0)
    with pytest.raises(FilesChangedError):
        mine.keep()


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ({}, None),
        ({"options": {"gpu_mem_limit": 5}, "memory": 900}, "5"),
        ({"memory": 900}, "900"),
        ({"memory": 900, "instances": 3}, "300"),
    ],
)
def test_the_arena_may_grow_to_what_was_reserved_and_no_further(
    tmp_path: Path, said: dict[str, Any], limit: str | None
) -> None:
    ort = Ort(True)
    sessions(ort, tmp_path, **said).first()
    (_, settings), _ = ort.made[0][1]
    assert settings.get("gpu_mem_limit") == limit and settings["device_id"] == "3"


def test_a_part_of_a_gpu_is_seen_alone_and_told_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    extra = {visible.ALONE: {"cuda:3": "MIG-7"}}
    assert visible.only("cuda:1", extra) == visible.AS_IS == visible.only("cpu", {})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    found = visible.only("cuda:3", extra)
    assert (found.device, os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda:0", "MIG-7")
    memory = {"cuda:0": {"weights": 1}, "cpu": {"workspace": 2}}
    assert found.shown(memory) == {"cuda:3": {"weights": 1}, "cpu": {"workspace": 2}}
    assert visible.AS_IS.shown(memory) is memory
