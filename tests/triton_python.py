"""Models for Triton's python backend, as their users write them: sources, and how they come to life here
without a server."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from repository.backends import registry
from repository.backends.abilities import Asked, Others
from repository.backends.base import Order
from repository.config import ModelConfig, TensorConfig
from repository.errors import RepositoryError
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import Array, Tensor
from tests.fakes.asking import FakeReply

SOURCES = Path(__file__).parent / "data" / "triton"


def source(name: str) -> str:
    """One of those in tests/data/triton."""
    return (SOURCES / f"{name}.py").read_text()


def tensor(name: str, datatype: str, *shape: int, **more: Any) -> TensorConfig:
    return TensorConfig(name=name, datatype=datatype, shape=shape, **more)


REPEAT: dict[str, Any] = {
    "decoupled": True,
    "inputs": (tensor("IN", "INT32", -1), tensor("DELAY", "UINT32", -1)),
    "outputs": (tensor("OUT", "INT32", 1), tensor("IDX", "UINT32", 1)),
}


class Model:
    """A loaded backend, and what can be asked of it."""

    def __init__(self, backend: Any, loaded: Loaded) -> None:
        self.backend, self.loaded = backend, loaded

    def begin(self, *requests: InferRequest) -> list[FakeReply]:
        """All at once, as one batch. They may not have ended."""
        replies = [FakeReply() for _ in requests]
        self.backend.ask([Asked(r, reply) for r, reply in zip(requests, replies, strict=True)])
        return replies

    def run(self, *requests: InferRequest) -> list[list[InferResponse]]:
        """The answers of each; one that fails raises."""
        replies = self.begin(*requests)
        for reply in replies:
            error = reply.wait()
            if error is not None:
                raise error
        return [reply.answers for reply in replies]

    def one(self, request: InferRequest) -> dict[str, Array]:
        """The outputs of the only answer to the only request."""
        ((answer,),) = self.run(request)
        return {t.name: t.array() for t in answer.outputs}

    def fails(self, *requests: InferRequest) -> list[RepositoryError | None]:
        return [reply.wait() for reply in self.begin(*requests)]


@contextmanager
def loaded(
    folder: Path,
    text: str,
    others: Others | None = None,
    extra: dict[str, Any] | None = None,
    **config: Any,
) -> Iterator[Model]:
    """`text`: of its model.py. Unloaded afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(textwrap.dedent(text))
    made = ModelConfig(backend="triton_python", **config)
    backend: Any = registry.make("triton_python", made)
    if others is not None:
        backend.meet(others)
    order = Order(
        model="m",
        version=1,
        path=folder,
        model_file="model.py",
        config=made,
        extra=extra or {},
    )
    try:
        yield Model(backend, backend.load(order))
    finally:
        backend.unload()


def ask(
    *outputs: str, id: str = "", parameters: dict[str, Any] | None = None, **inputs: Any
) -> InferRequest:
    """`inputs` are arrays, or what numpy makes one of."""
    tensors = [Tensor.of(name, np.asarray(value)) for name, value in inputs.items()]
    return InferRequest(tensors, outputs, id, parameters or {})


def values(answers: list[InferResponse], name: str) -> list[Any]:
    return [t.array().tolist()[0] for a in answers for t in a.outputs if t.name == name]
