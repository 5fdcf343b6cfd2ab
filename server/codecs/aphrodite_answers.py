"""What POST /v1/load_model and /v1/unload_model answer, as Aphrodite documents it.

Times are seconds with two decimals, and the parts of an unload add up to its whole. What is said of
memory is only what is known: that all of a GPU's is free needs a GPU that says so, and no other model
on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from repository.names import shown
from repository.reports import LoadReport, UnloadReport
from repository.sizes import human
from server.codecs.aphrodite_body import Order, Source


class Applied(msgspec.Struct):
    """One value that the model was loaded with, and who said it."""

    value: Any
    source: Source


class LoadedReply(msgspec.Struct):
    message: str
    load_time_s: float
    model: str
    status: Literal["success"] = "success"


class ConfiguredReply(LoadedReply):
    """The same where a model or a config was named."""

    config_applied: dict[str, Applied] = {}


class UnloadedReply(msgspec.Struct):
    """`drain_time_s`: until the last running request had ended; `shutdown_time_s`: the rest."""

    message: str
    drain_time_s: float
    shutdown_time_s: float
    total_time_s: float
    freed_bytes: int
    unloaded_models: list[str]
    status: Literal["success"] = "success"


class InfoReply(msgspec.Struct):
    """There was nothing to do."""

    message: str
    status: Literal["info"] = "info"


class NotLoadedReply(msgspec.Struct):
    message: str
    status: Literal["error"] = "error"


ALREADY_UNLOADED = "Model is already unloaded."


def not_loaded(model: str) -> NotLoadedReply:
    return NotLoadedReply(f"Model '{shown(model)}' is not loaded.")


def loaded(order: Order, report: LoadReport, took_s: float) -> LoadedReply | InfoReply:
    """A model is shown by the name that it was asked for, a path too."""
    model = order.model or report.model
    if report.already:
        return InfoReply(f"Model '{shown(model)}' is already loaded in the registry.")
    took_s = round(took_s, 2)
    message = f"Model loaded successfully in {took_s:.2f}s."
    if order.bare:
        return LoadedReply(message, took_s, model)
    applied = {"model": Applied(model, order.named_by), **_applied(report.applied)}
    return ConfiguredReply(message, took_s, model, config_applied=applied)


def _applied(found: Mapping[str, tuple[Any, str]]) -> dict[str, Applied]:
    return {
        key: msgspec.convert({"value": value, "source": source}, Applied)
        for key, (value, source) in found.items()
        if key != "model"
    }


class Gpus(NamedTuple):
    """Models that have something on a GPU."""

    before: frozenset[str]
    after: frozenset[str]


def unloaded(reports: Sequence[UnloadReport], took_s: float, gpus: Gpus) -> UnloadedReply:
    """All of `reports` together; they ran beside each other, so the longest drain is the whole's."""
    total_s = round(took_s, 2)
    drain_s = min(total_s, round(max((r.drain_s for r in reports), default=0.0), 2))
    freed = sum(r.bytes_freed for r in reports)
    return UnloadedReply(
        message=f"Model unloaded successfully in {total_s:.2f}s. {_memory(reports, freed, gpus)}",
        drain_time_s=drain_s,
        shutdown_time_s=round(total_s - drain_s, 2),
        total_time_s=total_s,
        freed_bytes=freed,
        unloaded_models=sorted(r.model for r in reports),
    )


def _memory(reports: Sequence[UnloadReport], freed: int, gpus: Gpus) -> str:
    if leaked := sum(r.leaked_bytes for r in reports):
        return f"{human(freed)} of memory came back; {human(leaked)} had not yet."
    if not all(r.confirmed for r in reports):
        return f"{human(freed)} of memory came back; whether that is all could not be confirmed."
    if not gpus.after and any(r.model in gpus.before for r in reports):
        return "All GPU memory has been freed."
    return f"{human(freed)} of memory came back."
