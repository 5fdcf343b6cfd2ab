"""Reading golden files, hostile ones too, and comparing what a model gave with them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.checks import Check, compare, find_checks, read_check
from repository.errors import CheckFailedError
from repository.spec import ModelSpec
from repository.tensors import DATATYPES, Tensor


def put(folder: Path, name: str, raw: bytes) -> ModelSpec:
    (folder / "checks").mkdir(exist_ok=True)
    (folder / "checks" / name).write_bytes(raw)
    return ModelSpec("m", 1, "f", folder, folder)


def one(name: str, datatype: str, shape: Any, data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


OK = one("y", "FP32", [1], [1.0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a check"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "is not a check"),
        ("[]", "is not a check"),
        ({"inputs": []}, "missing required field `outputs`"),
        ({"inputs": [], "outputs": []}, "no golden outputs"),
        ({"inputs": [], "outputs": [OK], "tolerance": 1}, "unknown field `tolerance`"),
        ({"inputs": [OK, OK], "outputs": [OK]}, "inputs name a tensor twice: y, y"),
        ({"inputs": [], "outputs": [OK], "atol": -1}, "atol is -1"),
        ({"inputs": [], "outputs": [one("y", "FP8", [1], [1])]}, "'FP8' cannot be written in JSON"),
        ({"inputs": [], "outputs": [one("y", "BF16", [1], [1])]}, "or an .npz"),
        ({"inputs": [], "outputs": [one("y", "FP32", [2], [1])]}, r"1 values; shape \[2\]"),
        ({"inputs": [], "outputs": [one("y", "FP32", [-1], [1])]}, r"shape \[-1\] does not"),
        ({"inputs": [], "outputs": [one("y", "FP32", [1], ["1"])]}, "'1' is no FP32"),
        ({"inputs": [], "outputs": [one("y", "FP32", [1], [[[1]]])]}, r"is no FP32"),
        ({"inputs": [], "outputs": [one("y", "INT8", [1], [1.5])]}, "1.5 is no INT8"),
        ({"inputs": [], "outputs": [one("y", "INT8", [1], [True])]}, "True is no INT8"),
        ({"inputs": [], "outputs": [one("y", "UINT8", [1], [256])]}, "out of UINT8's range"),
        ({"inputs": [], "outputs": [one("y", "UINT64", [1], [-1])]}, "out of UINT64's range"),
        ({"inputs": [], "outputs": [one("y", "BOOL", [1], [1])]}, "1 is no BOOL"),
        ({"inputs": [], "outputs": [one("y", "BYTES", [1], [1])]}, "1 is no BYTES"),
    ],
)
def test_a_malformed_json_check_says_what_is_wrong_in_which_file(
    tmp_path: Path, text: Any, reason: str
):
    raw = text if isinstance(text, str) else json.dumps(text)
    spec = put(tmp_path, "a.json", raw.encode(errors="surrogateescape"))
    with pytest.raises(CheckFailedError, match=r"^checks/a\.json: .*" + reason) as failure:
        read_check(spec, "checks/a.json", {})
    assert str(tmp_path) not in str(failure.value)


def test_json_values_may_be_nested_or_flat_and_of_every_type(tmp_path: Path):
    data = {"BOOL": [True], "BYTES": ["é"], "FP16": [0.5], "FP64": [float("nan")]}
    outputs = [one(n, n, [1], data.get(n, [1])) for n in DATATYPES if n != "BF16"]
    nested = one("deep", "INT32", [2, 1, 2], [[[1, 2]], [[3, 4]]])
    scalar = one("scalar", "FP32", [], float("inf"))
    golden = {"inputs": [], "outputs": [*outputs, nested, scalar]}
    spec = put(tmp_path, "a.json", json.dumps(golden).encode())
    check = read_check(spec, "checks/a.json", {})
    found = {tensor.name: tensor for tensor in check.outputs}
    assert found["deep"].array().tolist() == [[[1, 2]], [[3, 4]]]
    assert found["BYTES"].array()[0] == "é".encode()
    assert np.isinf(found["scalar"].array()) and np.isnan(found["FP64"].array()[0])
    assert len(found) == 15


def npz(folder: Path, **members: Any) -> ModelSpec:
    """Writes checks/a.npz; a member's value is an array, or the bytes of its file."""
    return put(folder, "a.npz", packed(members))


