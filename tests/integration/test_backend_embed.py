"""Encoder folders as sentence-transformers lays them out: what is read, what is refused, what comes
out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.adapters.orders import AdapterOrder
from repository.backends.embed import tokens
from repository.backends.embed.company import RUN_COSTS, by_length
from repository.backends.embed.folder import read_folder
from repository.errors import (
    AdapterNotFoundError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.messages import InferRequest
from repository.tensors import Tensor
from tests import tiny
from tests.embedding import (
    TEXTS,
    add_dense,
    add_graph,
    add_module,
    change,
    counts,
    embedding,
    hidden_of,
    ids,
    texts,
    unit,
    vectors,
)

WIDTH = tiny.SIZES["hidden"]


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny.model_of("bert")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("encoder") / "e")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "e"))


def means(encoder: Any, folder: Path) -> Any:
    return np.array([hidden_of(encoder, folder, text).mean(0) for text in TEXTS])


# how it is read -----------------------------------------------------------------------------------


def test_tokens_are_averaged_and_vectors_have_length_one(encoder, written):
    with embedding(written) as (backend, loaded):
        found = vectors(backend, texts(*TEXTS))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, unit(means(encoder, written)), atol=1e-5)
    told = {"engine": "torch", "dimensions": WIDTH, "max_tokens": 256, "pooling": "mean"}
    assert told.items() <= loaded.details.items() and loaded.details["normalize"] is True
    assert loaded.abilities == ("embed", "adapt", "sleep") and loaded.max_batch_size == 32
    assert loaded.memory["weights"] == sum(
        t.nbytes for t in (*encoder.parameters(), *encoder.buffers())
    )


def test_every_pooling_of_old_and_new_folders_is_what_its_name_says(encoder, folder):
    def weighted(h: Any) -> Any:
        weights = np.arange(1, len(h) + 1)[:, None]
        return (h * weights).sum(0) / weights.sum()

    ways: dict[str, tuple[str, Any]] = {
        "cls_token": ("cls", lambda h: h[0]),
        "max_tokens": ("max", lambda h: h.max(0)),
        "mean_tokens": ("mean", lambda h: h.mean(0)),
        "mean_sqrt_len_tokens": (
            "mean_sqrt_len_tokens",
            lambda h: h.sum(0) / np.sqrt(len(h)),
        ),
        "weightedmean_tokens": ("weightedmean", weighted),
        "lasttoken": ("lasttoken", lambda h: h[-1]),
    }
    hidden = [hidden_of(encoder, folder, text) for text in TEXTS]
    for old, (new, way) in ways.items():
        wanted = unit(np.array([way(h) for h in hidden]))
        for said in ({f"pooling_mode_{old}": True}, {"pooling_mode": new}):
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
            with embedding(folder) as (backend, loaded):
                np.testing.assert_allclose(vectors(backend, texts(*TEXTS)), wanted, atol=1e-5)
                assert loaded.details["pooling"] == new


def test_several_poolings_are_joined_and_dense_comes_behind_with_its_activation(encoder, folder):
    change(folder / "1_Pooling/config.json", pooling_mode_max_tokens=True)
    weight, bias = add_dense(
        folder, 2 * WIDTH, 7, activation_function="torch.nn.modules.activation.Tanh"
    )
    hidden = [hidden_of(encoder, folder, text) for text in TEXTS]
    joined = unit(np.array([np.concatenate([h.max(0), h.mean(0)]) for h in hidden]))
    with embedding(folder) as (backend, loaded):
        found = vectors(backend, texts(*TEXTS))
    np.testing.assert_allclose(found, np.tanh(joined @ weight.T + bias), atol=1e-5)
    assert loaded.details["pooling"] == "max+mean" and not loaded.details["normalize"]
    assert loaded.outputs[0].shape == (-1, 7)


def test_a_folder_of_todays_sentence_transformers_is_the_same_model(encoder, folder):
    modern = "sentence_transformers.base.modules"
    kinds = {
        "": f"{modern}.transformer.Transformer",
        "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "2_Normalize": f"{modern}.normalize.Normalize",
    }
    (folder / "modules.json").write_text("[]")
    for path, kind in kinds.items():
        add_module(folder, kind, path)
    change(folder / "2_Normalize/config.json", module_input_name="sentence_embedding")
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "feature-extraction"}')
    change(folder / "tokenizer_config.json", model_max_length=17)
    with embedding(folder) as (backend, loaded):
        assert loaded.details["max_tokens"] == 17
        assert max(counts(backend, texts(*TEXTS))) == 17
        found = vectors(backend, texts(TEXTS[0]))
    wanted = unit(hidden_of(encoder, folder, TEXTS[0]).mean(0))
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)


def test_the_encoder_may_lie_in_a_folder_of_its_own(written, folder):
    own = folder / "0_Transformer"
    own.mkdir()
    kept = ("modules.json", "1_Pooling")
    for path in list(folder.iterdir()):
        if path.name not in kept and path != own:
            path.rename(own / path.name)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = own.name
    (folder / "modules.json").write_text(json.dumps(listed))
    with embedding(folder) as (moved, _), embedding(written) as (flat, _):
        assert np.array_equal(vectors(moved, texts(*TEXTS)), vectors(flat, texts(*TEXTS)))


def test_a_folder_without_modules_is_averaged_and_what_is_assumed_is_told(encoder, folder):
    (folder / "modules.json").unlink()
    (folder / "sentence_bert_config.json").unlink()
    plain = means(encoder, folder)
    with embedding(folder) as (backend, loaded):
        assert loaded.details["assumed"] == ["pooling: mean", "normalize: true"]
        np.testing.assert_allclose(vectors(backend, texts(*TEXTS)), unit(plain), atol=1e-5)
    with embedding(folder, pooling="mean+mean", normalize=False) as (backend, loaded):
        assert "assumed" not in loaded.details
        found = vectors(backend, texts(*TEXTS))
        np.testing.assert_allclose(found, np.concatenate([plain, plain], axis=1), atol=1e-5)


def test_the_default_prompt_goes_in_front_and_may_be_left_out_of_the_pooling(encoder, folder):
    said = {"prompts": {"query": "0 1 2 ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    hidden = hidden_of(encoder, folder, "0 1 2 the fox")
    front = len(hidden_of(encoder, folder, "0 1 2 "))
    with embedding(folder) as (backend, loaded):
        assert loaded.details["prompt"] == "0 1 2 " and "query" in loaded.details["prompts"]
        found = vectors(backend, texts("the fox"))
        assert counts(backend, texts("the fox")) == [len(hidden)]
    np.testing.assert_allclose(found[0], unit(hidden.mean(0)), atol=1e-5)
    change(folder / "1_Pooling/config.json", include_prompt=False)
    with embedding(folder) as (backend, _):
        found = vectors(backend, texts("the fox"))
    np.testing.assert_allclose(found[0], unit(hidden[front:].mean(0)), atol=1e-5)


def test_a_checkpoint_of_encoder_and_head_serves_the_encoder(written, folder):
    import transformers as hf

    config = tiny.config_of("bert")
    whole = hf.BertForMaskedLM(config)
    whole.bert.load_state_dict(tiny.model_of("bert").state_dict(), strict=False)
    whole.save_pretrained(folder)
    with embedding(folder) as (headed, loaded), embedding(written) as (plain, _):
        assert np.array_equal(vectors(headed, texts(*TEXTS)), vectors(plain, texts(*TEXTS)))
        assert all(name.startswith("cls.") for name in loaded.details["unread_weights"])


def test_a_decoder_that_was_trained_to_embed_serves_without_its_head(tmp_path):
    folder = tiny.write_text_model(tmp_path / "e", "qwen3")
    model = tiny.model_of("qwen3").model
    wanted = unit(np.array([hidden_of(model, folder, text)[-1] for text in TEXTS]))
    with embedding(folder, pooling="lasttoken") as (backend, loaded):
        np.testing.assert_allclose(vectors(backend, texts(*TEXTS)), wanted, atol=1e-5)
        assert loaded.details["unread_weights"] == ["lm_head.weight"]


def test_of_a_model_with_two_halves_the_one_that_reads_serves(tmp_path):
    import transformers as hf

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = hf.T5Model(hf.T5Config(vocab_size=tiny.SIZES["vocab"], **sizes)).eval()
    model.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path, chat=False)
    wanted = unit(np.array([hidden_of(model.encoder, tmp_path, text).mean(0) for text in TEXTS]))
    with embedding(tmp_path) as (backend, loaded):
        np.testing.assert_allclose(vectors(backend, texts(*TEXTS)), wanted, atol=1e-5)
        assert loaded.details["model_class"] == "T5EncoderModel"
        assert "max_tokens: 512" in loaded.details["assumed"]


def test_positions_behind_the_padding_are_no_room_for_tokens(folder):
    change(folder / "config.json", model_type="roberta", pad_token_id=1, max_position_embeddings=66)
    assert read_folder(folder, {}).most_tokens == 64
    with pytest.raises(LoadFailedError, match=r"65; .* the encoder has 64 positions"):
        read_folder(folder, {"max_tokens": 65})


def test_a_graph_gives_what_the_weights_give(written, folder):
    add_graph(folder, tiny.model_of("bert", attn_implementation="eager"))
    with embedding(written) as (backend, _):
        wanted = vectors(backend, texts(*TEXTS))
    with embedding(folder, engine="onnx") as (backend, loaded):
        np.testing.assert_allclose(vectors(backend, texts(*TEXTS)), wanted, atol=1e-5)
        assert loaded.details["engine"] == "onnx" and loaded.abilities == ("embed", "sleep")
        (report,) = backend.adapt([AdapterOrder("a", str(folder))])
        assert "engine is onnx" in report.error
        with pytest.raises(AdapterNotFoundError, match="engine is onnx"):
            backend.infer(texts("x", adapters=("a",)))
    (folder / "model.safetensors").unlink()
    (folder / "onnx/model.onnx").rename(folder / "small.onnx")
    with embedding(folder, model_file="small.onnx") as (backend, loaded):
        assert loaded.details["engine"] == "onnx"
        np.testing.assert_allclose(vectors(backend, texts(*TEXTS)), wanted, atol=1e-5)
    (folder / "small.onnx").rename(folder / "model.onnx")
    with embedding(folder) as (_, loaded):
        assert loaded.details["graph"] == "model.onnx"


def test_half_precision_takes_half_the_memory_and_answers_in_float32(written):
    with embedding(written) as (backend, loaded):
        full, wanted = loaded.memory["weights"], vectors(backend, texts(*TEXTS))
    with embedding(written, dtype="bfloat16") as (backend, loaded):
        assert loaded.details["dtype"] == "bfloat16"
        assert loaded.memory["weights"] < 0.52 * full
        found = vectors(backend, texts(*TEXTS))
    assert found.dtype == np.float32
    assert (found * wanted).sum(1).min() > 0.99


def test_private_files_are_mapped_and_never_written_to(folder):
    before = (folder / "model.safetensors").read_bytes()
    with embedding(folder, private=True) as (backend, _):
        assert np.isfinite(vectors(backend, texts(*TEXTS))).all()
    assert (folder / "model.safetensors").read_bytes() == before


# requests -----------------------------------------------------------------------------------------


def test_what_a_row_gets_does_not_depend_on_its_company(written):
    many = [text[:n] for text in TEXTS for n in (5, 40, 200)]
    with embedding(written) as (backend, _):
        together = vectors(backend, texts(*many))
        alone = np.concatenate([vectors(backend, texts(text)) for text in many])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_rows_of_like_length_run_together():
    assert by_length([]) == []
    assert by_length([7, 7, 7]) == [[0, 1, 2]]
    assert by_length([3, 250, 4, 240]) == [[1, 3], [2, 0]]
    dice = np.random.default_rng(0)
    for _ in range(50):
        lengths = dice.integers(1, 300, dice.integers(1, 40)).tolist()
        runs = by_length(lengths)
        assert sorted(row for run in runs for row in run) == list(range(len(lengths)))
        padded = sum(len(run) * max(lengths[row] for row in run) for run in runs)
        assert padded + RUN_COSTS * len(runs) <= len(lengths) * max(lengths) + RUN_COSTS


def test_ids_give_what_their_text_gives(written):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(written / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    longest = max(map(len, rows))
    padded = ids(*[row + [-1] * (longest - len(row)) for row in rows])
    with embedding(written) as (backend, _):
        np.testing.assert_allclose(
            vectors(backend, padded), vectors(backend, texts(*TEXTS)), atol=1e-5
        )
        assert counts(backend, padded) == [len(row) for row in rows]


def test_a_long_text_is_cut_and_outputs_come_as_they_are_asked_for(written):
    with embedding(written, max_tokens=9) as (backend, loaded):
        assert loaded.details["max_tokens"] == 9
        request = texts(TEXTS[2], "x")
        request.outputs = ("tokens",)
        (only,) = backend.infer(request).outputs
        assert only.name == "tokens" and only.array().tolist() == [9, 1]
        empty = backend.infer(InferRequest([Tensor("text", "BYTES", (0,), b"")]))
        assert [tuple(t.shape) for t in empty.outputs] == [(0, WIDTH), (0,)]


def test_long_texts_take_turns_to_be_cut_into_tokens(written, monkeypatch):
    """A byte costs many while that is done; what comes out is the same."""
    with embedding(written) as (backend, _):
        expected = vectors(backend, texts(*TEXTS))
        monkeypatch.setattr(tokens, "MAX_TEXT", 200)
        assert np.array_equal(vectors(backend, texts(*TEXTS)), expected)
        parts = [list(part) for part in tokens._together(["a" * 120, "b" * 80, "c", "d" * 300])]
        assert [[len(text) for text in part] for part in parts] == [[120, 80], [1], [300]]


def test_a_text_that_the_tokenizer_gives_up_on_is_refused(folder):
    """A pattern that tries too often makes the library panic, which is no Exception."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    pattern = {"Regex": r"(?=(a+)+b)x|(\w+\s?)+!"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, said["pre_tokenizer"]]}
    path.write_text(json.dumps(said))
    with embedding(folder) as (backend, _):
        with pytest.raises(InvalidTensorError, match="tokenizer gives up on it"):
            backend.infer(texts("good", "a" * 60 + "c"))
        assert vectors(backend, texts("good")).shape == (1, WIDTH)


