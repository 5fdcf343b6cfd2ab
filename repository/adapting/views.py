"""What people are told of a model's adapters. Computed from the book and the fittings, never stored."""

from __future__ import annotations

from collections.abc import Iterable

from repository.adapters.book import AdapterBook, Entry
from repository.adapters.orders import AdapterReport
from repository.adapting.counts import Counts
from repository.adapting.fitting import Fitting
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.reports import AdapterState, AdapterView

NEARNESS = ("", "registered", "host", "device")


def takes_none(gen: Generation) -> str:
    if not gen.spec.config.adapters.enabled:
        return f"the config of '{gen.spec.model}' says adapters: {{enabled: false}}"
    return f"'{gen.spec.model}' takes no adapters (backend '{gen.spec.backend}')"


def describe(
    book: AdapterBook, counts: Counts, generations: Iterable[Generation]
) -> list[AdapterView]:
    """All that are registered, by name."""
    gens = list(generations)
    serving = [g for g in gens if g.state is State.READY]
    counting = serving or [g for g in gens if g.state in RISING]
    cannot = next((takes_none(g) for g in serving if g.fitting is None), "")
    fittings = [g.fitting for g in counting if g.fitting is not None]
    views = [_view(entry, counts, fittings, cannot=cannot) for entry in book.entries.values()]
    return sorted(views, key=lambda view: view.name)


def _view(entry: Entry, counts: Counts, fittings: list[Fitting], *, cannot: str) -> AdapterView:
    name, facts = entry.name, entry.source.facts
    reports = [f.where[name] for f in fittings if name in f.where]
    residence = max((r.residence for r in reports), key=NEARNESS.index, default="")
    refused = next((f.failed[name] for f in fittings if name in f.failed), "")
    error = entry.source.problem or cannot or refused
    known = bool(fittings) and all(f.knows(name) for f in fittings)
    count = counts.of(name)
    return AdapterView(
        name=name,
        src=entry.src,
        state=_state(entry, known=known, runs=bool(fittings), residence=residence, error=error),
        residence=residence,
        origin=entry.origin,
        preload=entry.preload,
        pin=entry.pin,
        rank=_most(reports, "rank") or (facts.rank if facts else 0),
        bytes=_most(reports, "bytes") or (facts.bytes if facts else 0),
        error=error,
        options=entry.options,
        requests=count.requests,
        loads=count.loaded,
        failures=count.failed,
    )


def _state(entry: Entry, *, known: bool, runs: bool, residence: str, error: str) -> AdapterState:
    if known:  # also where its replacement is broken: it serves on
        return "registered" if residence == "registered" else "loaded"
    if error or not entry.usable:
        return "failed"
    return "loading" if runs else "registered"


def _most(reports: list[AdapterReport], what: str) -> int:
    return max((int(getattr(r, what)) for r in reports), default=0)
