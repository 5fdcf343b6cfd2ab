"""Whatever comes, in whatever order: sequences at random, in virtual time, against one who adds up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import looptime
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import (
    InvalidRequestError,
    InvalidTensorError,
    QueueFullError,
    RequestTimeoutError,
    WorkerDiedError,
)
from repository.messages import InferRequest, InferResponse
from tests.fakes.host import FakeHost
from tests.sequences import adding, column, line_of, say, value_of

IDLE_S = 1.5
ASKED = st.fixed_dictionaries(
    {
        "sequence": st.integers(1, 4),
        "start": st.sampled_from([True, False, False, False]),
        "end": st.sampled_from([True, False, False]),
        "pause": st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.5, 3.0]),
        "leaves": st.sampled_from([None, None, None, None, 0.0, 0.3]),
        "bad": st.sampled_from([False, False, False, False, True]),
        "timeout": st.sampled_from([0, 0, 0, 200_000, 900_000]),
    }
)
RULES = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["direct", "oldest"]),
        "max_delay_us": st.sampled_from([0, 300_000]),
        "min_slots_ratio": st.sampled_from([0.0, 0.7]),
        "preferred_sizes": st.sampled_from([(), (2,)]),
        "max_candidates": st.integers(1, 3),
        "preserve_ordering": st.booleans(),
    }
)


@dataclass(slots=True, eq=False)
class Held:
    """The leases that are held."""

    count: int = 0

    def begin(self) -> None:
        self.count += 1

    def end(self, *, used: bool = True) -> None:
        self.count -= 1


def picky(request: InferRequest) -> InferResponse:
    if any(x % 1 for x in column(request, "x")):
        raise InvalidTensorError("it holds what it must not")
    return adding(request)


async def submit(line: Any, serial: int, kind: dict[str, Any]) -> asyncio.Future[InferResponse]:
    more = {"timeout": kind["timeout"]} if kind["timeout"] else {}
    request = say(
        serial + kind["bad"] / 2, kind["sequence"], start=kind["start"], end=kind["end"], **more
    )
    try:
        future: asyncio.Future[InferResponse] = line.submit(request)
    except (InvalidRequestError, QueueFullError) as error:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(error)
    if kind["leaves"] is not None:
        asyncio.get_running_loop().call_later(kind["leaves"], future.cancel)
    return future


def add_up(
    asked: list[dict[str, Any]], futures: list[asyncio.Future[InferResponse]], ran: set[int]
) -> None:
    """One sequence after the other, what was run of it. A request that failed changes nothing."""
    totals: dict[int, float] = {}
    begun: set[int] = set()
    for serial, (kind, future) in enumerate(zip(asked, futures, strict=True), 1):
        sequence = kind["sequence"]
        if serial in ran:
            assert kind["start"] or sequence in begun
            begun.add(sequence)
            totals[sequence] = 0 if kind["start"] else totals[sequence]
            totals[sequence] += 0 if kind["bad"] else serial
            if kind["end"]:
                begun.discard(sequence)
        if future.cancelled():
            continue
        match future.exception():
            case None:
                assert serial in ran and value_of(future.result()) == totals[sequence]
            case InvalidTensorError():
                assert serial in ran and kind["bad"]
            case InvalidRequestError():
                assert serial not in ran and not kind["start"]
            case RequestTimeoutError():
                assert serial not in ran and kind["timeout"]
            case other:
                assert isinstance(other, WorkerDiedError | QueueFullError)


async def all_places_are_free(line: Any, places: int) -> None:
    for batch in range(places):
        await asyncio.wait_for(line.submit(say(1, 100 + batch, start=True)), 10)


@settings(deadline=None, max_examples=150)
@given(
    asked=st.lists(ASKED, max_size=20),
    rules=RULES,
    most=st.integers(1, 3),
    slots=st.integers(1, 2),
    infer_s=st.sampled_from([0.0, 0.4]),
    dies=st.sampled_from([1.0, 9e9, 9e9, 9e9]),
    server_queue=st.sampled_from([3, 1000]),
)
def test_each_sequence_is_added_up_as_if_it_were_alone(
    asked: list[dict[str, Any]],
    rules: dict[str, Any],
    most: int,
    slots: int,
    infer_s: float,
    dies: float,
    server_queue: int,
) -> None:
    async def play() -> None:
        held = Held()
        host = FakeHost(infer_s=infer_s, slots=slots, result=picky)
        line = line_of(
            host, most, server_queue=server_queue, hold=lambda: held,
            idle_us=int(IDLE_S * 1e6), **rules,
        )  # fmt: skip
        asyncio.get_running_loop().call_later(dies, host.kill)
        futures = []
        for serial, kind in enumerate(asked, 1):
            await asyncio.sleep(kind["pause"])
            futures.append(await submit(line, serial, kind))
            assert held.count == len(line.open_sequences)
        await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 100)
        await asyncio.sleep(100)
        assert (line.queue_length, line.in_flight, held.count) == (0, 0, 0)
        assert not line.open_sequences
        ran = {int(x) for request in host.batches for x in column(request, "x")} - {0}
        if dies > 100:
            add_up(asked, futures, ran)
            await all_places_are_free(line, slots * most)

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        runner.run(play())
