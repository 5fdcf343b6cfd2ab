"""APIs that ask for a header of their own, as Triton's --http-restricted-api has it.

    model-repository,logging:x-admin=secret      these groups need the header x-admin: secret

Every address belongs to one group. Those that Triton does not have belong to the group that does the
same: a model can be loaded on several faces, and a lock on one of them would be none. This is no
replacement for API keys, which are asked for besides.

Rules: values are compared in constant time; a group that two texts name is an error, for nobody could
say which of them counts. It must not know how a refusal is shown.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable

from repository.errors import ConfigError
from server.auth import Scope, scope_of
from server.refusals import ForbiddenError

GROUPS = (
    "health", "metadata", "inference", "shared-memory", "model-config", "model-repository",
    "statistics", "trace", "logging",
)  # fmt: skip
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_BELOW_V2 = (
    ("/v2/repository/", "model-repository"),
    ("/v2/systemsharedmemory", "shared-memory"),
    ("/v2/cudasharedmemory", "shared-memory"),
    ("/v2/health/", "health"),
    ("/v2/trace/", "trace"),
    ("/v2/logging", "logging"),
    ("/v2/models/stats", "statistics"),
)
_OF_A_MODEL = (
    ("/infer", "inference"),
    ("/generate", "inference"),
    ("/generate_stream", "inference"),
    ("/ready", "health"),
    ("/config", "model-config"),
    ("/stats", "statistics"),
    ("/trace/setting", "trace"),
)
_OPEN = ("/", "/docs", "/openapi.json")


def group_of(method: str, path: str) -> str | None:
    """`path` decoded and normalised, as the router sees it. None: nothing of it can be restricted."""
    if path.startswith("/v2"):
        for begin, group in _BELOW_V2:
            if path.startswith(begin):
                return group
        if path.startswith("/v2/models/"):
            for end, group in _OF_A_MODEL:
                if path.endswith(end):
                    return group
        return "metadata"
    if path in _OPEN or path.startswith("/docs/"):
        return None
    if path == "/health":
        return "health"
    scope = scope_of(method, path)
    if scope is Scope.INFERENCE and method == "POST":
        return "inference"
    return {Scope.METRICS: "statistics", Scope.ADMIN: "model-repository"}.get(
        scope or Scope.INFERENCE, "metadata"
    )


class Restrictions:
    """`texts` as the setting has them; `prefix` stands before each header's name (gRPC's has one).

    Raises ConfigError.
    """

    def __init__(
        self, texts: Iterable[str] = (), *, flag: str = "--http-restricted-api", prefix: str = ""
    ) -> None:
        self._needs: dict[str, tuple[bytes, bytes]] = {}
        self._prefix = prefix
        for text in texts:
            names, header, value = _parts(text, flag)
            for group in names:
                if group in self._needs:
                    raise ConfigError(f"'{group}' is restricted twice", where=flag)
                self._needs[group] = ((prefix + header).lower().encode(), value.encode())

    def __bool__(self) -> bool:
        return bool(self._needs)

    def check(self, group: str | None, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Header names in lower case. Raises ForbiddenError."""
        needed = self._needs.get(group) if group is not None else None
        if needed is None:
            return
        name, value = needed
        found = [given for header, given in headers if header == name]
        if not found or not hmac.compare_digest(found[0], value):
            what = "protocol" if self._prefix else "API"
            raise ForbiddenError(f"This {what} is restricted, expecting header '{name.decode()}'")


def _parts(text: str, flag: str) -> tuple[list[str], str, str]:
    groups, colon, said = text.partition(":")
    header, equals, value = said.partition("=")
    names = [name.strip() for name in groups.split(",") if name.strip()]
    if not (colon and equals and names and value and _HEADER.fullmatch(header)):
        raise ConfigError(
            "must look like GROUP[,GROUP]:HEADER=VALUE, such as model-repository:x-admin=secret",
            where=flag,
        )
    for name in names:
        if name not in GROUPS:
            raise ConfigError(
                f"there is no group '{name[:40]}'; there are {', '.join(GROUPS)}", where=flag
            )
    return names, header, value
