"""What a model asks of the server: the front's side, one for each worker.

A call is a request like a client's, made by the `Caller`; its answers go to the worker as they come,
but never more than MOST_UNREAD (or MOST_UNREAD_BYTES) that the model has not taken: then nobody reads
the model that was called until this one does, and it waits in its turn.

A model may call itself, or one that calls it, as long as an instance is free to answer. Where every
instance waits for an answer that only one of them could give, the call that would close the circle is
refused (`circular`): nobody would ever be answered.

Rules: when the worker is gone its calls are closed, and their leases end. A call of which anything was
told has a last word, also one that was left. It never raises for what a model asks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from repository.calling import Caller
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    RepositoryError,
)
from repository.forms import Form
from repository.hosts import failures, frames
from repository.hosts.asking import Asking
from repository.hosts.base import Host
from repository.hosts.frames import (
    CALL,
    CALL_END,
    CALL_ERROR,
    CALLED,
    LEAVE,
    MANAGE,
    READ,
    BrokenFrameError,
    CallOrder,
    Header,
    Lot,
    ManageOrder,
)
from repository.messages import InferRequest
from repository.responding import Responses
from repository.tensors import Buffer

MOST_UNREAD, MOST_UNREAD_BYTES = 64, 16 << 20
JOIN_BELOW = 64 * 1024


class Waits(Protocol):
    """A host, as far as it may wait for another. `blocked`: of each instance whose model's own thread
    waits for calls, the hosts that are to answer (None: one that waits for nobody)."""

    slots: int
    blocked: dict[object, list[Any]]


class _Call:
    """`sent`: bytes of each answer that the model has not taken, as far as it is known."""

    __slots__ = ("first", "room", "sent", "told")

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.first = 0  # of `sent`: so many were taken before
        self.told = 0
        self.room = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self.sent) >= MOST_UNREAD or sum(self.sent) >= MOST_UNREAD_BYTES


class Calls:
    """`keep`: told what lies in the arena for the worker; `host`: whose worker it is."""

    def __init__(
        self,
        caller: Caller | None,
        asking: Asking,
        host: Waits,
        write: Callable[[Sequence[Buffer]], None],
        keep: Callable[[Lot, object], None],
    ) -> None:
        self._caller = caller
        self._asking = asking
        self._host = host
        self._write = write
        self._keep = keep
        self._calls: dict[int, _Call] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._closed = False

    def hear(self, header: Header, payload: memoryview) -> bool:
        """False: it is about nothing here. Raises BrokenFrameError, msgspec.MsgspecError."""
        _, meta, number, kind, *_ = header
        if kind == CALL:
            self._begin(number, self._call(number, payload, meta))
        elif kind == MANAGE:
            self._begin(number, self._manage(number, frames.read_manage(payload[:meta])))
        elif kind == READ:
            self._was_read(number, frames.read_count(payload[:meta]))
        elif kind == LEAVE:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
        else:
            return False
        return True

    def close(self) -> None:
        """The worker is gone."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()

    async def over(self) -> None:
        """Returns when no call is under way. After `close`."""
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    def _begin(self, number: int, work: Any) -> None:
        if number in self._tasks:
            work.close()
            raise BrokenFrameError(f"a second call number {number}")
        task = asyncio.create_task(work)
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    # one call -------------------------------------------------------------------------------------

    async def _call(self, number: int, payload: memoryview, meta: int) -> None:
        call = self._calls[number] = _Call()
        target: Any = None
        try:
            order, request = _read(payload, meta)
            caller = self._known()
            if order.blocks:
                target = self._target(caller, order)
                self._host.blocked.setdefault(self, []).append(target)
            try:
                await self._answer(number, call, caller.call(order.model, order.version, request))
            finally:
                if order.blocks:
                    self._unblock(target)
        except asyncio.CancelledError:
            self._say(_end(number, result=False))
            raise
        except Exception as error:  # noqa: BLE001 - the edge to a model
            self._refuse(number, error)
        finally:
            del self._calls[number]

    def _unblock(self, target: Any) -> None:
        targets = self._host.blocked[self]
        targets.remove(target)
        if not targets:
            del self._host.blocked[self]

    def _known(self) -> Caller:
        if self._caller is None:
            raise InferenceFailedError("there are no other models here that could be called")
        return self._caller

    def _target(self, caller: Caller, order: CallOrder) -> Any:
        """The host that would answer. Raises InferenceFailedError where it cannot, for it waits."""
        try:
            target = caller.lease(order.model, order.version).generation.host
        except RepositoryError:
            return None  # the call itself says what is wrong
        if target is not None and circular(self._host, self, target):
            raise InferenceFailedError(
                f"a call to '{order.model}' would wait for ever: every instance that could answer it "
                "waits itself for the answer to such a call; give the model more instances, or call "
                "from a thread of the model's own, after it has returned"
            )
        return target

    async def _answer(self, number: int, call: _Call, responses: Responses) -> None:
        try:
            async for response in responses:
                call.told += 1
                parts, kept = self._asking.hand(CALLED, number, response)
                if kept is not None:
                    self._keep((-number, call.told), kept)
                call.sent.append(sum([len(tensor.data) for tensor in response.outputs]))
                if responses.over and not responses.waiting:
                    await self._last(number, parts, responses)
                    return
                self._say(parts)
                while call.full:
                    call.room.clear()
                    await call.room.wait()
            self._say(_end(number, result=True))
        finally:
            responses.close()

    async def _last(self, number: int, parts: list[Buffer], responses: Responses) -> None:
        """An answer and what comes after it, which is known, in one."""
        try:
            await anext(responses)
        except StopAsyncIteration:
            parts += _end(number, result=True)
        except Exception as error:  # noqa: BLE001 - the edge to a model
            parts += _error(number, error)
        self._say(parts)

    def _was_read(self, number: int, count: int) -> None:
        call = self._calls.get(number)
        if call is None:  # it has ended meanwhile
            return
        new = max(0, count - call.first)
        call.first += new
        del call.sent[:new]
        call.room.set()

    # what models do to models ---------------------------------------------------------------------

    async def _manage(self, number: int, order: ManageOrder) -> None:
        try:
            result = await self._managed(self._known(), order)
        except Exception as error:  # noqa: BLE001 - the edge to a model
            self._refuse(number, error)
        else:
            self._say(_end(number, result=result))

    async def _managed(self, caller: Caller, order: ManageOrder) -> bool:
        if order.what == "load":
            await caller.load_by_name(order.model, _config(order.config), order.files)
        elif order.what == "unload":
            await caller.unload_by_name(order.model, dependents=order.dependents)
        else:
            try:
                lease = caller.lease(order.model, order.version)
            except RepositoryError:
                return False
            return await lease.generation.says_ready()
        return True

    def _refuse(self, number: int, error: BaseException) -> None:
        self._say(_error(number, error))

    def _say(self, parts: Sequence[Buffer]) -> None:
        if self._closed:
            return
        if len(parts) > 1 and sum(map(len, parts)) <= JOIN_BELOW:
            parts = [b"".join(parts)]
        self._write(parts)


