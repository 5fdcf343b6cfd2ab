"""Half-written and hostile model files: always a Problem, never an exception, never a wait."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from repository.errors import IncompleteFilesError
from repository.folder.onnx_files import External, external_files
from repository.folder.whole import inspect
from repository.snapshot import Problem
from tests.models import add_onnx, external_onnx, relocate_external


def judged(path: Path, root: Path | None = None) -> Problem | None:
    return inspect(str(path), str((root or path.parent).resolve()), "m/1/" + path.name, 1).problem


def held(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def tensors() -> bytes:
    return save(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)}, {"k": "v"}
    )


def archive() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        file.writestr("data/0", b"x" * 100)
        file.comment = b"a comment"
    return held.getvalue()


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", tensors()),
        ("model.pt2", archive()),
        ("model.py", b"x = 1"),
        ("a.onnx", b""),
    ],
)
def test_a_whole_file_is_whole_and_an_empty_one_is_not(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = held(tmp_path, name, content or add_onnx(tmp_path / "x.onnx").read_bytes())
    assert judged(path) is None
    path.write_bytes(b"")
    problem = judged(path)
    assert problem is not None and problem.rule == "incomplete" and problem.version == 1


@pytest.mark.parametrize("name", ["m.onnx", "m.safetensors", "m.pt2"])
def test_a_file_that_is_cut_anywhere_is_incomplete(tmp_path: Path, name: str) -> None:
    content = {
        "m.onnx": add_onnx(tmp_path / "x.onnx").read_bytes(),
        "m.safetensors": tensors(),
        "m.pt2": archive(),
    }[name]
    for length in range(len(content)):
        problem = judged(held(tmp_path, name, content[:length]))
        assert problem is not None and problem.rule == "incomplete", f"cut at {length}"
        assert problem.hint and str(tmp_path) not in str(problem)


@pytest.mark.parametrize(
    "content",
    [
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}, b"12345"),
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, b""),
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"12345"),
        header({"a": {"dtype": "U8", "shape": [2**62] * 60, "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}}, b""),
        header({"a": {"dtype": "U8", "shape": [1e400], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": [1]}), header([1]), header(b"{"), header(b"[" * 50_000), header(b"\xff\xff"),
        struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 17 << 20) + b"{}".ljust(17 << 20),  # whole, and more than the front reads
    ],
)  # fmt: skip
def test_a_safetensors_header_that_lies_is_told(tmp_path: Path, content: bytes) -> None:
    problem = judged(held(tmp_path, "m.safetensors", content))
    assert problem is not None and problem.rule == "incomplete"


HOSTILE = [
    b"\xff" * 10_000,  # a varint that never ends
    b"\x3a" + b"\xff" * 9 + b"\x01",  # a graph of 2**64 - 1 bytes
    b"\x3a\xff\xff\xff\xff\x7f",
    b"\x00" * 50_000,  # field number 0
    b"\x0b" * 5000,  # groups
    b"\x08\x01" * 40_000,  # more fields than are looked at
    b"\x3a\x04\x2a\x7f\x00\x00\x42\x00",  # an initializer longer than its graph
    b"\x3a\x00\x42\x02\x10\x11" + b"\x3a\x00" * 30_000,  # thousands of graphs
]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.sampled_from([".onnx", ".safetensors", ".pt2", ".pt"]))
@example(HOSTILE[0], ".onnx")
@example(HOSTILE[1], ".onnx")
@example(b"PK\5\6" + b"\xff" * 18, ".pt2")
@example(b"PK\6\7" + b"\xff" * 16 + b"PK\5\6" + b"\xff" * 16 + b"\0\0", ".pt2")
def test_no_bytes_whatever_raise(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    problem = judged(held(folder, f"m{ending}", content))
    if ending == ".onnx":
        try:
            external_files(folder / "m.onnx")
        except IncompleteFilesError:
            assert problem is not None


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_lengths_and_counts_end_soon(tmp_path: Path, content: bytes) -> None:
    path = held(tmp_path, "m.onnx", content)
    judged(path)
    with suppress(IncompleteFilesError):
        assert external_files(path) == []


def test_external_data_must_be_there_and_long_enough(tmp_path: Path) -> None:
    path = external_onnx(tmp_path / "model.onnx")
    assert external_files(path) == [External("weights.bin", 0, 16384)]
    verdict = inspect(str(path), str(tmp_path), "m", 1)
    assert verdict.problem is None and verdict.external == (str(tmp_path / "weights.bin"),)
    with open(tmp_path / "weights.bin", "r+b") as file:
        file.truncate(16383)
    problem = judged(path)
    assert problem is not None and problem.rule == "incomplete"
    assert "needs 16384 bytes of 'weights.bin', which has 16383" in problem.message
    os.remove(tmp_path / "weights.bin")
    problem = judged(path)
    assert problem is not None and "is not there" in problem.message


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/passwd", "a/../../w", "..\\w", "x/..", "\\etc", "a\0b"]
)
def test_external_data_that_leads_out_is_never_touched(tmp_path: Path, location: str) -> None:
    path = external_onnx(tmp_path / "m" / "model.onnx")
    relocate_external(path, location)
    problem = judged(path, tmp_path)
    assert problem is not None and problem.rule == "link" and problem.message.isprintable()


def test_external_data_behind_a_link_out_is_told_and_one_inside_is_fine(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    path = external_onnx(repo / "m" / "model.onnx")
    (tmp_path / "outside").write_bytes((repo / "m" / "weights.bin").read_bytes())
    os.rename(repo / "m" / "weights.bin", repo / "blob")
    (repo / "m" / "weights.bin").symlink_to("../blob")
    assert judged(path, repo) is None
    os.remove(repo / "m" / "weights.bin")
    (repo / "m" / "weights.bin").symlink_to(tmp_path / "outside")
    problem = judged(path, repo)
    assert problem is not None and problem.rule == "link"


def test_an_archive_beyond_the_small_format_is_judged_by_its_large_one(tmp_path: Path) -> None:
    content = archive().replace(b"a comment", b"")
    end = content.rindex(b"PK\5\6")
    length, start = struct.unpack_from("<II", content, end + 12)
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, length, start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    small = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = held(tmp_path, "m.pt2", content[:end] + record + locator + small)
    assert judged(path) is None
    path.write_bytes(content[:end] + record[:40] + b"\xff" * 16 + locator + small)
    assert judged(path) is not None


def test_a_limit_ends_the_walk_with_what_was_found(tmp_path: Path) -> None:
    path = external_onnx(tmp_path / "model.onnx")
    assert external_files(path, limit=3) == []
    assert len(external_files(path, limit=100)) == 1


def test_a_file_that_cannot_be_opened_is_told_as_io(tmp_path: Path) -> None:
    problem = judged(tmp_path / "gone.onnx")
    assert problem is not None and problem.rule == "io"
