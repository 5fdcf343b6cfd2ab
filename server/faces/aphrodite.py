"""POST /v1/load_model, /v1/unload_model: as Aphrodite had them.

Two things are other than there, both on purpose: what cannot be understood is refused, and loads or
unloads nothing; and a load that fails leaves what served before as it was. docs/aphrodite.md has the
rest.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from litestar import Request, Response, Router, post
from litestar.di import NamedDependency

from repository.errors import FailedError, NotFoundError
from repository.reports import UnloadReport
from repository.repository import Repository
from server.codecs.aphrodite_answers import (
    ALREADY_UNLOADED,
    ConfiguredReply,
    Gpus,
    InfoReply,
    LoadedReply,
    NotLoadedReply,
    UnloadedReply,
    loaded,
    not_loaded,
    unloaded,
)
from server.codecs.aphrodite_body import read_load, read_unload
from server.limits import ASKED

Asked = Request[Any, Any, Any]


@post("/load_model", status_code=200, summary="Load a model", tags=["Aphrodite"])
async def load_model(
    request: Asked, models: NamedDependency[Repository]
) -> LoadedReply | ConfiguredReply | InfoReply:
    """Answers when the model serves, or with the reason why not; until then, whatever served before
    goes on.

    Without a body: the default model (`--default-model`, or the only one), as its folder says. JSON
    names a `model`, and keys of its config, in `config` or beside it. A form uploads them as a YAML
    file: `-F config=@config.yaml`. A config takes the place of the folder's `aphrodite_config.yaml`.
    """
    kind, params = request.content_type
    raw = await request.body()
    order = await asyncio.to_thread(read_load, kind, params, raw)
    model = models.default() if order.model is None else order.model
    request.scope["state"][ASKED] = {"model": model, "config": order.config}
    began = time.perf_counter()
    report = await models.load(model, config=order.config)
    return loaded(order, report, time.perf_counter() - began)


@post("/unload_model", status_code=200, summary="Unload a model, or all", tags=["Aphrodite"])
async def unload_model(
    request: Asked, models: NamedDependency[Repository]
) -> Response[UnloadedReply | InfoReply | NotLoadedReply]:
    """Answers when nothing of it runs any more, and says how long that took and what came back.

    New requests are refused at once (503 with Retry-After); those that run are answered first, up to
    the limit of `--drain`. Without a body every model is unloaded. A `model` that is unknown or not
    loaded is a 404; without a body, nothing loaded is no error.
    """
    name = read_unload(request.content_type[0], await request.body())
    request.scope["state"][ASKED] = {"model": name}
    before, began = _on_gpus(models), time.perf_counter()
    reports = await (_all(models) if name is None else _one(models, name))
    took_s = time.perf_counter() - began
    if reports:
        return Response(unloaded(reports, took_s, Gpus(before, _on_gpus(models))))
    if name is None:
        return Response(InfoReply(ALREADY_UNLOADED))
    return Response(not_loaded(name), status_code=404)


async def _one(models: Repository, name: str) -> list[UnloadReport]:
    """Empty: there is no such model, or nothing of it ran."""
    try:
        report = await models.unload(name)
    except NotFoundError:
        return []
    return [report] if report.generations else []


async def _all(models: Repository) -> list[UnloadReport]:
    """Raises FailedError if one of them is left, naming it."""
    report = await models.unload_all()
    if report.errors:
        gone = ", ".join(sorted(r.model for r in report.unloaded)) or "none"
        left = "; ".join(f"'{model}': {text}" for model, text in sorted(report.errors.items()))
        raise FailedError(f"not every model was unloaded. Unloaded: {gone}. Still there: {left}")
    return list(report.unloaded)


def _on_gpus(models: Repository) -> frozenset[str]:
    """Models that have something on a GPU now, or may get it: what is on its way counts."""
    return frozenset(
        status.name
        for status in models.statuses()
        if any(g.device.startswith("cuda") and not g.ended.is_set() for g in status.generations)
    )


HANDLERS: list[Any] = [load_model, unload_model]
router = Router("/v1", route_handlers=HANDLERS)
