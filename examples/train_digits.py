"""Trains the two versions of examples/models/digits and writes everything that the folder needs.

    python examples/train_digits.py

Data: scikit-learn's bundled handwritten digits (1797 images of 8 x 8 pixels, each 0..16), so
nothing is downloaded. Version 1 is a multinomial logistic regression, version 2 a small neural
network. Both are written as ONNX graphs by hand from the trained weights:

    image          FP32  [-1, 64]   pixels 0..16, row by row
    label          INT64 [-1]       the most probable digit
    probabilities  FP32  [-1, 10]

Needs scikit-learn and onnx, which the development install brings. The result depends only on the
versions of those two and numpy: the seed is fixed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = Path(__file__).resolve().parent
SEED = 7
BRIGHTEST = 16.0  # pixels are divided by it inside the first layer's weights
Floats = npt.NDArray[np.float32]
Layer = tuple[Floats, Floats]


def main() -> None:
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.data / BRIGHTEST, digits.target, test_size=0.25, random_state=SEED
    )
    regression = LogisticRegression(C=1.0, max_iter=1000, random_state=SEED)
    network = MLPClassifier((64,), alpha=1e-3, max_iter=1000, random_state=SEED)
    layers: dict[int, list[Layer]] = {}
    right = np.ones(len(y_test), dtype=bool)
    for version, model in ((1, regression), (2, network)):
        model.fit(x_train, y_train)
        found = model.predict(x_test)
        right &= found == y_test
        print(f"version {version}: {np.mean(found == y_test):.4f} of {len(y_test)} held-out digits")
        layers[version] = layers_of(model)

    folder = HERE / "models" / "digits"
    for version, stack in layers.items():
        write_model(folder / str(version) / "model.onnx", stack, f"digits version {version}")

    # Golden cases must hold for every version, so they are held-out digits that both read rightly:
    # one of each, and one of each again for the .npz.
    pixels = np.rint(x_test * BRIGHTEST).astype(np.float32)
    first = [int(np.flatnonzero(right & (y_test == digit))[0]) for digit in range(10)]
    second = [int(np.flatnonzero(right & (y_test == digit))[1]) for digit in range(10)]
    write_json(folder / "checks" / "one-of-each.json", pixels[first], y_test[first])
    write_npz(folder / "checks" / "ten-more.npz", pixels[second], y_test[second])
    write_request(HERE / "digit.json", pixels[first[3]])
    draw(pixels[first[3]])


def layers_of(model: Any) -> list[Layer]:
    """(weights [in, out], bias [out]) from image to scores, with the pixels' scale folded in."""
    if isinstance(model, LogisticRegression):
        pairs = [(model.coef_.T, model.intercept_)]
    else:
        pairs = list(zip(model.coefs_, model.intercepts_, strict=True))
    (first, bias), *rest = pairs
    return [
        (np.ascontiguousarray(w, dtype=np.float32), np.ascontiguousarray(b, dtype=np.float32))
        for w, b in [(first / BRIGHTEST, bias), *rest]
    ]


def write_model(path: Path, layers: list[Layer], name: str) -> None:
    """Gemm, Relu between layers, then Softmax and ArgMax of the last."""
    nodes, weights, flow = [], [], "image"
    for i, (w, b) in enumerate(layers):
        if i:
            nodes.append(helper.make_node("Relu", [flow], [f"hidden{i}"]))
            flow = f"hidden{i}"
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(b, f"b{i}")]
        nodes.append(helper.make_node("Gemm", [flow, f"w{i}", f"b{i}"], [f"scores{i}"]))
        flow = f"scores{i}"
    nodes.append(helper.make_node("Softmax", [flow], ["probabilities"], axis=1))
    nodes.append(helper.make_node("ArgMax", [flow], ["label"], axis=1, keepdims=0))

    batch = "batch"
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, [batch]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, 10]),
        ],
        weights,
    )
    # Old enough for every onnxruntime that pyproject.toml allows.
    model = helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 17)],
        producer_name="train_digits",
    )
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def tensor(name: str, datatype: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(values.shape),
        "data": [int(v) for v in values.reshape(-1)],
    }


def write_json(path: Path, pixels: Floats, labels: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    case = {
        "inputs": [tensor("image", "FP32", pixels)],
        "outputs": [tensor("label", "INT64", labels)],
    }
    path.write_text(json.dumps(case) + "\n")


def write_npz(path: Path, pixels: Floats, labels: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"inputs/image": pixels, "outputs/label": labels.astype(np.int64)}
    np.savez_compressed(path, **arrays)


def write_request(path: Path, pixels: Floats) -> None:
    path.write_text(json.dumps({"inputs": [tensor("image", "FP32", pixels[None])]}) + "\n")


def draw(pixels: Floats) -> None:
    print("examples/digit.json is this digit:")
    for row in pixels.reshape(8, 8):
        print("   " + "".join(" .:*#"[int(v) // 4] * 2 for v in row))


if __name__ == "__main__":
    main()
