"""The commands that need no server: validate, init, serve --print-config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import hub, triton_python
from tests.cli import run

PYTHON = "class Model:\n    pass\n"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "repo").mkdir()
    return tmp_path / "repo"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(PYTHON)
    return path


def test_init_makes_a_folder_that_validates(repo: Path, source: Path) -> None:
    result = run("init", "org/net", "--from", str(source), "--repo", str(repo), "--version", "3")
    assert result.exit_code == 0, result.stderr
    assert (repo / "org/net/3/model.py").read_text() == PYTHON
    assert "backend: python" in (repo / "org/net/config.yaml").read_text()
    assert [p.name for p in (repo / "org").iterdir()] == ["net"]
    assert run("validate", str(repo), "--trust-code").exit_code == 0


@pytest.mark.parametrize("whole", [False, True])
def test_init_knows_a_model_for_tritons_python_backend(
    repo: Path, tmp_path: Path, whole: bool
) -> None:
    text = triton_python.source("square")
    path = tmp_path / "theirs" / "model.py"
    path.parent.mkdir()
    path.write_text(text)
    source = path.parent if whole else path
    result = run("init", "sq", "--from", str(source), "--repo", str(repo))
    assert result.exit_code == 0 and "--trust-code" in result.stderr
    assert (repo / "sq/1/model.py").read_text() == text
    assert "backend: triton_python" in (repo / "sq/config.yaml").read_text()
    assert run("validate", str(repo), "--trust-code").exit_code == 0


def test_init_never_overwrites(repo: Path, source: Path) -> None:
    (repo / "net").mkdir()
    result = run("init", "net", "--from", str(source), "--repo", str(repo))
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert list((repo / "net").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "file", "version", "code"),
    [
        ("../net", "net.py", "1", 2),
        ("net", "net.bin", "1", 2),
        ("net", "none.py", "1", 3),
        ("net", "net.py", "0", 2),
        ("status", "net.py", "1", 2),
    ],
)
def test_init_changes_nothing_where_it_cannot_do_its_work(
    repo: Path, source: Path, name: str, file: str, version: str, code: int
) -> None:
    (source.parent / "net.bin").write_bytes(b"?")
    given = ("--from", str(source.parent / file), "--repo", str(repo), "--version", version)
    assert run("init", name, *given).exit_code == code
    assert list(repo.iterdir()) == []


def test_init_takes_the_weights_that_an_onnx_file_keeps_beside_itself(
    repo: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    helper, proto = onnx.helper, onnx.TensorProto
    weights = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", proto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", proto.FLOAT, [1, 64])], [weights],
    )  # fmt: skip
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 19)])
    outside = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save_model(made, str(tmp_path / "net.onnx"), **outside)
    assert (
        run("init", "net", "--from", str(tmp_path / "net.onnx"), "--repo", str(repo)).exit_code == 0
    )
    assert sorted(p.name for p in (repo / "net/1").iterdir()) == ["model.onnx", "w.bin"]
    (tmp_path / "w.bin").unlink()
    assert (
        run("init", "two", "--from", str(tmp_path / "net.onnx"), "--repo", str(repo)).exit_code == 1
    )
    assert not (repo / "two").exists()


@pytest.mark.parametrize(
    ("files", "backend"),
    [(hub.text_files(), "text"), (hub.sharded_files(), "text"), (hub.embed_files(), "embed")],
)
def test_init_takes_a_hugging_face_folder_as_it_is(
    repo: Path, tmp_path: Path, files: hub.Files, backend: str
) -> None:
    more = {".cache/huggingface/x": b"x", "adapters/a/adapter_config.json": b"{}"}
    hub.lay(tmp_path / "away", files)
    hub.lay(tmp_path / "net", {**{n: c for n, c in files.items() if n != "config.json"}, **more})
    (tmp_path / "net/config.json").symlink_to(tmp_path / "away/config.json")  # as the hub's cache
    given = ("--from", str(tmp_path / "net"), "--repo", str(repo))
    result = run("init", "net", *given)
    assert result.exit_code == 0, result.stderr
    assert f"backend: {backend}\n" in (repo / "net/config.yaml").read_text()
    assert "--trust-code" not in result.stderr
    made = {p.relative_to(repo / "net/1").as_posix() for p in (repo / "net/1").rglob("*")}
    assert made >= files.keys() and not any("cache" in name for name in made)
    assert (repo / "net/adapters/a/adapter_config.json").is_file()
    assert not (repo / "net/1/config.json").is_symlink()
    assert run("validate", str(repo)).stdout == "0 findings, 0 warnings\n"


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "names no architecture"),
        ({**hub.text_files(), "tokenizer.json": b"{"}, ""),
        ({"README.md": b"x"}, "no backend for these files"),
        ({k: v for k, v in hub.sharded_files().items() if "00002" not in k}, "1 of 3 shards"),
    ],
)
def test_init_takes_no_folder_that_could_not_be_served(
    repo: Path, tmp_path: Path, files: hub.Files, word: str
) -> None:
    hub.lay(tmp_path / "net", files)
    result = run("init", "net", "--from", str(tmp_path / "net"), "--repo", str(repo))
    if word:
        assert result.exit_code == 2 and word in result.stderr
        assert list(repo.iterdir()) == []
    else:  # what is in a file, is for the server to find
        assert run("validate", str(repo)).exit_code == 7


def test_init_puts_a_modules_code_beside_its_weights(repo: Path, tmp_path: Path) -> None:
    hub.lay(tmp_path / "net", {"w.safetensors": hub.weights()})
    given = ("--from", str(tmp_path / "net/w.safetensors"), "--repo", str(repo))
    result = run("init", "net", *given)
    assert result.exit_code == 2 and "model.py" in result.stderr
    hub.lay(tmp_path / "net", {"model.py": PYTHON.encode()})
    result = run("init", "net", *given)
    assert result.exit_code == 0 and "--trust-code" in result.stderr
    assert sorted(p.name for p in (repo / "net/1").iterdir()) == ["model.py", "model.safetensors"]
    assert "backend: torch_module" in (repo / "net/config.yaml").read_text()
    assert run("validate", str(repo), "--trust-code").exit_code == 0


def test_every_backend_has_a_config_to_begin_with_that_is_one(tmp_path: Path) -> None:
    from repository.backends.registry import check_options
    from repository.folder.layering import merge
    from repository.folder.read_yaml import read_yaml
    from repository.folder.schema import BACKENDS
    from server.cli.init import CONFIG, OWN

    assert OWN.keys() == set(BACKENDS) - {"ensemble"}  # no file is one
    for backend, own in OWN.items():
        plain = CONFIG.format(backend=backend, own=own)
        assert read_yaml(plain.encode()).values == {"backend": backend}
        # What is only written as an example is right too.
        examples = re.findall(r"^# ( *[a-z_]+:.*)$", plain, re.MULTILINE)
        config, _ = merge([read_yaml("\n".join(examples).encode())])
        check_options(backend, config.options)


def test_validate_says_what_a_hugging_face_folder_lacks(repo: Path) -> None:
    files = hub.text_files()
    del files["tokenizer.json"]
    hub.lay(repo / "org/writer", {**files, "tokenizer.model": b"x"})
    result = run("validate", str(repo))
    assert result.exit_code == 7
    assert "org/writer/tokenizer.json: incomplete: 'tokenizer.json' is not there" in result.stdout
    assert "AutoTokenizer" in result.stdout


def test_findings_have_a_place_a_rule_and_an_exit_code(repo: Path, source: Path) -> None:
    run("init", "net", "--from", str(source), "--repo", str(repo))
    config = repo / "net/config.yaml"
    config.write_text("backend: python\ndevise: cpu\n")
    result = run("validate", str(repo), "--trust-code")
    assert result.exit_code == 7
    assert "net/config.yaml:2: config: " in result.stdout and "device" in result.stdout
    found = json.loads(run("validate", str(repo), "--trust-code", "--json").stdout)
    assert (found[0]["path"], found[0]["line"]) == ("net/config.yaml", 2)
    assert found[0]["level"] == "error"


def test_a_warning_alone_is_no_finding_unless_strict(repo: Path, source: Path) -> None:
    run("init", "net", "--from", str(source), "--repo", str(repo))
    (repo / "net/01").mkdir()
    (repo / "net/01/model.py").write_text(PYTHON)
    result = run("validate", str(repo), "--trust-code")
    assert result.exit_code == 0
    assert "warning" in result.stdout and "01" in result.stdout
    assert run("validate", str(repo), "--trust-code", "--strict").exit_code == 7


def test_validating_what_is_not_there_says_so(tmp_path: Path) -> None:
    assert run("validate", str(tmp_path / "none")).exit_code == 3


def test_serves_flags_are_the_settings_and_each_tells_where_it_came_from(tmp_path: Path) -> None:
    config = tmp_path / "depot.yaml"
    config.write_text("port: 7\nsettle: 2.5\n")
    args = ("serve", str(tmp_path), "--config", str(config), "--port", "9", "--insecure",
            "--load-model", "a", "--load-model", "b", "--print-config")  # fmt: skip
    said = run(*args, env={"MODELDEPOT_GRACE": "4"}).stdout
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    assert lines["port"] == ["9", "--port"]
    assert lines["insecure"] == ["true", "--insecure"]
    assert lines["load_model"] == ["a,b", "--load-model"]
    assert lines["settle"][0] == "2.5" and "depot.yaml" in lines["settle"][1]
    assert lines["grace"][1] == "MODELDEPOT_GRACE"
    assert lines["watch"][1] == "default"


def test_a_setting_that_cannot_be_is_a_usage_error(tmp_path: Path) -> None:
    result = run("serve", str(tmp_path), "--port", "99999")
    assert result.exit_code == 2
    assert "--port" in result.stderr
