"""Which of the two strategies a config asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from repository.config import Batching, ModelConfig, Sequences
from repository.hosts.base import Host
from repository.lines import Line
from repository.messages import Loaded
from repository.sequences.book import Strategy
from repository.sequences.direct import Direct
from repository.sequences.line import SequenceLine
from repository.sequences.oldest import Oldest

MOST_CANDIDATES = 1024  # of an instance, where the config does not say


def within(config: ModelConfig) -> ModelConfig:
    """Of the lines inside `oldest`. Who may wait and how long is asked before them."""
    rules = config.sequences or Sequences()
    batching = Batching(
        enabled=config.batching is None or config.batching.enabled,
        max_delay_us=rules.max_delay_us,
        preferred_sizes=rules.preferred_sizes,
        preserve_ordering=rules.preserve_ordering,
    )
    return msgspec.structs.replace(config, batching=batching, sequences=None)


def strategy_of(
    line: SequenceLine,
    host: Host,
    config: ModelConfig,
    loaded: Loaded,
    lines: Iterable[Line],
    clock: Callable[[], float] = time.perf_counter,
) -> Strategy:
    """`lines`: one in front of each instance, made with `within`; only `oldest` has a use for them."""
    rules = config.sequences or Sequences()
    if rules.strategy == "direct":
        return Direct(host, loaded, rules, line, line.wiring, clock)
    most = rules.max_candidates or MOST_CANDIDATES
    return Oldest(lines, most, line, clock, asks="ask" in loaded.abilities)
