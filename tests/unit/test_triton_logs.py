"""What is logged can be looked at and changed while the server runs, all of it or nothing."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from repository.errors import InvalidRequestError, UnavailableError
from server.refusals import UnsupportedError
from server.triton.logs import LogSettings


class Scene:
    def __init__(self, level: int = logging.INFO) -> None:
        self.out = io.StringIO()
        self.root = logging.getLogger("root of a test")
        self.root.setLevel(level)
        self.root.propagate = False
        self.root.handlers[:] = [logging.StreamHandler(self.out)]
        self.audit = self.root.getChild("modeldepot.audit")
        self.audit.setLevel(logging.NOTSET)  # another test may have left a level
        self.settings = LogSettings(self.root)

    def says(self) -> list[str]:
        """What of one line of each level comes through."""
        self.out.truncate(0)
        self.out.seek(0)
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(self.root, level)(level)
        return self.out.getvalue().split()


@pytest.fixture
def scene() -> Iterator[Scene]:
    """pytest listens to loggers that do not propagate with handlers that other tests have too."""
    scene = Scene()
    yield scene
    scene.settings.undo()


def test_it_shows_how_the_server_was_started(scene: Scene) -> None:
    assert scene.settings.shown() == {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    assert Scene(logging.WARNING).settings.shown()["log_info"] is False
    assert Scene(logging.DEBUG).settings.shown()["log_verbose_level"] == 1


def test_each_level_has_a_switch_of_its_own(scene: Scene) -> None:
    assert scene.says() == ["info", "warning", "error", "critical"]
    scene.settings.update({"log_warning": False})
    assert scene.says() == ["info", "error", "critical"]
    scene.settings.update({"log_info": False, "log_error": False})
    assert scene.says() == []
    scene.settings.update({"log_info": True})
    assert scene.says() == ["info"]


def test_a_verbose_level_brings_debug_lines_and_zero_takes_them_away(scene: Scene) -> None:
    assert scene.settings.update({"log_verbose_level": 2})["log_verbose_level"] == 2
    assert scene.says()[:2] == ["debug", "info"]
    scene.settings.update({"log_verbose_level": 0})
    assert scene.says()[0] == "info"


def test_a_server_that_was_started_quiet_can_be_made_to_talk() -> None:
    scene = Scene(logging.ERROR)
    scene.settings.update({"log_info": True, "log_warning": True})
    assert scene.says() == ["info", "warning", "error", "critical"]
    scene.settings.undo()


def test_tritons_formats_are_taken(scene: Scene) -> None:
    assert scene.settings.update({"log_format": "ISO8601"})["log_format"] == "ISO8601"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"log_info": False, "log_file": "x"}, UnsupportedError),
        ({"log_info": False, "log_format": "xml"}, UnavailableError),
        ({"log_info": False, "log_verbose_level": -1}, InvalidRequestError),
        ({"log_info": False, "log_verbose_level": True}, InvalidRequestError),
        ({"log_info": False, "log_error": 1}, InvalidRequestError),
        ({"log_info": False, "log_colour": "red"}, InvalidRequestError),
    ],
)
def test_what_cannot_be_set_changes_nothing(
    scene: Scene, said: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        scene.settings.update(said)
    assert scene.settings.shown()["log_info"] is True


def test_afterwards_the_loggers_are_as_they_were(scene: Scene) -> None:
    scene.settings.update({"log_error": False, "log_verbose_level": 1})
    scene.settings.undo()
    assert scene.says() == ["info", "warning", "error", "critical"]


@pytest.mark.parametrize(("level", "kept"), [(logging.INFO, True), (logging.WARNING, False)])
def test_the_audit_log_is_as_the_server_was_started_whatever_is_switched_off(
    level: int, kept: bool
) -> None:
    scene = Scene(level)
    scene.settings.update({"log_info": False, "log_warning": False, "log_error": False})
    scene.audit.info("who did it")
    assert scene.out.getvalue() == ("who did it\n" if kept else "")
    scene.settings.update({"log_info": True, "log_verbose_level": 4})
    scene.audit.info("again")
    assert ("again" in scene.out.getvalue()) is kept
    scene.settings.undo()
    assert scene.audit.level == logging.NOTSET
