"""Which folders are models, and which files belong to which version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from repository.errors import InvalidNameError
from repository.folder import walk
from repository.folder.layout import Found, Layout
from repository.snapshot import Problem


def lay(root: Path, *files: str) -> Path:
    """Empty-looking files; a name that ends with '/' is a folder."""
    for file in files:
        path = root / file
        if file.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
    return root


def look(root: Path) -> tuple[dict[str, Found], list[Problem]]:
    layout = Layout(str(root))
    found = {f.name: f for f in layout.models()}
    for name, one in found.items():
        alone = Layout(str(root)).model(name)
        assert alone == one, "one model alone is seen as in a whole scan"
    return found, layout.notes


def paths(found: Found, version: int | None = None) -> list[str]:
    return [s.path for s in (found.shared if version is None else found.versions[version])]


def test_version_folders_configs_and_model_files_make_a_model(tmp_path: Path) -> None:
    lay(tmp_path, "a/1/model.onnx", "a/12/x.bin", "b/config.yaml", "c/config.pbtxt", "d/model.onnx")
    lay(tmp_path, "e/model.py", "f/config.json", "f/model.safetensors", "g/README.md", "h/")
    found, notes = look(tmp_path)
    assert sorted(found) == ["a", "b", "c", "d", "e", "f"] and notes == []
    assert sorted(found["a"].versions) == [1, 12] and not found["a"].flat
    assert found["b"].versions == {}
    assert found["d"].flat and paths(found["d"], 1) == ["model.onnx"]
    assert paths(found["f"], 1) == ["config.json", "model.safetensors"]


def test_folders_without_models_are_namespaces(tmp_path: Path) -> None:
    lay(tmp_path, "org/bert/1/model.onnx", "org/deep/er/model.py", "org/README.md")
    found, _ = look(tmp_path)
    assert sorted(found) == ["org/bert", "org/deep/er"]


def test_a_number_that_holds_version_folders_is_a_model_and_not_a_version(tmp_path: Path) -> None:
    lay(
        tmp_path,
        "ViT-L/14/1/model.onnx",
        "ViT-L/14/config.yaml",
        "ViT-L/16/README",
        "ViT-L/16/3/m.py",
    )
    lay(
        tmp_path,
        "both/1/model.onnx",
        "both/14/1/model.onnx",
        "data/1/model.py",
        "data/1/0/rows.bin",
    )
    found, _ = look(tmp_path)
    assert sorted(found) == ["ViT-L/14", "ViT-L/16", "both", "both/14", "data"]
    assert sorted(found["both"].versions) == [1] == sorted(found["ViT-L/14"].versions)
    assert paths(found["data"], 1) == ["1/0/rows.bin", "1/model.py"]


def test_files_are_shared_by_all_versions_or_belong_to_one(tmp_path: Path) -> None:
    lay(
        tmp_path,
        "m/config.yaml",
        "m/labels.txt",
        "m/checks/a/in.json",
        "m/adapters/x/w.safetensors",
    )
    lay(tmp_path, "m/1/model.onnx", "m/2/model.onnx", "m/2/sub/data.bin", "m/3/")
    found, _ = look(tmp_path)
    assert paths(found["m"]) == ["checks/a/in.json", "config.yaml", "labels.txt"]
    assert paths(found["m"], 2) == ["2/model.onnx", "2/sub/data.bin"]
    assert sorted(found["m"].versions) == [1, 2]


def test_a_model_without_version_folders_is_its_own_version_1(tmp_path: Path) -> None:
    lay(tmp_path, "m/config.yaml", "m/model.py", "m/tokenizer/vocab.txt", "m/checks/in.json")
    lay(tmp_path, "m/adapters/a/x.bin")
    found, _ = look(tmp_path)
    assert paths(found["m"]) == ["checks/in.json", "config.yaml"]
    assert paths(found["m"], 1) == ["model.py", "tokenizer/vocab.txt"]


@pytest.mark.parametrize(
    "name",
    [".git/config.yaml", "m/1/.model.onnx.Xy12", "m/1/model.onnx~", "m/1/.model.onnx.swp", "m/4913",
     "m/1/__pycache__/model.cpython-311.pyc", "m/lost+found/x", "m/1/.#model.py", "..data/model.onnx",
     "m/1/a.swp"],
)  # fmt: skip
def test_hidden_and_temporary_files_do_not_exist(tmp_path: Path, name: str) -> None:
    lay(tmp_path, "m/1/model.onnx")
    before, _ = look(tmp_path)
    lay(tmp_path, name)
    after, notes = look(tmp_path)
    assert sorted(after) == ["m"] and notes == []
    assert (paths(after["m"]), paths(after["m"], 1)) == (paths(before["m"]), paths(before["m"], 1))


def test_numbers_that_are_no_versions_are_ignored_and_told(tmp_path: Path) -> None:
    lay(tmp_path, "m/01/model.onnx", "m/0/model.onnx", "m/99999999999/model.onnx", "m/2/model.onnx")
    lay(tmp_path, "only/01/model.onnx")
    found, _ = look(tmp_path)
    assert sorted(found["m"].versions) == [2]
    told = {(p.where, p.rule, p.warning) for p in found["m"].notes}
    assert told == {(f"m/{n}", "version", True) for n in ("01", "0", "99999999999")}
    assert found["only"].versions == {} and len(found["only"].notes) == 1


@pytest.mark.parametrize(
    "folder", ["bad name", "-x", "ünder", "1", "status", "a/infer", "a\nb", "a%2e"]
)
def test_a_model_with_a_name_that_is_not_allowed_is_told(tmp_path: Path, folder: str) -> None:
    lay(tmp_path, f"{folder}/model.onnx", "fine/model.onnx")
    layout = Layout(str(tmp_path))
    assert [f.name for f in layout.models()] == ["fine"]
    (problem,) = layout.notes
    assert problem.rule == "name" and problem.where.isprintable() and problem.hint


def test_a_folder_name_that_is_not_text_is_told_in_text(tmp_path: Path) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/m\xff")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff/model.onnx")).write_text("x")
    layout = Layout(str(tmp_path))
    assert list(layout.models()) == []
    layout.notes[0].where.encode()


def test_links_inside_are_followed_and_links_out_are_told_and_never_opened(tmp_path: Path) -> None:
    root = lay(tmp_path / "repo", "m/1/model.onnx", "store/weights.bin", "n/1/model.onnx")
    outside = lay(tmp_path / "outside", "1/model.onnx", "secret")
    (root / "twin").symlink_to("m")
    (root / "m/1/w.bin").symlink_to("../../store/weights.bin")
    (root / "away").symlink_to(outside)
    (root / "n/1/secret").symlink_to(outside / "secret")
    (root / "n/2").symlink_to(outside / "1")
    (root / "n/label").symlink_to(outside / "secret")
    (root / "n/gone").symlink_to("nowhere")
    found, notes = look(root)
    assert sorted(found) == ["m", "n", "twin"]
    assert found["twin"].folder == found["m"].folder
    assert paths(found["m"], 1) == ["1/model.onnx", "1/w.bin"]
    assert [(p.where, p.rule) for p in notes] == [("away", "link")]
    told = {(p.where, p.version) for p in found["n"].notes if p.rule == "link"}
    assert told == {("n/1/secret", 1), ("n/2", 2), ("n/label", None), ("n/gone", None)}


def test_a_link_to_a_version_is_a_name_for_it_and_not_one_more_folder(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx", "m/2/model.onnx")
    (tmp_path / "m/latest").symlink_to("2")
    found, _ = look(tmp_path)
    assert paths(found["m"]) == [] and found["m"].notes == []


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    lay(tmp_path, "a/1/model.onnx", "b/1/model.onnx", "ns/x/")
    (tmp_path / "ns/up").symlink_to(tmp_path)
    (tmp_path / "a/1/self").symlink_to(".")
    (tmp_path / "a/to_b").symlink_to("../b")
    (tmp_path / "b/to_a").symlink_to("../a")
    (tmp_path / "loop").symlink_to("loop")
    found, notes = look(tmp_path)
    assert sorted(found) == ["a", "b"]
    assert {p.where for p in notes} == {"ns/up", "loop"}
    assert {p.rule for p in found["a"].notes} == {"link", "layout"}


def test_a_scan_that_would_never_end_stops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, *(f"m/1/{i}" for i in range(50)))
    monkeypatch.setattr(walk, "MAX_ENTRIES", 20)
    layout = Layout(str(tmp_path))
    problems = [p for f in layout.models() for p in f.notes] + layout.notes
    assert [(p.where, p.rule) for p in problems] == [(".", "io")]


def test_what_lies_in_the_wrong_place_is_a_warning(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx", "m/model.onnx", "m/1/config.yaml", "model.onnx")
    found, notes = look(tmp_path)
    assert {(p.where, p.warning) for p in found["m"].notes} == {
        ("m/model.onnx", True),
        ("m/1/config.yaml", True),
    }
    assert [(p.where, p.rule, p.warning) for p in notes] == [("model.onnx", "layout", True)]


def test_what_is_neither_file_nor_folder_is_not_opened(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx")
    os.mkfifo(tmp_path / "m/config.yaml")
    os.mkfifo(tmp_path / "m/1/pipe")
    found, _ = look(tmp_path)
    assert paths(found["m"]) == [] and paths(found["m"], 1) == ["1/model.onnx"]


@pytest.mark.parametrize("name", ["n", "m/checks", "m/1", "m/1/x", "__pycache__", "out", "org"])
def test_what_is_not_a_model_is_not_found_by_name(tmp_path: Path, name: str) -> None:
    lay(
        tmp_path / "r",
        "m/1/model.onnx",
        "m/checks/model.onnx",
        "__pycache__/model.py",
        "org/x/model.py",
    )
    lay(tmp_path / "o", "model.onnx")
    (tmp_path / "r/out").symlink_to(tmp_path / "o")
    assert Layout(str(tmp_path / "r")).model(name) is None


@pytest.mark.parametrize("name", ["../o", "/etc", "a/../m", ""])
def test_a_name_that_is_not_allowed_is_not_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidNameError):
        Layout(str(tmp_path)).model(name)
