"""Texts in, vectors out (`backend: embed`), by an encoder's folder as sentence-transformers lays it out.

Inputs, exactly one of the two: `text` BYTES [rows], `input_ids` INT32 [rows, length] padded with -1.
Outputs: `embedding` FP32 [rows, dimensions], `tokens` INT32 [rows] (how many the row had, after
cutting). What a row gets does not depend on its company.

Options of the config (`options:`):
    engine      auto | torch | onnx: auto takes safetensors where there are any, else the graph
    dtype       auto | float32 | float16 | bfloat16: auto is what the weights are stored in
    max_tokens  of one text; a longer one is cut (default: what the folder says)
    pooling     cls, max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken, or some joined by "+"
                (default: what the folder says, else mean)
    normalize   bring vectors to length 1 (default: what the folder says, else true)
    threads     compute threads of one instance
    model_file  a graph other than onnx/model.onnx
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from repository.adapters.orders import ROW_ADAPTERS, AdapterOrder, AdapterReport
from repository.backends import agreement, registry, torch_io
from repository.backends.asleep import Movable, Tensors, tensors_of
from repository.backends.base import Order
from repository.backends.embed.company import by_length
from repository.backends.embed.encoder import TorchEncoder, bytes_of
from repository.backends.embed.folder import EncoderFolder, read_folder
from repository.backends.embed.onnx_encoder import OnnxEncoder, find_graph
from repository.backends.embed.pooling import Head
from repository.backends.embed.tokens import Row, Tokens
from repository.backends.ferry import movable
from repository.backends.lora.adapters import LoraAdapters
from repository.backends.onnx import OnnxBackend
from repository.config import ModelConfig
from repository.errors import (
    AdapterNotFoundError,
    IncompleteFilesError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.lifecycle.placement import Memory, all_memory
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.tensors import Array, Tensor

NAME = "embed"
DEFAULT_BATCH = 32  # rows, where the config says nothing (max_batch_size: 1 ends batching)
TEXT, IDS = "text", "input_ids"
VECTORS, COUNTS = "embedding", "tokens"
INPUTS = (
    TensorSpec(TEXT, "BYTES", (-1,), optional=True),
    TensorSpec(IDS, "INT32", (-1, -1), optional=True),
)
NO_ADAPTERS = "the model takes no adapters: its engine is onnx, or adapters.enabled is false"


class Encoder(Protocol):
    """`session`: where its weights are not torch's."""

    name: str
    session: OnnxBackend | None

    def run(self, ids: Array, mask: Array, types: Array | None) -> torch.Tensor: ...

    def bytes_of_weights(self) -> int: ...

    def details(self) -> dict[str, Any]: ...

    def tensors(self) -> Iterable[torch.Tensor]:
        """Those that torch has."""
        ...

    def unload(self) -> None: ...


