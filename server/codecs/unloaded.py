"""What an unload of every model answers, on each of PolarGrid's calls that do it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from repository.reports import UnloadAllReport

Success: TypeAlias = Literal["success"]


class UnloadError(msgspec.Struct):
    model: str
    error: str


class UnloadAllReply(msgspec.Struct):
    """`unloaded_models`: those that ran when it was asked for; `freed_bytes`: reserved for them;
    `leaked_bytes`: what devices had not given back when their workers had ended; `confirmed`: every
    worker is gone."""

    unloaded_models: list[str]
    errors: list[UnloadError]
    total_unloaded: int
    freed_bytes: int
    leaked_bytes: int
    confirmed: bool
    status: Success = "success"


def unloaded_all(report: UnloadAllReport) -> UnloadAllReply:
    unloaded = sorted(r.model for r in report.unloaded)
    return UnloadAllReply(
        unloaded_models=unloaded,
        errors=[UnloadError(model, text) for model, text in sorted(report.errors.items())],
        total_unloaded=len(unloaded),
        freed_bytes=sum(r.bytes_freed for r in report.unloaded),
        leaked_bytes=sum(r.leaked_bytes for r in report.unloaded),
        confirmed=all(r.confirmed for r in report.unloaded),
    )
