"""What the server and its models are: names, versions, inputs, outputs, and whether they serve."""

from __future__ import annotations

from typing import Any, Protocol

from repository.errors import ModelNotReadyError, NotFoundError
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State
from repository.lifecycle.status import ModelStatus
from repository.messages import TensorSpec
from repository.repository import Repository
from server.codecs.v2_paths import Route
from server.triton.index import missing


class ServerInfo(Protocol):
    """What the app says of itself."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def extensions(self) -> tuple[str, ...]: ...


def server_of(info: ServerInfo) -> dict[str, Any]:
    return {"name": info.name, "version": info.version, "extensions": list(info.extensions)}


def server_ready(models: Repository, *, strict: bool) -> bool:
    """All that was wanted at the start has settled. A model that loads later, or fails, does not take
    a server that answers for the others out of service, unless `strict` says so."""
    return models.ready and not (strict and any(map(missing, models.statuses())))


async def model_ready(models: Repository, route: Route) -> bool:
    """It serves, and does not say itself that it is not ready. False too for what there is not; over
    HTTP that is an error. Raises InvalidNameError."""
    try:
        lease = models.lease(*route)
    except (ModelNotReadyError, NotFoundError):
        return False
    return await lease.generation.says_ready()


def model_of(models: Repository, route: Route) -> dict[str, Any]:
    """Raises what `lease` raises."""
    gen = models.lease(*route).generation
    loaded = gen.loaded
    if loaded is None:
        raise ModelNotReadyError(f"model '{gen.spec.model}' has not said yet what it takes")
    described = (
        {"inputs": _tensors(loaded.inputs), "outputs": _tensors(loaded.outputs)}
        if gen.signature is None
        else gen.signature.metadata()
    )
    return {
        "name": gen.spec.model,
        "versions": _serving(models.status(gen.spec.model), gen),
        "platform": loaded.platform or gen.spec.backend,
        **described,
    }


def _serving(status: ModelStatus, gen: Generation) -> list[str]:
    found = {g.spec.version for g in status.generations if g.state is State.READY}
    return [str(v) for v in sorted(found | {gen.spec.version})]


def _tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]
