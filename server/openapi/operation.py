"""What one call of a face takes and answers, as data. `document` makes OpenAPI of it.

Types are those that the faces decode and encode with, wherever they have some; where a face writes its
JSON by hand, a struct beside the operation says how it looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

JSON = "application/json"
Schema = dict[str, Any]
Shape = Callable[[BaseException], tuple[int, Any]]  # an error's status and body, as a face has them


@dataclass(frozen=True, kw_only=True)
class Face:
    """A group of calls. `error`: how its errors look; `shape`: who renders them, where the path does
    not tell `server.shapes`."""

    name: str
    description: str
    error: Any
    shape: Shape | None = None


@dataclass(frozen=True, kw_only=True)
class Param:
    """`example`: one that works with the models of the other examples."""

    name: str
    where: str = "query"  # query, path, header
    description: str
    schema: Schema = field(default_factory=lambda: {"type": "string"})
    example: Any = None
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class Content:
    """One media type of a body. `kind`: a type for msgspec, several (one of them), or a schema."""

    kind: Any
    media: str = JSON
    examples: Mapping[str, Any] = field(default_factory=dict)


def events(example: str) -> Content:
    """Server-sent events. OpenAPI 3.1 has no words for their form: the example shows it."""
    anything = {"description": "Server-sent events, as the WHATWG's HTML standard has them."}
    return Content(kind=anything, media="text/event-stream", examples={"stream": example})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`headers`: name → description."""

    description: str
    contents: tuple[Content, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`handler`: whose summary and docstring are the words for it; where one handler is several calls,
    or none that the framework runs, `summary` and `description` are here.

    `route`: the app's own pattern, where it is another one than `path`. `errors`: statuses beyond
    those that follow from the key it needs, each with the error that is shown (none: the usual one).
    """

    method: str
    path: str
    face: Face
    answers: Mapping[int, Answer]
    handler: Any = None
    summary: str = ""
    description: str = ""
    route: str = ""
    params: tuple[Param, ...] = ()
    body: tuple[Content, ...] = ()
    body_required: bool = True
    errors: Mapping[int, BaseException | None] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, str]:
        """Summary and description."""
        if self.handler is None:
            return self.summary, self.description
        told = inspect.cleandoc(self.handler.fn.__doc__ or "")
        return self.handler.summary or self.summary, self.description or told

    @property
    def id(self) -> str:
        """ "post_v1_models_load": stable, for those who make clients of the document."""
        words = self.path.replace("{", "").replace("}", "").replace("-", "_").strip("/")
        return f"{self.method.lower()}_{words.replace('/', '_') or 'root'}"

    @property
    def sample_path(self) -> str:
        """With the examples in place of the names."""
        path = self.path
        for param in self.params:
            if param.where == "path":
                path = path.replace(f"{{{param.name}}}", str(param.example))
        return path


def ok(kind: Any, example: Any, description: str = "Done.", **headers: str) -> dict[int, Answer]:
    """200 with a JSON body."""
    contents = (Content(kind=kind, examples={"answer": example}),)
    return {200: Answer(description=description, contents=contents, headers=headers)}


def asked(kind: Any, **examples: Any) -> tuple[Content, ...]:
    """A JSON body."""
    return (Content(kind=kind, examples=examples),)
