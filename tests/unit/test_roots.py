"""Several folders that are one repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from repository.errors import ConfigError, OutOfBoundsError
from repository.folder.mounts import check_links, place_of
from repository.folder.roots import TWICE
from repository.folder.scan import Scanner
from repository.folder.settle import Settler
from server.settings import resolve
from tests.models import add_onnx


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    for root, name in (("one", "a"), ("two", "b")):
        add_onnx(tmp_path / root / name / "1" / "model.onnx")
    return tmp_path / "one", tmp_path / "two"


def test_models_of_all_folders_are_one_repository(roots: tuple[Path, Path]) -> None:
    scanner = Scanner(roots, trust_code=False)
    found = scanner.scan()
    assert list(found.models) == ["a", "b"] and found.problems == ()
    assert [folder.specs[1].folder.parent for folder in found.models.values()] == list(roots)
    assert scanner.scan() == found
    assert scanner.scan_model("b") == found.models["b"]
    assert scanner.roots.home("b") == roots[1] / "b"
    assert scanner.roots.home("new") == roots[0] / "new"


def test_a_name_in_two_of_them_is_no_model_until_one_is_gone(roots: tuple[Path, Path]) -> None:
    scanner = Scanner(roots, trust_code=False)
    settler = Settler(0)
    before = settler.offer(scanner.scan(), 1e12).snapshot.models["a"]
    add_onnx(roots[1] / "a" / "1" / "model.onnx", value=2.0)
    for seen in (scanner.scan().models["a"], scanner.scan_model("a")):
        assert seen is not None and not seen.specs
        assert [(p.rule, p.message) for p in seen.errors] == [("twice", TWICE)]
    told = settler.offer(scanner.scan(), 1e12).snapshot.models["a"]
    assert told.specs == before.specs and told.broken, "what served goes on, and is not loaded anew"
    shutil.rmtree(roots[0] / "a")
    after = scanner.scan().models["a"]
    assert after.specs[1].folder == roots[1] / "a" and not after.errors


def test_a_folder_that_is_away_hides_its_models_and_takes_nothing(
    roots: tuple[Path, Path],
) -> None:
    scanner = Scanner(roots, trust_code=False)
    settler = Settler(0)
    settler.offer(scanner.scan(), 1e12)
    roots[1].rename(roots[1].with_name("away"))
    add_onnx(roots[0] / "c" / "1" / "model.onnx")
    seen = scanner.scan()
    assert list(seen.models) == ["a", "c"] and seen.hides("b")
    assert "two" in str(seen.problems[0]) and str(roots[1]) not in str(seen.problems[0])
    assert list(settler.offer(seen, 1e12).snapshot.models) == ["a", "b", "c"]
    roots[0].rename(roots[0].with_name("gone"))
    with pytest.raises(FileNotFoundError):
        scanner.scan()


def test_a_path_may_lead_into_any_of_them(roots: tuple[Path, Path], tmp_path: Path) -> None:
    allowed = [tmp_path / "data"]
    assert place_of(str(roots[1] / "b"), roots, allowed) == ("b", None)
    assert place_of("./b", roots, allowed) == ("b", None)
    assert place_of(str(allowed[0] / "m"), roots, allowed).mount is not None
    with pytest.raises(OutOfBoundsError):
        place_of(str(tmp_path / "three" / "m"), roots, allowed)
    (roots[1] / "out").symlink_to(tmp_path)
    with pytest.raises(OutOfBoundsError):
        check_links(place_of(str(roots[1] / "out"), roots), roots)


def test_the_first_folder_that_is_named_is_repo_and_each_counts_once(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = roots
    home = {"HOME": str(tmp_path)}
    both = resolve({"model_repository": (str(one), str(two), str(one))}, home)
    assert (both.settings.repo, both.settings.model_repository) == (one, (two,))
    assert both.sources["repo"] == "--model-repository"
    beside = resolve({"repo": str(two), "model_repository": (str(one),)}, home).settings
    assert (beside.repo, beside.model_repository) == (two, (one,))
    assert beside.state_dir == both.settings.state_dir, "whatever the order"
    alone = resolve({"model_repository": (str(one),)}, home).settings
    assert (alone.repo, alone.model_repository) == (one, ())
    assert alone.state_dir == resolve({"repo": str(one)}, home).settings.state_dir
    assert alone.state_dir != both.settings.state_dir


def test_a_folder_in_another_is_refused(roots: tuple[Path, Path]) -> None:
    inner = roots[0] / "a"
    with pytest.raises(ConfigError, match="lies in"):
        resolve({"repo": str(roots[0]), "model_repository": (str(inner),)}, {"HOME": "/"})