def packed(members: dict[str, Any]) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            stream = io.BytesIO()
            if isinstance(value, bytes):
                stream.write(value)
            else:
                np.save(stream, value)
            archive.writestr(name.replace("__", "/") + ".npy", stream.getvalue())
    return whole.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_an_npz_holds_every_type_in_any_layout(tmp_path: Path):
    arrays: dict[str, Any] = {
        "outputs__big": np.arange(6, dtype=">i4").reshape(2, 3),
        "outputs__turned": np.asfortranarray(np.arange(6, dtype="f2").reshape(2, 3)),
        "outputs__half": np.array([0x3F80], "u2"),
        "outputs__plain": np.array([0x3F80], "u2"),
        "outputs__words": np.array([["a", "é"]]),
        "outputs__raw": np.array([b"x\x00y"]),
        "outputs__none": np.array([""], "U0"),
        "outputs__scalar": np.float64(3),
        "outputs__org__name": np.zeros((0, 4), bool),
    }
    spec = npz(tmp_path, **arrays)
    check = read_check(spec, "checks/a.npz", {"half": "BF16"})
    found = {tensor.name: tensor for tensor in check.outputs}
    assert found["big"].array().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["turned"].array().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (found["half"].datatype, found["plain"].datatype) == ("BF16", "UINT16")
    assert found["words"].array().tolist() == [[b"a", "é".encode()]]
    assert found["raw"].array().tolist() == [b"x\x00y"] and found["none"].array().tolist() == [b""]
    assert found["scalar"].shape == () and found["org/name"].shape == (0, 4)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"y": np.zeros(1)}, "an array 'y'; arrays are named 'inputs/NAME'"),
        ({"inputs__x": np.zeros(1)}, "no golden outputs"),
        ({"outputs__y": np.zeros(1, complex)}, "no KServe V2 datatype"),
        ({"outputs__y": np.array([{}])}, "object arrays need pickle"),
        ({"outputs__y": b"nonsense"}, "is not a readable .npz"),
        (
            {"outputs__y": header("{'descr':'<f4','fortran_order':False,'shape':(9999999999,)}\n")},
            "which its bytes do not fill",
        ),
        (
            {"outputs__y": header("{'descr':'<f4','fortran_order':False,'shape':(-1,)}\n")},
            "which its bytes do not fill",
        ),
        (
            {"outputs__y": header("{'descr':'<f4','fortran_order':False,'shape':(4,)}\n")},
            "an array ends early",
        ),
        ({"outputs__y": np.zeros(9 << 20)}, "at most 64 ?MiB are read"),
    ],
)
def test_a_malformed_npz_says_what_is_wrong_and_allocates_nothing_for_it(
    tmp_path: Path, members: dict[str, Any], reason: str
):
    with pytest.raises(CheckFailedError, match=r"^checks/a\.npz: .*" + reason):
        read_check(npz(tmp_path, **members), "checks/a.npz", {})


GOOD = packed({"inputs__x": np.arange(3.0), "outputs__y": np.arange(3.0)})


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4))
def test_a_damaged_npz_is_read_or_refused_and_nothing_else(damage: list[tuple[int, int]]):
    raw = bytearray(GOOD)
    for at, value in damage:
        raw[at] = value
    with tempfile.TemporaryDirectory() as folder:
        spec = put(Path(folder), "a.npz", bytes(raw))
        with contextlib.suppress(CheckFailedError):
            read_check(spec, "checks/a.npz", {})


@settings(deadline=None, max_examples=100)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner)))
def test_any_json_data_is_read_or_refused_and_nothing_else(data: Any):
    golden = {"inputs": [], "outputs": [one("y", "INT32", [2, 2], data)]}
    with tempfile.TemporaryDirectory() as folder:
        spec = put(Path(folder), "a.json", json.dumps(golden).encode())
        with contextlib.suppress(CheckFailedError):
            read_check(spec, "checks/a.json", {})


# where a check may lie ----------------------------------------------------------------------------


def test_a_link_out_of_the_models_folder_is_refused_and_one_inside_is_read(tmp_path: Path):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"inputs": [], "outputs": [OK]}))
    model = tmp_path / "model"
    model.mkdir()
    spec = put(model, "b.json", secret.read_bytes())
    (model / "checks" / "a.json").symlink_to(secret)
    (model / "checks" / "c.json").symlink_to("b.json")
    assert find_checks(spec) == ["checks/a.json", "checks/b.json", "checks/c.json"]
    with pytest.raises(CheckFailedError, match=r"checks/a\.json: is a link that leads out"):
        read_check(spec, "checks/a.json", {})
    assert read_check(spec, "checks/c.json", {}).outputs[0].name == "y"


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path):
    spec = put(tmp_path, "b.json", b"")
    os.mkfifo(tmp_path / "checks" / "a.json")
    with pytest.raises(CheckFailedError, match="is not a file"):
        read_check(spec, "checks/a.json", {})
    with pytest.raises(CheckFailedError, match=r"checks/gone\.json: cannot be read: No such file"):
        read_check(spec, "checks/gone.json", {})


