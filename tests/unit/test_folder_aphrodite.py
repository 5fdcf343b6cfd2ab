"""Aphrodite's words for a model: its own file, a request's config, and where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repository.errors import ConfigError
from repository.folder.aphrodite import read_request
from repository.folder.mounts import ByCall
from repository.folder.scan import Scanner
from repository.folder.validate import validate
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec
from tests.hub import embed_files, lay, text_files
from tests.models import add_onnx

FILE = "aphrodite_config.yaml"


def text_model(root: Path, said: str = "", config: str = "", name: str = FILE) -> Path:
    folder = lay(root / "m", text_files())
    if said:
        (folder / name).write_text(said)
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def look(root: Path, **request: Any) -> ModelFolder:
    scanner = Scanner(root, trust_code=False)
    if request:
        scanner.by_call = ByCall().overridden("m", read_request(request))
    return scanner.scan().models["m"]


def spec(root: Path, **request: Any) -> ModelSpec:
    folder = look(root, **request)
    assert folder.specs, folder.problems
    return folder.specs[1]


# the file ----------------------------------------------------------------------------------------


def test_its_keys_become_ours_and_every_value_keeps_its_line(tmp_path: Path) -> None:
    text_model(
        tmp_path,
        "max_model_len: 64\ngpu-memory-utilization: 0.5\ntensor_parallel_size: 1\n"
        "dtype: half\nserved_model_name: [chat, org/chat]\n",
    )
    found = spec(tmp_path)
    assert found.backend == "text"
    assert found.config.options == {"max_len": 64, "dtype": "float16"}
    assert found.config.device_share == 0.5
    assert found.config.aliases == ("chat", "org/chat")
    assert look(tmp_path).aliases == ("chat", "org/chat")
    assert found.sources["options.max_len"] == f"{FILE}:1"
    assert found.sources["device_share"] == f"{FILE}:2"
    assert found.sources["options.dtype"] == f"{FILE}:4"
    assert found.sources["aliases"] == f"{FILE}:5"


def test_it_wins_over_config_yaml_key_by_key(tmp_path: Path) -> None:
    text_model(tmp_path, "max_model_len: 64\n", "options: {max_len: 32, slots: 2}\npin: true\n")
    found = spec(tmp_path)
    assert found.config.options == {"max_len": 64, "slots": 2}
    assert found.config.pin
    assert found.sources["options.slots"] == "config.yaml:1"
    assert found.sources["options.max_len"] == f"{FILE}:1"


def test_a_length_is_that_of_whatever_reads_texts(tmp_path: Path) -> None:
    folder = lay(tmp_path / "m", embed_files())
    (folder / FILE).write_text("max_model_len: 16\ndtype: auto\n")
    assert spec(tmp_path).config.options == {"max_tokens": 16, "dtype": "auto"}


@pytest.mark.parametrize(
    ("said", "line", "message"),
    [
        ("max_modl_len: 3\n", 1, "unknown key 'max_modl_len'; did you mean 'max_model_len'?"),
        ("dtype: auto\nquantization: awq\n", 2, "unknown key 'quantization'"),
        ("device: cpu\n", 1, "'device' is a key of config.yaml: write it there"),
        ("tensor_parallel_size: 2\n", 1, "'tensor_parallel_size' is 2; it must be 1"),
        ("max_model_len: 0\n", 1, "'max_model_len' is 0; it must be a whole number"),
        ("max_model_len: true\n", 1, "'max_model_len' is true"),
        ("gpu_memory_utilization: 0\n", 1, "must be a number above 0, at most 1"),
        ("gpu_memory_utilization: 1.5\n", 1, "'gpu_memory_utilization' is 1.5"),
        ("gpu_memory_utilization: .nan\n", 1, "'gpu_memory_utilization' is nan"),
        ("dtype: fp8\n", 1, "'dtype' is 'fp8'; it must be one of auto, half"),
        ("served_model_name: ../up\n", 1, "invalid model name '../up'"),
        ("served_model_name: []\n", 1, "a name or a list of names"),
        ("dtype: auto\nmax-model-len: 1\nmax_model_len: 2\n", 3, "is there twice"),
        ("- 1\n", 1, "must be a mapping"),
        ("a: &x 1\nb: *x\n", 1, "anchors and aliases"),
    ],
)
def test_what_is_wrong_with_it_is_told_with_its_line(
    tmp_path: Path, said: str, line: int, message: str
) -> None:
    text_model(tmp_path, said)
    folder = look(tmp_path)
    assert not folder.specs
    (problem,) = folder.errors
    assert problem.rule == "config" and message in str(problem)
    if "twice" not in message:
        assert problem.where == f"m/{FILE}:{line}"
    assert str(problem) in map(str, validate(tmp_path, trust_code=False))


@pytest.mark.parametrize("key", ["max_model_len: 8", "dtype: half"])
def test_a_key_that_the_backend_has_nothing_for_is_an_error(tmp_path: Path, key: str) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / FILE).write_text(f"{key}\n")
    (problem,) = look(tmp_path).errors
    assert "is for models of the backends text and embed; this model's is onnx" in problem.message
    assert problem.where == f"m/{FILE}:1"


def test_an_onnx_model_takes_the_keys_that_any_model_has(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / FILE).write_text("served_model_name: n\ndtype: auto\n")
    assert spec(tmp_path).config.aliases == ("n",)


def test_two_spellings_of_its_name_are_an_error(tmp_path: Path) -> None:
    folder = text_model(tmp_path, "max_model_len: 8\n")
    (folder / "aphrodite_config.yml").write_text("max_model_len: 9\n")
    (problem,) = look(tmp_path).errors
    assert problem.message == "both aphrodite_config.yaml and aphrodite_config.yml are there"


def test_the_short_ending_will_do(tmp_path: Path) -> None:
    text_model(tmp_path, "max_model_len: 8\n", name="aphrodite_config.yml")
    assert spec(tmp_path).sources["options.max_len"] == "aphrodite_config.yml:1"


def test_the_model_that_it_names_is_not_followed_and_told_if_it_is_another(tmp_path: Path) -> None:
    folder = text_model(tmp_path, "max_model_len: 8\nmodel: Qwen/Qwen3-32B\n")
    found = look(tmp_path)
    assert found.specs[1].config.options == {"max_len": 8}
    (problem,) = found.problems
    assert (
        problem.warning and problem.where == f"m/{FILE}:2" and "Qwen/Qwen3-32B" in problem.message
    )
    (folder / FILE).write_text("model: m\n")
    assert not look(tmp_path).problems


def test_it_is_in_the_fingerprint(tmp_path: Path) -> None:
    folder = text_model(tmp_path, "max_model_len: 8\n")
    scanner = Scanner(tmp_path, trust_code=False)
    before = scanner.scan().models["m"]
    (folder / FILE).write_text("max_model_len: 16\n")
    after = scanner.scan().models["m"]
    assert after.fingerprint != before.fingerprint
    assert after.specs[1].fingerprint != before.specs[1].fingerprint
    assert after.said == {"max_model_len": 16}


def test_one_in_a_version_folder_is_not_read_and_told(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "1" / FILE).write_text("bad: key\n")
    (problem,) = look(tmp_path).problems
    assert problem.warning and problem.where == f"m/1/{FILE}"


def test_no_link_leads_out_of_the_repository(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("max_model_len: 8\n")
    (text_model(tmp_path / "repo") / FILE).symlink_to(tmp_path / "secret")
    folder = look(tmp_path / "repo")
    assert [p.rule for p in folder.errors] == ["link"] and not folder.said


# a request ---------------------------------------------------------------------------------------


def test_a_request_stands_in_place_of_the_file_but_not_of_config_yaml(tmp_path: Path) -> None:
    text_model(tmp_path, "max_model_len: 64\ndtype: half\n", "options: {slots: 2}\n")
    before = spec(tmp_path)
    found = spec(tmp_path, **{"max-model-len": 16, "pin": True})
    assert found.config.options == {"slots": 2, "max_len": 16}
    assert found.config.pin
    assert found.sources["options.max_len"] == found.sources["pin"] == "request"
    assert found.sources["options.slots"] == "config.yaml:1"
    assert found.fingerprint != before.fingerprint and found.files == before.files
    folder = look(tmp_path, **{"max-model-len": 16, "pin": True})
    assert folder.said == {"max_model_len": 16, "pin": True}
    assert folder.fingerprint == look(tmp_path).fingerprint  # so nothing needs to settle


def test_an_empty_request_stands_in_place_of_the_file_too(tmp_path: Path) -> None:
    text_model(tmp_path, "max_model_len: 64\n")
    scanner = Scanner(tmp_path, trust_code=False)
    scanner.by_call = ByCall().overridden("m", read_request({}))
    assert scanner.scan().models["m"].specs[1].config.options == {}


def test_a_request_mends_what_a_broken_file_of_aphrodites_says(tmp_path: Path) -> None:
    text_model(tmp_path, "max_model_len: many\n")
    assert not look(tmp_path).specs
    assert spec(tmp_path, max_model_len=8).config.options == {"max_len": 8}


def test_the_order_of_what_was_said_says_nothing(tmp_path: Path) -> None:
    one = read_request({"pin": True, "max_model_len": 8})
    assert one.digest == read_request({"max-model-len": 8, "pin": True, "dtype": None}).digest
    assert one.digest != read_request({"pin": True, "max_model_len": 9}).digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_modl_len": 8}, "unknown key 'max_modl_len'; did you mean 'max_model_len'?"),
        ({"devise": "cpu"}, "unknown key 'devise'; did you mean 'device'?"),
        ({"pin": "yes"}, "'pin' must be true or false"),
        ({"instances": 0}, "'instances' must be at least 1"),
        ({"tensor-parallel-size": 2}, "'tensor_parallel_size' is 2"),
        ({"max-model-len": 1, "max_model_len": 1}, "'max_model_len' is there twice"),
        ({"aliases": ["a"], "served_model_name": "b"}, "both 'served_model_name' and 'aliases'"),
        ({"options": [1]}, "'options' must be a mapping"),
        ({"device_share": 0}, "'device_share' must be above 0"),
        ({"model": 3}, "'model' is 3"),
    ],
)
def test_a_request_is_refused_for_its_keys_and_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_request(values)
    assert str(caught.value).startswith("request: ") and message in str(caught.value)


def test_a_request_that_is_nested_for_ever_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"options": deep}
    with pytest.raises(ConfigError, match="nested deeper"):
        read_request(deep)


def test_said_twice_in_two_languages_is_an_error_of_the_request(tmp_path: Path) -> None:
    text_model(tmp_path)
    folder = look(tmp_path, max_model_len=8, options={"max_len": 9})
    (problem,) = folder.errors
    assert problem.rule == "request"
    assert "both 'max_model_len' and 'options.max_len' are said" in problem.message


def test_what_makes_no_whole_with_config_yaml_is_told_of_the_request(tmp_path: Path) -> None:
    text_model(tmp_path, config="max_batch_size: 4\n")
    folder = look(tmp_path, batching={"preferred_sizes": [8]})
    assert [p.rule for p in folder.errors] == ["request"]