class EmbedBackend:
    _encoder: Encoder
    _head: Head
    _tokens: Tokens
    _movable: Movable

    def __init__(self) -> None:
        self._lora: LoraAdapters | None = None
        self._skip = 0
        self._loaded = False

    def load(self, order: Order) -> Loaded:
        config, options = order.config, order.config.options
        registry.check_options(NAME, options)
        folder = read_folder(order.path, options)
        threads = max(1, registry.option(options, "threads", int, order.threads))
        torch_io.begin(replace(order, threads=threads))
        self._tokens = Tokens(folder, threads=threads)
        engine = _engine(folder, order)
        self._movable = movable("cpu" if engine == "onnx" else order.device, self._tensors)
        self._encoder = encoder = _encoder(engine, folder, order, threads)
        with torch.inference_mode():
            width = encoder.run(*self._tokens.table([Row([0])])).shape[-1]
        self._head = Head(folder, width, private=order.private)
        self._loaded = True
        if isinstance(encoder, TorchEncoder):
            self._head.to(encoder.device)
            if config.adapters.enabled:
                self._lora = LoraAdapters(encoder.model, config.adapters)
        self._skip = 0 if folder.include_prompt else self._tokens.prompt_tokens
        most = config.max_batch_size or DEFAULT_BATCH
        inputs, outputs = _signature(config, most, self._head.width)
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=most,
            platform=registry.entry(NAME).platform,
            memory={"weights": encoder.bytes_of_weights() + bytes_of(self._head)},
            details={
                "engine": encoder.name,
                "dimensions": self._head.width,
                "max_tokens": folder.most_tokens,
                "pooling": "+".join(folder.pooling),
                "normalize": folder.normalizes,
                "threads": threads,
                **({"prompts": dict(folder.prompts)} if any(folder.prompts.values()) else {}),
                **({"prompt": folder.prompt} if folder.prompt else {}),
                **({"assumed": list(folder.assumed)} if folder.assumed else {}),
                **encoder.details(),
            },
            abilities=("embed", "sleep") if self._lora is None else ("embed", "adapt", "sleep"),
        )

    def validate(self, order: Order) -> None:
        """Everything but the numbers of the encoder: all that its folder says, and each weight's name
        and shape."""
        options = order.config.options
        registry.check_options(NAME, options)
        folder = read_folder(order.path, options)
        Tokens(folder, threads=1)
        if _engine(folder, order) == "onnx":
            OnnxEncoder.check(folder, order)
        else:
            TorchEncoder.check(folder, order, registry.option(options, "dtype", str, "auto"))

    def sleep(self) -> None:
        if self._encoder.session is not None:
            self._encoder.session.sleep()
        self._movable.sleep()

    def wake(self) -> None:
        if self._encoder.session is not None:
            self._encoder.session.wake()
        self._movable.wake()

    def memory(self) -> Memory:
        if not self._loaded:
            return {}
        session = self._encoder.session
        mine = self._movable.memory()
        return mine if session is None else all_memory([mine, session.memory()])

    def _tensors(self) -> Tensors:
        return {
            "weights": (*self._encoder.tensors(), *tensors_of(self._head)),
            "adapters": self._lora.tensors() if self._lora is not None else (),
        }

    def infer(self, request: InferRequest) -> InferResponse:
        for name in request.outputs:
            if name not in (VECTORS, COUNTS):
                raise InvalidTensorError(f"the model has no output '{name}'")
        rows, adapters = self._rows(request)
        vectors = np.empty((len(rows), self._head.width), np.float32)
        with torch.inference_mode():
            left = list(range(len(rows)))
            while left:
                left = self._embed_some(rows, adapters, left, vectors)
        counts = np.array([len(row.ids) for row in rows], np.int32)
        made = {VECTORS: Tensor.of(VECTORS, vectors), COUNTS: Tensor.of(COUNTS, counts)}
        return InferResponse([made[name] for name in request.outputs or made])

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        if self._lora is None:
            return [AdapterReport(order.name, NO_ADAPTERS) for order in orders]
        return self._lora.adapt(orders)

    def unload(self) -> None:
        if hasattr(self, "_encoder"):  # else the load has failed
            self._encoder.unload()
            del self._encoder
        self._lora = None
        self._loaded = False

    # one request --------------------------------------------------------------------------------

    def _rows(self, request: InferRequest) -> tuple[list[Row], list[str]]:
        """The rows, and the adapter of each; no adapters: all have none."""
        given = {tensor.name: tensor for tensor in request.inputs}
        named = given.pop(ROW_ADAPTERS, None)
        if len(given) != 1 or not given.keys() <= {TEXT, IDS}:
            raise InvalidTensorError(
                f"give exactly one of '{TEXT}' (BYTES) and '{IDS}' (INT32, padded with -1); given "
                f"are {', '.join(given) or 'neither'}"
            )
        ((name, tensor),) = given.items()
        wanted, axes = ("BYTES", 1) if name == TEXT else ("INT32", 2)
        if tensor.datatype != wanted or len(tensor.shape) != axes:
            raise InvalidTensorError(
                f"input '{name}' is {tensor.datatype} {list(tensor.shape)}; the model wants "
                f"{wanted} of {axes} dimension{'s' if axes > 1 else ''}"
            )
        rows = self._tokens.of_texts(tensor) if name == TEXT else self._tokens.of_ids(tensor)
        adapters = [] if named is None else [n.decode() for n in named.array().reshape(-1)]
        return rows, adapters if any(adapters) else []

    def _embed_some(
        self, rows: Sequence[Row], adapters: Sequence[str], left: list[int], vectors: Array
    ) -> list[int]:
        """Embeds as many of the rows `left` as there are slots for their adapters; returns the rest."""
        if not adapters:
            self._embed(rows, dict.fromkeys(left, 0), vectors)
            return []
        lora = self._lora
        if lora is None:
            raise AdapterNotFoundError(NO_ADAPTERS)
        with lora.taken(adapters[at] for at in left) as held:
            slots = {at: held[adapters[at]] for at in left if adapters[at] in held}
            self._embed(rows, slots, vectors)
        return [at for at in left if at not in slots]

    def _embed(self, rows: Sequence[Row], slots: Mapping[int, int], vectors: Array) -> None:
        """Writes the vectors of those rows that have a slot to their places."""
        places = list(slots)
        for run in by_length([len(rows[at].ids) for at in places]):
            mine = [places[i] for i in run]
            ids, mask, types = self._tokens.table([rows[at] for at in mine])
            if self._lora is not None:
                self._lora.rows([slots[at] for at in mine])
            hidden = self._encoder.run(ids, mask, types)
            kept = torch.from_numpy(mask != 0).to(hidden.device)
            vectors[mine] = self._head(hidden, kept, self._skip).cpu().numpy()


