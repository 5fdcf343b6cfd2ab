"""Embeddings on a real GPU: the same vectors as on the CPU, with adapters and without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from repository.backends.base import Order
from repository.backends.embed.backend import EmbedBackend
from repository.config import ModelConfig
from tests import tiny
from tests.embedding import TEXTS, order_of, texts, vectors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine"),
]
ADAPTERS = ("", "a0", "a1", "", "a1")


@contextmanager
def on(device: str, folder: Path) -> Iterator[EmbedBackend]:
    backend, told = EmbedBackend(), dict(os.environ)
    try:
        loaded = backend.load(Order("m", 1, folder, "", ModelConfig(backend="embed"), device))
        assert loaded.details["dimensions"] == tiny.SIZES["hidden"]
        yield backend
    finally:
        backend.unload()
        for name in os.environ.keys() - told.keys():
            del os.environ[name]


def test_vectors_are_those_of_the_cpu(tmp_path):
    folder = tiny.write_encoder(tmp_path / "e")
    for seed in (0, 1):
        tiny.write_adapter(
            tmp_path / f"a{seed}", tiny.model_of("bert"), seed=seed, targets=("query", "value")
        )
    found = {}
    for device in ("cpu", "cuda:0"):
        with on(device, folder) as backend:
            reports = backend.adapt([order_of(tmp_path / name) for name in ("a0", "a1")])
            assert [report.error for report in reports] == ["", ""]
            asked = (texts(*TEXTS), texts(*TEXTS, adapters=ADAPTERS))
            found[device] = [vectors(backend, request) for request in asked]
    for here, there in zip(found["cpu"], found["cuda:0"], strict=True):
        np.testing.assert_allclose(there, here, atol=1e-3)
