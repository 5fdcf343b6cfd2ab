"""Certificates for tests: an authority, a server's on 127.0.0.1, a client's."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent / "data" / "tls"
CA = HERE / "ca.pem"
SERVER, SERVER_KEY = HERE / "server.pem", HERE / "server.key"
CLIENT, CLIENT_KEY = HERE / "client.pem", HERE / "client.key"
FLAGS = ("--tls-certificate", str(SERVER), "--tls-key", str(SERVER_KEY))
