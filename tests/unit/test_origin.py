"""Who may use a server without keys: programs, and pages that are its own."""

from __future__ import annotations

from typing import Any

import pytest

from server.app import build_app
from server.auth import Gate, Scope
from server.errors import ForbiddenError
from server.origin import check_origin, is_here
from server.settings import Settings
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import serving


@pytest.mark.parametrize(
    "host",
    [
        b"", b"localhost", b"localhost:8000", b"LOCALHOST", b"127.0.0.1:8000", b"[::1]:8000", b"[::1]",
        b"depot.localhost:1", b"depot", b"depot:8000", b"10.0.0.7:8000",
    ],
)  # fmt: skip
def test_names_that_no_stranger_can_own_lead_here(host: bytes) -> None:
    assert is_here(host)
    check_origin([(b"host", host)])
    check_origin([(b"host", host), (b"origin", b"http://" + host)])


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:8000",
        b"127.0.0.1.evil.example",
        b"localhost.evil.example:80",
    ],
)
def test_a_name_that_somebody_lets_lead_here_does_not(host: bytes) -> None:
    for more in ([], [(b"origin", b"http://" + host)]):
        with pytest.raises(ForbiddenError, match="--api-keys"):
            check_origin([(b"host", host), *more])


@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example",
        b"null",
        b"",
        b"http://localhost:3000",
        b"http://localhost:8000.evil",
    ],
)
def test_a_page_of_another_site_may_not(origin: bytes) -> None:
    with pytest.raises(ForbiddenError, match="another site"):
        check_origin([(b"host", b"localhost:8000"), (b"origin", origin)])


def test_keys_speak_for_themselves_and_open_addresses_stay_open() -> None:
    strange = [(b"host", b"evil.example"), (b"origin", b"https://evil.example")]
    Gate(None).check(strange, Scope.ADMIN)
    Gate(None, local=True).check(strange, None)
    with pytest.raises(ForbiddenError):
        Gate(None, local=True).check(strange, Scope.INFERENCE)


PAGE = {"origin": "https://evil.example"}


@pytest.mark.parametrize(
    "path", ["/v1/models/unload-all", "/v1/models/unload", "/v2/models/a/infer"]
)
async def test_a_form_on_another_page_changes_nothing(path: str) -> None:
    models = FakeRepository()
    models.add("a", loaded=True)
    async with serving(models) as client:
        answer = await client.post(path, json={"model_name": "a"}, headers=PAGE)
        assert answer.status_code == 403 and "error" in answer.json()
        assert models.calls == []
        assert (await client.get("/health", headers=PAGE)).status_code == 200


@pytest.mark.parametrize("said", [{"insecure": True}, {"host": "0.0.0.0", "insecure": True}])
def test_who_says_insecure_is_believed(said: dict[str, Any]) -> None:
    app = build_app(FakeRepository(), Settings(**said))  # type: ignore[arg-type]
    app.gate.check([(b"host", b"models.example")], Scope.ADMIN)
