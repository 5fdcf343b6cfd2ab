"""Encoders for tests: folders made on the spot, backends loaded from them, and what they must give."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repository.adapters.orders import ROW_ADAPTERS, AdapterFile, AdapterOrder
from repository.backends.base import Order
from repository.backends.embed.backend import EmbedBackend
from repository.config import ModelConfig
from repository.messages import InferRequest, Loaded
from repository.spec import ModelSpec
from repository.tensors import Array, Tensor
from tests import tiny

TEXTS = (
    "the quick brown fox",
    "0 1 2 3",
    "drop a folder, see it served " * 6,
    "naïve café 🦊",
    "x",
)


def texts(*given: str | bytes, adapters: tuple[str, ...] = ()) -> InferRequest:
    raw = [each.encode() if isinstance(each, str) else each for each in given]
    inputs = [Tensor.of("text", np.array(raw, dtype=object))]
    if adapters:
        inputs.append(Tensor.of(ROW_ADAPTERS, np.array(adapters, dtype=object)))
    return InferRequest(inputs)


def ids(*rows: list[int]) -> InferRequest:
    """As they are: pad them yourself."""
    return InferRequest([Tensor.of("input_ids", np.array(rows, np.int32))])


def vectors(backend: EmbedBackend, request: InferRequest) -> Array:
    return backend.infer(request).outputs[0].array()


def counts(backend: EmbedBackend, request: InferRequest) -> list[int]:
    return backend.infer(request).outputs[1].array().tolist()


@contextmanager
def embedding(
    folder: Path,
    *,
    private: bool = False,
    adapters: Any = None,
    model_file: str = "",
    **options: Any,
) -> Iterator[tuple[EmbedBackend, Loaded]]:
    """A loaded backend, in this process."""
    backend = EmbedBackend()
    more = {} if adapters is None else {"adapters": adapters}
    config = ModelConfig(backend="embed", options=options, **more)
    threads, told = torch.get_num_threads(), dict(os.environ)
    try:
        loaded = backend.load(Order("m", 1, folder, model_file, config, private=private))
        yield backend, loaded
    finally:
        backend.unload()
        torch.set_num_threads(threads)
        for name in os.environ.keys() - told.keys():
            del os.environ[name]


def spec_of(folder: Path, **config: Any) -> ModelSpec:
    config.setdefault("backend", "embed")
    return ModelSpec("m", 1, "f", folder, folder, config=ModelConfig(**config), backend="embed")


def hidden_of(model: Any, folder: Path, text: str) -> Array:
    """The encoder's own hidden states of one text, alone and unpadded: [tokens, width]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with torch.inference_mode():
        found = model(torch.tensor([tokenizer.encode(text).ids]))
    made: Array = found.last_hidden_state[0].numpy()
    return made


def unit(vector: Array) -> Array:
    made: Array = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
    return made


def change(path: Path, **keys: Any) -> None:
    """Keys of a JSON object; None takes one away."""
    said = json.loads(path.read_text()) if path.is_file() else {}
    said |= keys
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def add_module(folder: Path, kind: str, path: str) -> None:
    """As the last one."""
    listed = json.loads((folder / "modules.json").read_text())
    listed.append({"idx": len(listed), "name": str(len(listed)), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))


def add_dense(folder: Path, inputs: int, outputs: int, **said: Any) -> tuple[Array, Array]:
    """(weight, bias) of a Dense module behind all others."""
    from safetensors.numpy import save_file

    name = "3_Dense"
    add_module(folder, f"{tiny.HOME}.Dense", name)
    dice = np.random.default_rng(3)
    weight = dice.normal(size=(outputs, inputs)).astype(np.float32)
    bias = dice.normal(size=outputs).astype(np.float32)
    change(
        folder / name / "config.json", in_features=inputs, out_features=outputs, bias=True, **said
    )
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / name / "model.safetensors")
    return weight, bias


def add_graph(folder: Path, model: Any) -> None:
    """onnx/model.onnx of the encoder `model`, as exporters write it."""

    class Hidden(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    names, out = ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"
    sample = torch.ones(2, 5, dtype=torch.long)
    (folder / "onnx").mkdir(exist_ok=True)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its age
        torch.onnx.export(
            Hidden(), (sample, sample, sample * 0), folder / "onnx" / "model.onnx",
            input_names=names, output_names=[out], opset_version=17, dynamo=False,
            dynamic_axes={name: {0: "rows", 1: "tokens"} for name in [*names, out]},
        )  # fmt: skip


def order_of(folder: Path) -> AdapterOrder:
    """An adapter to be known by its folder's name."""
    files = tuple(
        AdapterFile(path.name, found.st_size, found.st_mtime_ns, found.st_ino)
        for path in sorted(folder.glob("adapter_*"))
        for found in [path.stat()]
    )
    return AdapterOrder(folder.name, str(folder), folder.name, files)
