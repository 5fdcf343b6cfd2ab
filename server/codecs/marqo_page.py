"""GET / for people: a plain page of what is here. It runs nothing and fetches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from urllib.parse import quote

from repository.lifecycle.status import ModelStatus

MOST = 1000  # models on the page; the API lists them all
LINKS = (
    ("/docs", "the API"),
    ("/v1/models/status", "the state of every model"),
    ("/metrics", "metrics"),
    ("/health", "health"),
)
# Nothing may be loaded, framed or sent from it, whatever a model is called.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Vary": "Accept",
}


def page(title: str, version: str, statuses: Iterable[ModelStatus] | None) -> str:
    """`statuses` None: who asks may not know which models there are."""
    links = "".join(f'<li><a href="{href}">{escape(text)}</a></li>' for href, text in LINKS)
    name = escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{name}</title></head><body><h1>{name}</h1>"
        f"<p>Version {escape(version)}</p><ul>{links}</ul><h2>Models</h2>{_models(statuses)}"
        "</body></html>\n"
    )


def _models(statuses: Iterable[ModelStatus] | None) -> str:
    if statuses is None:
        return "<p>Not everybody may know them: GET /v1/models/status, with a key.</p>"
    found = list(statuses)
    if not found:
        return "<p>There are none: put a folder with a model into the repository.</p>"
    rows = "".join(map(_row, found[:MOST]))
    more = f"<p>and {len(found) - MOST} more</p>" if len(found) > MOST else ""
    head = "<tr><th>model</th><th>state</th><th>version</th><th>why</th></tr>"
    return f"<table>{head}{rows}</table>{more}"


def _row(status: ModelStatus) -> str:
    version = "" if status.serving_version is None else str(status.serving_version)
    why = status.last_error.message if status.last_error else ""
    link = f'<a href="/v1/models/{escape(quote(status.name))}">{escape(status.name)}</a>'
    return (
        f"<tr><td>{link}</td><td>{status.state}</td><td>{version}</td><td>{escape(why)}</td></tr>"
    )
