"""GET /, GET and DELETE /models, GET /device/cpu, /device/cuda: as Marqo's clients know them.

An eject is an unload by hand, of the whole model: its versions come and go together. So a model that
serves on several devices is not taken off one of them (409): eject it without a device. Names are
compared exactly; an alias names its model.
"""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, Router, delete, get
from litestar.datastructures.headers import Accept
from litestar.di import NamedDependency

from repository.errors import (
    ConflictError,
    ModelNotFoundError,
    OutOfBoundsError,
    RejectedError,
)
from repository.lifecycle.status import ModelStatus
from repository.repository import Repository
from server.codecs import marqo_answers as answers
from server.codecs.marqo_answers import CpuInfo, CudaInfo, Ejected, Greeting, LoadedModels
from server.codecs.marqo_errors import NoCudaError, NotCachedError
from server.codecs.marqo_page import HEADERS, page
from server.codecs.marqo_query import eject_query
from server.errors import ForbiddenError
from server.limits import ASKED
from server.origin import check_origin
from server.settings import Settings

JSON, HTML = "application/json", "text/html"
TAGS = ["Marqo"]
Asked = Request[Any, Any, Any]


@get("/", sync_to_thread=False, summary="Who is here", tags=TAGS)
def greet(
    request: Asked,
    models: NamedDependency[Repository],
    settings: NamedDependency[Settings],
    info: NamedDependency[Any],
) -> Response[Any]:
    """For clients the version that they compare; for browsers (Accept: text/html) a plain page, which
    names the models where nobody is asked for a key. Open to everyone."""
    accept = request.headers.get("accept", "")
    if accept and Accept(accept).best_match([JSON, HTML], JSON) == HTML:
        statuses = models.statuses() if _may_know(request, settings) else None
        text = page(info.name, info.version, statuses)
        return Response(text, media_type=HTML, headers=HEADERS)
    greeting = Greeting(f"Welcome to {info.name}", info.name, info.version)
    return Response(greeting, headers={"Vary": "Accept"})


@get("/models", sync_to_thread=False, summary="List the loaded models", tags=TAGS)
def loaded(models: NamedDependency[Repository]) -> LoadedModels:
    """One row for each model that serves and each device that it is on, by name."""
    return answers.loaded_models(models.statuses())


@delete("/models", status_code=200, summary="Eject a model", tags=TAGS)
async def eject(request: Asked, models: NamedDependency[Repository]) -> Ejected:
    """Unloads `model_name`, and answers when nothing of it runs any more. With `model_device` (cpu,
    cuda, cuda:1) only if that is where it serves. It stays unloaded until somebody loads it."""
    name, device = eject_query(request.scope["query_string"])
    request.scope["state"][ASKED] = {"model_name": name, "model_device": device}
    status = _known(models, name, device)
    found = answers.devices_of(status)  # from here no await until it is unwanted
    # "cuda:0" is what everybody but Marqo calls its "cuda".
    if not found or (device and answers.word_of(device) not in found):
        raise NotCachedError(name, device)
    if device and len(found) > 1:
        raise ConflictError(
            f"model '{status.name}' serves on {' and '.join(found)}, and its versions are unloaded "
            "together; eject it without a model_device"
        )
    await models.unload(status.name)
    return answers.ejected(name, device)


@get("/device/cpu", sync_to_thread=False, summary="How busy the machine is", tags=TAGS)
def cpu(models: NamedDependency[Repository]) -> CpuInfo:
    """Of all cores, since somebody asked last; of the memory that this server may have."""
    return answers.cpu_info(models.host())


@get("/device/cuda", summary="How busy each GPU is", tags=TAGS)
async def cuda(models: NamedDependency[Repository]) -> CudaInfo:
    """400 where there is no GPU. What a GPU does not tell is "unknown"."""
    gpus = await models.gpus()
    if not gpus:
        raise NoCudaError
    return answers.cuda_info(gpus)


def _known(models: Repository, name: str, device: str) -> ModelStatus:
    """To Marqo's clients no model and what can be no model's name are one and the same."""
    try:
        return models.status(name)
    except (ModelNotFoundError, RejectedError, OutOfBoundsError) as error:
        raise NotCachedError(name, device) from error


def _may_know(request: Asked, settings: Settings) -> bool:
    """The page is open to everyone, the names of the models are not: as with every other call, a page
    of another site may not read them."""
    if settings.api_keys is not None:
        return False
    if settings.insecure:
        return True
    try:
        check_origin(request.scope["headers"])
    except ForbiddenError:
        return False
    return True


HANDLERS: list[Any] = [greet, loaded, eject, cpu, cuda]
router = Router("/", route_handlers=HANDLERS)
