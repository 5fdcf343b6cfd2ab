"""TorchScript archives: served where they are trusted, and said to be on their way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from repository.errors import IncompleteFilesError, InvalidTensorError
from tests.hosting import ask
from tests.torch_models import answer, given, listed, loaded, mlp, order_of, quiet

ROWS = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)


def scripted(path: Path) -> Path:
    with quiet():
        torch.jit.save(torch.jit.trace(mlp(), torch.from_numpy(ROWS)), path)
    return path


def test_torchscript_answers_and_says_that_it_is_deprecated(tmp_path, caplog):
    path = scripted(tmp_path / "model.pt")
    config = {"max_batch_size": 8, "inputs": (listed("image", shape=(4,)),)}
    with loaded(order_of(tmp_path, "torchscript", **config)) as (backend, told):
        assert "deprecated" in told.details["deprecated"] and "deprecated" in caplog.text
        want = mlp()(torch.from_numpy(ROWS)).numpy()
        path.write_bytes(b"")
        got = answer(backend.infer(ask(*given(image=ROWS))))["output"]
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_torchscript_inputs_go_by_the_archives_own_names(tmp_path):
    scripted(tmp_path / "model.pt")
    with loaded(order_of(tmp_path, "torchscript")) as (backend, told):
        assert (told.inputs, told.outputs) == ((), ())
        assert answer(backend.infer(ask(*given(x=ROWS))))["output"].shape == (5, 3)
        with pytest.raises(InvalidTensorError, match=r"forward\(\) takes \(x\)"):
            backend.infer(ask(*given(x=ROWS, y=ROWS)))


def test_a_half_copied_torchscript_archive_is_refused(tmp_path):
    path = scripted(tmp_path / "model.pt")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(IncompleteFilesError, match=r"^model\.pt is no complete archive"):
        torchscript(tmp_path)


def torchscript(folder: Path) -> None:
    with loaded(order_of(folder, "torchscript")):
        pass
