"""Texts as they are written: one stream for each sequence, and all those of one generation.

A piece that the worker tells is put into the deque of its stream, by a plain call; nobody makes a
task or a future of it. Who reads slowly, or not at all, holds up nobody: it costs the memory of its
own pieces, of which there are no more than its tokens.

Rule: a stream ends once, with Ended, an error, or by `close`. Everything is on the loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from repository.config import ModelConfig
from repository.errors import QueueFullError
from repository.generate import Ended, GenerateRequest, Piece
from repository.hosts.base import Host
from repository.messages import Loaded
from repository.prompt import error_of, listen, own

STOPPED = "the model was stopped before the text had ended; ask again"
RETRY_S = 1.0  # until somebody's turn may be over; how long an answer will be nobody knows


class TokenStream:
    """One sequence, as an iterator over its pieces, for one reader. It raises what the worker says
    (InvalidRequestError, AdapterNotFoundError, ...), WorkerDiedError, or what its generation was
    closed with; not before the pieces that came first have been read.

    ended   how it ended, once the iteration has stopped by itself
    """

    __slots__ = (
        "_answer",
        "_echo",
        "_error",
        "_last",
        "_over",
        "_pieces",
        "_waiter",
        "ended",
        "tokens",
    )

    def __init__(self, *, echo: bool) -> None:
        self.ended: Ended | None = None
        self.tokens = 0  # written so far
        self._echo = echo  # the next piece is the prompt
        self._answer: asyncio.Future[Ended] | None = None
        self._pieces: deque[Piece] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._last: Ended | None = None
        self._error: BaseException | None = None
        self._over = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Piece:
        while not self._pieces:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._over:
                self.ended = self._last
                raise StopAsyncIteration
            assert self._waiter is None, "one stream has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._pieces.popleft()

    def close(self) -> None:
        """Nobody wants the rest: the worker leaves it at its next step. Again: nothing."""
        self._pieces.clear()
        self._error = self._last = None
        self._finish()
        if self._answer is not None:
            self._answer.cancel()

    # told by Streams ------------------------------------------------------------------------------

    def _begin(self, answer: asyncio.Future[Ended]) -> None:
        self._answer = answer

    def _tell(self, piece: Piece) -> None:
        if self._over:
            return
        if not self._echo:
            self.tokens += len(piece.tokens)
        self._echo = False
        self._pieces.append(piece)
        self._wake()

    def _end(self, last: Ended | None, error: BaseException | None) -> None:
        """Once; what comes later changes nothing."""
        if not self._over:
            self._last, self._error = last, error
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Streams:
    """Of one generation. At most `max_queue` wait (0: any number) beside those that its slots (of each
    worker, as `loaded.details` says) have room for; a model's own `batching.max_queue` overrides it.

    executions, samples   sequences that have begun, tokens that were written: what the metrics of a
                          model that generates count
    """

    def __init__(self, host: Host, loaded: Loaded, config: ModelConfig, *, max_queue: int) -> None:
        own = config.batching.max_queue if config.batching is not None else 0
        self._host = host
        self._slots = max(1, host.slots) * _slots_of(loaded)
        self._queue = own or max_queue
        self._open: set[TokenStream] = set()
        self._closed: BaseException | None = None
        self.executions = 0
        self.samples = 0

    @property
    def in_flight(self) -> int:
        """Sequences that run."""
        return min(len(self._open), self._slots)

    @property
    def queue_length(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._open) - self.in_flight

    def open(self, request: GenerateRequest) -> TokenStream:
        """Raises QueueFullError; after `close`, the error that it was given."""
        if self._closed is not None:
            raise own(self._closed, STOPPED)
        if self._queue and len(self._open) >= self._slots + self._queue:
            raise QueueFullError(
                f"{self._slots} sequences of the model run and {self._queue} wait, as many as may; "
                "ask again later, or raise batching.max_queue",
                retry_after_s=RETRY_S,
            )
        stream = TokenStream(echo=request.echo)
        answer = self._host.generate(request, stream._tell)
        stream._begin(answer)
        self._open.add(stream)
        self.executions += 1
        listen(answer, partial(self._ended, stream))
        return stream

    def close(self, cause: BaseException) -> None:
        """What still runs ends with `cause`, and so does whatever comes later."""
        self._closed = cause
        for stream in list(self._open):
            stream._end(None, own(cause, STOPPED))
            if stream._answer is not None:
                stream._answer.cancel()

    def _ended(self, stream: TokenStream, answer: asyncio.Future[Ended]) -> None:
        self._open.discard(stream)
        error = error_of(answer)
        if error is not None:
            self.samples += stream.tokens
            stream._end(None, own(error, STOPPED))
            return
        ended = answer.result()
        self.samples += ended.completion_tokens
        stream._end(ended, None)


def _slots_of(loaded: Loaded) -> int:
    told = loaded.details.get("slots")
    return told if isinstance(told, int) and told > 0 else 1
