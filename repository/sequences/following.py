"""Reads what a model answers to a turn, one by one, and writes it in the book."""

from __future__ import annotations

import asyncio
from functools import partial

from repository.messages import InferResponse
from repository.responding import Responses
from repository.sequences.book import Book, Turn

AHEAD = 16  # answers that its client has not read; then the model waits too


class Following:
    """A task for each turn: only models that are asked so have them."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, turn: Turn, answers: Responses) -> None:
        """Until its end; whoever leaves the turn leaves the answers."""
        read = asyncio.Event()
        if turn.answers is not None:
            turn.answers.on_read = partial(_go_on, read)
        task = asyncio.get_running_loop().create_task(self._read(turn, answers, read))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        turn.add_done_callback(partial(_leave, answers, read))

    async def _read(self, turn: Turn, answers: Responses, read: asyncio.Event) -> None:
        error: Exception | None = None
        try:
            async for response in answers:
                read.clear()
                self._book.told(turn, response)
                if turn.answers is not None and turn.answers.waiting >= AHEAD:
                    await read.wait()
        except Exception as broken:  # noqa: BLE001 - whatever it was, nobody may wait for ever
            error = broken
        answers.close()
        self._book.ran(turn, error)


def _go_on(read: asyncio.Event, response: InferResponse) -> None:
    read.set()


def _leave(answers: Responses, read: asyncio.Event, turn: asyncio.Future[InferResponse]) -> None:
    if turn.cancelled():
        answers.close()
    read.set()
