"""Hugging Face folders: what they are, when they are whole, and what is never believed of them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.folder import whole
from repository.folder.scan import Scanner
from repository.snapshot import ModelFolder, Problem, Snapshot
from repository.spec import ModelSpec
from tests import hub
from tests.models import add_onnx

BASE = 48 * 2**20 + 9 * len(hub.TOKENIZER)  # a worker and its tokenizer
LONGEST = 600  # characters of a reason


def scan(root: Path, *, trust_code: bool = False, gpus: tuple[str, ...] = ()) -> Snapshot:
    return Scanner(root, trust_code=trust_code, gpus=gpus).scan()


def seen(root: Path, files: hub.Files, name: str = "m", **rules: Any) -> ModelFolder:
    hub.lay(root / name, files)
    return scan(root, **rules).models[name]


def served(root: Path, files: hub.Files, **rules: Any) -> ModelSpec:
    model = seen(root, files, **rules)
    assert not model.problems
    return model.specs[1]


def refused(root: Path, files: hub.Files, **rules: Any) -> Problem:
    """The one reason why it is not served."""
    model = seen(root, files, **rules)
    assert not model.specs
    problem = model.errors[0]
    assert problem.hint and len(str(problem)) < LONGEST and str(root) not in str(problem)
    return problem


def configured(**config: Any) -> bytes:
    return json.dumps(config).encode()


# what it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "backend"),
    [
        (hub.text_files(), "text"),
        (hub.sharded_files(), "text"),
        (hub.text_files(architectures=["GPT2LMHeadModel"]), "text"),
        (hub.embed_files(), "embed"),
        (hub.embed_files(architectures=["Qwen3ForCausalLM"]), "embed"),  # trained to embed
        ({**hub.text_files(architectures=["BertModel"])}, "embed"),
        (hub.text_files(architectures=["XLMRobertaForMaskedLM"]), "embed"),
        ({**hub.text_files(), "notes.onnx": b""}, "text"),
        ({**hub.text_files(), "onnx/model.onnx": b"half"}, "text"),
    ],
)
@pytest.mark.parametrize("where", ["m", "org/m", "m/1"])
def test_a_folder_is_what_its_config_says(
    tmp_path: Path, files: hub.Files, backend: str, where: str
) -> None:
    hub.lay(tmp_path / where, files)
    ((name, model),) = scan(tmp_path, gpus=("cuda:0",)).models.items()
    spec = model.specs[1]
    assert name == where.removesuffix("/1") and not model.problems
    assert (spec.backend, spec.model_file, spec.sources["backend"]) == (backend, "", "guessed")
    assert spec.path == (tmp_path / where).resolve() and spec.devices == ("cuda:0", "cpu")


def test_an_encoder_may_come_as_an_onnx_file(tmp_path: Path) -> None:
    files = hub.embed_files()
    del files["model.safetensors"]
    assert refused(tmp_path, files).where == "m/model.safetensors"
    size = add_onnx(tmp_path / "m" / "onnx" / "model.onnx").stat().st_size
    spec = served(tmp_path, {})
    assert (spec.backend, spec.bytes_needed) == ("embed", size + BASE)


def test_an_encoder_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    files = hub.embed_files()
    modules = [{**m, "path": m["path"] or "0_Transformer"} for m in hub.MODULES]
    top = {"modules.json": json.dumps(modules).encode()}
    moved = {
        (n if n.startswith("1_") else f"0_Transformer/{n}"): c
        for n, c in files.items()
        if n != "modules.json"
    }
    assert served(tmp_path, {**moved, **top}).backend == "embed"
    (tmp_path / "m/0_Transformer/tokenizer.json").unlink()
    assert refused(tmp_path, {}).where == "m/0_Transformer/tokenizer.json"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, "vocab_size": 9},
         "T5ForConditionalGeneration"),
        ({"architectures": ["T5Model"], "is_encoder_decoder": True, "vocab_size": 9}, "T5Model"),
        ({"architectures": ["ViTModel"]}, "ViTModel"),
        ({"architectures": ["BertForSequenceClassification"], "vocab_size": 9}, "BertForSequence"),
        ({"architectures": []}, "names no architecture"),
        ({}, "names no architecture"),
    ],
)  # fmt: skip
def test_another_architecture_is_named_with_what_would_do(
    tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    files = {**hub.text_files(), "config.json": configured(**config)}
    problem = refused(tmp_path, files)
    assert (problem.where, problem.rule) == ("m/config.json", "config")
    assert word in problem.message and "'backend" in problem.hint


def test_what_the_config_says_goes_before_what_the_files_say(tmp_path: Path) -> None:
    files = {**hub.text_files(architectures=None), "config.yaml": b"backend: text\n"}
    spec = served(tmp_path, files)
    assert (spec.backend, spec.sources["backend"]) == ("text", "config.yaml:1")
    files["config.yaml"] = b"backend: embed\noptions: {model_file: weights.bin}\n"
    assert "options.model_file" in refused(tmp_path, files).message
    files["config.yaml"] = b"backend: onnx\n"
    assert "'model.onnx' is not there" in refused(tmp_path, files).message


def test_a_config_json_of_somebodys_own_hides_no_models(tmp_path: Path) -> None:
    hub.lay(tmp_path / "org", {"config.json": b"{}"})
    add_onnx(tmp_path / "org" / "team" / "m" / "1" / "model.onnx")
    hub.lay(tmp_path / "org" / "writer", hub.text_files())
    assert sorted(scan(tmp_path).models) == ["org/team/m", "org/writer"]
    scanner = Scanner(tmp_path, trust_code=False)
    assert scanner.scan_model("org/team/m") and scanner.scan_model("org") is None


# when it is whole -------------------------------------------------------------------------------


def subsets(names: list[str]) -> Iterator[set[str]]:
    for count in range(1, len(names)):
        yield from map(set, itertools.combinations(names, count))


@pytest.mark.parametrize("files", [hub.sharded_files(), hub.embed_files()], ids=["text", "embed"])
def test_in_whatever_order_the_files_come_only_the_whole_folder_is_served(
    tmp_path: Path, files: hub.Files
) -> None:
    marks = {"config.json", "modules.json", "tokenizer.json", "model.safetensors.index.json"}
    encoder = files.keys() - {"modules.json", "1_Pooling/config.json"}  # is one by itself
    halves = [s for s in subsets(sorted(files)) if s != encoder]
    for i, there in enumerate(halves):
        hub.lay(tmp_path / f"m{i}", {name: files[name] for name in there})
    models = scan(tmp_path).models
    for i, there in enumerate(halves):
        model = models.get(f"m{i}")
        if model is not None:
            assert not model.specs and model.errors, there
        if there & marks:
            assert model is not None and "not there" in model.errors[0].message, there
    hub.lay(tmp_path / "all", files)
    assert scan(tmp_path).models["all"].specs


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_that_is_cut_is_never_served(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kinds = [hub.sharded_files(), hub.embed_files(), hub.chat_files()]
    files = data.draw(st.sampled_from(kinds))
    name = data.draw(st.sampled_from(sorted(files)))
    length = data.draw(st.integers(0, len(files[name]) - 1))
    root = tmp_path_factory.mktemp("cut")
    problem = refused(root, {**files, name: files[name][:length]})
    assert problem.rule == "incomplete" and problem.where == f"m/{name}"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_large_tokenizer_is_judged_by_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    vocab = {f"w{i}": i for i in range(300)}
    made = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    text = json.dumps(made, indent=indent).encode()
    monkeypatch.setattr(whole, "SMALL", 100)
    path = tmp_path / "tokenizer.json"
    for length in (*range(120, len(text), 97), *range(len(text) - 30, len(text))):
        path.write_bytes(text[:length])
        assert whole.inspect(str(path), str(tmp_path), "t").problem is not None, length
    for end in (b"", b"\n"):
        path.write_bytes(text + end)
        assert whole.inspect(str(path), str(tmp_path), "t").problem is None
    path.write_bytes(text[:-200] + bytes(200))  # as a copy that takes its room first
    assert whole.inspect(str(path), str(tmp_path), "t").problem is not None


@pytest.mark.parametrize(
    ("there", "gone", "word"),
    [
        ("tokenizer.model", "tokenizer.json", "only 'tokenizer.model'"),
        ("vocab.txt", "tokenizer.json", "only 'vocab.txt'"),
        ("pytorch_model.bin", "model.safetensors", "'pytorch_model.bin'"),
        ("pytorch_model.bin.index.json", "model.safetensors", "pickle"),
        ("pytorch_model-00001-of-00002.bin", "model.safetensors", "pickle"),
    ],
)
def test_what_another_format_has_is_told_with_how_to_convert_it(
    tmp_path: Path, there: str, gone: str, word: str
) -> None:
    files = {**hub.text_files(), there: b"x"}
    del files[gone]
    problem = refused(tmp_path, files, trust_code=True)
    assert word in problem.message and "save_pretrained" in problem.hint


def test_modules_behind_an_encoder_are_whole_too(tmp_path: Path) -> None:
    dense = {"idx": 3, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    files = hub.embed_files()
    files["modules.json"] = json.dumps([*hub.MODULES, dense]).encode()
    assert refused(tmp_path, files).where == "m/2_Dense/config.json"
    assert refused(tmp_path, {"2_Dense/config.json": b"{}"}).where == "m/2_Dense/model.safetensors"
    pickled = refused(tmp_path, {"2_Dense/pytorch_model.bin": b"x"})
    assert "pickle" in pickled.message and "SentenceTransformer" in pickled.hint
    before = served(tmp_path, {"2_Dense/model.safetensors": hub.weights(numbers=10)})
    assert before.bytes_needed == BASE + 6 * 4 + 10 * 4


def test_code_that_a_folder_asks_for_is_refused_by_its_name_trusted_or_not(tmp_path: Path) -> None:
    mapped = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    files = {**hub.text_files(auto_map=mapped), "modeling_x.py": b"raise SystemExit"}
    for trust in (False, True):
        problem = refused(tmp_path, files, trust_code=trust)
        assert (problem.rule, problem.where) == ("trust", "m/config.json")
        assert "modeling_x.XModel" in problem.message and "'auto_map'" in problem.hint
    tokenizer = {"tokenizer_config.json": configured(auto_map={"AutoTokenizer": ["t.T", None]})}
    hub.lay(tmp_path / "m", hub.text_files())
    problem = refused(tmp_path, tokenizer, trust_code=True)
    assert (problem.rule, problem.where) == ("trust", "m/tokenizer_config.json")
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    files = hub.embed_files()
    files["modules.json"] = json.dumps([{"path": "", "type": "mine.Transformer"}]).encode()
    problem = refused(tmp_path, files, trust_code=True)
    assert problem.rule == "trust" and "mine.Transformer" in problem.message


# what is never believed -------------------------------------------------------------------------

DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.mark.parametrize(
    "config",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 300, DEEP,
        b'{"a":' + DEEP + b"}",
        b'{"architectures":' + DEEP + b"}",
        b'{"architectures":["LlamaForCausalLM"],"num_hidden_layers":' + b"9" * 100_000 + b"}",
        b'{"architectures":["LlamaForCausalLM"],"num_hidden_layers":1e999}',
        b'{"architectures":["LlamaForCausalLM"],"num_hidden_layers":-1}',
        b'{"architectures":["LlamaForCausalLM"],"num_attention_heads":true}',
        b'{"architectures":["LlamaForCausalLM"],"hidden_size":99999999999}',
        b'{"architectures":"LlamaForCausalLM"}',
        b'{"architectures":[1]}',
        b'{"architectures":["LlamaForCausalLM"],"auto_map":[1]}',
        b'{"architectures":["' + b"A" * 10_000 + b'"]}',
        b'{"architectures":["\\u0000\\n\\ud83d"]}',
        b'{"a":"' + b"x" * (5 << 20) + b'"}',
    ],
    ids=range(20),
)  # fmt: skip
def test_a_hostile_config_json_is_a_problem(tmp_path: Path, config: bytes) -> None:
    problem = refused(tmp_path, {**hub.text_files(), "config.json": config})
    assert problem.where == "m/config.json" and problem.rule in ("config", "incomplete")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["config.json", "modules.json", "model.safetensors.index.json"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*hub.LLAMA, "weight_map", "path", "type", "auto_map"]), inner
            )
        ),
    ),
)
def test_any_json_in_any_of_its_files_is_a_problem_or_none(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    root = tmp_path_factory.mktemp("any")
    files = hub.sharded_files() if "index" in name else hub.embed_files()
    model = seen(root, {**files, name: json.dumps(value).encode()})
    assert not any(p.rule == "internal" or len(str(p)) > LONGEST for p in model.problems)


@pytest.mark.parametrize(
    ("places", "rule"),
    [
        ({"a": "/etc/passwd"}, "link"),
        ({"a": "../other/model.safetensors"}, "link"),
        ({"a": "sub/model.safetensors"}, "link"),
        ({"a": ".."}, "link"),
        ({"a": ""}, "link"),
        ({"a": "x\0.safetensors"}, "link"),
        ({"a": "pytorch_model.bin"}, "link"),
        ({"a": "gone.safetensors"}, "incomplete"),
        ({"a": 1}, "incomplete"),
        ({}, "config"),
    ],
)
def test_an_index_names_only_what_lies_beside_it(
    tmp_path: Path, places: dict[str, Any], rule: str
) -> None:
    hub.lay(tmp_path / "other", hub.text_files())
    files = {
        **hub.sharded_files(),
        "sub/model.safetensors": hub.weights(),
        "pytorch_model.bin": b"x",
    }
    files["model.safetensors.index.json"] = configured(weight_map=places)
    problem = refused(tmp_path, files)
    assert (problem.where, problem.rule) == ("m/model.safetensors.index.json", rule)


def test_a_shard_or_config_that_is_a_link_out_is_not_opened(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "models"
    hub.lay(outside, {**hub.sharded_files(), "config.json": b"hunter2"})
    for name in ("model-00002-of-00003.safetensors", "config.json"):
        hub.lay(root / "m", hub.sharded_files())
        (root / "m" / name).unlink()
        (root / "m" / name).symlink_to(outside / name)
        model = scan(root).models["m"]
        assert not model.specs and model.errors[0].rule == "link"
        assert "hunter2" not in str(model.problems)
        (root / "m" / name).unlink()


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    files = hub.sharded_files(9)
    for i in (2, 3, 5, 7):
        del files[f"model-{i:05}-of-00009.safetensors"]
    message = refused(tmp_path, files).message
    assert message.startswith("4 of 9 shards are not there: 'model-00002-of-00009.safetensors'")
    assert message.count("'") == 6


# fingerprints -----------------------------------------------------------------------------------


def test_whatever_the_backend_may_read_is_in_the_fingerprint_and_adapters_are_not(
    tmp_path: Path,
) -> None:
    def fingerprint(name: str, content: bytes) -> str:
        hub.lay(tmp_path / "m", {name: content})
        os.utime(tmp_path / "m" / name, ns=(0, len(content)))
        return scan(tmp_path).models["m"].specs[1].fingerprint

    hub.lay(tmp_path / "m", hub.embed_files())
    before = {fingerprint("README.md", b"1")}
    for name, content in (
        ("tokenizer.json", hub.TOKENIZER + b"\n"),
        ("tokenizer_config.json", b"{}"),
        ("1_Pooling/config.json", b'{"pooling_mode_cls_token": true}'),
        ("chat_template.jinja", b"x"),
    ):
        now = fingerprint(name, content)
        assert now not in before, name
        before.add(now)
    same = fingerprint("adapters/a/adapter_config.json", b"{}")
    assert same in before


def test_adapters_beside_a_version_are_told_and_never_count(tmp_path: Path) -> None:
    adapter = {"1/adapters/a/adapter_model.safetensors": b"half"}
    model = seen(tmp_path, {**{f"1/{n}": c for n, c in hub.text_files().items()}, **adapter})
    (problem,) = model.problems
    assert problem.warning and problem.where == "m/1/adapters" and model.specs[1].backend == "text"
    assert not any("adapters" in f.path for f in model.specs[1].files)
    code = {"1/model.py": b"import adapters", "1/adapters/__init__.py": b""}
    model = seen(tmp_path, code, "n", trust_code=True)
    assert not model.problems
    assert "1/adapters/__init__.py" in [f.path for f in model.specs[1].files]
