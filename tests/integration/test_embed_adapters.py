"""LoRA adapters of an encoder: each row of a batch has its own."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repository.batching import Batcher
from repository.config import Adapters
from repository.errors import AdapterNotFoundError, InvalidTensorError
from repository.tensors import Array
from tests import tiny
from tests.embedding import (
    TEXTS,
    embedding,
    hidden_of,
    order_of,
    spec_of,
    texts,
    unit,
    vectors,
)
from tests.hosting import forking, hosted

NEAR = {"atol": 1e-5, "rtol": 0}
NAMES = ("", "a0", "a1", "a2")
ROWS = tuple(itertools.islice(itertools.cycle(zip(TEXTS, NAMES, strict=False)), 9))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("adapters")
    tiny.write_encoder(home / "e")
    model = tiny.model_of("bert")
    for seed, name in enumerate(NAMES[1:]):
        tiny.write_adapter(home / name, model, seed=seed, targets=("query", "value", "dense"))
    return home


@pytest.fixture(scope="module")
def wanted(written: Path) -> dict[tuple[str, str], Array]:
    """(text, adapter) -> what PEFT's own gives."""
    from peft import PeftModel

    found = {}
    for name in NAMES:
        model: Any = tiny.model_of("bert")
        if name:
            with warnings.catch_warnings():  # as in tests.tiny
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
                model = PeftModel.from_pretrained(model, str(written / name)).eval()
        for text in TEXTS:
            found[text, name] = unit(hidden_of(_Plain(model), written / "e", text).mean(0))
    return found


class _Plain:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, ids: torch.Tensor) -> Any:
        return self._model(input_ids=ids)


def ask(rows: tuple[tuple[str, str], ...]) -> Any:
    return texts(*[text for text, _ in rows], adapters=tuple(name for _, name in rows))


@pytest.mark.parametrize("slots", [8, 1], ids=["all at once", "one after the other"])
def test_each_row_of_a_batch_is_what_peft_makes_of_it(written, wanted, slots):
    with embedding(written / "e", adapters=Adapters(slots=slots)) as (backend, loaded):
        assert "adapt" in loaded.abilities
        base = vectors(backend, texts(*TEXTS))
        reports = backend.adapt([order_of(written / name) for name in NAMES[1:]])
        assert [report.error for report in reports] == [""] * 3
        found = vectors(backend, ask(ROWS))
        np.testing.assert_allclose(found, [wanted[row] for row in ROWS], **NEAR)
        assert np.array_equal(vectors(backend, texts(*TEXTS)), base)


def test_adapters_can_be_switched_off(written):
    with embedding(written / "e", adapters=Adapters(enabled=False)) as (backend, loaded):
        assert loaded.abilities == ("embed", "sleep")
        with pytest.raises(AdapterNotFoundError, match=r"adapters\.enabled"):
            backend.infer(ask((("x", "a0"),)))


async def test_requests_share_batches_and_a_bad_one_fails_alone(written, wanted, tmp_path):
    spec = spec_of(written / "e")
    asked = [ask((row,)) for row in ROWS]
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        assert loaded.max_batch_size == 32 and loaded.abilities == ("embed", "adapt", "sleep")
        await host.adapt([order_of(written / name) for name in NAMES[1:]])
        batcher = Batcher(host, loaded, spec.config, max_queue=100)
        *answers, garbled, unknown = await asyncio.gather(
            *map(batcher.submit, [*asked, texts(b"\xff", adapters=("",)), ask((("x", "no"),))]),
            return_exceptions=True,
        )
        again = await asyncio.gather(*map(batcher.submit, asked))
    assert isinstance(garbled, InvalidTensorError) and "row 0" in str(garbled)
    assert isinstance(unknown, AdapterNotFoundError)
    assert max(answer.batch_size for answer in again) > 1
    for row, *both in zip(ROWS, answers, again, strict=True):
        for answer in both:
            assert not isinstance(answer, BaseException), answer
            np.testing.assert_allclose(answer.outputs[0].array()[0], wanted[row], **NEAR)
