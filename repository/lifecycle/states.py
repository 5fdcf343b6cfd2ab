"""The state machine of one generation.

A *generation* is one attempt to serve one version of one model with one fingerprint of its files.
It is born QUEUED, moves only along TRANSITIONS, and ends GONE or FAILED. It never goes back: a
reload is a new generation beside the old one, so "loaded while reloading" needs no extra state.

Rule 1: every legal move is a row of TRANSITIONS; nothing else in the tree assigns a state.
Rule 2: this file imports nothing of ours and does no I/O.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    QUEUED = "queued"  # wanted; waits for memory and a load slot
    LOADING = "loading"  # the host is reading weights
    WARMING = "warming"  # weights are in; warm-up requests and golden checks run
    READY = "ready"  # gives out leases
    DRAINING = "draining"  # gives out none; the old ones finish
    ASLEEP = "asleep"  # the host stays with its weights in host memory; the device's is given back
    UNLOADING = "unloading"  # the host is stopping; memory is still held
    FAILING = "failing"  # as UNLOADING, after a fault
    GONE = "gone"  # stopped as asked; memory returned
    FAILED = "failed"  # stopped by a fault; memory returned; the error is kept


class Event(enum.StrEnum):
    ADMIT = "admit"  # memory and a load slot were granted
    LOADED = "loaded"
    WARMED = "warmed"
    RETIRE = "retire"  # the planner no longer wants it
    DRAINED = "drained"  # the last lease ended, or patience did
    SLEPT = "slept"  # so too, and what it had on its device lies in host memory now
    WOKEN = "woken"  # a newer generation has taken over its host, and all the memory that it held
    STOPPED = "stopped"  # the host is down and its memory is back
    FAULT = "fault"  # load error, warm-up error, a check that disagrees, or the host died


S, E = State, Event

TRANSITIONS: dict[State, dict[Event, State]] = {
    S.QUEUED: {E.ADMIT: S.LOADING, E.RETIRE: S.GONE, E.FAULT: S.FAILED},
    S.LOADING: {E.LOADED: S.WARMING, E.RETIRE: S.UNLOADING, E.FAULT: S.FAILING},
    S.WARMING: {E.WARMED: S.READY, E.RETIRE: S.UNLOADING, E.FAULT: S.FAILING},
    S.READY: {E.RETIRE: S.DRAINING, E.FAULT: S.FAILING},
    S.DRAINING: {E.DRAINED: S.UNLOADING, E.SLEPT: S.ASLEEP, E.FAULT: S.UNLOADING},
    S.ASLEEP: {E.WOKEN: S.GONE, E.RETIRE: S.UNLOADING},
    S.UNLOADING: {E.STOPPED: S.GONE},
    S.FAILING: {E.STOPPED: S.FAILED},
    S.GONE: {},
    S.FAILED: {},
}

TERMINAL = frozenset(s for s, row in TRANSITIONS.items() if not row)
HOLDS_MEMORY = frozenset(
    {S.LOADING, S.WARMING, S.READY, S.DRAINING, S.ASLEEP, S.UNLOADING, S.FAILING}
)
RISING = frozenset({S.QUEUED, S.LOADING, S.WARMING})
LEAVING = frozenset({S.DRAINING, S.UNLOADING, S.FAILING})


class IllegalMoveError(Exception):
    """A bug in this program, never a user's mistake."""


def advance(state: State, event: Event) -> State:
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalMoveError(f"{event!s} is not allowed in {state!s}") from None
