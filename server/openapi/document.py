"""The operations of all faces → the OpenAPI document, as JSON. Pure; made when somebody first asks.

The scope that a call needs comes from the table that the gate itself asks; the errors that follow from
it (401, 403) are added to each call that needs one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from server import errors
from server.auth import scope_of
from server.openapi.failures import USUAL, WHY, rendered
from server.openapi.operation import Answer, Content, Operation, Schema

VERSION = "3.1.0"
REFERENCE = "#/components/schemas/{name}"
ABOUT = """\
One server, several habits: PolarGrid's, Marqo's, Aphrodite's and DJL's ways to manage models, KServe V2
and OpenAI's ways to ask them.

**Names.** A model's name may hold slashes (`ViT-L/14`); in a path they are written as they are, or as
`%2F`. It is segments of letters, digits and `_ . + @ = -`.

**Keys.** Without a key file everything is open, to this machine alone. With one, each call needs a key
with the scope that `x-scope` names (`null`: open to everyone); `admin` includes the others. Send
`Authorization: Bearer KEY` or `x-api-key: KEY`.

**Errors** look as each face's clients expect, with the same number for the same reason. Bytes that are
no HTTP request, heads that are too long and clients that stop half-way are answered 400, 431 and 408
on any path. Every answer of a managing call has an `x-request-id`: yours, if you sent one.
"""
SECURITY: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
RETRY_AFTER = {"Retry-After": "Whole seconds to wait."}
HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    405: {"Allow": "The verbs that would do."},
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}


@lru_cache(4)
def document(title: str, version: str) -> bytes:
    from server.openapi.calls import OPERATIONS

    return errors.encode(build(title, version, OPERATIONS))


def build(title: str, version: str, operations: Sequence[Operation]) -> Schema:
    """Raises ValueError where two operations have one address."""
    names = _Names(operations)
    paths: dict[str, dict[str, Schema]] = {}
    for op in operations:
        place = paths.setdefault(op.path, {})
        if op.method.lower() in place:
            raise ValueError(f"{op.method} {op.path} is described twice")
        place[op.method.lower()] = _operation(op, names)
    faces = {op.face.name: op.face for op in operations}
    return {
        "openapi": VERSION,
        "info": {"title": title, "version": version, "description": ABOUT},
        "servers": [{"url": "/", "description": "the server that showed you this"}],
        "tags": [{"name": f.name, "description": f.description} for f in faces.values()],
        "paths": paths,
        "components": {"schemas": names.components, "securitySchemes": SECURITY},
    }


class _Names:
    """Schemas for the types that the operations mention; each type has its name once."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        kinds = {id(k): k for op in operations for k in _kinds(op)}
        schemas, components = msgspec.json.schema_components(kinds.values(), ref_template=REFERENCE)
        raw = errors.encode([schemas, components]).decode()
        for name in components:
            if "." in name:  # two types of one name: the last of the module's is put before it
                module, _, last = name.rpartition(".")
                short = module.rpartition(".")[2].title().replace("_", "") + last
                raw = raw.replace(f'/{name}"', f'/{short}"').replace(f'"{name}":', f'"{short}":')
        schemas, self.components = msgspec.json.decode(raw)
        self._found = dict(zip(kinds, schemas, strict=True))

    def of(self, kind: Any) -> Any:
        if isinstance(kind, Mapping):
            return dict(kind)
        if isinstance(kind, tuple):
            return {"anyOf": [self._found[id(one)] for one in kind]}
        return self._found[id(kind)]


def _kinds(op: Operation) -> Iterable[Any]:
    """The types that msgspec knows."""
    contents = [c for answer in op.answers.values() for c in answer.contents]
    for kind in (op.face.error, *(c.kind for c in (*op.body, *contents))):
        if isinstance(kind, tuple):
            yield from kind
        elif not isinstance(kind, Mapping):
            yield kind


def _operation(op: Operation, names: _Names) -> Schema:
    scope = scope_of(op.method, op.sample_path)
    need = "Open to everyone." if scope is None else f"Needs the scope **{scope}**."
    summary, description = op.words
    found: Schema = {
        "operationId": op.id,
        "tags": [op.face.name],
        "summary": summary,
        "description": f"{description}\n\n{need}",
        "x-scope": scope,
        "security": [] if scope is None else [{name: []} for name in SECURITY],
    }
    if op.params:
        found["parameters"] = [
            {
                "name": p.name,
                "in": p.where,
                "required": p.required or p.where == "path",
                "description": p.description,
                "schema": p.schema,
                **({} if p.example is None else {"example": p.example}),
            }
            for p in op.params
        ]
    if op.body:
        found["requestBody"] = {"required": op.body_required, "content": _contents(op.body, names)}
    answers = {status: _answer(answer, names) for status, answer in op.answers.items()}
    for status, answer in _failures(op, guarded=scope is not None).items():
        if status in answers:  # a face that answers two forms with one number says so itself
            continue
        answers[status] = _answer(answer, names)
    found["responses"] = {str(status): answers[status] for status in sorted(answers)}
    return found


def _failures(op: Operation, *, guarded: bool) -> dict[int, Answer]:
    wanted: dict[int, BaseException | None] = dict(op.errors)
    if guarded:
        wanted |= {401: wanted.get(401), 403: wanted.get(403)}
        if op.handler is not None and op.method != "GET":
            wanted[429] = None  # the app's turnstile
    found = {}
    for number, error in wanted.items():
        example = error or USUAL[number]
        status, body = rendered(op, example)
        content = Content(kind=op.face.error, examples={errors.code_of(example): body})
        found[status] = Answer(
            description=WHY[status], contents=(content,), headers=HEADERS.get(status, {})
        )
    return found


def _answer(answer: Answer, names: _Names) -> Schema:
    found: Schema = {"description": answer.description}
    if answer.headers:
        found["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in answer.headers.items()
        }
    if answer.contents:
        found["content"] = _contents(answer.contents, names)
    return found


def _contents(contents: Iterable[Content], names: _Names) -> Schema:
    found: Schema = {}
    for content in contents:
        entry = {"schema": names.of(content.kind)}
        if content.examples:
            entry["examples"] = {name: {"value": value} for name, value in content.examples.items()}
        found[content.media] = entry
    return found