def _engine(folder: EncoderFolder, order: Order) -> str:
    """ "torch" or "onnx". Raises LoadFailedError, IncompleteFilesError."""
    engine: str = registry.option(order.config.options, "engine", str, "auto")
    if engine not in ("auto", "torch", "onnx"):
        raise LoadFailedError(f"options.engine is '{engine}'; it must be auto, torch or onnx")
    stored = any(folder.encoder.glob("model.safetensors*"))
    if engine == "auto":
        named = order.model_file.endswith(".onnx")
        graph = named or (not stored and find_graph(folder, order) is not None)
        engine = "onnx" if graph else "torch"
    if engine == "torch" and not stored:
        raise IncompleteFilesError(_no_weights(folder))
    return engine


def _encoder(engine: str, folder: EncoderFolder, order: Order, threads: int) -> Encoder:
    if engine == "onnx":
        return OnnxEncoder(folder, order, threads)
    dtype = registry.option(order.config.options, "dtype", str, "auto")
    return TorchEncoder(folder, order, dtype)


def _no_weights(folder: EncoderFolder) -> str:
    pickles = sorted(path.name for path in folder.encoder.glob("*.bin"))
    if not pickles:
        return "model.safetensors is missing, and there is no onnx/model.onnx"
    return (
        f"the weights lie in {pickles[0]}, a pickle, which can run code and is never read; save "
        "them as model.safetensors"
    )


def _signature(
    config: ModelConfig, most: int, width: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What is shown and checked. A config may list one of the inputs and leave the other out."""
    listed = {tensor.name for tensor in config.inputs or ()}
    have = [spec for spec in INPUTS if not listed or spec.name in listed]
    inputs, outputs = agreement.reconcile(
        msgspec.structs.replace(config, max_batch_size=most),
        have,
        [TensorSpec(VECTORS, "FP32", (-1, width)), TensorSpec(COUNTS, "INT32", (-1,))],
    )
    optional = len(inputs) > 1
    return tuple(TensorSpec(s.name, s.datatype, s.shape, optional) for s in inputs), outputs