def test_a_bad_row_is_named(written):
    cases: dict[str, InferRequest] = {
        "row 1 of 'text' is not UTF-8": texts("good", b"bad \xff"),
        "row 2 of 'text' has no tokens": texts("a", "b", ""),
        "row 1 of 'text' has 1048577 bytes, at most 1048576": texts("a", "b" * (2**20 + 1)),
        "row 0 of 'input_ids' has no tokens": ids([-1, -1]),
        "row 1 of 'input_ids' has -1 before its last token": ids([1, 2, 3], [1, -1, 3]),
        "row 0 of 'input_ids' has the token 4000; .* vocabulary has 400": ids([4000]),
        "row 0 of 'input_ids' has the token -7": ids([5, -7]),
        "row 1 of 'input_ids' has 9 tokens; the model takes 8": ids([1] + [-1] * 8, [1] * 9),
        "exactly one of .* neither": InferRequest([]),
        "exactly one of .* text, input_ids": InferRequest(texts("a").inputs + ids([1]).inputs),
        "no output 'none'": InferRequest(texts("a").inputs, ("none",)),
        "wants INT32 of 2 dimensions": InferRequest([Tensor.of("input_ids", np.ones(3, np.int32))]),
        "wants BYTES of 1 dimension$": InferRequest([Tensor.of("text", np.ones(3, np.int32))]),
    }
    with embedding(written, max_tokens=8) as (backend, _):
        for text, request in cases.items():
            with pytest.raises(InvalidTensorError, match=text):
                backend.infer(request)
        assert vectors(backend, texts("good")).shape == (1, WIDTH)


def test_loading_warns_of_nothing_and_prints_nothing(written, capfd):
    with embedding(written):  # a warning would be an error here
        pass
    assert capfd.readouterr() == ("", "")
