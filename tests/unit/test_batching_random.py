"""Whatever comes, in whatever order: a batcher with every rule at once, at random, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import looptime
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import InvalidTensorError, RequestTimeoutError, WorkerDiedError
from repository.messages import InferRequest, InferResponse
from tests.batches import ask, batcher, rows_of
from tests.fakes.host import FakeHost, echo

BAD = 0.5  # what a request holds that the model refuses

ASKED = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 3),
        "width": st.integers(1, 2),
        "pause": st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.5]),
        "leaves": st.sampled_from([None, None, None, 0.0, 0.3]),
        "bad": st.sampled_from([False, False, False, True]),
        "timeout": st.sampled_from([0, 0, 100_000, 700_000]),
        "priority": st.integers(0, 3),
    }
)
RULES = st.fixed_dictionaries(
    {
        "max_delay_us": st.sampled_from([0, 200_000]),
        "preferred_sizes": st.sampled_from([(), (4,), (2, 3)]),
        "timeout_us": st.sampled_from([0, 400_000]),
        "enabled": st.booleans(),
    }
)
ORDERS = st.sampled_from(
    [
        {},
        {"preserve_ordering": True},
        {"priorities": 2, "default_priority": 1},
        {"priorities": 2, "default_priority": 2, "timeout_action": "delay"},
    ]
)


def picky(request: InferRequest) -> InferResponse:
    if (request.inputs[0].array() == BAD).any():
        raise InvalidTensorError("it holds what it must not")
    return echo(request)


def check(
    kind: dict[str, Any],
    future: asyncio.Future[InferResponse],
    serial: int,
    ran: set[float],
    *,
    limited: bool,
) -> None:
    match future.exception():
        case None:
            assert rows_of(future.result()) == [serial] * kind["rows"] and not kind["bad"]
        case RequestTimeoutError():
            assert limited and serial not in ran
        case InvalidTensorError():
            assert kind["bad"]
        case other:
            assert isinstance(other, WorkerDiedError)


@settings(deadline=None, max_examples=150)
@given(
    asked=st.lists(ASKED, max_size=14),
    rules=RULES,
    order=ORDERS,
    most=st.sampled_from([0, 4, 6]),
    slots=st.integers(1, 2),
    infer_s=st.sampled_from([0.0, 0.4]),
    dies=st.sampled_from([0.7, 99.0, 99.0]),
)
def test_everyone_gets_exactly_what_is_due_to_him(
    asked: list[dict[str, Any]],
    rules: dict[str, Any],
    order: dict[str, Any],
    most: int,
    slots: int,
    infer_s: float,
    dies: float,
):
    async def play() -> None:
        loop = asyncio.get_running_loop()
        host = FakeHost(infer_s=infer_s, slots=slots, result=picky)
        queue = batcher(host, most, **{**rules, **order})
        answered: list[int] = []
        futures: list[asyncio.Future[InferResponse]] = []
        loop.call_later(dies, host.kill)
        for serial, kind in enumerate(asked, 1):
            await asyncio.sleep(kind["pause"])
            values = [float(serial)] * (kind["rows"] - kind["bad"]) + [BAD] * kind["bad"]
            extra = {k: kind[k] for k in ("timeout", "priority") if kind[k]}
            future = queue.submit(ask(*values, width=kind["width"], **extra))
            future.add_done_callback(lambda _, serial=serial: answered.append(serial))
            futures.append(future)
            if kind["leaves"] is not None:
                loop.call_later(kind["leaves"], future.cancel)
        await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 60)
        await asyncio.sleep(100)
        ran = {v for request in host.batches for v in request.inputs[0].array().flat}
        served = []
        for serial, (kind, future) in enumerate(zip(asked, futures, strict=True), 1):
            if future.cancelled():
                continue
            check(kind, future, serial, ran, limited=bool(kind["timeout"] or rules["timeout_us"]))
            if future.exception() is None:
                served.append(serial)
        if order.get("preserve_ordering"):
            assert [s for s in answered if s in served] == served
        if most and rules["enabled"]:
            assert all(r.inputs[0].shape[0] <= most for r in host.batches)
        assert (queue.in_flight, queue.queue_length) == (0, 0)

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        runner.run(play())
