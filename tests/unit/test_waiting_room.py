"""How much memory the bodies of requests may hold whose models load."""

import asyncio

import pytest

from repository.errors import ModelNotReadyError, NoRoomError, QueueFullError
from server.waiting import WaitingRoom


class Models:
    on_demand = True

    def loads_on_request(self, model):
        return self.on_demand

    def demand(self, model, version, take):
        return asyncio.get_running_loop().create_future()


def enter(room, size, error=None, models=None):
    error = error or ModelNotReadyError("loading")
    return room.enter(models or Models(), error, "m", None, size=size, take=lambda lease: None)


async def test_bodies_that_wait_are_counted_until_their_wait_ends_however_it_does():
    room = WaitingRoom(100)
    first, second = enter(room, 60), enter(room, 40)
    with pytest.raises(QueueFullError, match="100B wait") as refused:
        enter(room, 1)
    assert refused.value.retry_after_s
    first.cancel()
    second.set_result(None)
    await asyncio.sleep(0)
    assert room.held == 0
    assert enter(room, 1000) is not None  # alone, whatever its size


async def test_nothing_waits_for_what_no_load_changes_nor_where_loads_are_not_on_demand():
    room, models = WaitingRoom(), Models()
    assert enter(room, 1, NoRoomError("full")) is None
    models.on_demand = False
    assert enter(room, 1, models=models) is None and room.held == 0
