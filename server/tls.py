"""The certificate that the server shows, its key, and whose clients it lets in: read, and tried, before
anything else is started."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from repository.errors import ConfigError
from server.settings import Settings

FLAGS = ("--tls-certificate", "--tls-key", "--tls-client-ca")


class Tls(NamedTuple):
    """What the files hold (PEM), and the files. `client_ca`: None lets in clients without one."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    certificate_path: Path
    key_path: Path
    client_ca_path: Path | None

    def of_uvicorn(self) -> dict[str, Any]:
        """The same for uvicorn's Config."""
        return {
            "ssl_certfile": str(self.certificate_path),
            "ssl_keyfile": str(self.key_path),
            "ssl_ca_certs": str(self.client_ca_path) if self.client_ca_path else None,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.client_ca_path else ssl.CERT_NONE,
        }


def tls_of(settings: Settings) -> Tls | None:
    """None: nothing is encrypted. Raises ConfigError, naming the flag and what is wrong."""
    certificate, key, ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None and key is None and ca is None:
        return None
    if certificate is None or key is None:
        missing, given = FLAGS[certificate is not None], FLAGS[certificate is None]
        if certificate is None and key is None:
            missing, given = f"{FLAGS[0]} and {FLAGS[1]}", FLAGS[2]
        raise ConfigError(f"it needs {missing} besides", where=given)
    found = Tls(
        _read(certificate, FLAGS[0]),
        _read(key, FLAGS[1]),
        None if ca is None else _read(ca, FLAGS[2]),
        certificate,
        key,
        ca,
    )
    _try(found)
    return found


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read '{path.name}': {error.strerror}", where=flag) from error


def _try(tls: Tls) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate_path, tls.key_path, password=_ask)
    except ssl.SSLError as error:
        _explain(tls, error)
    if tls.client_ca_path is not None:
        try:
            context.load_verify_locations(tls.client_ca_path)
        except ssl.SSLError as error:
            name = tls.client_ca_path.name
            raise ConfigError(f"'{name}' holds no certificate in PEM", where=FLAGS[2]) from error


def _explain(tls: Tls, error: ssl.SSLError) -> NoReturn:
    certificate, key = tls.certificate_path.name, tls.key_path.name
    if error.reason == "KEY_VALUES_MISMATCH":
        raise ConfigError(f"'{key}' is not the key of '{certificate}'", where=FLAGS[1]) from error
    if b"-----BEGIN CERTIFICATE-----" not in tls.certificate:
        raise ConfigError(f"'{certificate}' holds no certificate in PEM", where=FLAGS[0]) from error
    if b"PRIVATE KEY-----" not in tls.key:
        raise ConfigError(f"'{key}' holds no private key in PEM", where=FLAGS[1]) from error
    raise ConfigError(
        f"'{certificate}' and '{key}' cannot be used: {error.reason or error}", where=FLAGS[0]
    ) from error


def _ask() -> str:
    raise ConfigError("the key asks for a password; give one without", where=FLAGS[1])
