"""What RPCs need of the server: the same objects that HTTP has, in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from repository.repository import Repository
from server.auth import Gate
from server.call import Door
from server.metrics.tally import Tallies
from server.restricted import Restrictions
from server.settings import Settings
from server.triton.logs import LogSettings
from server.triton.metadata import ServerInfo
from server.triton.shm import CudaRegions, Regions
from server.turnstile import Turnstile

PREFIX = "triton-grpc-protocol-"  # what Triton's clients put before a restricted protocol's header


@dataclass(frozen=True, slots=True, kw_only=True)
class Depot:
    """closing   set when the server begins to go
    tracer       `Tracer` of server.triton
    """

    models: Repository
    door: Door
    gate: Gate
    settings: Settings
    info: ServerInfo
    tallies: Tallies
    turnstile: Turnstile
    restricted: Restrictions
    logs: LogSettings
    tracer: Any
    regions: Regions
    cuda: CudaRegions
    closing: asyncio.Event


def depot_of(
    known: Mapping[str, Any],
    door: Door,
    gate: Gate,
    turnstile: Turnstile,
    closing: asyncio.Event,
) -> Depot:
    """`known`: what the app's handlers may ask for by name. Raises ConfigError."""
    settings: Settings = known["settings"]
    restricted = Restrictions(
        settings.grpc_restricted_protocol, flag="--grpc-restricted-protocol", prefix=PREFIX
    )
    return Depot(
        models=door.models,
        door=replace(door, max_body=settings.grpc_max_message),
        gate=gate,
        settings=settings,
        info=known["info"],
        tallies=known["metrics"].meter,
        turnstile=turnstile,
        restricted=restricted,
        logs=known["logs"],
        tracer=known["tracer"],
        regions=door.regions,
        cuda=known["cuda_regions"],
        closing=closing,
    )
