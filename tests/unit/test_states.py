"""The transition table, tested on itself."""

import itertools

import pytest

from repository.lifecycle.states import (
    HOLDS_MEMORY,
    LEAVING,
    RISING,
    TERMINAL,
    TRANSITIONS,
    Event,
    IllegalMoveError,
    State,
    advance,
)


def test_every_state_has_a_row_and_is_reachable():
    reached = {State.QUEUED}
    while True:
        further = {to for s in reached for to in TRANSITIONS[s].values()} | reached
        if further == reached:
            break
        reached = further
    assert set(TRANSITIONS) == set(State) == reached


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_move_is_in_the_table_or_illegal(state, event):
    if event in TRANSITIONS[state]:
        assert advance(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalMoveError, match=f"{event} is not allowed in {state}"):
            advance(state, event)


def test_memory_is_taken_by_admit_given_back_by_stopped_and_passed_on_by_woken():
    for state, row in TRANSITIONS.items():
        for event, to in row.items():
            if to in HOLDS_MEMORY and state not in HOLDS_MEMORY:
                assert event is Event.ADMIT
            if state in HOLDS_MEMORY and to not in HOLDS_MEMORY:
                assert event in (Event.STOPPED, Event.WOKEN)


def test_only_what_sleeps_is_woken_and_only_what_has_drained_falls_asleep():
    found = {(s, e) for s, row in TRANSITIONS.items() for e in row}
    assert {s for s, e in found if e is Event.WOKEN} == {State.ASLEEP}
    assert {s for s, e in found if e is Event.SLEPT} == {State.DRAINING}


def test_no_state_can_come_back():
    def walk(state, seen=()):
        assert state not in seen
        for to in TRANSITIONS[state].values():
            walk(to, (*seen, state))

    walk(State.QUEUED)
    assert {State.GONE, State.FAILED} == TERMINAL


def test_every_state_that_is_not_terminal_can_be_asked_to_end_or_is_ending():
    for state in set(State) - TERMINAL:
        assert Event.RETIRE in TRANSITIONS[state] or state in LEAVING


def test_the_kinds_of_state_do_not_overlap():
    kinds = [RISING, LEAVING, TERMINAL, frozenset({State.READY, State.ASLEEP})]
    assert frozenset().union(*kinds) == set(State)
    assert sum(len(k) for k in kinds) == len(State)
