"""Who may reach the server: addresses that need keys."""

from __future__ import annotations

import ipaddress

from repository.errors import ConfigError
from server.settings import Settings


def check_bind(settings: Settings) -> None:
    """Raises ConfigError for an address that others can reach while nobody is asked for a key, nor for a
    certificate."""
    if settings.api_keys is not None or settings.tls_client_ca is not None or settings.insecure:
        return
    if not is_loopback(settings.host):
        raise ConfigError(
            f"refusing to listen on {settings.host} without API keys: anyone who can reach it "
            "could load and unload models; give --api-keys FILE (MODELDEPOT_API_KEYS; see `modeldepot "
            "keys new`) or --tls-client-ca FILE, stay on 127.0.0.1, or say --insecure "
            "(MODELDEPOT_INSECURE=1) if something in front asks for keys",
            where="--host",
        )


def is_loopback(host: str) -> bool:
    """Names other than localhost are taken for public: what they resolve to may change."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
