"""The answers to one request, as they come: one from most models, any number from those that say so.

What a model answers is put into a deque by a plain call; who reads it, by and by, is one iterator.
Host and face know this class alone of each other.

Rule: it ends once, with or without an error, or by `close`. Everything is on the loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from repository.messages import InferRequest, InferResponse


class Responses:
    """One request, and an iterator over its answers for one reader. The iteration stops when the model
    has said that there are no more; it raises what went wrong, not before the answers that came first
    have been read.

    on_close   called once, when nobody wants the rest while there may be more
    on_read    called with each answer as it is taken: whoever runs the model may wait for that
    """

    __slots__ = (
        "_answers",
        "_error",
        "_over",
        "_reader",
        "_waiter",
        "on_close",
        "on_read",
        "request",
        "told",
    )

    def __init__(self, request: InferRequest) -> None:
        self.request = request
        self.on_close: Callable[[Responses], None] | None = None
        self.on_read: Callable[[InferResponse], None] | None = None
        self.told = 0  # answers so far
        self._answers: deque[InferResponse] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._over = False

    def __aiter__(self) -> Responses:
        return self

    async def __anext__(self) -> InferResponse:
        while not self._answers:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._over:
                raise StopAsyncIteration
            assert self._waiter is None, "one request has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        response = self._answers.popleft()
        if self.on_read is not None:
            self.on_read(response)
        if self._reader is not None:
            self._has_read()
        return response

    @property
    def over(self) -> bool:
        """Nothing more will come. There may be answers that nobody has read yet."""
        return self._over

    @property
    def waiting(self) -> int:
        """Answers that have come and were not read yet."""
        return len(self._answers)

    def close(self) -> None:
        """Nobody wants the rest. Again, or when it is over: nothing."""
        over, self._over = self._over, True
        self._answers.clear()
        self._error = None
        self._wake()
        self._has_read()
        if not over and self.on_close is not None:
            self.on_close(self)

    # told by whoever runs the model ---------------------------------------------------------------

    def tell(self, response: InferResponse) -> None:
        """One answer. After the end: nothing."""
        if not self._over:
            self.told += 1
            self._answers.append(response)
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """The last word. What comes later changes nothing."""
        if not self._over:
            self._over, self._error = True, error
            self._wake()

    async def until_read(self, most: int) -> None:
        """Until fewer than `most` answers wait to be read, or it is over. For who only hands on what
        somebody else tells: so that one waits, too."""
        while len(self._answers) >= most and not self._over:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def _has_read(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
