"""What lies in adapters/: which are there, what is wrong with one, and when it is to be believed."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import pytest

from repository.adapters.sources import AdapterSource
from repository.folder.adapters import AdapterFolders
from repository.folder.scan import Scanner
from repository.folder.settle_adapters import AdapterSettler
from tests.adapters import source, weights, write_adapter, write_config
from tests.models import add_onnx

LATER = time.time() + 3600  # a look at which all that a test writes is old
T = 1_000_000.0  # a wall clock


def look(root: Path) -> dict[str, AdapterSource]:
    return dict(AdapterFolders().look("m", str(root / "m/adapters"), str(root), LATER))


def problem(root: Path, name: str = "a1") -> str:
    found = look(root)[name]
    assert found.facts is None
    return found.problem


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path.resolve() / "models"
    write_adapter(path / "m/adapters/a1")
    return path


def test_an_adapter_is_its_two_files_and_what_their_headers_say(root: Path) -> None:
    (root / "m/adapters/a1/README.md").write_text("nothing that is read")
    (root / "m/adapters/notes.txt").write_text("no adapter")
    (root / "m/adapters/.tmp").mkdir()
    ((name, found),) = look(root).items()
    assert (name, found.name, found.path) == ("a1", "a1", root / "m/adapters/a1")
    assert [f.name for f in found.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert found.facts is not None and found.problem == ""
    assert (found.facts.rank, found.facts.bytes) == (4, 256)


def test_adapters_change_neither_the_model_nor_its_fingerprint(root: Path) -> None:
    add_onnx(root / "m/1/model.onnx")
    scanner = Scanner(root, trust_code=False)
    first = scanner.scan(LATER).models["m"]
    write_adapter(root / "m/adapters/a2", r=2)
    second = scanner.scan(LATER).models["m"]
    assert first == second and first.fingerprint == second.fingerprint
    assert sorted(second.adapters) == ["a1", "a2"]
    assert scanner.scan(LATER).models["m"] is second
    shutil.rmtree(root / "m/adapters")
    assert not scanner.scan(LATER).models["m"].adapters


def test_a_model_that_wants_none_has_none(root: Path) -> None:
    add_onnx(root / "m/1/model.onnx")
    (root / "m/config.yaml").write_text("adapters: {enabled: false}\n")
    assert not Scanner(root, trust_code=False).scan(LATER).models["m"].adapters


def test_half_an_adapter_is_told_by_what_is_missing(root: Path) -> None:
    file = root / "m/adapters/a1/adapter_model.safetensors"
    file.write_bytes(weights()[:-1])
    assert "its tensors need" in problem(root)
    file.unlink()
    assert "adapter_model.safetensors is missing" in problem(root)
    (root / "m/adapters/a1/adapter_model.bin").write_bytes(b"\x80\x04")
    assert "adapter_model.bin is a pickle and never read" in problem(root)
    shutil.rmtree(root / "m/adapters/a1")
    write_config(root / "m/adapters/a1", r=64)
    (root / "m/adapters/a1/adapter_model.safetensors").write_bytes(weights(r=4))
    assert "rank" in problem(root)


def test_links_are_followed_inside_and_refused_outside(root: Path, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    (root / "m/adapters/away").symlink_to(outside)
    (root / "m/adapters/near").symlink_to(root / "m/adapters/a1")
    half = write_adapter(root / "m/adapters/half")
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    found = look(root)
    assert found["near"].facts is not None
    for name in ("away", "half"):
        assert found[name].facts is None
        assert "a link that leads out of the repository" in found[name].problem
        assert str(tmp_path) not in found[name].problem


@pytest.mark.parametrize("name", ["has space", "dots:colon", "-dash"])
def test_a_bad_name_is_told_and_hides_nobody(root: Path, name: str) -> None:
    write_adapter(root / "m/adapters" / name)
    found = look(root)
    assert "invalid adapter name" in found[name].problem and found["a1"].facts is not None


def test_a_name_that_is_no_text_can_be_told(root: Path) -> None:
    os.mkdir(os.fsencode(root / "m/adapters") + b"/\xff")
    name = next(n for n in look(root) if n != "a1")
    assert name.isprintable() and "invalid adapter name" in problem(root, name)


def test_a_pipe_and_a_huge_config_hold_up_nobody(root: Path) -> None:
    (root / "m/adapters/a1/adapter_config.json").write_text(" " * (1 << 20) + "{}")
    assert "more than" in problem(root)
    (root / "m/adapters/a1/adapter_config.json").unlink()
    os.mkfifo(root / "m/adapters/a1/adapter_config.json")
    assert "is no file" in problem(root)


def test_what_did_not_change_is_the_same_object_and_costs_its_stats(root: Path) -> None:
    reads = 0

    def read(config: bytes, header: object) -> object:
        nonlocal reads
        reads += 1
        return source().facts

    for i in range(300):
        write_adapter(root / f"m/adapters/b{i}")
    folders = AdapterFolders(read)  # type: ignore[arg-type]
    place = str(root / "m/adapters")
    first = folders.look("m", place, str(root), LATER)
    began = time.process_time()
    assert folders.look("m", place, str(root), LATER) is first
    assert time.process_time() - began < 0.1  # 5 ms on a quiet machine
    assert reads == 301
    write_adapter(root / "m/adapters/b7", r=2)
    second = folders.look("m", place, str(root), LATER)
    assert reads == 302 and second["b8"] is first["b8"]
    assert second["b7"].fingerprint != first["b7"].fingerprint


def test_a_folder_that_cannot_be_listed_is_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = AdapterFolders()
    first = folders.look("m", str(root / "m/adapters"), str(root), LATER)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert folders.look("m", str(root / "m/adapters"), str(root), LATER) is first
    assert "cannot be read" in caplog.text


# settling -----------------------------------------------------------------------------------------


def offer(settler: AdapterSettler, now: float, **seen: AdapterSource) -> dict[str, str]:
    told, _ = settler.offer("m", seen, now)
    return {n: "settling" if s.settling else s.problem or s.fingerprint for n, s in told.items()}


def fresh(print_: str, **rest: object) -> AdapterSource:
    return source("a", print_, newest_ctime=math.inf, **rest)


def test_a_new_adapter_settles_by_itself_and_is_told_as_settling() -> None:
    settler = AdapterSettler(1.0)
    old = source("b", "b1", newest_ctime=T - 9)
    assert offer(settler, T, a=fresh("a1"), b=old) == {"a": "settling", "b": "b1"}
    assert offer(settler, T + 0.5, a=fresh("a2"), b=old) == {"a": "settling", "b": "b1"}
    told, again = settler.offer("m", {"a": fresh("a2"), "b": old}, T + 1.2)
    assert told["a"].settling and again == pytest.approx(0.3)
    seen = {"a": fresh("a2"), "b": old}
    told, again = settler.offer("m", seen, T + 1.6)
    assert told is seen and again is None
    assert settler.offer("m", seen, T + 2)[0] is told


def test_a_half_written_one_is_not_refused_and_a_broken_one_at_rest_is() -> None:
    settler = AdapterSettler(1.0)
    assert offer(settler, T, a=fresh("half", problem="half")) == {"a": "settling"}
    assert offer(settler, T + 1.1, a=fresh("half", problem="half")) == {"a": "half"}


def test_a_live_one_stays_while_its_replacement_is_written_or_broken() -> None:
    settler = AdapterSettler(1.0)
    offer(settler, T, a=source("a", "good", newest_ctime=T - 9))
    assert offer(settler, T + 1, a=fresh("half", problem="half")) == {"a": "good"}
    told, _ = settler.offer("m", {"a": fresh("half", problem="half")}, T + 2)
    assert (told["a"].fingerprint, told["a"].problem) == ("good", "half")
    assert told["a"].facts is not None
    offer(settler, T + 3, a=fresh("new"))
    assert offer(settler, T + 4, a=fresh("new")) == {"a": "new"}


def test_one_that_is_gone_stays_for_the_settle_time_and_comes_back_fresh() -> None:
    settler = AdapterSettler(1.0)
    offer(settler, T, a=source("a", "good", newest_ctime=T - 9))
    assert offer(settler, T + 1) == {"a": "good"}
    assert offer(settler, T + 1.9) == {"a": "good"}
    assert offer(settler, T + 2) == {}
    assert offer(settler, T + 3, a=fresh("x")) == {"a": "settling"}
    assert offer(settler, T + 3.5) == {}
    assert offer(settler, T + 9, a=fresh("x")) == {"a": "settling"}
