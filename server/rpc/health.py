"""grpc.health.v1: whether the server is ready, for load balancers and Kubernetes' probes.

The service "" is the server, and so is that of inference. Its two messages have one field each, so they
are read and written here.
"""

from __future__ import annotations

from typing import Any

from repository.errors import DrainingError, InvalidRequestError, NotFoundError
from server.errors import TooManyRequestsError
from server.rpc.depot import Depot
from server.rpc.table import HEALTH, INFERENCE
from server.rpc.wire import MALFORMED, cut, varint
from server.triton.metadata import server_ready

SERVICES = ("", INFERENCE, HEALTH)
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
MOST_WATCHES = 256


class UnknownServiceError(NotFoundError):
    code = "unknown_service"


def service_of(message: bytes) -> str:
    """HealthCheckRequest's. Raises InvalidRequestError."""
    found = cut(message, 1)[1]
    try:
        return bytes(found[-1]).decode() if found else ""
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{MALFORMED}it is no HealthCheckRequest") from error


def reply_of(status: int) -> bytes:
    return b"\x08" + varint(status)


class Health:
    def __init__(self, depot: Depot) -> None:
        self._depot = depot
        self._watches = 0

    def status(self) -> int:
        models, strict = self._depot.models, self._depot.settings.strict_readiness
        fit = not models.draining and server_ready(models, strict=strict)
        return SERVING if fit else NOT_SERVING

    def check(self, message: bytes) -> bytes:
        """Raises InvalidRequestError, UnknownServiceError."""
        service = service_of(message)
        if service not in SERVICES:
            raise UnknownServiceError(f"there is no service '{service[:60]}' here")
        return reply_of(self.status())

    async def watch(self, message: bytes, context: Any) -> None:
        """Says how it is, and again whenever that has changed; until the client leaves or the server
        goes. Raises InvalidRequestError, TooManyRequestsError, DrainingError."""
        known = service_of(message) in SERVICES
        if self._watches >= MOST_WATCHES:
            raise TooManyRequestsError(
                f"{MOST_WATCHES} clients watch the server's health, as many as may; ask again",
                retry_after_s=1.0,
            )
        self._watches += 1
        try:
            with self._depot.models.events.subscribe() as events:
                told = self.status() if known else SERVICE_UNKNOWN
                await context.write(reply_of(told))
                async for _ in events:
                    status = self.status() if known else SERVICE_UNKNOWN
                    if status != told:
                        told = status
                        await context.write(reply_of(told))
                if told == SERVING:
                    await context.write(reply_of(NOT_SERVING))
        finally:
            self._watches -= 1
        raise DrainingError("the server is shutting down")
