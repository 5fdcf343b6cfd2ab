"""POST /v1/models/load, /unload, /unload-all; GET /v1/models, /v1/models/status: as PolarGrid
documents them.

Three spellings of the model's name are accepted. The status words are PolarGrid's four: a model
that is unloading is shown as "unloaded" here, by its own name everywhere else.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from litestar import Request, Router, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from repository.errors import InvalidRequestError
from repository.lifecycle.status import ModelStatus, Public
from repository.repository import Repository
from server.codecs.named_model import NamedModel
from server.codecs.openai_models import ModelCard, cards_of, word_of
from server.codecs.unloaded import Success, UnloadAllReply, unloaded_all
from server.settings import Settings


class LoadRequest(NamedModel, forbid_unknown_fields=True, kw_only=True):
    force_reload: bool = False
    dry_run: bool = False


class LoadReply(msgspec.Struct):
    model: str
    force_reload: bool
    message: str
    status: Success = "success"


class DryRunReply(msgspec.Struct):
    """Bytes on `device`, the first of `devices` (one for each instance); `needs`: on all of them.

    source         how the need is known: config, measured (of an earlier load), estimate
    would_evict    models that would leave, or sleep
    would_replace  its own older generation would leave first, so nothing of it serves for a while
    would_wake     it sleeps, and would be woken
    would_wait     it would have to wait: others are busy, or leaving
    """

    model: str
    would_load: bool
    bytes_needed: int
    bytes_free: int
    device: str
    would_evict: list[str]
    message: str
    devices: list[str]
    needs: dict[str, int]
    source: str
    would_replace: bool
    would_wake: bool
    would_wait: bool
    dry_run: Literal[True] = True
    status: Success = "success"


class UnloadReply(msgspec.Struct):
    """`freed_bytes`: reserved for it, and returned; `leaked_bytes`: what a device had not given back
    when the workers had ended; `confirmed`: every worker is gone, and with it all that it held."""

    model: str
    message: str
    freed_bytes: int
    leaked_bytes: int
    confirmed: bool
    status: Success = "success"


class StatusReply(msgspec.Struct):
    """`loading_status` names every model of the repository. The last four are extra; `asleep` and
    `pinned` name models."""

    loaded: list[str]
    loading_status: dict[str, str]
    repository: str
    reloading: list[str]
    failed: dict[str, str]
    asleep: list[str]
    pinned: list[str]


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


@post("/load", status_code=200, summary="Load a model", tags=["models"])
async def load(
    data: JSONBody[LoadRequest], models: NamedDependency[Repository]
) -> LoadReply | DryRunReply:
    """Answers when the model is ready, or with the reason why not. Joins a load in flight."""
    name = data.name
    if data.dry_run:
        would = await models.dry_run(name)
        return DryRunReply(
            model=name,
            would_load=would.would_load,
            bytes_needed=would.bytes_needed,
            bytes_free=would.bytes_free,
            device=would.device,
            would_evict=list(would.would_evict),
            message=would.message,
            devices=list(would.devices or (would.device,)),
            needs=dict(would.needs or {would.device: would.bytes_needed}),
            source=would.source,
            would_replace=would.would_replace,
            would_wake=would.would_wake,
            would_wait=would.would_wait,
        )
    await models.load(name, force=data.force_reload)
    return LoadReply(name, data.force_reload, f"Model {name} loaded successfully")


@post("/unload", status_code=200, summary="Unload a model", tags=["models"])
async def unload(data: JSONBody[NamedModel], models: NamedDependency[Repository]) -> UnloadReply:
    """Answers when nothing of it runs any more. Unloading what is not loaded is no error."""
    name = data.name
    report = await models.unload(name)
    return UnloadReply(
        model=name,
        message=f"Model {name} unloaded successfully",
        freed_bytes=report.bytes_freed,
        leaked_bytes=report.leaked_bytes,
        confirmed=report.confirmed,
    )


@post("/unload-all", status_code=200, summary="Unload every model", tags=["models"])
async def unload_all(
    request: Request[Any, Any, Any], models: NamedDependency[Repository]
) -> UnloadAllReply:
    """What fails to unload is listed; the others go on. Requests that run may end first. It takes no
    body: one that says something was meant for another call, and nothing is unloaded."""
    if (await request.body()).strip() not in (b"", b"{}", b"null"):
        raise InvalidRequestError(
            "unload-all takes no body and unloads every model; to unload one, send its name to "
            "POST /v1/models/unload"
        )
    return unloaded_all(await models.unload_all())


@get("/status", sync_to_thread=False, summary="The state of every model", tags=["models"])
def status(models: NamedDependency[Repository], settings: NamedDependency[Settings]) -> StatusReply:
    """Every model of the repository, in PolarGrid's four words; why a failed one has failed."""
    found = models.statuses()
    return StatusReply(
        loaded=[s.name for s in found if s.state is Public.LOADED],
        loading_status={s.name: word_of(s.state) for s in found},
        repository=str(settings.repo),
        reloading=[s.name for s in found if s.reloading],
        failed={s.name: _why(s) for s in found if s.state is Public.FAILED},
        asleep=[s.name for s in found if s.asleep],
        pinned=[s.name for s in found if any(g.pinned for g in s.generations)],
    )


@get("/", sync_to_thread=False, summary="List the models", tags=["models"])
def index(models: NamedDependency[Repository], settings: NamedDependency[Settings]) -> ModelList:
    """OpenAI's list: every model of the repository, loaded or not (`status` says which), each with
    its adapters behind it."""
    owner = settings.server_name
    found = [cards_of(s, models.adapters(s.name), owner) for s in models.statuses()]
    return ModelList([card for cards in found for card in cards])


def _why(status: ModelStatus) -> str:
    return status.last_error.message if status.last_error else ""


HANDLERS: list[Any] = [load, unload, unload_all, status, index]
router = Router("/v1/models", route_handlers=HANDLERS)
