"""Every RPC that is answered, and the call over HTTP that does the same.

Its rights, and the group by which it may be restricted, are those of that call: what a key may do does
not depend on the protocol. An RPC that is not in the table is refused, like one that does not exist.
"""

from __future__ import annotations

from typing import NamedTuple

from server.auth import Scope, scope_of
from server.restricted import group_of

INFERENCE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"


class Rpc(NamedTuple):
    """`changes`: it is noted in the audit log, and counted at the turnstile."""

    name: str
    path: str  # as gRPC has it
    scope: Scope | None
    group: str | None
    changes: bool


def _rpc(service: str, name: str, method: str, path: str, *, changes: bool = False) -> Rpc:
    return Rpc(name, f"/{service}/{name}", scope_of(method, path), group_of(method, path), changes)


def _rows() -> tuple[Rpc, ...]:
    of, v2, model, repository = INFERENCE, "/v2", "/v2/models/m", "/v2/repository"
    system, cuda = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
    rows = [
        _rpc(HEALTH, "Check", "GET", f"{v2}/health/ready"),
        _rpc(HEALTH, "Watch", "GET", f"{v2}/health/ready"),
        _rpc(of, "ServerLive", "GET", f"{v2}/health/live"),
        _rpc(of, "ServerReady", "GET", f"{v2}/health/ready"),
        _rpc(of, "ServerMetadata", "GET", v2),
        _rpc(of, "ModelReady", "GET", f"{model}/ready"),
        _rpc(of, "ModelMetadata", "GET", model),
        _rpc(of, "ModelConfig", "GET", f"{model}/config"),
        _rpc(of, "ModelStatistics", "GET", f"{model}/stats"),
        _rpc(of, "ModelInfer", "POST", f"{model}/infer"),
        _rpc(of, "ModelStreamInfer", "POST", f"{model}/infer"),
        _rpc(of, "RepositoryIndex", "POST", f"{repository}/index"),
        _rpc(of, "RepositoryModelLoad", "POST", f"{repository}/models/m/load", changes=True),
        _rpc(of, "RepositoryModelUnload", "POST", f"{repository}/models/m/unload", changes=True),
        # One RPC both reads and writes them: it takes the right to write.
        _rpc(of, "TraceSetting", "POST", f"{v2}/trace/setting", changes=True),
        _rpc(of, "LogSettings", "POST", f"{v2}/logging", changes=True),
    ]
    for kind, base in (("System", system), ("Cuda", cuda)):
        name = f"{kind}SharedMemory"
        rows += [
            _rpc(of, f"{name}Status", "GET", f"{base}/status"),
            _rpc(of, f"{name}Register", "POST", f"{base}/region/r/register", changes=True),
            _rpc(of, f"{name}Unregister", "POST", f"{base}/unregister", changes=True),
        ]
    return tuple(rows)


ROWS = _rows()
BY_PATH = {row.path: row for row in ROWS}
