"""What stands in front of one generation's host, and lets requests in: which kind it is follows from the
model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from repository.asks import AskLine
from repository.batching import Batcher
from repository.cache import ResponseCache
from repository.cached import Cached
from repository.hosts.base import Host
from repository.hosts.ensemble import EnsembleHost
from repository.lifecycle.generation import Generation
from repository.lines import Line
from repository.messages import Loaded
from repository.passing import Passing
from repository.sequences.book import Strategy
from repository.sequences.line import SequenceLine
from repository.sequences.oldest import instances_of
from repository.sequences.strategy import strategy_of, within
from repository.spec import ModelSpec


def entrance(spec: ModelSpec, host: Host, loaded: Loaded, *, max_queue: int) -> Line:
    if isinstance(host, EnsembleHost):
        return Passing(host, loaded)
    line = AskLine if "ask" in loaded.abilities else Batcher
    return line(host, loaded, spec.config, max_queue=max_queue)


def let_in(
    gen: Generation,
    host: Host,
    loaded: Loaded,
    *,
    max_queue: int,
    clock: Callable[[], float],
    cache: ResponseCache | None = None,
) -> None:
    """Requests may come. `clock` in seconds, for sequences that wait or are silent. `cache`: for the
    answers of models that want them kept."""
    if gen.spec.config.sequences is None:
        gen.batcher = entrance(gen.spec, host, loaded, max_queue=max_queue)
        if cache is not None and _may_repeat(gen.spec, loaded):
            batching = gen.spec.config.batching
            ordered = batching is not None and batching.preserve_ordering
            cached = gen.batcher = Cached(gen.batcher, cache, ordered=ordered)
            gen.lookups = cached.lookups
        return
    line = _sequenced(gen, host, loaded, max_queue, clock)
    gen.batcher, gen.sequences, gen.let_go = line, line.open_sequences, line.let_go


def _may_repeat(spec: ModelSpec, loaded: Loaded) -> bool:
    """It wants to, and can: to each request there is one answer, the same for as long as it lives. (What
    an ensemble is made of may be reloaded, and the ensemble stays.)"""
    wants = spec.config.response_cache and spec.config.ensemble is None
    return wants and "decoupled" not in loaded.abilities


def _sequenced(
    gen: Generation, host: Host, loaded: Loaded, max_queue: int, clock: Callable[[], float]
) -> SequenceLine:
    spec = gen.spec
    inner = replace(spec, config=within(spec.config))

    def strategy(line: SequenceLine) -> Strategy:
        lines = [entrance(inner, one, loaded, max_queue=0) for one in instances_of(host)]
        return strategy_of(line, host, spec.config, loaded, lines, clock)

    return SequenceLine(
        host,
        spec.model,
        spec.config,
        loaded,
        strategy,
        max_queue=max_queue,
        initial=gen.initial,
        hold=partial(gen.lease, late=True),
        clock=clock,
    )
