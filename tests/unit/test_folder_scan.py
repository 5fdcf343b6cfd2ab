"""A whole scan: specs of what is whole, Problems for the rest, and never an exception."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from repository.folder.instead import read_instead
from repository.folder.mounts import ByCall
from repository.folder.scan import Scanner
from repository.folder.validate import validate
from repository.snapshot import ModelFolder, Problem, Snapshot
from tests.models import add_onnx, external_onnx

LATER = time.time() + 3600  # a scan at which all that a test writes is old


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def scan(root: Path, *, trust_code: bool = False, gpus: tuple[str, ...] = ()) -> Snapshot:
    return Scanner(root, trust_code=trust_code, gpus=gpus).scan()


def only(root: Path) -> ModelFolder:
    (model,) = scan(root).models.values()
    return model


def told(model: ModelFolder) -> set[tuple[str, str, int | None]]:
    return {(p.where, p.rule, p.version) for p in model.errors}


def test_a_model_without_a_config_has_a_spec_with_everything_a_load_needs(tmp_path: Path) -> None:
    add_onnx(tmp_path / "org" / "m" / "3" / "model.onnx")
    spec = only(tmp_path).specs[3]
    assert (spec.model, spec.version, spec.backend, spec.model_file) == (
        "org/m",
        3,
        "onnx",
        "model.onnx",
    )
    assert spec.folder == (tmp_path / "org" / "m").resolve() and spec.path == spec.folder / "3"
    assert [f.path for f in spec.files] == ["3/model.onnx"]
    assert spec.config.backend == "onnx" and spec.sources["backend"] == "guessed"
    assert spec.bytes_needed > 16 * 2**20 and spec.devices == ("cpu",)


def test_external_data_counts_for_the_memory_and_gpus_for_the_places(tmp_path: Path) -> None:
    external_onnx(tmp_path / "m" / "1" / "model.onnx")
    write(tmp_path / "m" / "1" / "notes.bin", "x" * 10**6)
    model = Scanner(tmp_path, trust_code=False, gpus=("cuda:0",)).scan().models["m"]
    size = sum(f.size for f in model.specs[1].files if "notes" not in f.path)
    assert model.specs[1].bytes_needed == size + 16 * 2**20
    assert model.specs[1].devices == ("cuda:0", "cpu")


def test_a_broken_config_is_told_at_its_line_and_the_model_is_broken(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    write(tmp_path / "m" / "config.yaml", "pin: true\nmax_batchsize: 8\n")
    model = only(tmp_path)
    assert model.broken and not model.specs
    (problem,) = model.problems
    assert str(problem).startswith("m/config.yaml:2: unknown key 'max_batchsize'")
    assert str(tmp_path) not in str(problem)


def test_two_configs_are_one_too_many(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    write(tmp_path / "m" / "config.yaml", "")
    write(tmp_path / "m" / "config.pbtxt", "")
    assert told(only(tmp_path)) == {("m", "config", None)}


def test_a_pbtxt_is_read_and_its_warnings_stop_nothing(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    write(
        tmp_path / "m" / "config.pbtxt",
        "max_batch_size: 4\noptimization { cuda { graphs: true } }\n",
    )
    model = only(tmp_path)
    assert model.specs[1].config.max_batch_size == 4 and not model.broken
    assert [(p.where, p.warning) for p in model.problems] == [("m/config.pbtxt:2", True)]
    assert model.specs[1].sources["max_batch_size"] == "config.pbtxt:1"


def test_a_version_that_is_not_whole_does_not_stop_the_others(tmp_path: Path) -> None:
    whole = add_onnx(tmp_path / "m" / "1" / "model.onnx").read_bytes()
    write(tmp_path / "m" / "2" / "model.onnx", "").write_bytes(whole[:-5])
    model = only(tmp_path)
    assert list(model.specs) == [1] and model.versions == (2, 1)
    assert told(model) == {("m/2/model.onnx", "incomplete", 2)} and not model.broken


def test_an_old_broken_version_that_would_not_serve_is_only_a_warning(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "2" / "model.onnx")
    write(tmp_path / "m" / "1" / "model.onnx", "")
    model = only(tmp_path)
    assert list(model.specs) == [2] and not model.errors and len(model.problems) == 1


@pytest.mark.parametrize(
    ("policy", "specs", "errors", "warnings"),
    [
        ("{latest: 1}", [3], 0, 0),
        ("{latest: 2}", [3, 2], 0, 0),
        ("all", [3, 2, 1], 0, 0),
        ("{specific: [1, 3, 9]}", [3, 1], 0, 1),
        ("{specific: [8, 9]}", [], 1, 2),
    ],
)
def test_the_version_policy_chooses_among_the_whole_versions(
    tmp_path: Path, policy: str, specs: list[int], errors: int, warnings: int
) -> None:
    for version in (1, 2, 3):
        add_onnx(tmp_path / "m" / str(version) / "model.onnx")
    write(tmp_path / "m" / "config.yaml", f"version_policy: {policy}\n")
    model = only(tmp_path)
    assert list(model.specs) == specs and model.versions == (3, 2, 1)
    assert (len(model.errors), len(model.problems)) == (errors, errors + warnings)


@pytest.mark.parametrize(
    ("files", "rule", "word"),
    [
        ({"config.yaml": ""}, "version", "no version folder"),
        ({"1/weights.safetensors": "x", "1/README": ""}, "config", "no backend"),
        ({"1/model.onnx": ""}, "incomplete", "empty"),
        ({"1/a.onnx": "", "1/b.onnx": ""}, "config", "no backend"),
        ({"config.yaml": "backend: onnx", "1/README": ""}, "incomplete", "'model.onnx' is not there"),
        ({"config.yaml": "device: cuda", "1/model.onnx": ""}, "config", "no GPU"),
        ({"config.yaml": "device: cuda:7", "1/model.onnx": ""}, "config", "cuda:7"),
        ({"config.yaml": "max_batch_size: 1\nbatching: {preferred_sizes: [2]}", "1/model.onnx": ""},
         "config", "max_batch_size 1"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_served_says_why(
    tmp_path: Path, files: dict[str, str], rule: str, word: str
) -> None:
    for name, text in files.items():
        write(tmp_path / "m" / name, text)
    model = only(tmp_path)
    assert model.broken and not model.specs
    assert any(p.rule == rule and word in p.message and p.hint for p in model.errors), (
        model.problems
    )


def test_code_is_only_taken_from_a_trusted_repository(tmp_path: Path) -> None:
    write(tmp_path / "m" / "1" / "model.py", "class Model: ...")
    model = only(tmp_path)
    assert told(model) == {("m", "trust", None)} and "--trust-code" in model.problems[0].hint
    trusted = scan(tmp_path, trust_code=True).models["m"]
    assert trusted.specs[1].backend == "python" and not trusted.problems
    assert trusted.specs[1].bytes_needed == 32 * 2**20 + 16


def test_an_alias_has_one_owner(tmp_path: Path) -> None:
    for name, aliases in {"a": "[x, b, a]", "b": "[x, y]", "c": "[y]"}.items():
        add_onnx(tmp_path / name / "1" / "model.onnx")
        write(tmp_path / name / "config.yaml", f"pin: true\naliases: {aliases}\n")
    models = scan(tmp_path).models
    assert {n: m.aliases for n, m in models.items()} == {"a": ("x",), "b": ("y",), "c": ()}
    assert {n: len(m.problems) for n, m in models.items()} == {"a": 1, "b": 1, "c": 1}
    problem = models["b"].problems[0]
    assert (problem.rule, problem.warning, problem.where) == ("alias", True, "b/config.yaml:2")
    assert all(m.specs for m in models.values())


def test_one_model_alone_is_seen_as_it_lies_there_now(tmp_path: Path) -> None:
    add_onnx(tmp_path / "a" / "1" / "model.onnx")
    scanner = Scanner(tmp_path, trust_code=False)
    before = scanner.scan(LATER).models["a"]
    assert scanner.scan_model("a", LATER) is before
    add_onnx(tmp_path / "a" / "2" / "model.onnx")
    after = scanner.scan_model("a")
    assert after is not None and list(after.specs) == [2]
    assert scanner.scan_model("b") is None
    shutil.rmtree(tmp_path / "a")
    assert scanner.scan_model("a") is None


def test_what_did_not_change_is_the_same_object_and_its_files_are_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        add_onnx(tmp_path / name / "1" / "model.onnx")
        write(tmp_path / name / "config.yaml", "pin: true")
    scanner = Scanner(tmp_path, trust_code=False)
    before = scanner.scan(LATER).models
    opened: list[str] = []
    really = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *a: (opened.append(str(path)), really(path, *a))[1]
    )
    assert all(scanner.scan(LATER).models[n] is before[n] for n in before) and opened == []
    write(tmp_path / "a" / "config.yaml", "pin: false")
    after = scanner.scan(LATER).models
    assert after["a"].fingerprint != before["a"].fingerprint and after["b"] is before["b"]
    assert [os.path.basename(p) for p in opened] == ["config.yaml"]


def test_a_broken_version_is_taken_once_it_is_mended(tmp_path: Path) -> None:
    whole = add_onnx(tmp_path / "m" / "1" / "model.onnx").read_bytes()
    scanner = Scanner(tmp_path, trust_code=False)
    for content, good in ((whole, True), (whole[:50], False), (b"", False), (whole, True)):
        (tmp_path / "m" / "1" / "model.onnx").write_bytes(content)
        assert bool(scanner.scan(LATER).models["m"].specs) is good


def test_a_file_that_changed_within_the_last_tick_of_the_clock_is_looked_into_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "m" / "config.yaml", "priority: 1")
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    scanner = Scanner(tmp_path, trust_code=False)
    seen = scanner.scan(config.stat().st_ctime)
    assert seen.models["m"].specs[1].config.priority == 1
    # The same size within the same tick: no stamp differs. (A stat cannot be made to lie, so that the
    # content is swapped below the reader.)
    really = os.open
    later = write(tmp_path / "later", "priority: 2")
    monkeypatch.setattr(os, "open", lambda p, *a: really(later if str(p) == str(config) else p, *a))
    assert scanner.scan(LATER).models["m"].specs[1].config.priority == 2


def test_stamps_of_the_future_are_never_quiet_and_come_to_rest_when_it_is_past(
    tmp_path: Path,
) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    scanner = Scanner(tmp_path, trust_code=False)
    now = time.time()
    assert scanner.scan(now - 100).models["m"].newest_ctime == math.inf
    assert abs(scanner.scan(now + 1).models["m"].newest_ctime - now) < 10


def test_a_root_that_is_a_link_is_followed_anew_each_time(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        add_onnx(tmp_path / version / f"m-{version}" / "1" / "model.onnx")
    (tmp_path / "current").symlink_to("v1")
    scanner = Scanner(tmp_path / "current", trust_code=False)
    assert list(scanner.scan().models) == ["m-v1"]
    (tmp_path / "next").symlink_to("v2")
    os.replace(tmp_path / "next", tmp_path / "current")
    assert list(scanner.scan().models) == ["m-v2"]


def test_a_repository_that_is_gone_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Scanner(tmp_path / "gone", trust_code=False).scan()


def test_files_that_come_and_go_while_we_look_are_no_reason_to_fail(tmp_path: Path) -> None:
    source = add_onnx(tmp_path / "source.onnx")
    root = tmp_path / "repo"
    root.mkdir()
    scanner = Scanner(root, trust_code=False)
    done = threading.Event()

    def churn() -> None:
        for i in range(150):
            folder = root / f"m{i % 5}"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "1").mkdir(parents=True)
            shutil.copy(source, folder / "1" / "model.onnx")
            (folder / "config.yaml").write_text("pin: true\n")
        done.set()

    thread = threading.Thread(target=churn)
    thread.start()
    while not done.is_set():
        for model in scanner.scan().models.values():
            assert {p.rule for p in model.problems} <= {"incomplete", "version", "config", "io"}
    thread.join()
    final = scanner.scan()
    assert len(final.models) == 5 and all(m.specs and not m.problems for m in final.models.values())


def test_a_thousand_folders_are_a_thousand_models(tmp_path: Path) -> None:
    source = add_onnx(tmp_path / "source.onnx").read_bytes()
    root = tmp_path / "repo"
    for i in range(1000):
        folder = root / f"org{i % 10}" / f"m{i}"
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.onnx").write_bytes(source)
        if i % 100 == 0:
            (folder / "config.yaml").write_text(f"max_batch_size: {i}\n")
    scanner = Scanner(root, trust_code=False)
    first, second = scanner.scan(LATER).models, scanner.scan(LATER).models
    assert len(first) == 1000 and all(m.specs and not m.problems for m in first.values())
    assert all(first[name] is second[name] for name in first)
    assert len({m.fingerprint for m in first.values()}) == 1000


def test_validate_lists_errors_and_warnings_by_place(tmp_path: Path) -> None:
    add_onnx(tmp_path / "b" / "1" / "model.onnx")
    write(tmp_path / "b" / "config.yaml", "device: cuda\nmax_batchsize: 8\n")
    write(tmp_path / "a" / "01" / "model.onnx", "x")
    write(tmp_path / "gpu" / "config.yaml", "device: cuda\n")
    add_onnx(tmp_path / "gpu" / "1" / "model.onnx")
    (tmp_path / "c").symlink_to("/etc")
    found = validate(tmp_path, False)
    assert [(p.where, p.rule) for p in found] == [
        ("a", "version"),
        ("a/01", "version"),
        ("b/config.yaml:2", "config"),
        ("c", "link"),
    ]
    assert all(isinstance(p, Problem) and p.hint for p in found)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "c").unlink()
    assert validate(tmp_path, False) == []


def test_a_config_said_anew_of_other_files_holds_for_those(tmp_path: Path) -> None:
    """The same words as before: what was remembered of the folder under them is of no use."""
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    scanner = Scanner(tmp_path, trust_code=False)
    bare = scanner.scan(LATER).models["m"]
    said = read_instead('{"max_batch_size": 8}', "m")
    for over, holds in (("of files before", ""), (bare.fingerprint, said.digest)):
        scanner.by_call = ByCall().overridden("m", said.of_files(over))
        assert scanner.scan(LATER).models["m"].override == holds