def test_a_large_json_is_refused_with_what_to_do(tmp_path: Path):
    spec = put(tmp_path, "a.json", b" " * (4 << 20) + b"{}")
    with pytest.raises(CheckFailedError, match=r"at most 4 ?MiB .*use an \.npz"):
        read_check(spec, "checks/a.json", {})


def test_other_files_are_no_checks(tmp_path: Path):
    for name in ("README.md", ".a.json", "a.json~"):
        spec = put(tmp_path, name, b"")
    assert find_checks(spec) == []
    assert find_checks(ModelSpec("m", 1, "f", tmp_path / "none", tmp_path / "none")) == []


# comparing ----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def judge(got: Tensor, golden: Tensor, atol: float = 0.01, rtol: float = 0.1) -> str:
    try:
        compare(Check("c", [], [golden]), [got], atol=atol, rtol=rtol)
    except CheckFailedError as failure:
        return str(failure)
    return ""


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize(
    ("got", "golden", "agree"),
    [
        (1.0, 1.0, True),
        (1.1, 1.0, True),
        (1.2, 1.0, False),
        (0.0099, 0.0, True),
        (0.02, 0.0, False),
        (-1.0, 1.0, False),
        (NAN, NAN, True),
        (NAN, 1.0, False),
        (1.0, NAN, False),
        (INF, INF, True),
        (-INF, INF, False),
        (1.0, INF, False),
        (INF, 1.0, False),
    ],
)
def test_floats_agree_within_the_tolerance(dtype: str, got: float, golden: float, agree: bool):
    pair = [Tensor.of("y", np.array([value], dtype)) for value in (got, golden)]
    assert (judge(*pair) == "") is agree


def test_bf16_is_compared_as_the_numbers_that_it_stands_for():
    one_, near, far = (np.array([bits], "u2") for bits in (0x3F80, 0x3F81, 0x4000))
    golden = Tensor.of("y", one_, "BF16")
    assert judge(Tensor.of("y", near, "BF16"), golden) == ""
    assert "got 2, expected 1; largest difference 1 " in judge(Tensor.of("y", far, "BF16"), golden)


def test_other_types_must_be_equal():
    def of(*values: Any) -> Tensor:
        return Tensor.of("y", np.array(values))

    assert judge(of(1, 2), of(1, 2)) == judge(of(b"a", b""), of(b"a", b"")) == ""
    assert judge(of(2**62), of(2**62 + 1)).endswith("got 4611686018427387904, expected "
                                                    "4611686018427387905")  # fmt: skip
    assert "in 1 of 2 elements, first at [1]: got True, expected False" in judge(
        of(True, True), of(True, False)
    )
    assert "got b'a', expected b'b'" in judge(of(b"a"), of(b"b"))
    assert len(judge(of(b"a" * 9999), of(b"b" * 9999))) < 300


def test_shape_and_datatype_must_match():
    def of(dtype: str, *shape: int) -> Tensor:
        return Tensor.of("y", np.zeros(shape, dtype))

    assert judge(of("f4", 2), of("f4", 1, 2)) == (
        "c: output 'y' is FP32 [2]; the golden one is FP32 [1, 2]"
    )
    assert "is FP32 [2]; the golden one is FP64 [2]" in judge(of("f4", 2), of("f8", 2))
    assert judge(of("f4", 0, 3), of("f4", 0, 3)) == judge(of("f4"), of("f4")) == ""


def test_a_difference_that_no_number_says_is_told():
    nan, one_ = (Tensor.of("y", np.array(v, "f4")) for v in (NAN, 1.0))
    assert "first at []: got nan, expected 1; largest difference not finite" in judge(nan, one_)


def test_a_golden_file_may_list_a_part_of_the_outputs():
    golden = Tensor.of("y", np.ones(1))
    compare(Check("c", [], [golden]), [Tensor.of("z", np.ones(9)), golden], atol=0, rtol=0)
