"""Requests that a document allows, and such as it forbids; what is wrong with the answers to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import FailureGroup, load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

load_all_checks()
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
MEANT = {501, 503, 507}  # what a server may say that has not broken
# Triton's words for a wrong request, for which it has the number of a broken server.
TRITONS = ("failed to load '", "unexpected error on creating Triton parameter")
GOOD, BAD = 4, 3  # requests of each operation
CALM = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


def operations_of(document: dict[str, Any], names: list[str]) -> Iterator[Any]:
    """As schemathesis has them. `names`: of models, with which to ask now and then."""
    for result in schemathesis.openapi.from_dict(_led(document, names)).get_all_operations():
        yield result.ok()


def faults_of(url: str, operation: Any, session: requests.Session) -> Iterator[str]:
    """What is wrong with the answers to some requests of this operation."""
    found: list[str] = []

    def tried(case: Case) -> None:
        answer = case.call(base_url=url, session=session, timeout=40)
        meant = answer.status_code in MEANT or any(word in answer.text for word in TRITONS)
        if answer.status_code >= 500 and not meant:
            found.append(
                f"{answer.status_code} {answer.text[:300]}: {case.as_curl_command()[:500]}"
            )
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as error:
            found.append(f"{error!s:.1500}\n{answer.status_code} {answer.text[:300]}")

    named = {p.name: p.definition["example"] for p in operation.path_parameters}
    plans = [(GOOD, GenerationMode.POSITIVE, named), (BAD, GenerationMode.NEGATIVE, {})]
    if named:
        plans.append((BAD, GenerationMode.POSITIVE, {}))
    for count, mode, fixed in plans:
        cases = operation.as_strategy(mode, path_parameters=fixed or None)
        calm = settings(max_examples=count, **CALM)
        with suppress(Unsatisfiable):  # where nothing can be said, nothing wrong can
            seed(5)(calm(given(case=cases)(tried)))()
    yield from found


def _led(document: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The document with names that exist where any text would do: else hardly a request gets far."""
    found = copy.deepcopy(document)
    for schema in found["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            if name in ("model", "model_name", "model_id"):
                for kind in (field, *field.get("anyOf", ())):
                    if kind.get("type") == "string":
                        kind["enum"] = names
    return found
