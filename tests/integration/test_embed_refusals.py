"""Encoder folders that cannot serve: each is refused by the name of what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from repository.errors import IncompleteFilesError, LoadFailedError, UntrustedCodeError
from tests import tiny
from tests.embedding import add_dense, add_module, change, embedding

WIDTH = tiny.SIZES["hidden"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("encoder") / "e")


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def reweigh(folder: Path, **changes: Any) -> None:
    """None takes a weight away; the words are `a__b` for "a.b"."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path)
    found |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({n: t.clone() for n, t in found.items() if t is not None}, path)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


QUERY = "encoder__layer__0__attention__self__query__weight"
REFUSED: dict[str, tuple[type[LoadFailedError], Any]] = {
    "'sentence_transformers.models.CNN'; known are": (
        LoadFailedError,
        lambda f: add_module(f, f"{tiny.HOME}.CNN", ""),
    ),
    "'custom_st.Transformer'; known are": (
        LoadFailedError,
        lambda f: add_module(f, "custom_st.Transformer", ""),
    ),
    "lists Transformer, Pooling, Normalize, Pooling": (
        LoadFailedError,
        lambda f: add_module(f, f"{tiny.HOME}.Pooling", "1_Pooling"),
    ),
    "names the folder '../x', outside": (
        LoadFailedError,
        lambda f: add_module(f, f"{tiny.HOME}.Normalize", "../x"),
    ),
    "auto_map: AutoModel: code.Model": (
        UntrustedCodeError,
        lambda f: change(f / "config.json", auto_map={"AutoModel": "code.Model"}),
    ),
    "no model_type 'alien'": (
        LoadFailedError,
        lambda f: change(f / "config.json", model_type="alien"),
    ),
    "'bart' is not an encoder": (
        LoadFailedError,
        lambda f: change(f / "config.json", model_type="bart"),
    ),
    "quantization_config": (
        LoadFailedError,
        lambda f: change(f / "config.json", quantization_config={"quant_method": "x"}),
    ),
    "config.json is not whole JSON": (
        IncompleteFilesError,
        lambda f: (f / "config.json").write_text("{"),
    ),
    "1_Pooling/config.json is missing": (
        IncompleteFilesError,
        lambda f: drop(f, "1_Pooling/config.json"),
    ),
    "no pooling 'middle'": (
        LoadFailedError,
        lambda f: change(f / "1_Pooling/config.json", pooling_mode="middle"),
    ),
    "tokenizer.json is missing": (IncompleteFilesError, lambda f: drop(f, "tokenizer.json")),
    "tokenizer.json cannot be read": (
        IncompleteFilesError,
        lambda f: (f / "tokenizer.json").write_text("{}"),
    ),
    "model.safetensors is missing": (IncompleteFilesError, lambda f: drop(f, "model.safetensors")),
    "pytorch_model.bin, a pickle": (IncompleteFilesError, pickled),
    "layer.0.attention.self.query.weight' is missing": (
        LoadFailedError,
        lambda f: reweigh(f, **{QUERY: None}),
    ),
    "'more.weight' belongs to no part": (
        LoadFailedError,
        lambda f: reweigh(f, more__weight=torch.zeros(2)),
    ),
    "query.weight' has another shape": (
        LoadFailedError,
        lambda f: reweigh(f, **{QUERY: torch.zeros(3, 3)}),
    ),
    "3_Dense takes 5 numbers; it is given 64": (LoadFailedError, lambda f: add_dense(f, 5, 2)),
    "the activation 'os.system'": (
        LoadFailedError,
        lambda f: add_dense(f, WIDTH, 2, activation_function="os.system"),
    ),
    "module_input_name 'token_embeddings'": (
        LoadFailedError,
        lambda f: add_dense(f, WIDTH, 2, module_input_name="token_embeddings"),
    ),
    "is not a list of modules": (
        LoadFailedError,
        lambda f: (f / "modules.json").write_text('{"0": "Transformer"}'),
    ),
    "prompts is not an object": (
        LoadFailedError,
        lambda f: change(f / "config_sentence_transformers.json", prompts=["query: "]),
    ),
    "default prompt 'q', but the prompts none": (
        LoadFailedError,
        lambda f: change(f / "config_sentence_transformers.json", default_prompt_name="q"),
    ),
}


def test_what_cannot_serve_is_refused_by_name(written, tmp_path):
    for at, (text, (kind, spoil)) in enumerate(REFUSED.items()):
        folder = Path(shutil.copytree(written, tmp_path / str(at)))
        spoil(folder)
        with pytest.raises(kind, match=text.replace("'", "['\"]")) as caught, embedding(folder):
            pass
        assert caught.type is kind and str(tmp_path) not in str(caught.value), text


def test_options_that_cannot_be_meant_are_refused(written):
    cases: dict[str, dict[str, Any]] = {
        "did you mean 'pooling'": {"poling": "cls"},
        "engine is 'gpu'": {"engine": "gpu"},
        "dtype is 'int8'": {"dtype": "int8"},
        "no pooling 'middle'": {"pooling": "mean+middle"},
        "max_tokens is 300; .* the encoder has 256 positions": {"max_tokens": 300},
        "max_tokens is 0": {"max_tokens": 0},
        "normalize is 'no'": {"normalize": "no"},
    }
    for text, options in cases.items():
        with pytest.raises(LoadFailedError, match=text), embedding(written, **options):
            pass
    with (
        pytest.raises(IncompleteFilesError, match=r"onnx/model\.onnx is missing"),
        embedding(written, engine="onnx"),
    ):
        pass
