"""Events reach whoever listens, in order, and what is lost is told."""

from __future__ import annotations

import asyncio

import pytest

from repository.events import KEPT, PENDING, Event, EventBus, Subscription

pytestmark = pytest.mark.looptime


async def read(listener: Subscription, count: int) -> list[Event]:
    async with asyncio.timeout(60):
        return [await anext(listener) for _ in range(count)]


async def rest(bus: EventBus, listener: Subscription) -> list[Event]:
    """All that still comes once the bus is closed."""
    bus.close()
    async with asyncio.timeout(60):
        return [event async for event in listener]


def publish(bus: EventBus, count: int) -> None:
    for _ in range(count):
        bus.publish("model.state", "m")


async def test_every_listener_gets_every_event_from_its_subscription_on():
    bus = EventBus(clock=lambda: 12.5)
    publish(bus, 1)
    with bus.subscribe() as first:
        publish(bus, 1)
        with bus.subscribe() as second:
            sent = bus.publish("model.state", "m", 2, 7, state="ready")
            assert sent == Event(3, "model.state", 12.5, "m", 2, 7, {"state": "ready"})
            assert await read(first, 2) == [Event(2, "model.state", 12.5, "m"), sent]
            assert await read(second, 1) == [sent]


async def test_a_listener_waits_until_something_happens(looptime):
    bus = EventBus()
    with bus.subscribe() as listener:
        asyncio.get_running_loop().call_later(5, publish, bus, 1)
        assert (await read(listener, 1))[0].id == 1 and looptime == 5


async def test_a_wait_that_was_cancelled_loses_nothing():
    bus = EventBus()
    with bus.subscribe() as listener:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(listener), 1)
        publish(bus, 2)
        assert [event.id for event in await read(listener, 2)] == [1, 2]


async def test_a_slow_listener_loses_the_oldest_and_is_told_how_many():
    bus = EventBus()
    with bus.subscribe() as slow:
        publish(bus, PENDING + 10)
        lost, *kept = await read(slow, 1 + PENDING)
        assert (lost.kind, lost.id, lost.data) == ("lost", 10, {"count": 10})
        assert [event.id for event in kept] == list(range(11, PENDING + 11))
        publish(bus, 1)
        assert (await read(slow, 1))[0].kind == "model.state"


async def test_what_was_lost_in_two_places_is_told_in_both():
    bus = EventBus()
    with bus.subscribe() as slow:
        publish(bus, PENDING + 1)
        assert [event.kind for event in await read(slow, 2)] == ["lost", "model.state"]
        publish(bus, 3)
        told = await read(slow, 2)
        assert told[0].data == {"count": 2} and [event.id for event in told] == [4, 5]


async def test_a_listener_that_returns_gets_what_it_missed_however_much():
    bus = EventBus()
    publish(bus, KEPT)
    with bus.subscribe(after=3) as listener:
        publish(bus, 1)
        found = await rest(bus, listener)
    assert [event.id for event in found] == list(range(4, KEPT + 2))


async def test_a_listener_that_was_away_too_long_is_told_how_many_are_gone():
    bus = EventBus()
    publish(bus, KEPT + 50)
    with bus.subscribe(after=20) as listener:
        lost, first = await read(listener, 2)
    assert (lost.kind, lost.data) == ("lost", {"count": 30})
    assert first.id == 51 and lost.id == 50  # returning with the id of `lost` goes on at `first`


async def test_the_oldest_kept_event_is_no_loss():
    bus = EventBus()
    publish(bus, KEPT + 50)
    with bus.subscribe(after=50) as listener:
        assert (await read(listener, 1))[0].id == 51


async def test_after_the_newest_there_is_nothing_yet():
    bus = EventBus()
    publish(bus, 5)
    with bus.subscribe(after=5) as listener:
        assert await rest(bus, listener) == []


async def test_an_id_of_an_earlier_life_of_the_server_hides_nothing():
    bus = EventBus()
    publish(bus, 2)
    with bus.subscribe(after=900) as listener:
        assert [event.id for event in await rest(bus, listener)] == [1, 2]


async def test_closing_ends_every_listener_after_what_it_has_to_read():
    bus = EventBus()
    with bus.subscribe() as waiting, bus.subscribe() as slow:
        end = asyncio.create_task(anext(waiting, None))
        await asyncio.sleep(1)
        bus.close()
        assert await end is None
        publish(bus, 1)
        assert [event.id for event in await rest(bus, slow)] == [1]
    with bus.subscribe(after=0) as late:
        assert [event.id for event in await rest(bus, late)] == [1]


async def test_who_left_is_offered_nothing_more():
    bus = EventBus()
    with bus.subscribe() as gone:
        pass
    publish(bus, 1)
    gone.close()
    assert [event async for event in gone] == []
