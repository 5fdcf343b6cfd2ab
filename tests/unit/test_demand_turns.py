"""Models that share room take turns, whatever they need and however they are asked for."""

import asyncio
import random
from collections import Counter

import pytest

from repository.lifecycle.residency import PAUSE_S
from tests.extent import drawn
from tests.fakes.demand import CAPACITY, RESIDENCY_S, World, big
from tests.fakes.heart import load

pytestmark = pytest.mark.looptime

SIZES = {
    2: ([60, 60], [30, 80]),
    3: ([50, 50, 50], [60, 40, 70]),
    5: ([30] * 5, [20, 30, 40, 50, 90]),
}


@pytest.mark.parametrize("seed", range(drawn(15, long=45)))
async def test_every_request_is_answered_and_none_waits_longer_than_all_turns_together(
    seed, looptime
):
    """Closed-loop clients, models of which a part fits, and no pause in which one would be idle."""
    rng = random.Random(seed)
    count = rng.choice([2, 3, 5])
    sizes = list(rng.choice(SIZES[count]))
    rng.shuffle(sizes)
    names = [f"m{i}" for i in range(count)]
    longest_load, longest = rng.choice([0.5, 5.0]), rng.choice([1.0, 4.0])
    pinned = count == 5 and rng.random() < 0.3 and max(sizes) == 30
    specs = [
        big(n, s, pin=pinned and n == "m0", priority=rng.randrange(2))
        for n, s in zip(names, sizes, strict=True)
    ]
    world = World(
        *specs,
        load_s=lambda what: rng.uniform(0.1, longest_load),
        load_slots=rng.choice([1, 4]),
        lives={"drain_s": 1e6},
    )
    turn = max(RESIDENCY_S, longest_load)
    bound = count * (turn + longest_load + longest) + 1
    loop, waited, rounds = asyncio.get_running_loop(), [], Counter()

    async def client(own):
        until = loop.time() + 30
        while loop.time() < until:
            name = rng.choice(names) if own is None else own
            began = loop.time()
            lease = await world.lease(name)
            waited.append(loop.time() - began)
            await asyncio.sleep(rng.uniform(longest / 4, longest))
            lease.end()
            rounds[name] += 1

    async with world.models.running():
        if pinned:
            await load(world.models, "m0")
        homes = (names * 2)[:6] if seed % 2 else [None] * 6
        await asyncio.gather(*[client(own) for own in homes])
        assert not world.models.demand.models
        assert "m0" not in world.evicted or not pinned
        assert world.models.ledgers["cpu"].held <= CAPACITY
    assert max(waited) <= bound, (max(waited), bound)
    assert set(rounds) == set(names)
    assert world.models.ledgers["cpu"].free == CAPACITY
    assert all(h.calls == ["load", "stop"] for hosts in world.hosts.values() for h in hosts)


async def test_nobody_waits_for_the_rest_of_a_turn_that_nobody_uses(looptime):
    world = World(big("a"), big("b"), load_s=0.25)
    async with world.models.running():
        await world.use("a", for_s=0.5)
        assert looptime == 0.75
        await world.use("b")  # after the pause in which another request for "a" might have come
        assert looptime == pytest.approx(0.75 + PAUSE_S + 0.25)


async def test_a_turn_that_is_used_lasts_as_long_as_it_should(looptime):
    world = World(big("a"), big("b"), load_s=0.25)
    async with world.models.running():

        async def keep_asking():
            while not other.done():
                await world.use("a", for_s=PAUSE_S / 2)
                await asyncio.sleep(PAUSE_S / 2)

        await world.use("a")
        other = asyncio.create_task(world.use("b"))
        asking = asyncio.create_task(keep_asking())
        await other
        assert 0.25 + RESIDENCY_S <= looptime <= 0.25 + RESIDENCY_S + PAUSE_S + 0.25
        await asking


async def test_an_unused_turn_is_still_as_long_as_the_load_took(looptime):
    world = World(big("a"), big("b"), load_s=1.5)
    async with world.models.running():
        await world.use("a")
        await world.use("b")
        assert looptime == pytest.approx(3 * 1.5)
