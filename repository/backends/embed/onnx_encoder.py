"""The encoder by onnxruntime, where the folder ships one: a graph from token ids to hidden states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from repository.backends.base import Order
from repository.backends.embed.folder import EncoderFolder
from repository.backends.onnx import OnnxBackend
from repository.config import ModelConfig
from repository.errors import IncompleteFilesError, LoadFailedError
from repository.messages import InferRequest, TensorSpec
from repository.tensors import DATATYPES, Array, Tensor

PLACES = ("onnx/model.onnx", "model.onnx")
GIVEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
HIDDEN = ("token_embeddings", "last_hidden_state")


def find_graph(folder: EncoderFolder, order: Order) -> tuple[Order, str] | None:
    """Where it lies: the order for that folder, and the file in it. None: there is none."""
    if order.model_file.endswith(".onnx"):
        return order, order.model_file
    for place in PLACES:
        if (folder.encoder / place).is_file():
            return replace(order, path=folder.encoder), place
    return None


class OnnxEncoder:
    """Rows in and out as `TorchEncoder` has them. It takes no adapters."""

    name = "onnx"
    session: OnnxBackend | None

    def __init__(self, folder: EncoderFolder, order: Order, threads: int) -> None:
        place = _place(folder, order, {"threads": threads})
        self._file = place.model_file
        self._session = self.session = OnnxBackend()
        loaded = self._session.load(place)
        self._inputs = {spec.name: spec.datatype for spec in loaded.inputs}
        for name in self._inputs:
            if name not in GIVEN:
                raise LoadFailedError(
                    f"the graph wants the input '{name}'; given are {', '.join(GIVEN)}"
                )
        self._output = _hidden_of(loaded.outputs)
        self._providers = loaded.details["providers"]
        self._bytes = _size(place, self._file)

    @staticmethod
    def check(folder: EncoderFolder, order: Order) -> None:
        """The graph's file; raises what a load would."""
        OnnxBackend().validate(_place(folder, order, {}))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def run(self, ids: Array, mask: Array, types: Array | None) -> torch.Tensor:
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids) if types is None else types,
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        }
        asked = [
            Tensor.of(name, given[name].astype(DATATYPES[datatype].dtype), datatype)
            for name, datatype in self._inputs.items()
        ]
        (hidden,) = self._session.infer(InferRequest(asked, (self._output,))).outputs
        # Its memory is this answer's alone, though numpy calls it read-only.
        return torch.from_numpy(np.array(hidden.array(), dtype=np.float32))

    def bytes_of_weights(self) -> int:
        return self._bytes

    def details(self) -> dict[str, Any]:
        return {"graph": self._file, "providers": self._providers}

    def unload(self) -> None:
        self._session.unload()


def _place(folder: EncoderFolder, order: Order, options: dict[str, Any]) -> Order:
    found = find_graph(folder, order)
    if found is None:
        raise IncompleteFilesError(f"options.engine is onnx; {PLACES[0]} is missing")
    place, file = found
    return replace(place, model_file=file, config=ModelConfig(options=options))


def _hidden_of(outputs: tuple[TensorSpec, ...]) -> str:
    """The output with a vector for every token."""
    tables = [spec.name for spec in outputs if len(spec.shape) == 3]
    for name in (*HIDDEN, *tables[:1]):
        if name in tables:
            return name
    raise LoadFailedError(
        "the graph has no output of [rows, tokens, numbers]; it has "
        + ", ".join(f"'{s.name}' {list(s.shape)}" for s in outputs)
    )


def _size(place: Order, file: str) -> int:
    """Of the graph and of external data that bears its name beside it, as exporters write it."""
    name = PurePosixPath(file).name
    folder = (place.path / file).parent
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith(name))
