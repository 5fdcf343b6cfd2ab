"""The fingerprint sees every difference that matters and none that does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from repository.folder.scan import Scanner
from repository.folder.stamps import fingerprint, restat
from repository.snapshot import ModelFolder
from repository.spec import FileStamp, ModelSpec
from tests.models import add_onnx


def model(root: Path) -> Path:
    add_onnx(root / "m" / "1" / "model.onnx")
    add_onnx(root / "m" / "2" / "model.onnx")
    (root / "m" / "config.yaml").write_text("version_policy: all\n")
    return root / "m"


def scan(root: Path) -> ModelFolder:
    return Scanner(root, trust_code=False).scan().models["m"]


def prints(root: Path) -> dict[int, str]:
    return {v: s.fingerprint for v, s in scan(root).specs.items()}


def test_the_order_of_stamps_does_not_count_and_every_field_but_ctime_does() -> None:
    one, two = FileStamp("a", 1, 2, 3, 4), FileStamp("b", 5, 6, 7, 8)
    assert fingerprint([one, two]) == fingerprint([two, one])
    assert fingerprint([one]) == fingerprint([one._replace(ctime_ns=9)])
    others = [
        one._replace(path="c"),
        one._replace(size=9),
        one._replace(mtime_ns=9),
        one._replace(inode=9),
    ]
    assert len({fingerprint([s]) for s in (one, two, *others)} | {fingerprint([])}) == 7


def test_a_rollback_to_an_older_file_changes_the_fingerprint(tmp_path: Path) -> None:
    file = model(tmp_path) / "1" / "model.onnx"
    before = prints(tmp_path)
    old = tmp_path / "old.onnx"
    shutil.copy2(file, old)
    os.utime(old, ns=(10**18, 10**18))
    shutil.copy2(old, file)  # what `rsync -a` or tar do: the content of then, the mtime of then
    after = prints(tmp_path)
    assert after[1] != before[1] and after[2] == before[2]


def test_another_file_of_equal_size_and_mtime_changes_the_fingerprint(tmp_path: Path) -> None:
    file = model(tmp_path) / "1" / "model.onnx"
    before = prints(tmp_path)
    twin = tmp_path / "twin"
    shutil.copy2(file, twin)
    os.replace(twin, file)
    assert prints(tmp_path)[1] != before[1]


def test_a_new_version_leaves_the_others_alone_and_a_config_change_reaches_all(
    tmp_path: Path,
) -> None:
    folder = model(tmp_path)
    before = prints(tmp_path)
    add_onnx(folder / "3" / "model.onnx")
    with_third = prints(tmp_path)
    assert {v: with_third[v] for v in before} == before and 3 in with_third
    (folder / "config.yaml").write_text("version_policy: all\nmax_batch_size: 2\n")
    changed = prints(tmp_path)
    assert all(changed[v] != with_third[v] for v in changed)


@pytest.mark.parametrize(
    ("file", "counts"), [("checks/a.json", True), ("adapters/a/x", False), ("labels.txt", True)]
)
def test_checks_and_labels_count_and_adapters_do_not(
    tmp_path: Path, file: str, counts: bool
) -> None:
    folder = model(tmp_path)
    before = prints(tmp_path)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("x")
    assert (prints(tmp_path) != before) is counts


def test_a_chmod_or_a_hard_link_is_no_change_but_is_seen_in_the_ctime(tmp_path: Path) -> None:
    file = model(tmp_path) / "1" / "model.onnx"
    os.utime(file, ns=(10**18, 10**18))
    before = scan(tmp_path)
    file.chmod(0o600)
    os.link(file, tmp_path / "hard")
    after = scan(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.newest_ctime >= before.newest_ctime > 1.6e9


def test_a_folder_moved_as_a_whole_keeps_its_versions_interchangeable(tmp_path: Path) -> None:
    folder = model(tmp_path)
    before = scan(tmp_path)
    os.rename(folder, tmp_path / "elsewhere")
    os.rename(tmp_path / "elsewhere", folder)
    assert scan(tmp_path).fingerprint == before.fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    os.rename(tmp_path / "copy", folder)
    assert scan(tmp_path).fingerprint != before.fingerprint


def spec_of(root: Path) -> ModelSpec:
    return scan(root).specs[1]


def test_restat_sees_a_change_a_removal_and_a_replacement_and_no_chmod(tmp_path: Path) -> None:
    file = model(tmp_path) / "1" / "model.onnx"
    spec = spec_of(tmp_path)
    assert restat(spec)
    file.chmod(0o600)
    assert restat(spec)
    content = file.read_bytes()
    file.write_bytes(content)
    assert not restat(spec)
    spec = spec_of(tmp_path)
    os.rename(file, tmp_path / "kept")
    assert not restat(spec)
    os.rename(tmp_path / "kept", file)
    assert restat(spec)
    (tmp_path / "m" / "config.yaml").write_text("version_policy: all\npin: true\n")
    assert not restat(spec)
