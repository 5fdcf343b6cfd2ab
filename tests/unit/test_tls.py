"""What is said of certificates that cannot be used, before anything is started; the doctor too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from repository.errors import ConfigError
from server.binding import check_bind
from server.cli.checkup import doors, encryption
from server.cli.checkup.encryption import context_of
from server.cli.checkup.finding import Level
from server.settings import Settings
from server.tls import tls_of
from tests.checkup import only, settings
from tests.tls import CA, CLIENT_KEY, SERVER, SERVER_KEY

GOOD = {"tls_certificate": SERVER, "tls_key": SERVER_KEY}
LOCKED = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgA
-----END ENCRYPTED PRIVATE KEY-----
"""


def test_without_files_nothing_is_encrypted() -> None:
    assert tls_of(Settings()) is None and context_of(Settings()) is None


def test_what_the_files_hold_is_read_once() -> None:
    found = tls_of(Settings(**GOOD, tls_client_ca=CA))
    assert found is not None
    assert (found.certificate, found.key) == (SERVER.read_bytes(), SERVER_KEY.read_bytes())
    assert found.client_ca == CA.read_bytes()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"tls_certificate": SERVER}, "--tls-certificate: it needs --tls-key besides"),
        ({"tls_key": SERVER_KEY}, "--tls-key: it needs --tls-certificate besides"),
        ({"tls_client_ca": CA}, "--tls-client-ca: it needs --tls-certificate and --tls-key"),
        ({**GOOD, "tls_key": Path("none.key")}, "--tls-key: cannot read 'none.key': No such file"),
        ({**GOOD, "tls_client_ca": Path("no.pem")}, "--tls-client-ca: cannot read 'no.pem'"),
        ({**GOOD, "tls_key": CLIENT_KEY}, "'client.key' is not the key of 'server.pem'"),
        ({**GOOD, "tls_certificate": SERVER_KEY}, "'server.key' holds no certificate in PEM"),
        ({**GOOD, "tls_key": SERVER}, "'server.pem' holds no private key in PEM"),
        ({**GOOD, "tls_client_ca": SERVER_KEY}, "'server.key' holds no certificate in PEM"),
        ({**GOOD, "tls_certificate": Path("/")}, "--tls-certificate: cannot read ''"),
    ],
)
def test_an_error_names_the_flag_and_the_file(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        tls_of(Settings(**given))
    assert text in str(error.value) and str(SERVER.parent) not in str(error.value)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    locked.write_text(LOCKED)
    with pytest.raises(ConfigError, match="--tls"):
        tls_of(Settings(tls_certificate=SERVER, tls_key=locked))


def test_a_certificate_that_is_asked_for_stands_for_a_key(tmp_path: Path) -> None:
    here = settings(tmp_path, host="0.0.0.0", **GOOD, tls_client_ca=CA)
    check_bind(here)
    assert only(doors.keys(here)).level is Level.OK
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        check_bind(settings(tmp_path, host="0.0.0.0", **GOOD))


def test_the_doctor_looks_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def level(**given: Any) -> Level:
        return only(encryption.encryption(settings(tmp_path, **given))).level

    assert level() is Level.OK
    assert level(host="0.0.0.0", api_keys=tmp_path / "keys") is Level.WARN
    assert level(**GOOD, tls_client_ca=CA) is Level.OK
    assert level(**{**GOOD, "tls_key": CLIENT_KEY}) is Level.FAIL
    end = time.time() + encryption._left_s(tls_of(Settings(**GOOD)))  # type: ignore[arg-type]
    for before_s, expected in ((-1, Level.FAIL), (3600, Level.WARN), (99 * 24 * 3600, Level.OK)):
        monkeypatch.setattr(encryption.time, "time", lambda at=end - before_s: at)
        assert level(**GOOD) is expected
