"""/models/MODEL/adapters..., /adapters...: LoRA adapters, as DJL Serving manages them."""

from __future__ import annotations

from typing import Any

from repository.errors import AdapterRefusedError, ConflictError, ModelNotFoundError, NoRoomError
from server.codecs.djl_adapters import AdapterList, DescribedAdapter, StatusReply, token_of
from server.faces import djl
from server.openapi.failures import DjlError
from server.openapi.operation import Answer, Face, Operation, Param, asked, ok

FACE = Face(
    name="DJL adapters",
    description="LoRA adapters of a model, as DJL Serving manages them. Without `/models/{model}`: of "
    "the only model that there is.",
    error=DjlError,
)


REGISTER: dict[str, Any] = {
    "type": "object",
    "description": "The same as in the query; what else is there are options of the model's own.",
    "properties": {
        "name": {"type": "string"},
        "src": {"type": "string"},
        "preload": {"type": ["boolean", "string"]},
        "pin": {"type": ["boolean", "string"]},
    },
}
MODEL = Param(
    name="model",
    where="path",
    description="The model. Slashes as they are, or as %2F.",
    schema={"type": "string", "minLength": 1, "maxLength": 200},
    example="tiny-lm",
)
NAME = Param(
    name="adapter",
    where="path",
    description="The adapter.",
    schema={"type": "string", "minLength": 1, "maxLength": 200},
    example="pirate",
)
FLAGS = (
    Param(name="preload", description="Read it now: true or false."),
    Param(name="pin", description="It keeps its place on the device: true or false."),
)
SOURCE = "A folder of the model, of the repository, or of an allowed root."
ROW = {"name": "pirate", "src": "adapters/pirate", "pin": False, "preload": True}
DESCRIBED = {
    **ROW,
    "state": "loaded",
    "residence": "device",
    "memory_bytes": 65536,
    "rank": 4,
    "origin": "folder",
    "options": {},
    "error": None,
}
NO_MODEL = ModelNotFoundError("The model tiny-lm2 was not found")
NO_ADAPTER = ModelNotFoundError("The adapter parrot was not found")
TAKEN = ConflictError(
    "The adapter pirate already exists. If you want to replace it, please unregistering before "
    "registering a new adapter with the same name."
)
REFUSED = AdapterRefusedError("adapter 'pirate': no tensor of it matches a layer of 'tiny-lm'")
NO_SLOT = NoRoomError("every device slot is pinned")
WISH = {400: None, 404: NO_MODEL, 405: None, 500: None, 503: None}
ALSO = {413: None, 415: None, 424: REFUSED, 507: NO_SLOT}


def _done(word: str) -> dict[int, Answer]:
    return ok(StatusReply, {"status": f"Adapter pirate {word}"})


def _below(prefix: str) -> tuple[Operation, ...]:
    inside = bool(prefix)
    model = (MODEL,) if inside else ()
    top = f"{prefix}/adapters"
    one, update = f"{top}/{{adapter}}", f"{top}/{{adapter}}/update"
    route = top.replace("{model}", "{model:str}")
    one_route = f"{route}/{{adapter:str}}"
    return (
        Operation(
            method="GET",
            path=top,
            route=route,
            face=FACE,
            handler=djl.index,
            params=(
                *model,
                Param(
                    name="limit", description="1 to 100; 100 otherwise.", schema={"type": "integer"}
                ),
                Param(
                    name="next_page_token", description="As the page before said; `0`: the first."
                ),
            ),
            answers=ok(AdapterList, {"adapters": [ROW], "nextPageToken": token_of("pirate")}),
            errors={400: None, 404: NO_MODEL, 405: None},
        ),
        Operation(
            method="POST",
            path=top,
            route=route,
            face=FACE,
            handler=djl.register,
            params=(
                *model,
                Param(name="name", description="What it will be called.", example="parrot"),
                Param(name="src", description=SOURCE, example="adapters/pirate"),
                *FLAGS,
            ),
            body=asked(REGISTER, parrot={"name": "parrot", "src": "adapters/pirate", "pin": False}),
            body_required=False,
            answers=_done("registered"),
            errors={**WISH, 409: TAKEN, **ALSO},
        ),
        Operation(
            method="GET",
            path=one,
            route=one_route,
            face=FACE,
            handler=djl.describe,
            params=(*model, NAME),
            answers=ok(list[DescribedAdapter], [DESCRIBED]),
            errors={400: None, 404: NO_ADAPTER, 405: None},
        ),
        Operation(
            method="DELETE",
            path=one,
            route=one_route,
            face=FACE,
            handler=djl.unregister,
            params=(*model, NAME),
            answers=_done("unregistered"),
            errors={**WISH, 404: NO_ADAPTER, 409: None, 507: None},
        ),
        Operation(
            method="POST",
            path=update,
            route=f"{one_route}/update",
            face=FACE,
            handler=djl.update,
            params=(*model, NAME, *FLAGS, Param(name="src", description=SOURCE)),
            body=asked(REGISTER, pin={"pin": True}),
            body_required=False,
            answers=_done("updated"),
            errors={**WISH, 404: NO_ADAPTER, 409: None, **ALSO},
        ),
    )


OPERATIONS = (*_below("/models/{model}"), *_below(""))
