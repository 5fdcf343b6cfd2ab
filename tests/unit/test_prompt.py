"""A future with a listener that is told at once."""

import asyncio

import pytest

from repository.prompt import Prompt, listen


def made():
    future = Prompt(loop=asyncio.get_running_loop())
    future.listener = None
    return future


@pytest.mark.parametrize("how", ["result", "error"])
async def test_a_listener_is_told_before_the_call_returns(how):
    future, told = made(), []
    listen(future, told.append)
    if how == "result":
        future.set_result(1)
    else:
        future.set_exception(KeyError("x"))
        assert isinstance(future.exception(), KeyError)
    assert told == [future] and future.done()


async def test_whoever_cancels_finishes_first():
    future, told = made(), []
    listen(future, told.append)
    assert future.cancel()
    assert told == []
    await asyncio.sleep(0)
    assert told == [future]
    assert not future.cancel()
    await asyncio.sleep(0)
    assert told == [future]


async def test_one_that_is_done_tells_in_the_next_iteration():
    future, told = made(), []
    future.set_result(1)
    listen(future, told.append)
    assert told == []
    await asyncio.sleep(0)
    assert told == [future]


async def test_a_second_listener_is_a_callback_and_an_ordinary_future_has_only_those():
    future, told = made(), []
    listen(future, lambda f: told.append("first"))
    listen(future, lambda f: told.append("second"))
    plain = asyncio.get_running_loop().create_future()
    listen(plain, lambda f: told.append("plain"))
    future.set_result(1)
    plain.set_result(1)
    assert told == ["first"]
    await asyncio.sleep(0)
    assert told == ["first", "second", "plain"]
    assert await future == 1


async def test_a_listener_that_fails_harms_nobody():
    heard = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    future = made()

    def fail(_):
        raise ValueError("mine")

    listen(future, fail)
    future.set_result(1)
    assert await future == 1
    assert [str(context["exception"]) for context in heard] == ["mine"]


async def test_it_lets_go_of_its_listener():
    future = made()
    listen(future, lambda _: None)
    future.set_result(1)
    assert future.listener is None