def circular(asks: Waits, instance: object, target: Host | Waits) -> bool:
    """Whether `instance` of `asks` would wait for ever if it waited for `target` too: of all hosts that
    it would wait for, by whatever way, none has an instance that is free or waits for somebody else."""
    waits: dict[int, tuple[int, list[list[Any]]]] = {}
    ahead: list[Any] = [asks, target]
    while ahead:
        host = ahead.pop()
        if id(host) in waits:
            continue
        blocked = dict(getattr(host, "blocked", {}))
        if host is asks:
            blocked[instance] = [*blocked.get(instance, ()), target]
        waits[id(host)] = host.slots, list(blocked.values())
        ahead += [other for others in blocked.values() for other in others if other is not None]
    stuck = set(waits)
    while True:
        left = {key for key in stuck if _is_stuck(*waits[key], stuck)}
        if left == stuck:
            return id(asks) in stuck
        stuck = left


def _is_stuck(slots: int, blocked: list[list[Any]], stuck: set[int]) -> bool:
    """As far as those in `stuck` are."""
    return sum(any(id(o) in stuck for o in others) for others in blocked) >= slots


def _read(payload: memoryview, meta: int) -> tuple[CallOrder, InferRequest]:
    """Raises InvalidRequestError."""
    try:
        order = frames.read_call(payload[:meta])
        sizes = [blank.size for blank in order.blanks]
        data = frames.blobs_behind(payload, meta, sizes)
    except (msgspec.MsgspecError, BrokenFrameError) as error:
        raise InvalidRequestError(f"the call cannot be understood: {error}") from error
    form = Form(order.blanks, order.outputs, order.parameters)
    return order, InferRequest(form.tensors(data), form.outputs, order.id, form.parameters, form)


def _config(text: str | None) -> dict[str, Any] | None:
    """Raises InvalidRequestError."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"the config to load with is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequestError("the config to load with is no JSON object")
    return found


def _end(number: int, *, result: bool) -> list[Buffer]:
    return frames.pack(CALL_END, number, frames.encode(result))


def _error(number: int, error: BaseException) -> list[Buffer]:
    ours = failures.of_infer(error)
    return frames.pack(CALL_ERROR, number, frames.encode(failures.to_wire(ours)))
