"""Keys: what is read, what is compared, what survives a spoilt file."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import ConfigError
from server.auth import Gate, Scope, new_key, read_keys, scope_of, sent_key
from server.errors import ForbiddenError, UnauthorizedError


def line(name: str, key: str, *scopes: str) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'  - {{name: {name}, sha256: "{digest}", scopes: [{", ".join(scopes)}]}}\n'


def key_file(folder: Path, *lines: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text("keys:\n" + "".join(lines))
    return path


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


ALL = (
    line("reader", "r", "inference"),
    line("boss", "b", "admin"),
    line("prom", "p", "metrics"),
)


def test_without_a_key_file_everything_is_open() -> None:
    gate = Gate(None)
    assert gate.open and gate.check([], Scope.ADMIN) is None


@pytest.mark.parametrize(
    ("key", "may"),
    [("r", {Scope.INFERENCE}), ("b", set(Scope)), ("p", {Scope.METRICS})],
)
def test_a_key_opens_its_scopes_and_admin_opens_all(
    tmp_path: Path, key: str, may: set[Scope]
) -> None:
    gate = Gate(key_file(tmp_path, *ALL))
    for scope in Scope:
        if scope in may:
            found = gate.check(bearer(key), scope)
            assert found is not None
        else:
            with pytest.raises(ForbiddenError, match=scope):
                gate.check(bearer(key), scope)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer("x"),
        bearer(""),
        [(b"authorization", b"Basic b")],
        [(b"authorization", b"b")],
        [(b"x-api-key", b"")],
        bearer("b" * 10_000),
        [(b"authorization", b"Bearer \xff\xfe")],
        bearer(hashlib.sha256(b"b").hexdigest()),
    ],
)
def test_no_key_or_an_unknown_one_is_401_and_tells_how_to_ask(
    tmp_path: Path, headers: list[tuple[bytes, bytes]]
) -> None:
    gate = Gate(key_file(tmp_path, *ALL))
    with pytest.raises(UnauthorizedError) as caught:
        gate.check(headers, Scope.METRICS)
    assert caught.value.headers["WWW-Authenticate"] == "Bearer"


def test_what_is_open_needs_no_key(tmp_path: Path) -> None:
    assert Gate(key_file(tmp_path, *ALL)).check([], None) is None


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_the_scheme_may_be_written_in_any_case(scheme: bytes) -> None:
    assert sent_key([(b"authorization", scheme + b"  k ")]) == b"k"


def test_x_api_key_is_a_second_way_and_authorization_wins() -> None:
    both = [(b"x-api-key", b"x"), (b"authorization", b"Bearer a")]
    assert sent_key(both) == b"a" and sent_key(both[:1]) == b"x"
    assert sent_key([(b"x-api-key", b"x"), (b"authorization", b"Basic a")]) == b"x"


def test_every_key_is_compared_even_after_a_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("server.auth.hmac.compare_digest", compare)
    Gate(key_file(tmp_path, *ALL)).check(bearer("r"), Scope.INFERENCE)
    assert len(compared) == len(ALL)


def test_refusals_are_told_with_the_scope_that_was_needed(tmp_path: Path) -> None:
    refused: list[Scope] = []
    gate = Gate(key_file(tmp_path, *ALL), refused=refused.append)
    with pytest.raises(UnauthorizedError):
        gate.check([], Scope.ADMIN)
    with pytest.raises(ForbiddenError):
        gate.check(bearer("r"), Scope.METRICS)
    assert refused == [Scope.ADMIN, Scope.METRICS]


# the file ---------------------------------------------------------------------------------------


def test_a_changed_file_counts_within_a_second_without_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    gate = Gate(key_file(tmp_path, *ALL), clock=clock)
    key_file(tmp_path, line("new", "n", "admin"))
    clock.now = 0.5
    with pytest.raises(UnauthorizedError):
        gate.check(bearer("n"), Scope.ADMIN)
    clock.now = 1.5
    assert gate.check(bearer("n"), Scope.ADMIN) is not None
    with pytest.raises(UnauthorizedError):
        gate.check(bearer("b"), Scope.ADMIN)


def test_an_epoch_lasts_as_long_as_the_keys(tmp_path: Path) -> None:
    clock = Clock()
    path = key_file(tmp_path, *ALL)
    gate = Gate(path, clock=clock)
    first = gate.epoch()
    clock.now = 2.0
    assert gate.epoch() == first
    path.write_text("keys: [")  # spoilt: the old ones stay
    clock.now = 4.0
    assert gate.epoch() == first
    key_file(tmp_path, ALL[0])
    assert gate.epoch() == first  # nobody has looked yet
    clock.now = 6.0
    assert gate.epoch() != first
    assert Gate(None).epoch() == Gate(None).epoch()


@pytest.mark.parametrize("spoilt", ["keys: [", "", "keys: [{name: x}]", None])
def test_a_spoilt_file_keeps_the_old_keys_and_says_why(
    tmp_path: Path, spoilt: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    path = key_file(tmp_path, *ALL)
    gate = Gate(path, clock=clock)
    if spoilt is None:
        path.unlink()
    else:
        path.write_text(spoilt)
    clock.now = 2.0
    with caplog.at_level(logging.ERROR):
        assert gate.check(bearer("b"), Scope.ADMIN) is not None
    assert "keys.yaml" in caplog.text and "stay valid" in caplog.text
    key_file(tmp_path, line("new", "n", "admin"))
    clock.now = 4.0
    assert gate.check(bearer("n"), Scope.ADMIN) is not None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("keys: [{name: a, sha256: abc, scopes: [admin]}]", "64"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', scopes: [root]}}]", "root"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', scopes: []}}]", "no scopes"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', scopes: [admin], more: 1}}]", "more"),
        ("other: 1", "keys"),
        ("keys: &a []", "alias"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, text: str, word: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        Gate(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        Gate(tmp_path / "missing.yaml")


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        read_keys(key_file(tmp_path, line("a", "1", "admin"), line("a", "2", "admin")))


@pytest.mark.parametrize("name", ["ci", 'odd: "name" #', "ünï", "a\nb"])
def test_a_new_key_works_once_its_line_is_in_the_file(tmp_path: Path, name: str) -> None:
    key, added = new_key(name, [Scope.INFERENCE, Scope.METRICS])
    assert key not in added
    gate = Gate(key_file(tmp_path, added + "\n"))
    found = gate.check(bearer(key), Scope.METRICS)
    assert found is not None and found.name == name
    assert found.scopes == {Scope.INFERENCE, Scope.METRICS}
    assert new_key("a", [Scope.ADMIN])[0] != new_key("a", [Scope.ADMIN])[0]


# the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/health", None),
        ("GET", "/v2/health/live", None),
        ("GET", "/v2/health/ready", None),
        ("GET", "/metrics", Scope.METRICS),
        ("POST", "/v2/models/a/b/versions/1/infer", Scope.INFERENCE),
        ("GET", "/v2/models/a", Scope.INFERENCE),
        ("GET", "/v1/models", Scope.INFERENCE),
        ("GET", "/v1/models/status", Scope.INFERENCE),
        ("GET", "/v1/events", Scope.INFERENCE),
        ("POST", "/v1/models/load", Scope.ADMIN),
        ("POST", "/v1/models/unload-all", Scope.ADMIN),
        ("POST", "/v1/models/sleep", Scope.ADMIN),
        ("POST", "/v1/models/wake", Scope.ADMIN),
        ("POST", "/v1/models/pin", Scope.ADMIN),
        ("GET", "/v1/devices", Scope.METRICS),
        ("POST", "/v1/devices", Scope.ADMIN),
        ("DELETE", "/v1/models/a", Scope.ADMIN),
        ("OPTIONS", "/v1/models", Scope.ADMIN),
        ("POST", "/health", Scope.ADMIN),
        ("GET", "/nowhere", Scope.ADMIN),
        ("GET", "/", None),
        ("GET", "/docs/start.js", None),
        ("GET", "/docsx", Scope.ADMIN),
        ("POST", "/docs/start.js", Scope.ADMIN),
    ],
)
def test_the_table_says(method: str, path: str, scope: Scope | None) -> None:
    assert scope_of(method, path) == scope


OPEN = {"/", "/docs", "/health", "/openapi.json", "/v2/health/live", "/v2/health/ready"}


@given(st.sampled_from(["GET", "POST", "PUT", "get", ""]), st.text(max_size=40))
@settings(deadline=None)
def test_what_is_not_exactly_open_is_never_open(method: str, path: str) -> None:
    if scope_of(method, path) is None:
        assert method == "GET" and (path in OPEN or path.startswith("/docs/"))
