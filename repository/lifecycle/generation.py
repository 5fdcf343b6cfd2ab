"""One generation and the leases on it.

Every method here runs on the event loop's thread, so there are no locks. A generation counts its
leases itself: draining is "wait until `leases` is 0", and nothing else needs to know who holds one.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from repository.errors import ModelNotReadyError
from repository.lifecycle.placement import NO_CREDIT, NOWHERE, Credit, Memory, Placement
from repository.lifecycle.spreading import shared
from repository.lifecycle.states import TERMINAL, Event, State, advance
from repository.messages import Loaded
from repository.spec import ModelSpec
from repository.tensors import Tensor

if TYPE_CHECKING:
    from repository.adapting.fitting import Fitting
    from repository.adapting.rows import RowAdapters
    from repository.hosts.base import Host
    from repository.lines import Line
    from repository.reports import Lookups
    from repository.signature import Signature
    from repository.streaming import Streams

STORY_LENGTH = 64  # steps kept per generation


def first_choice(spec: ModelSpec) -> tuple[Placement, ...]:
    """As it was estimated, on the best of the devices that it may go to, or where its config says."""
    if spec.config.devices:
        needs = shared(spec.bytes_needed, spec.config.devices)
        return (Placement(spec.config.devices, needs),)
    device = spec.devices[0]
    return (Placement((device,) * max(1, spec.config.instances), {device: spec.bytes_needed}),)


class Trigger(enum.StrEnum):
    """Why a generation was started; a label of the load metrics."""

    STARTUP = "startup"
    WATCH = "watch"
    API = "api"
    DEMAND = "demand"
    RESTART = "restart"

    @property
    def asked(self) -> bool:
        """Somebody said so at that moment, and may be waiting."""
        return self in (Trigger.API, Trigger.DEMAND)


class Work(NamedTuple):
    """What a generation has to do, and has done. Of a model that generates texts its streams count
    too: a sequence is an execution, each token that it wrote a sample."""

    waiting: int = 0
    in_flight: int = 0
    executions: int = 0
    samples: int = 0


class Step(NamedTuple):
    at: float  # seconds since 1970
    event: Event | None  # None: it was born
    state: State  # the state after the event
    note: str


@dataclass(slots=True, eq=False)
class Generation:
    """One life: QUEUED to GONE or FAILED.

    Invariants: serials rise and never repeat; a lease begins only in READY; `error` is set iff a
    FAULT happened; `idle` is set iff `leases` is 0; `settled` iff READY was reached or it ended;
    `rested` iff it fell asleep or ended; `roused` when it is not to sleep, or not any longer.
    Times that are compared (`born_at`, `ready_at`, `ended_at`, `last_used`) are the loop's clock, in
    seconds; the story has wall-clock times for people.
    """

    serial: int
    spec: ModelSpec
    on_step: Callable[[Generation, State], None]  # (self, the state before), after every step
    on_idle: Callable[[Generation], None]  # when the last lease ends
    clock: Callable[[], float]
    trigger: Trigger = Trigger.API
    epoch: int = 0  # counts forced reloads of one fingerprint
    options: tuple[Placement, ...] = ()  # where it may go, best first, and what it needs there
    placement: Placement = NOWHERE  # the one that it was admitted to
    aim: Placement | None = None  # where others have left for it
    wakes: Generation | None = None  # the one asleep whose host and memory it takes over
    woken: bool = False  # it has taken them over, and the host is awake
    rolled_back: bool = False  # an older one, come back because its successor had failed
    examined: bool = False  # what can be told of its files was told before anybody left for it
    sleeps: bool = False  # once it has drained it is to sleep; or it does
    state: State = State.QUEUED
    error: BaseException | None = None
    forgiven: bool = False  # somebody has asked since: its fault counts for nothing any more
    loaded: Loaded | None = None
    signature: Signature | None = None  # what a request must look like; set from READY on
    batcher: Line | None = None  # set from READY on
    initial: Mapping[str, Tensor] = field(default_factory=dict)  # states of a new sequence
    sequences: Collection[int | str] = ()  # ids of those that have begun and not ended
    lookups: Lookups | None = None  # where its answers are kept
    let_go: Callable[[], None] = lambda: None  # nobody can go on with one of them any more
    host: Host | None = None  # from LOADING on, until it is stopped or another's
    fitting: Fitting | None = None  # what its host knows of adapters, where the model takes them
    rows: RowAdapters | None = None  # beside it, from READY on
    streams: Streams | None = None  # beside it, where the model generates
    held: dict[str, int] = field(default_factory=dict)  # device -> bytes of its ledger
    measured: Memory = field(default_factory=dict)  # as the host reported last
    pinned: bool = False  # nobody drives it out; what its config or a call says, within the cap
    users: tuple[Generation, ...] = ()  # of ensembles, that need it to serve
    pin_refused: str = ""  # why it is not, though it was to be
    credit: Credit = NO_CREDIT  # how dear it is to those who look for somebody to evict
    leaked: int = 0  # bytes that had not come back when it had ended
    leases: int = 0
    served: int = 0  # leases that ended
    born_at: float = 0.0
    asked_at: float = 0.0  # its patience begins then
    admitted_at: float = 0.0  # 0.0: not yet
    ready_at: float | None = None
    ended_at: float | None = None
    last_used: float = 0.0
    drain_s: float = 0.0  # how long its last requests were waited for
    confirmed: bool = True  # whatever it held has surely come back; False while it lives
    story: deque[Step] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))
    retire_why: str = ""
    retire_asked: asyncio.Event = field(default_factory=asyncio.Event)
    roused: asyncio.Event = field(default_factory=asyncio.Event)
    rested: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        if not self.options:
            self.options = first_choice(self.spec)
        self.idle.set()
        self.born_at = self.asked_at = self.last_used = self.clock()
        self.story.append(Step(time.time(), None, State.QUEUED, str(self.trigger)))

    def __str__(self) -> str:
        return f"{self.spec.model}:{self.spec.version}#{self.serial}"

    @property
    def device(self) -> str:
        """Where it runs, or would run first: "cpu", "cuda:0". Of instances on several, the first."""
        return self.chosen.devices[0]

    @property
    def needed(self) -> int:
        """Bytes, on all devices together."""
        return sum(self.chosen.needs.values())

    @property
    def chosen(self) -> Placement:
        """Where it was admitted to; until then where it would go first."""
        return self.placement if self.placement.devices else self.options[0]

    @property
    def reserved(self) -> int:
        """Bytes that it holds, on all devices together."""
        return sum(self.held.values())

    async def says_ready(self) -> bool:
        """What its model says of itself, where it says anything; in half a second at most."""
        if self.host is None or self.loaded is None or "ready" not in self.loaded.abilities:
            return True
        return await self.host.ready()

    def asked_for(self, trigger: Trigger) -> None:
        """Somebody joins it while it is queued: it is as if it had been started for them."""
        self.trigger, self.asked_at = trigger, self.clock()

    def step(self, event: Event, note: str = "") -> None:
        before, self.state = self.state, advance(self.state, event)
        self.story.append(Step(time.time(), event, self.state, note))
        if event is Event.ADMIT:
            self.admitted_at = self.clock()
        if self.state is State.READY:
            self.ready_at = self.last_used = self.clock()
        if self.state in TERMINAL:
            self.ended_at = self.clock()
            self.ended.set()
        if self.state in TERMINAL or self.state is State.ASLEEP:
            self.rested.set()
        if self.state in TERMINAL or self.state is State.READY:
            self.settled.set()
        self.on_step(self, before)

    def fault(self, error: BaseException) -> None:
        self.error = error
        self.step(Event.FAULT, f"{type(error).__name__}: {error}")

    def break_off(self, error: BaseException) -> None:
        """After an illegal move, which is a bug: FAILED at once, past the table. What it had reserved
        stays reserved, because nobody knows what of it is still in use."""
        self.error = error
        before, self.state = self.state, State.FAILED
        self.story.append(Step(time.time(), Event.FAULT, self.state, f"a bug: {error}"))
        self.ended_at = self.clock()
        self.ended.set()
        self.rested.set()
        self.settled.set()
        self.on_step(self, before)

    def retire(self, why: str, *, sleeps: bool = False) -> None:
        """Asks it to end, or (`sleeps`) to fall asleep where it can. Asking again changes nothing, but
        that one which sleeps, or was to, ends."""
        if sleeps and (self.retire_asked.is_set() or self.state is State.ASLEEP):
            return
        if self.retire_asked.is_set() and not self.sleeps:
            return
        self.retire_why, self.sleeps = why, sleeps
        self.retire_asked.set()
        if not sleeps:
            self.roused.set()

    def fall_asleep(self, note: str) -> None:
        """Its host and what it holds now stay, until it is asked to end, or `hand_over`."""
        self.retire_asked.clear()
        self.step(Event.SLEPT, note)

    def hand_over(self, heir: Generation) -> None:
        """Asleep: its host, which `heir` is to wake, and all that it holds are the heir's from now."""
        self.sleeps = False
        self.wakes = None  # or each would keep all who slept before it
        heir.host, self.host = self.host, None
        heir.loaded, heir.fitting = self.loaded, self.fitting
        heir.held, self.held = self.held, {}
        self.fitting, self.confirmed = None, True
        self.roused.set()
        self.step(Event.WOKEN, f"by #{heir.serial}")

    @property
    def decoupled(self) -> bool:
        """A request may have any number of answers."""
        return self.loaded is not None and "decoupled" in self.loaded.abilities

    @property
    def work(self) -> Work:
        """Nothing before it was ready."""
        total = Work()
        for part in (self.batcher, self.streams):
            if part is not None:
                total = Work(
                    total.waiting + part.queue_length,
                    total.in_flight + part.in_flight,
                    total.executions + part.executions,
                    total.samples + part.samples,
                )
        return total

    def lease(self, *, late: bool = False) -> Lease:
        """Keeps this generation alive for the length of a `with`, or from `begin` to `end`. `late`: for
        what has begun here and goes on, also while it drains."""
        return Lease(self, late=late)


class Lease:
    """Begins only in READY (else ModelNotReadyError; `late`: or DRAINING), ends exactly once."""

    __slots__ = ("generation", "late")

    def __init__(self, generation: Generation, *, late: bool = False) -> None:
        self.generation = generation
        self.late = late

    def begin(self) -> Generation:
        gen = self.generation
        if gen.state is not State.READY and not (self.late and gen.state is State.DRAINING):
            raise ModelNotReadyError(f"model '{gen.spec.model}' is {gen.state}", retry_after_s=1.0)
        if gen.leases == 0:
            gen.idle.clear()
        gen.leases += 1
        return gen

    def end(self, *, used: bool = True) -> None:
        """`used` false: the model was asked nothing in the end. Bad requests keep nothing awake."""
        gen = self.generation
        gen.leases -= 1
        if used:
            gen.served += 1
            gen.last_used = gen.clock()
        if gen.leases == 0:
            gen.idle.set()
            gen.on_idle(gen)

    __enter__ = begin

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
