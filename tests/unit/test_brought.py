"""Files that a load brings: which names are taken, and what is left on the disk whatever happens."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository import brought
from repository.brought import MOST_FILES, BroughtFiles, check_files
from repository.errors import InvalidRequestError, NoDiskError

FILES = {"1/model.onnx": b"weights", "labels.txt": b"a\nb\n"}


def there(state: Path) -> list[str]:
    """Every file and folder of the state folder that should not be there unasked."""
    home = state / "brought"
    return sorted(os.listdir(home)) if home.exists() else []


def put(files: BroughtFiles, model: str, brought: dict[str, bytes]) -> str:
    root = files.hold(files.digest(model, brought))
    files.put(root, model, brought)
    return root


def sweep(files: BroughtFiles, *keep: str) -> None:
    files.doom(files.listed(), keep)
    files.sweep()


def test_files_lie_in_a_folder_of_the_models_name_and_nobody_else_may_read_them(
    tmp_path: Path,
) -> None:
    files = BroughtFiles(tmp_path)
    root = Path(put(files, "org/m", FILES))
    assert (root / "org/m/1/model.onnx").read_bytes() == b"weights"
    assert (root / "org/m/labels.txt").read_bytes() == b"a\nb\n"
    assert there(tmp_path) == [root.name]
    assert root.parent.stat().st_mode & 0o077 == 0
    assert files.root_of(str(root / "org/m")) == str(root)
    assert files.root_of("/elsewhere/m") == files.root_of(files.home) == ""


def test_the_same_files_are_the_same_folder_and_others_another(tmp_path: Path) -> None:
    files = BroughtFiles(tmp_path)
    first = put(files, "m", FILES)
    inode = os.stat(f"{first}/m/1/model.onnx").st_ino
    assert put(files, "m", dict(reversed(FILES.items()))) == first
    assert os.stat(f"{first}/m/1/model.onnx").st_ino == inode
    assert len({first, put(files, "n", FILES), put(files, "m", {**FILES, "labels.txt": b""})}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "", "/etc/passwd", "../m", "1/../../x", "1/..", ".", "./x", "1//x", "1/", "a\0b", "a\nb",
        "1\\..\\x", "x" * 256, "é" * 128, "a/" * 9 + "x", "\ud800", "1/\u202egpj.exe",
    ],
)  # fmt: skip
def test_a_name_that_is_no_file_below_the_model_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(InvalidRequestError, match="invalid file name"):
        put(BroughtFiles(tmp_path), "m", {"1/model.onnx": b"good", name: b"evil"})
    assert there(tmp_path) == []


def test_a_file_cannot_be_a_folder_too(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'1' is a file and a folder"):
        put(BroughtFiles(tmp_path), "m", {"1/a/model.onnx": b"", "1": b""})
    with pytest.raises(InvalidRequestError, match="at most"):
        check_files({str(n): b"" for n in range(MOST_FILES + 1)})
    assert there(tmp_path) == []


@given(st.text(max_size=40))
def test_whatever_is_taken_lies_below_the_folder(name: str) -> None:
    try:
        check_files({name: b""})
    except InvalidRequestError:
        return
    assert os.path.normpath(os.path.join("/m", name)) == f"/m/{name}"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file of three does not fit."""
    written: list[str] = []
    write = brought._write

    def full(path: str, content: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, "full")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(brought, "_write", full)
    files = BroughtFiles(tmp_path)
    with pytest.raises(NoDiskError, match="No space left on device"):
        put(files, "m", {"1/a": b"1", "1/b": b"2", "1/c": b"3"})
    assert written and there(tmp_path) == []
    monkeypatch.undo()
    assert os.path.isdir(put(files, "m", FILES))


def test_what_nobody_refers_to_is_swept_and_what_is_being_brought_is_not(tmp_path: Path) -> None:
    files = BroughtFiles(tmp_path)
    kept, old, new = (put(files, name, FILES) for name in "abc")
    for root in (kept, old):
        files.let_go(root)
    (Path(files.home) / "left.123.1").mkdir()  # by a server that was killed as it wrote
    sweep(files, kept)
    assert there(tmp_path) == sorted(os.path.basename(root) for root in (kept, new))
    files.let_go(new)
    sweep(files)
    assert there(tmp_path) == []
    sweep(BroughtFiles(tmp_path / "never"))


def test_what_is_doomed_and_brought_again_stays(tmp_path: Path) -> None:
    """Between the word that it goes and its going, somebody wants it."""
    files = BroughtFiles(tmp_path)
    root = put(files, "m", FILES)
    files.let_go(root)
    files.doom(files.listed(), ())
    assert put(files, "m", FILES) == root
    files.let_go(root)
    files.sweep()
    assert os.path.isfile(f"{root}/m/1/model.onnx")


def test_what_was_swept_by_half_is_not_taken_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed as it sweeps, or a file cannot be removed."""

    def half(path: str, ignore_errors: bool = False) -> None:
        os.unlink(next(Path(path).rglob("model.onnx")))

    files = BroughtFiles(tmp_path)
    root = put(files, "m", FILES)
    files.let_go(root)
    monkeypatch.setattr(brought.shutil, "rmtree", half)
    sweep(files)
    monkeypatch.undo()
    assert not os.path.isdir(root)
    again = BroughtFiles(tmp_path)
    assert os.path.isfile(f"{put(again, 'm', FILES)}/m/1/model.onnx")
    again.let_go(root)
    sweep(again)
    assert there(tmp_path) == []
