"""How safetensors are read: mapped, into memory, through the ring; whole or not at all."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repository.backends import ring, weights
from repository.backends.weights import read_weights, weight_files
from repository.errors import FilesChangedError, IncompleteFilesError, LoadFailedError
from repository.hosts import snapshots
from tests.hosting import open_files

Tensors = dict[str, torch.Tensor]


class LateLane:
    """Copies that happen as late as they may: when somebody waits for them."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.most = 0
        self.places = 0
        self._lock = threading.Lock()

    def memory(self, size: int) -> torch.Tensor:
        self.places += 1
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._lock:
            self.waiting.append((target, source))
            self.most = max(self.most, len(self.waiting))

    def mark(self) -> Callable[[], None]:
        with self._lock:
            last = self.waiting[-1] if self.waiting else None

        def wait() -> None:
            with self._lock:
                while any(each is last for each in self.waiting):
                    target, source = self.waiting.pop(0)
                    target.copy_(source)

        return wait


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of every datatype that the safetensors library writes, and odd shapes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    kinds = [d for d in weights.DTYPES.values() if d is not torch.float4_e2m1fn_x2]
    tensors = {
        f"of {dtype}": torch.randint(0, 2 if dtype is torch.bool else 120, (5, 3, dtype.itemsize))
        .to(torch.uint8)
        .view(dtype)
        .clone()
        for dtype in kinds
    }
    tensors |= {f"t{i}": torch.randn(30 + i, 37) for i in range(20)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    tensors["nan"] = torch.tensor([0x7FC01234, -1, 0x7F800001], dtype=torch.int32).view(
        torch.float32
    )
    save_file(tensors, path)
    return path


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def assert_same(got: Tensors, path: Path) -> None:
    want = load_file(path)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), name


def carried(path: Path, lane: ring.Lane) -> Tensors:
    with weights._opened(path) as source:
        return weights._on_device([source], torch.device("cpu"), lane)


def carried_and_checked(path: Path, lane: ring.Lane) -> None:
    with weights._opened(path) as source:
        weights._on_device([source], torch.device("cpu"), lane)
        source.check_unchanged()


def header(path: Path, entries: Any, data: bytes = b"", length: int | None = None) -> Path:
    said = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    path.write_bytes(struct.pack("<Q", len(said) if length is None else length) + said + data)
    return path


def test_every_datatype_and_shape_is_read_bytes_exact_either_way(every):
    files = open_files()
    for private in (False, True):
        assert_same(read_weights([every], private=private), every)
    assert open_files() <= files + 1  # a map keeps its file, until its tensors go


def test_a_private_file_is_mapped_and_writing_to_a_tensor_does_not_reach_it(every):
    before = every.read_bytes()
    tensors = read_weights([every], private=True)
    t1, t2 = tensors["t1"], tensors["t2"]
    assert t1.untyped_storage().data_ptr() == t2.untyped_storage().data_ptr()
    t1.zero_()
    assert not t1.any() and every.read_bytes() == before
    assert_same(read_weights([every], private=True), every)


def test_tensors_that_the_writer_did_not_align_are_read_too(tmp_path):
    entries = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path = header(tmp_path / "m.safetensors", entries, b"abc" + struct.pack("<2f", 1.5, -2.0))
    for private in (False, True):
        assert read_weights([path], private=private)["b"].tolist() == [1.5, -2.0]
    assert carried(path, LateLane())["b"].tolist() == [1.5, -2.0]


