"""How busy things are: cores without waiting, devices without believing that they answer, clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from repository.devices.cpu import SHORTEST_S, Cpu, counted
from repository.devices.readings import Readings
from repository.errors import DeviceSilentError
from server.errors import TooManyRequestsError
from server.turnstile import Turnstile


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.counted = (0.0, 0.0)
        self.cpu = Cpu(lambda: self.counted, lambda: self.now)

    def later(self, busy: float, total: float, s: float = 1.0) -> float:
        self.now += s
        self.counted = (self.counted[0] + busy, self.counted[1] + total)
        return self.cpu.busy()


def test_the_cores_are_as_busy_as_they_were_since_the_last_question() -> None:
    clock = Clock()
    assert clock.later(1.0, 4.0) == 0.25
    assert clock.later(4.0, 4.0) == 1.0
    assert clock.later(0.0, 4.0) == 0.0


def test_who_asks_again_at_once_is_told_the_same() -> None:
    clock = Clock()
    assert clock.later(1.0, 2.0) == 0.5
    assert clock.later(0.1, 0.1, SHORTEST_S / 2) == 0.5
    assert clock.later(0.9, 2.9, SHORTEST_S / 2) == pytest.approx(1 / 3)


def test_a_kernel_that_counts_backwards_is_no_negative_figure() -> None:
    """As it may do for the time in which it waited for disks."""
    assert Clock().later(-1.0, 4.0) == 0.0 and Clock().later(5.0, 4.0) == 1.0
    assert Clock().later(0.0, 0.0) == 0.0


def test_this_machine_has_counted() -> None:
    busy, total = counted()
    assert 0 < busy < total


# devices that may not answer --------------------------------------------------------------------


class Device:
    """Answers what `say` gives, once `go` is set. `asked`: how often."""

    def __init__(self, say: Callable[[], int]) -> None:
        self.say = say
        self.go = threading.Event()
        self.asked = 0

    def read(self) -> int:
        self.asked += 1
        self.go.wait()
        return self.say()


async def test_all_who_ask_meanwhile_share_one_question() -> None:
    device = Device(lambda: 7)
    readings = Readings(device.read)
    asking = [asyncio.create_task(readings.now()) for _ in range(5)]
    await asyncio.sleep(0)
    device.go.set()
    assert await asyncio.gather(*asking) == [7] * 5 and device.asked == 1
    assert await readings.now() == 7 and device.asked == 2


async def test_a_device_that_does_not_answer_is_asked_once_and_believed_again_when_it_does() -> (
    None
):
    device = Device(lambda: 7)
    readings = Readings(device.read, within_s=0.01)
    for _ in range(3):
        with pytest.raises(DeviceSilentError, match="nvidia-smi"):
            await readings.now()
    assert device.asked == 1
    device.go.set()
    patient = Readings(device.read)
    assert await patient.now() == 7


async def test_what_the_device_says_in_anger_everybody_is_told() -> None:
    device = Device(lambda: 1 // 0)
    device.go.set()
    readings = Readings(device.read)
    found = await asyncio.gather(readings.now(), readings.now(), return_exceptions=True)
    assert [type(error) for error in found] == [ZeroDivisionError] * 2


async def test_whoever_leaves_takes_the_answer_from_nobody() -> None:
    device = Device(lambda: 7)
    readings = Readings(device.read)
    leaving, staying = (asyncio.create_task(readings.now()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    device.go.set()
    assert await staying == 7 and leaving.cancelled()


# clients ----------------------------------------------------------------------------------------


def test_one_client_may_have_so_many_calls_under_way_and_keeps_nobody_else_out() -> None:
    turnstile = Turnstile(2)
    turnstile.enter("a")
    turnstile.enter("a")
    with pytest.raises(TooManyRequestsError, match="2 of your calls") as refused:
        turnstile.enter("a")
    assert refused.value.retry_after_s == 1.0
    turnstile.enter("b")
    turnstile.leave("a")
    turnstile.enter("a")
    for who in ("a", "a", "b"):
        turnstile.leave(who)
    assert not turnstile._inside
