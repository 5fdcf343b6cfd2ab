"""The port that speaks gRPC, in the server's own event loop.

gRPC opens its port itself, so what was listened on from the start is let go in the step before: until
then nobody else could take it, and a port that is taken is told before anything was started.
"""

from __future__ import annotations

import logging
import socket
from typing import Any

import grpc
from grpc import aio

from repository.errors import ConfigError
from server.rpc.depot import Depot
from server.rpc.service import Service
from server.tls import Tls

log = logging.getLogger("modeldepot.server")

# As Triton has them when nothing is said.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 7_200_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 300_000),
    ("grpc.http2.max_ping_strikes", 2),
)


def options_of(max_message: int) -> tuple[tuple[str, int], ...]:
    """`max_message`: bytes, both ways."""
    most = min(max_message, 2**31 - 1)
    return (
        ("grpc.max_receive_message_length", most),
        ("grpc.max_send_message_length", most),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its clients unseen
        *KEEPALIVE,
    )


class RpcPort:
    """`sock` listens already. `open` once the repository runs, `close` before it ends."""

    def __init__(
        self, depot: Depot, sock: socket.socket, *, max_message: int, tls: Tls | None = None
    ) -> None:
        host, port = sock.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._sock = sock
        self._depot = depot
        self._options = options_of(max_message)
        self._tls = tls
        self._server: Any = None

    async def open(self) -> None:
        """Raises ConfigError."""
        server = aio.server(options=self._options)
        server.add_generic_rpc_handlers((Service(self._depot),))
        self._sock.close()
        try:
            if self._tls is None:
                server.add_insecure_port(self.address)
            else:
                server.add_secure_port(self.address, credentials_of(self._tls))
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self.address}; choose another with --grpc-port, or say "
                "--no-allow-grpc",
                where="--grpc-port",
            ) from error
        await server.start()
        self._server = server
        log.info("serving grpc %s%s", self.address, " (TLS)" if self._tls else "")

    async def close(self, within_s: float) -> None:
        """No new connections; what runs is answered, or cancelled after so long. Again, or without
        `open`: nothing but the socket."""
        self._sock.close()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(within_s)
            await server.wait_for_termination()


def credentials_of(tls: Tls) -> Any:
    return grpc.ssl_server_credentials(
        ((tls.key, tls.certificate),),
        root_certificates=tls.client_ca,
        require_client_auth=tls.client_ca is not None,
    )
