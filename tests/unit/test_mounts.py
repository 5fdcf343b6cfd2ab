"""Paths that name models: by their words in bounds or not, and folders beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from repository.errors import InvalidNameError, InvalidRequestError, OutOfBoundsError
from repository.folder.mounts import ByCall, Mount, check_links, place_of
from repository.folder.scan import Scanner
from tests.models import add_onnx


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "repo").mkdir()
    (tmp_path / "data").mkdir()
    return tmp_path / "repo"


def test_a_path_in_the_repository_is_the_name_of_its_model(repo: Path) -> None:
    assert place_of(f"{repo}/org/m", repo).name == "org/m"
    assert place_of(f"{repo}/org/../m/", repo).name == "m"
    assert place_of("./m", repo) == ("m", None)
    link = repo.parent / "link"
    link.symlink_to(repo)
    assert place_of(f"{repo}/m", link).name == "m"
    assert place_of(f"{link}/m", link).name == "m"


def test_a_path_below_an_allowed_root_is_called_by_what_is_below(repo: Path) -> None:
    data = repo.parent / "data"
    place = place_of(f"{data}/org/m", repo, [data])
    assert place == ("org/m", Mount(str(data), "org/m"))
    assert place_of(f"{repo}/m", repo, [repo.parent]).mount is None  # the repository goes first


@pytest.mark.parametrize("path", ["/etc/passwd", "/", "./../data/m", "/nowhere", "//etc/passwd"])
def test_any_other_path_is_out_of_bounds_whether_it_exists_or_not(repo: Path, path: str) -> None:
    with pytest.raises(OutOfBoundsError) as caught:
        place_of(path, repo)
    assert path not in str(caught.value) and str(repo) not in str(caught.value)


def test_a_name_that_only_begins_like_a_root_is_outside(repo: Path) -> None:
    with pytest.raises(OutOfBoundsError):
        place_of(f"{repo}2/m", repo)


def test_a_root_itself_and_what_makes_no_name_are_refused(repo: Path) -> None:
    for path in (str(repo), f"{repo}/", "./", str(repo.parent / "data")):
        with pytest.raises(InvalidRequestError, match="itself"):
            place_of(path, repo, [repo.parent / "data"])
    with pytest.raises(InvalidNameError):
        place_of(f"{repo}/.hidden", repo)
    with pytest.raises(InvalidRequestError, match="NUL"):
        place_of("/a\0b", repo)


def test_a_link_out_of_its_root_is_out_of_bounds(repo: Path) -> None:
    data = repo.parent / "data"
    add_onnx(repo.parent / "other" / "1" / "model.onnx")
    (data / "m").symlink_to(repo.parent / "other")
    with pytest.raises(OutOfBoundsError):
        check_links(place_of(f"{data}/m", repo, [data]), repo)
    by_call = ByCall().mounted("m", Mount(str(data), "m"))
    assert not Scanner(repo, trust_code=False, by_call=by_call).scan().models


def test_a_mounted_folder_is_scanned_as_a_model(repo: Path) -> None:
    data = repo.parent / "data"
    path = add_onnx(data / "org" / "m" / "1" / "model.onnx")
    scanner = Scanner(repo, trust_code=False)
    assert scanner.scan_model("org/m") is None
    scanner.by_call = ByCall().mounted("org/m", Mount(str(data), "org/m"))
    found = scanner.scan().models["org/m"]
    assert found.specs[1].path == path.parent and scanner.scan_model("org/m") == found
    add_onnx(path, value=2.0)
    assert scanner.scan().models["org/m"].fingerprint != found.fingerprint


def test_what_the_repository_holds_goes_before_a_mount_of_that_name(repo: Path) -> None:
    data = repo.parent / "data"
    add_onnx(data / "m" / "1" / "model.onnx")
    mine = add_onnx(repo / "m" / "1" / "model.onnx")
    by_call = ByCall().mounted("m", Mount(str(data), "m"))
    found = Scanner(repo, trust_code=False, by_call=by_call).scan()
    assert found.models["m"].specs[1].path == mine.parent
    assert [p.rule for p in found.problems] == ["mount"]


def test_a_root_that_cannot_be_seen_takes_nothing_away(repo: Path) -> None:
    by_call = ByCall().mounted("m", Mount(str(repo.parent / "gone"), "m"))
    found = Scanner(repo, trust_code=False, by_call=by_call).scan()
    assert not found.models and found.hides("m")
