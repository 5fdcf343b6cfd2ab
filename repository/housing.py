"""The part of the writer that gives and takes memory (`repository.reconciler` is the whole).

It carries out what `admission` decides of the queue, in the same breath: who is admitted takes from the
ledgers, who has ended gives back. Nothing here waits.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable

from repository.admission import Admit, Decision, Evict, Refuse, Waiting, decide
from repository.composing import Composing
from repository.errors import NoRoomError
from repository.events import EventBus
from repository.life import Books, Means, live
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.news import tell_eviction, tell_pin_refused
from repository.lifecycle.placement import HOST, Bytes, Placement
from repository.lifecycle.residency import Moment, victims
from repository.lifecycle.states import Event, State
from repository.lifecycle.worth import may_sleep, settle
from repository.observer import Guarded


class Housing(Composing):
    """What the writer brings beside how things stand."""

    means: Means
    events: EventBus
    observer: Guarded
    generations: dict[str, list[Generation]]
    _load_slots: int
    _room_wait_s: float
    min_residency_s: float
    _lives: set[asyncio.Task[None]]
    _beds: list[asyncio.Future[None]]  # who waits for a place in the host tier
    _admit_again: float | None
    worth: float = 0.0  # the clock of `lifecycle.worth`

    @abstractmethod
    def _mark(self, model: str) -> None:
        """It has to be planned again."""

    @abstractmethod
    def _life_over(self, gen: Generation, life: asyncio.Task[None]) -> None: ...

    @abstractmethod
    def sleepless(self, gen: Generation) -> str:
        """Why it could not sleep, or "" (`resting`)."""

    @abstractmethod
    def _look_first(self, todo: Iterable[Decision]) -> list[Decision]:
        """Those that may be carried out now (`replacing`)."""

    @abstractmethod
    def _leave_for(self, old: Generation, heir: Generation) -> None:
        """A model's own older generation makes room (`replacing`)."""

    def _make_room(self, now: float) -> None:
        """Admits, evicts and refuses until nothing more can be decided now."""
        self._admit_again = None
        if self._ensembles:
            self._note_users()
            self._serve_ensembles()
        line = self._in_line()
        if not line:
            return
        found = decide(
            line,
            self._all(),
            self.ledgers,
            load_slots=self._load_slots,
            room_wait_s=self._room_wait_s,
            now=now,
            outgoing=self._outgoing,
            waiting=Waiting(self.demanded(), self.min_residency_s),
            clock=self.worth,
        )
        self._admit_again = found.again_at
        if any(isinstance(decision, Evict) for decision in found.todo):
            settle(self._all(), self.worth)
        for decision in self._look_first(found.todo):
            match decision:
                case Admit(gen, where):
                    self._admit(gen, where)
                case Evict(gen, room_for, where, credit):
                    room_for.aim = where
                    if decision.replaced:
                        self._leave_for(gen, room_for)
                    else:
                        self.worth = max(self.worth, credit)
                        self._evict(gen, "memory", sleeps=self.may_sleep(gen))
                case Refuse(gen, error):
                    self._refuse(gen, error)

    def _leave_queue(self, gen: Generation) -> None:
        self._queue.remove(gen)
        if not self._queue:
            self._retry_the_refused()  # they had stood back for it

    def _admit(self, gen: Generation, where: Placement) -> None:
        self._leave_queue(gen)
        gen.placement = where
        gen.held = self._taken_over(gen)
        for device, n_bytes in where.needs.items():
            more = max(0, n_bytes - gen.held.get(device, 0))
            self.ledgers[device].take(more)
            gen.held[device] = gen.held.get(device, 0) + more
        self.observer.phase(gen, "queue", self.now - gen.born_at)
        gen.step(Event.ADMIT)
        books = Books(self._give_back, self._keep, self._bed)
        life = asyncio.create_task(live(gen, self.means, books), name=str(gen))
        self._lives.add(life)
        life.add_done_callback(lambda task: self._life_over(gen, task))

    def _taken_over(self, gen: Generation) -> dict[str, int]:
        """What the sleeper held that it wakes. One that goes elsewhere, or whose sleeper has been told
        to leave since, loads as any other."""
        sleeper = gen.wakes
        if sleeper is None:
            return {}
        asleep = sleeper.state is State.ASLEEP and not sleeper.retire_asked.is_set()
        if not asleep or gen.placement != sleeper.placement:
            gen.wakes = None
            return {}
        sleeper.hand_over(gen)
        return gen.held

    def _evict(self, gen: Generation, reason: str, *, sleeps: bool = False) -> None:
        if gen.state is State.READY:  # whoever sleeps is not wanted awake
            self.wishes.evict(gen.spec.model)
            self._dirty[gen.spec.model] = Trigger.API  # its other versions leave with it
        gen.retire(f"evicted: {reason}", sleeps=sleeps)
        self.observer.evicted(gen, reason)
        tell_eviction(self.events, gen, reason)

    def may_sleep(self, gen: Generation) -> bool:
        """Driven out it falls asleep, if the tier has a place then. Who sleeps leaves for good."""
        return gen.state is State.READY and may_sleep(gen) and not self.sleepless(gen)

    def _refuse(self, gen: Generation, error: NoRoomError) -> None:
        """A wish of that moment that could not be granted is not kept. What policy wants, or was
        wanted before, is made up for when memory comes free."""
        if gen.trigger.asked:
            self.wishes.withdraw(gen.spec.model)
        self._leave_queue(gen)
        gen.fault(error)

    def _give_back(self, gen: Generation) -> None:
        for device, n_bytes in gen.held.items():
            self.ledgers[device].give(n_bytes)
        gen.held = {}
        self.room_came()

    def _keep(self, gen: Generation, held: Bytes) -> None:
        """It holds no more than that any longer."""
        for device, had in gen.held.items():
            self.ledgers[device].give(max(0, had - held.get(device, 0)))
        gen.held = {d: n for d, had in gen.held.items() if (n := min(had, held.get(d, 0)))}
        self.room_came()

    async def _bed(self, gen: Generation, n_bytes: int) -> bool:
        """So many bytes more of the host tier, for one that is to sleep. Who sleeps there already, is
        no dearer and is not about to be woken leaves for it. False: that would not be enough."""
        tier = self.ledgers.get(HOST)
        while tier is not None and n_bytes > tier.free:
            going = [g for g in self._all() if g.held.get(HOST) and not g.sleeps]
            soon = tier.free + sum(g.held[HOST] for g in going)
            found = victims({HOST: n_bytes - soon}, self._beneath(gen), self._moment)
            if found is None or not (found or going):
                return False
            for old in found:
                self._evict(old, "memory")
            came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._beds.append(came)
            await came
        if tier is None:
            return False
        tier.take(n_bytes)
        gen.held[HOST] = gen.held.get(HOST, 0) + n_bytes
        return True

    def _beneath(self, gen: Generation) -> list[Generation]:
        """Those asleep that may leave so that it can sleep."""
        called = [g.wakes for g in self._queue]
        return [
            g
            for g in self._all()
            if g.state is State.ASLEEP
            and g is not gen
            and g not in called
            and g.spec.config.priority <= gen.spec.config.priority
        ]

    @property
    def _moment(self) -> Moment:
        return Moment(self.now, self.min_residency_s, self.worth)

    def room_came(self) -> None:
        """Somebody has given back bytes, of ours or not: who waits for some is looked at again."""
        if self._queue:  # all of it is looked at then
            self._mark(self._queue[0].spec.model)
        beds, self._beds = self._beds, []
        for came in beds:
            if not came.done():
                came.set_result(None)
        self._retry_the_refused()

    def pin(self, model: str, pinned: bool) -> None:
        """Said by call: it holds at once, and for all that comes of the model."""
        self.pins.say(model, pinned)
        self._honour_pins()
        self._mark(model)

    def _honour_pins(self) -> None:
        """At once, wherever somebody comes or leaves who is to be pinned."""
        if self._ensembles:
            self._pin_parts()
        for gen in self.pins.honour(self._all(), self.ledgers):
            tell_pin_refused(self.events, gen)

    def _retry_the_refused(self) -> None:
        """Models that found no room are planned again."""
        for model, gens in self.generations.items():
            if any(isinstance(g.error, NoRoomError) for g in gens):
                self._mark(model)
