"""/models/MODEL/adapters...: LoRA adapters as DJL Serving manages them; and /adapters..., where the
repository has one model only.

What DJL cannot do and these calls can: unpin (`pin=false`), put other files in an adapter's place
(`src`), take parameters as JSON too. They hold for every model that takes adapters, under names with
'/' too (`codecs.djl_paths`). The errors come in the order of the contract: the model, the adapter's
name, its src, the rest of what is said, and then what the repository finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from litestar import Request, Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from repository.errors import (
    AdapterNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    OutOfBoundsError,
    RejectedError,
)
from repository.names import shown
from repository.repository import Repository
from server.codecs import djl_calls as calls
from server.codecs.djl_adapters import (
    AdapterList,
    DescribedAdapter,
    StatusReply,
    described,
    page,
)
from server.codecs.djl_calls import Said
from server.codecs.djl_paths import unfolded
from server.limits import ASKED

TAGS = ["DJL adapters"]
ALL = ["/adapters", "/models/{model:str}/adapters"]
ONE = [f"{path}/{{adapter:str}}" for path in ALL]
UPDATE = [f"{path}/update" for path in ONE]
LONGEST = 200  # characters of a client's own name

Asked = Request[Any, Any, Any]


@post(ALL, status_code=200, summary="Register an adapter", tags=TAGS)
async def register(
    request: Asked, models: NamedDependency[Repository], model: FromPath[str] = ""
) -> StatusReply:
    """Answers when every running generation of the model has taken the adapter; after any error
    nothing has changed.

    `name` and `src` (a folder in the model's own, in the repository or in an allowed root) are
    required, `preload` (default true) and `pin` (default false) are not. Whatever else is said is an
    option for the model. In the query, or in a JSON body with the same keys; the query wins.
    """
    known = _model(models, model)
    said = await _said(request)
    name, src = calls.required(said, "name"), calls.required(said, "src")
    preload, pin = calls.truth(said, "preload"), calls.truth(said, "pin")
    await models.register_adapter(
        known,
        name,
        src,
        preload=preload is not False,
        pin=bool(pin),
        options=calls.options(said),
    )
    return StatusReply(f"Adapter {name} registered")


@post(UPDATE, status_code=200, summary="Update an adapter", tags=TAGS)
async def update(
    request: Asked,
    models: NamedDependency[Repository],
    adapter: FromPath[str],
    model: FromPath[str] = "",
) -> StatusReply:
    """What is not said stays as it was. `pin=false` unpins, `src` puts other files in its place; a
    request that runs ends with the old ones. After any error nothing has changed.
    """
    known = _model(models, model)
    if all(view.name != adapter for view in models.adapters(known)):
        raise _not_found(adapter)
    said = await _said(request)
    with _found(adapter):
        if said.get("name", "") not in ("", adapter):
            raise InvalidRequestError(
                f"the adapter '{shown(adapter)}' cannot be renamed; register it under its new name"
            )
        await models.update_adapter(
            known,
            adapter,
            src=said.get("src") or None,
            preload=calls.truth(said, "preload"),
            pin=calls.truth(said, "pin"),
            options=calls.options(said),
        )
    return StatusReply(f"Adapter {adapter} updated")


@get(ONE, summary="Describe an adapter", tags=TAGS)
async def describe(
    models: NamedDependency[Repository], adapter: FromPath[str], model: FromPath[str] = ""
) -> list[DescribedAdapter]:
    """A list of one. Its workers are asked where it is."""
    known = _model(models, model)
    for view in await models.adapters_now(known):
        if view.name == adapter and view.state != "settling":
            return [described(view)]
    raise _not_found(adapter)


@delete(ONE, status_code=200, summary="Unregister an adapter", tags=TAGS)
async def unregister(
    models: NamedDependency[Repository], adapter: FromPath[str], model: FromPath[str] = ""
) -> StatusReply:
    """Requests that use it end as they began. Its files are left alone: of the model's own folder
    `adapters/` it stays unregistered until it is registered, or put there anew.
    """
    known = _model(models, model)
    with _found(adapter):
        await models.unregister_adapter(known, adapter)
    return StatusReply(f"Adapter {adapter} unregistered")


@get(ALL, summary="List adapters", tags=TAGS, sync_to_thread=False)
def index(
    request: Asked, models: NamedDependency[Repository], model: FromPath[str] = ""
) -> AdapterList:
    """By name, `limit` (1 to 100, else 100) at once; `next_page_token` as the page before gave it.
    What is registered or unregistered between two pages neither repeats nor hides another.
    """
    known = _model(models, model)
    said = calls.said(request.scope["query_string"])
    limit = calls.number(said, "limit")
    return page(models.adapters(known), limit, said.get("next_page_token", ""))


async def _said(request: Asked) -> Said:
    """Also for the audit log."""
    body: Any = None
    if await request.body():
        body = await request.json()
        if not isinstance(body, Mapping):
            raise InvalidRequestError("the body must be a JSON object with the parameters")
    said = calls.said(request.scope["query_string"], body)
    request.scope["state"][ASKED] = said
    return said


def _model(models: Repository, segment: str) -> str:
    """The model that the address names, aliases followed; the only one where it names none."""
    if not segment:
        names = models.names()
        if len(names) != 1:
            raise InvalidRequestError(
                "The adapter must be prefixed with a model unless there is only a single startup "
                "model used."
            )
        return names[0]
    name = unfolded(segment)
    try:
        return models.status(name).name
    except (ModelNotFoundError, RejectedError, OutOfBoundsError):
        raise ModelNotFoundError(f"The model {shown(name, LONGEST)} was not found") from None


@contextmanager
def _found(adapter: str) -> Iterator[None]:
    """Where an adapter is managed, one that is not there is a 404; only who asks it something is
    told that what the request relies on is missing."""
    try:
        yield
    except AdapterNotFoundError:
        raise _not_found(adapter) from None


def _not_found(adapter: str) -> NotFoundError:
    return NotFoundError(f"The adapter {shown(adapter, LONGEST)} was not found")


HANDLERS: list[Any] = [register, update, describe, unregister, index]
router = Router("/", route_handlers=HANDLERS)
