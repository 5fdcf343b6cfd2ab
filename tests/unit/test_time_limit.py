from __future__ import annotations

import signal
import threading

import pytest

from repository.backends.text.time_limit import within
from repository.errors import InvalidRequestError

TOO_SLOW = InvalidRequestError("it loops")


def test_what_loops_is_ended_also_where_it_catches_every_exception():
    def endless() -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:  # noqa: BLE001 - what somebody else's program may do
                continue

    with pytest.raises(InvalidRequestError, match="it loops"), within(0.02, TOO_SLOW):
        endless()


def test_what_ends_in_time_leaves_no_timer_and_no_handler():
    before = signal.getsignal(signal.SIGALRM)
    with within(30.0, TOO_SLOW):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(ZeroDivisionError), within(30.0, TOO_SLOW):
        _ = 1 / 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_beside_the_main_thread_nothing_is_bounded_and_nothing_breaks():
    ended = []

    def work() -> None:
        with within(0.001, TOO_SLOW):
            ended.append(sum(range(1000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [499500]
