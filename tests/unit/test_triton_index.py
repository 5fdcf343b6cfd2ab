"""Triton's index and strict readiness, computed from generations that are stepped by hand."""

from __future__ import annotations

from repository.errors import LoadFailedError
from repository.lifecycle.states import Event
from repository.snapshot import ModelFolder, Problem
from server.triton.index import TWICE, entries_of, missing
from tests.fakes.repository import FakeRepository

WHY = LoadFailedError("no weights")


def shown(models: FakeRepository, name: str = "m", lies: ModelFolder | None = None) -> list[str]:
    """Version, state and reason of each entry."""
    entries = entries_of(name, models.status(name), lies)
    return [":".join(map(str, entry[1:])).rstrip(":") for entry in entries]


def stage(*versions: int) -> FakeRepository:
    models = FakeRepository()
    models.add("m", *versions)
    models.wanted.add("m")
    return models


def test_what_was_never_tried_is_a_name_alone() -> None:
    models = FakeRepository()
    models.add("m", 1)
    (entry,) = entries_of("m", models.status("m"), None)
    assert entry.shown() == {"name": "m"} and not missing(models.status("m"))


def test_each_version_has_the_state_of_its_newest_life() -> None:
    models = stage(1)
    models.begin("m")
    assert shown(models) == ["1:LOADING"] and missing(models.status("m"))
    gen = models.bring_up("m", 1)
    assert shown(models) == ["1:READY"] and not missing(models.status("m"))
    gen.step(Event.RETIRE)
    assert shown(models) == ["1:UNLOADING"]
    gen.step(Event.DRAINED)
    gen.step(Event.STOPPED)
    assert shown(models) == ["1:UNAVAILABLE:unloaded"]


def test_what_serves_says_what_has_come_of_its_successor() -> None:
    models = stage(1)
    models.bring_up("m", 1)
    new = models.begin("m")
    assert shown(models) == ["1:READY:a newer one is being loaded"]
    assert not missing(models.status("m")), "a reload takes nobody out of service"
    new.fault(WHY)
    assert shown(models) == ["1:READY:Internal: no weights"]
    assert not missing(models.status("m"))
    models.bring_up("m", 1)
    assert shown(models) == ["1:READY"]


def test_what_is_wrong_in_the_folder_is_a_reason() -> None:
    models = stage(1)
    broken = ModelFolder("m", "f", problems=(Problem("m/config.pbtxt:1", "config", "odd"),))
    assert shown(models, lies=broken) == ["0:UNAVAILABLE:m/config.pbtxt:1: odd"]
    models.bring_up("m", 1)
    assert shown(models, lies=broken) == ["1:READY:m/config.pbtxt:1: odd"]
    version = Problem("m/2/model.onnx", "incomplete", "half", version=2)
    half = ModelFolder("m", "f", problems=(version,))
    assert shown(models, lies=half) == ["1:READY", "2:UNAVAILABLE:m/2/model.onnx: half"]


def test_that_no_version_can_be_served_is_no_entry_of_its_own_beside_the_versions() -> None:
    models = stage(1)
    none = Problem("m", "version", "no version can be served")
    one = Problem("m/1/model.onnx", "incomplete", "half", version=1)
    assert shown(models, lies=ModelFolder("m", "f", problems=(one, none))) == [
        "1:UNAVAILABLE:m/1/model.onnx: half"
    ]
    assert shown(models, lies=ModelFolder("m", "f", problems=(none,))) == [
        "0:UNAVAILABLE:m: no version can be served"
    ]


def test_a_name_of_two_folders_has_no_version_unless_it_serves() -> None:
    models = stage(1)
    twice = ModelFolder("m", "f", problems=(Problem("m", "twice", TWICE),))
    assert shown(models, lies=twice) == [f"0:UNAVAILABLE:{TWICE}"]
    models.bring_up("m", 1)
    assert shown(models, lies=twice) == [f"1:READY:{TWICE}"]


def test_a_version_that_failed_beside_the_first_that_served_is_missing() -> None:
    models = stage(1, 2)
    second = models.begin("m", 2)
    models.bring_up("m", 1)
    assert missing(models.status("m")), "it still loads"
    second.fault(WHY)
    assert missing(models.status("m"))
    assert shown(models) == ["1:READY", "2:UNAVAILABLE:Internal: no weights"]
