"""Trains examples/models/digits_torch and writes its weights and checks.

    python examples/train_digits_torch.py

The same digits as `train_digits.py`, read by a small torch network: its class is in the version's
model.py, this trains it and saves its weights as model.safetensors. Needs torch and scikit-learn, which
the development install brings. The result depends only on the versions of those: the seed is fixed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from train_digits import HERE, SEED, write_json

FOLDER = HERE / "models" / "digits_torch"
ROUNDS = 400


def main() -> None:
    torch.manual_seed(SEED)
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.data.astype(np.float32), digits.target, test_size=0.25, random_state=SEED
    )
    model = model_class(FOLDER / "1" / "model.py")()
    train(model, torch.from_numpy(x_train), torch.from_numpy(y_train))

    found = model.eval()(torch.from_numpy(x_test))["label"].numpy()
    print(f"{np.mean(found == y_test):.4f} of {len(y_test)} held-out digits")
    save_file(model.state_dict(), FOLDER / "1" / "model.safetensors")
    right = found == y_test
    some = [int(np.flatnonzero(right & (y_test == digit))[0]) for digit in range(10)]
    write_json(FOLDER / "checks" / "one-of-each.json", x_test[some], y_test[some])


def model_class(path: Path) -> Any:
    """As the server finds it: the class Model of a file."""
    spec = importlib.util.spec_from_file_location("digits_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model


def train(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    """All digits at once, again and again; a little noise keeps it from learning them by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        scores = model.scores(pixels + torch.randn_like(pixels))
        torch.nn.functional.cross_entropy(scores, labels).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
