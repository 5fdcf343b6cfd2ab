"""APIs behind a header: which address belongs to which group, and who is let in."""

from __future__ import annotations

import pytest

from repository.errors import ConfigError
from server.refusals import ForbiddenError
from server.restricted import GROUPS, Restrictions, group_of

SECRET = (b"x-admin", b"secret")


@pytest.mark.parametrize(
    ("method", "path", "group"),
    [
        ("GET", "/v2", "metadata"),
        ("GET", "/v2/health/live", "health"),
        ("GET", "/v2/models/a/ready", "health"),
        ("GET", "/v2/models/a/versions/1", "metadata"),
        ("GET", "/v2/models/a/config", "model-config"),
        ("GET", "/v2/models/stats", "statistics"),
        ("GET", "/v2/models/org/a/versions/1/stats", "statistics"),
        ("POST", "/v2/models/a/infer", "inference"),
        ("POST", "/v2/models/a/generate", "inference"),
        ("POST", "/v2/models/a/generate_stream", "inference"),
        ("POST", "/v2/models/a/trace/setting", "trace"),
        ("GET", "/v2/trace/setting", "trace"),
        ("POST", "/v2/logging", "logging"),
        ("POST", "/v2/repository/index", "model-repository"),
        ("POST", "/v2/repository/models/a/load", "model-repository"),
        ("GET", "/v2/systemsharedmemory/status", "shared-memory"),
        ("POST", "/v2/cudasharedmemory/unregister", "shared-memory"),
        ("POST", "/v1/models/load", "model-repository"),
        ("DELETE", "/v1/model/unload", "model-repository"),
        ("POST", "/v1/chat/completions", "inference"),
        ("GET", "/v1/models", "metadata"),
        ("GET", "/metrics", "statistics"),
        ("GET", "/health", "health"),
        ("GET", "/docs", None),
    ],
)
def test_every_address_belongs_to_one_group(method: str, path: str, group: str | None) -> None:
    assert group_of(method, path) == group


def test_without_the_header_or_with_another_value_it_is_refused_and_says_which_header() -> None:
    guard = Restrictions(["model-repository,logging:X-Admin=secret"])
    for headers in ([], [(b"x-admin", b"other")], [(b"x-other", b"secret")]):
        for group in ("model-repository", "logging"):
            with pytest.raises(ForbiddenError) as refused:
                guard.check(group, headers)
            assert str(refused.value) == "This API is restricted, expecting header 'x-admin'"


def test_with_the_header_it_passes_and_what_is_not_restricted_always_does() -> None:
    guard = Restrictions(["logging:x-admin=secret", "trace:x-trace=a=b"])
    guard.check("logging", [SECRET])
    guard.check("trace", [(b"x-trace", b"a=b")])
    guard.check("inference", [])
    guard.check(None, [])
    assert guard and not Restrictions()


def test_over_grpc_the_header_has_a_prefix() -> None:
    guard = Restrictions(["health:key=v"], flag="--grpc-restricted-protocol", prefix="triton-grpc-")
    guard.check("health", [(b"triton-grpc-key", b"v")])
    with pytest.raises(ForbiddenError, match=r"This protocol is restricted.*'triton-grpc-key'"):
        guard.check("health", [(b"key", b"v")])


@pytest.mark.parametrize(
    "text",
    ["", "logging", "logging:", "logging:x", "logging:x=", ":x=y", "logging:a b=c", "models:x=y"],
)
def test_a_text_that_says_no_such_thing_is_an_error_that_names_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--http-restricted-api"):
        Restrictions([text])


def test_a_group_that_two_texts_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'logging' is restricted twice"):
        Restrictions(["logging:a=b", "trace,logging:c=d"])


def test_the_groups_are_tritons() -> None:
    assert len(GROUPS) == 9
