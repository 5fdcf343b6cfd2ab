"""GET /openapi.json, and /docs: Swagger UI from the package flask-swagger-ui, of which only the static
files are read (nothing of it is imported).

Open to everyone: it tells nothing of this server but its version. The page fetches nothing from
elsewhere, and the Content-Security-Policy sees to that; there is no script or style inside the page.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from litestar import MediaType, Response, Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from server.errors import NoSuchPathError
from server.faces.health import Info
from server.openapi.document import document

PACKAGE = "flask_swagger_ui"
MEDIA = {  # the framework says the charset of texts
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
    "start.js": "text/javascript",
}
PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Model Depot: API</title>
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="api"></div>
<noscript><a href="/openapi.json">The document as JSON</a></noscript>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
# validatorUrl: the page would show an image of a foreign server otherwise.
START = b"""SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  docExpansion: "none",
  persistAuthorization: false,
  validatorUrl: null,
});
"""
SAFE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@get("/openapi.json", sync_to_thread=True)
def openapi(info: NamedDependency[Info]) -> Response[bytes]:
    """Made when first asked for."""
    body = document(info.name, info.version)
    return Response(body, media_type=MediaType.JSON, headers=SAFE)


@get("/docs", sync_to_thread=False)
def docs() -> Response[bytes]:
    return Response(PAGE, media_type="text/html", headers=SAFE)


@get("/docs/{file:str}", sync_to_thread=True)
def asset(file: FromPath[str]) -> Response[bytes]:
    media = MEDIA.get(file)
    if media is None:
        raise NoSuchPathError(f"the page has no such part; its parts are {', '.join(MEDIA)}")
    return Response(_content(file), media_type=media, headers=SAFE)


@cache
def _content(file: str) -> bytes:
    """`file` is one of MEDIA."""
    if file == "start.js":
        return START
    try:
        return (_folder() / file).read_bytes()
    except OSError as error:
        raise _not_installed() from error


def _folder() -> Path:
    found = find_spec(PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise _not_installed()
    return Path(places[0]) / "dist"


def _not_installed() -> NoSuchPathError:
    return NoSuchPathError(
        "the files of the page are not installed: pip install flask-swagger-ui; "
        "/openapi.json needs none"
    )


HANDLERS: list[Any] = [openapi, docs, asset]
router = Router("/", route_handlers=HANDLERS)
