"""What is encrypted, and with what: the files of `--tls-*`, and how to ask a server that has them."""

from __future__ import annotations

import ssl
import time

from repository.errors import ConfigError
from server.binding import is_loopback
from server.cli.checkup.finding import Finding, fail, ok, warn
from server.settings import Settings
from server.tls import Tls, tls_of

SOON_S = 14 * 24 * 3600


def context_of(settings: Settings) -> ssl.SSLContext | None:
    """For asking our own server on this machine whether it is well, which is no reason to doubt its
    name. Where clients must have a certificate, it is the server's own. None: nothing is encrypted, or
    with what nobody can read."""
    try:
        tls = tls_of(settings)
    except ConfigError:
        return None
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if tls.client_ca is not None:
        context.load_cert_chain(tls.certificate_path, tls.key_path)
    return context


def encryption(settings: Settings) -> list[Finding]:
    name = "tls"
    try:
        tls = tls_of(settings)
    except ConfigError as error:
        return [fail(name, str(error), "mend it, or leave --tls-* out")]
    if tls is None:
        if is_loopback(settings.host) or settings.api_keys is None:
            return [ok(name, "nothing is encrypted")]
        said = f"nothing is encrypted on {settings.host}: keys can be read on their way"
        return [warn(name, said, "give --tls-certificate and --tls-key, or encrypt in front")]
    left_s = _left_s(tls)
    said = f"{tls.certificate_path}: for HTTP, gRPC and metrics"
    if tls.client_ca is not None:
        said += ", for clients with a certificate"
    if left_s <= 0:
        return [fail(name, f"{said}; it has expired", "renew it, and start the server again")]
    if left_s < SOON_S:
        days = left_s / (24 * 3600)
        todo = "renew it, and start the server again"
        return [warn(name, f"{said}; it expires within {days:.1f} days", todo)]
    return [ok(name, said)]


def _left_s(tls: Tls) -> float:
    """Until the certificate is no longer valid; for ever where that cannot be told."""
    try:
        # No public function reads a certificate's dates; this one serves ssl's own tests.
        found = ssl._ssl._test_decode_cert(str(tls.certificate_path))  # type: ignore[attr-defined]
        return ssl.cert_time_to_seconds(found["notAfter"]) - time.time()
    except (AttributeError, KeyError, ValueError, OSError):
        return float("inf")
