"""The models of `bench.compare`, what is asked of them, and what the right answer is.

    tiny    y = x + 1, 16 floats: nothing but the server is measured
    large   y = x + 1, 150,000 floats, 600 KB each way: how bytes are moved
    slow    matrix products over the two halves of a row, 4 hidden layers of 2,048: 50 MB of weights
            that one request reads as well as sixteen do, so a batch of 16 costs about 2.3 times what
            one costs (and one of 8 1.5 times)

Every server gets the same files and runs them with one thread of onnxruntime that does not spin.
Each request is one row; `batch` is the most that a server may join, 0: it may not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from tests import models

Array = npt.NDArray[np.float32]

WIDTH = 2048
HIDDEN = 4
HALF = 8  # floats


@dataclass(frozen=True)
class Subject:
    name: str
    told: str
    floats: int
    batch: int
    write: Callable[[Path], Any]
    expect: Callable[[Array], Array]

    def question(self) -> Array:
        """x, float32 [1, floats]: always the same."""
        return np.random.default_rng(7).standard_normal((1, self.floats)).astype(np.float32)


def _plus_one(floats: int) -> Callable[[Path], Any]:
    return lambda path: models.add_onnx(path, 1.0, (-1, floats))


@cache
def _weights() -> list[Array]:
    """Of such a size that numbers neither grow nor vanish on their way through."""
    random = np.random.default_rng(11)
    sizes = [HALF, *[WIDTH] * HIDDEN, HALF]
    pairs = itertools.pairwise(sizes)
    return [(random.standard_normal(p) * (2 / p[0]) ** 0.5).astype(np.float32) for p in pairs]


def _write_chain(path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "halves"], ["hidden"])]
    weights = _weights()
    last = "hidden"
    for number in range(len(weights)):
        ends = number == len(weights) - 1
        product = f"product{number}"
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [product]))
        last = product if ends else f"hidden{number}"
        if not ends:
            nodes.append(helper.make_node("Relu", [product], [last]))
    nodes.append(helper.make_node("Reshape", [last, "whole"], ["y"]))
    shapes = {"halves": [-1, HALF], "whole": [-1, 2 * HALF]}
    constants = [numpy_helper.from_array(np.array(s, np.int64), n) for n, s in shapes.items()]
    constants += [numpy_helper.from_array(w, f"w{n}") for n, w in enumerate(weights)]
    rows = ("FP32", (-1, 2 * HALF))
    model = models.onnx_model(nodes, [("x", *rows)], [("y", *rows)], constants)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def _expect_chain(x: Array) -> Array:
    *hidden, last = _weights()
    halves = x.reshape(-1, HALF)
    for weights in hidden:
        halves = np.maximum(halves @ weights, 0)
    return (halves @ last).reshape(x.shape)


def _expect_plus_one(x: Array) -> Array:
    return x + np.float32(1)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("tiny", "16 floats, x + 1", 16, 16, _plus_one(16), _expect_plus_one),
        Subject(
            "large", "600 KB each way, x + 1", 150_000, 0, _plus_one(150_000), _expect_plus_one
        ),
        Subject("slow", "about 5 ms of matrix products", 16, 16, _write_chain, _expect_chain),
    )
}
