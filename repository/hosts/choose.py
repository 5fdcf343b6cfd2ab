"""Which host a generation gets. Said once, so that nobody else asks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from repository.calling import Caller
from repository.errors import LoadFailedError
from repository.hosts.base import Host
from repository.hosts.ensemble import EnsembleHost
from repository.hosts.inline import InlineHost
from repository.hosts.process import ProcessHost
from repository.hosts.zygotes import Zygotes
from repository.spec import ModelSpec

log = logging.getLogger(__name__)
NEVER_INLINE = ("triton_python",)  # unless a config insists, which is refused


def make_host(
    spec: ModelSpec,
    *,
    default_host: Literal["process", "inline"],
    zygotes: Zygotes,
    state_dir: Path,
    threads: int | None = None,
    cpu_fallback: bool = False,
    trust_code: bool = False,
    extra: dict[str, Any] | None = None,
    caller: Caller | None = None,
) -> Host:
    """The config's host, else the default; a model for a GPU goes into a process unless its config
    insists on inline, which is refused (LoadFailedError). `caller`: whom it may ask for other models."""
    if spec.config.ensemble is not None:
        if caller is None:
            raise LoadFailedError(
                f"'{spec.model}' is an ensemble, and there are no other models here"
            )
        return EnsembleHost(caller)
    gpu = bool(spec.devices) and spec.devices[0].startswith("cuda")
    if gpu and spec.config.host == "inline":
        raise LoadFailedError(
            f"'{spec.model}' has host inline and may go to {spec.devices[0]}; inline is for CPU "
            "models only: set device to cpu, or host to process"
        )
    default_host = "process" if spec.backend in NEVER_INLINE else default_host
    told = {
        **(extra or {}),
        "cpu_fallback": cpu_fallback,
        "trust_code": trust_code,
        "log_verbose": log.isEnabledFor(logging.DEBUG),  # as the server is now
    }
    instances = max(1, spec.config.instances)
    if (spec.config.host or default_host) == "inline" and not gpu:
        return InlineHost(state_dir=state_dir, instances=instances, threads=threads, extra=told)
    return ProcessHost(
        zygotes,
        state_dir=state_dir,
        instances=instances,
        threads=threads,
        extra=told,
        caller=caller,
    )