def test_packed_and_unknown_datatypes(tmp_path):
    path = tmp_path / "m.safetensors"
    header(path, {"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}, b"\1\2\3\4")
    a = read_weights([path])["a"]
    assert (a.dtype, tuple(a.shape), raw(a)) == (torch.float4_e2m1fn_x2, (2, 2), b"\1\2\3\4")
    header(path, {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\1")
    with pytest.raises(IncompleteFilesError, match="contradicts itself"):
        read_weights([path])
    header(path, {"a": {"dtype": "X9", "shape": [3], "data_offsets": [0, 3]}}, b"abc")
    with pytest.raises(LoadFailedError, match=r"'a' of m\.safetensors is of datatype X9"):
        read_weights([path])


def test_floating_tensors_are_converted_where_a_dtype_is_asked_for(every):
    tensors = read_weights([every], private=True, dtype=torch.bfloat16)
    assert tensors["t1"].dtype is torch.bfloat16
    assert tensors["t1"].equal(load_file(every)["t1"].bfloat16())
    assert tensors["of torch.int32"].dtype is torch.int32


@pytest.mark.parametrize(
    ("entries", "data", "text"),
    [
        (b"{", b"", "not a safetensors header"),
        (b"[" * 9999, b"", "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "need .* bytes"),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, b"12345678", "contradicts"),
        (
            {"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}},
            b"",
            "need .* bytes",
        ),
        ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 0]}}, b"", "contradicts"),
        (
            {"a": {"dtype": "U8", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}},
            b"",
            "contradicts",
        ),
    ],
)
def test_a_doctored_header_is_refused_before_anything_is_allocated(tmp_path, entries, data, text):
    path = header(tmp_path / "m.safetensors", entries, data)
    for private in (False, True):
        with pytest.raises(
            IncompleteFilesError, match=rf"^m.safetensors is not complete: .*{text}"
        ):
            read_weights([path], private=private)


def test_a_half_copied_or_missing_file_is_refused(tmp_path, every):
    path = tmp_path / "m.safetensors"
    whole = every.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(IncompleteFilesError, match=r"m\.safetensors is not complete"):
            read_weights([path])
    path.unlink()
    with pytest.raises(IncompleteFilesError, match=r"^m\.safetensors is missing$"):
        read_weights([path])


def test_a_file_that_changes_while_it_is_read_is_not_believed(tmp_path, every):
    path = tmp_path / "m.safetensors"
    for change, text in ((_touched, "was changed"), (_replaced, "was changed"), (_cut, "ends at")):
        path.write_bytes(every.read_bytes())

        class Meddling(LateLane):
            def memory(self, size: int, change: Callable[[Path], None] = change) -> torch.Tensor:
                change(path)
                return super().memory(size)

        with pytest.raises(FilesChangedError, match=text):
            carried_and_checked(path, Meddling())


def _touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _replaced(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.replace(path.parent / "new", path)


def _cut(path: Path) -> None:
    os.truncate(path, 1000)


def test_shards_are_found_by_their_index_and_may_not_overlap(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    files = weight_files(tmp_path)
    assert read_weights(files).keys() == {"a", "b"}
    save_file({"a": torch.ones(3)}, tmp_path / "m-2.safetensors")
    with pytest.raises(
        LoadFailedError, match=r"'a' is in m-1\.safetensors and in m-2\.safetensors"
    ):
        read_weights(files)
    for bad in ("../m-1.safetensors", "/etc/passwd", "m.bin"):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(LoadFailedError, match=r"must be a \.safetensors beside it"):
            weight_files(tmp_path)
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(broken)
        with pytest.raises(IncompleteFilesError, match="is not an index"):
            weight_files(tmp_path)


# the ring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [64, 1000, 4096, 1 << 20])
def test_the_ring_carries_every_byte_however_small_its_places(every, monkeypatch, chunk):
    monkeypatch.setattr(weights, "CHUNK", chunk)
    lane = LateLane()
    assert_same(carried(every, lane), every)
    assert not lane.waiting
    assert lane.places <= ring.PLACES


def test_a_place_of_the_ring_is_not_read_into_before_its_copies_have_ended(every, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 512)
    lane = LateLane()
    assert_same(carried(every, lane), every)
    assert lane.most > 1  # copies did wait


def test_what_a_read_raises_ends_the_ring_and_its_threads(every, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 512)
    before = threading.active_count()
    count = iter(range(1000))

    def read(into: memoryview, at: int) -> None:
        if next(count) == 9:
            raise FilesChangedError("so it is")
        into[:] = bytes(len(into))

    target = torch.zeros(20_000, dtype=torch.uint8)
    chunks = list(ring.chunks_of(read, 0, [(0, target)], 512))
    with pytest.raises(FilesChangedError, match="so it is"):
        ring.carry(chunks, LateLane(), size=512)
    assert threading.active_count() == before


# snapshots ----------------------------------------------------------------------------------------


def test_weights_are_snapshotted_only_where_that_costs_nothing(tmp_path, every, monkeypatch):
    folder, target = tmp_path / "1", tmp_path / "snapshot"
    (folder / "adapters" / "a").mkdir(parents=True)
    (folder / "adapters" / "a" / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(every.read_bytes())
    (folder / "model.py").write_text("")
    monkeypatch.setattr(snapshots, "FICLONE", 0)  # a file system that cannot
    assert snapshots.prepare("weights", folder, "model.py", target) == folder
    assert not target.exists()

    def linked(source: Path, copy: Path) -> bool:
        copy.write_bytes(source.read_bytes())
        return True

    monkeypatch.setattr(snapshots, "_reflink", linked)  # one that can
    assert snapshots.prepare("weights", folder, "model.py", target) == target
    assert {p.name for p in target.iterdir()} == {"model.safetensors", "model.py"}
    snapshots.remove(target)
    (folder / "elsewhere").symlink_to(every)
    assert snapshots.prepare("weights", folder, "model.py", target) == folder
