"""Folders that the text backend refuses, and what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repository.backends.text.backend import TextBackend
from repository.backends.text.building import around_stand_ins
from repository.errors import IncompleteFilesError, LoadFailedError
from tests import tiny
from tests.writers import order

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_model(tmp_path_factory.mktemp("good"), "llama")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def writes(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


UP = "model.layers.0.mlp.up_proj.weight"
CASES: dict[str, tuple[Callable[[Path], None], type[LoadFailedError], str]] = {
    "code of its own": (
        config(auto_map={"AutoModelForCausalLM": "evil.Model"}),
        LoadFailedError,
        "auto_map: the model brings code of its own",
    ),
    "a tokenizer's code": (
        writes("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
        LoadFailedError,
        "the tokenizer brings code of its own",
    ),
    "no config": (without("config.json"), IncompleteFilesError, "config.json is missing"),
    "half a config": (writes("config.json", '{"a'), IncompleteFilesError, "config.json is no JSON"),
    "a list": (writes("config.json", "[]"), LoadFailedError, "must be a JSON object"),
    "no type": (writes("config.json", "{}"), LoadFailedError, "no model_type"),
    "unknown type": (config(model_type="nothing"), LoadFailedError, "config.json: .*nothing"),
    "an encoder": (config(model_type="vit"), LoadFailedError, "a vit model does not write text"),
    "a masked model": (
        config(model_type="bert", architectures=["BertForMaskedLM"]),
        LoadFailedError,
        "says BertForMaskedLM",
    ),
    "a config of a much larger model": (
        config(vocab_size=10**12),
        LoadFailedError,
        r"config.json describes a model of 128000\d+ numbers, its weights have \d+: they do not belong",
    ),
    "a config that transformers refuses": (
        config(eos_token_id=[-1, "x"]),
        LoadFailedError,
        "config.json: Validation error for field 'eos_token_id': .*expected int",
    ),
    "no datatype": (config(dtype="object"), LoadFailedError, "config.json: .*'object'"),
    "quantised": (config(quantization_config={"bits": 4}), LoadFailedError, "quantised weights"),
    "pickles": (pickled, LoadFailedError, "pytorch_model.bin is a pickle, which is never read"),
    "no weights": (without(WEIGHTS), IncompleteFilesError, "model.safetensors is missing"),
    "half the weights": (cut, IncompleteFilesError, "model.safetensors is not complete"),
    "one weight less": (
        weights(lambda tensors: tensors.pop(UP)),
        IncompleteFilesError,
        f"1 of the model's weights are missing: {UP}",
    ),
    "one more": (
        weights(lambda tensors: tensors.update(extra=torch.zeros(2))),
        LoadFailedError,
        "1 of 22 weights belong to no part of the model: extra",
    ),
    "another shape": (
        weights(lambda tensors: tensors.update({UP: torch.zeros(3, 3)})),
        LoadFailedError,
        rf"1 weights have another shape .* {UP}: \[3, 3\], not \[128, 64\]",
    ),
    "no tokenizer": (without("tokenizer.json"), IncompleteFilesError, "tokenizer.json is missing"),
    "half a tokenizer": (writes("tokenizer.json", '{"model'), LoadFailedError, "tokenizer.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_cannot_be_used_is_refused_with_its_reason(
    case: str, good: Path, tmp_path: Path
) -> None:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change, kind, says = CASES[case]
    change(tmp_path)
    backend = TextBackend()
    with pytest.raises(kind, match=says) as caught:
        backend.load(order(tmp_path))
    backend.unload()
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "options.dtype is 'int8'; it must be auto, float32"),
        ({"engine": "paged"}, "options.engine is 'paged'"),
        ({"slots": 0}, "options.slots is 0; it must be 1 or more"),
        ({"prefill_chunk": 0}, "options.prefill_chunk is 0"),
        ({"max_len": 4}, "options.max_len is 4; it must be 8 or more"),
        ({"max_len": 300}, "options.max_len is 300; the model has 256 positions"),
        ({"slot": 3}, "options.slot: .*did you mean 'slots'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    options: dict[str, Any], says: str, good: Path
) -> None:
    with pytest.raises(LoadFailedError, match=says):
        TextBackend().load(order(good, options))


def test_whose_code_computes_attention_is_not_the_folders_business(
    good: Path, tmp_path: Path
) -> None:
    """transformers would fetch a kernel that the folder names."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    config(_attn_implementation="someone/kernel")(tmp_path)
    backend = TextBackend()
    assert backend.load(order(tmp_path)).details["engine"] == "slots"
    backend.unload()


def test_nothing_of_a_load_is_shared_with_the_files(good: Path, tmp_path: Path) -> None:
    """An overwrite in place changes nothing of a model that was not mapped."""
    from tests.writers import Writer

    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    backend = TextBackend()
    writer = Writer(backend, backend.load(order(tmp_path)))
    before = writer.ask("the quick", max_tokens=9).tokens
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.seek(5000)
        file.write(bytes(100_000))
    assert writer.ask("the quick", max_tokens=9).tokens == before
    backend.unload()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_tensors_of_a_device_take_the_places_of_their_stand_ins(kind: str, tmp_path: Path) -> None:
    """As on a GPU, with tensors that are not: nothing depends on where they lie."""
    from transformers import AutoModelForCausalLM

    reference = tiny.model_of(kind)
    tiny.write_text_model(tmp_path, kind)
    tensors = load_file(tmp_path / WEIGHTS)
    built = AutoModelForCausalLM._model_mapping[type(reference.config)]
    model, _ = around_stand_ins(built, reference.config, tensors, torch.float32)
    assert model is not None
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine == {t.data_ptr() for t in tensors.values()}
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    halves = {**tensors, UP: torch.zeros(3, 3)} if kind == "llama" else {}
    if halves:  # what does not fit is reported, whatever becomes of the model
        assert around_stand_ins(built, reference.config, halves, torch.float32)[1][
            "mismatched_keys"
        ]
