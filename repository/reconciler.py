"""The one writer. Turns wishes and happenings into plans, and plans into lives.

    wishes      load(), unload(), the settled snapshot in observe()   -> wishes, folders
    demand      requests that wait for a model: it is wanted meanwhile -> demand
    happenings  a generation's step, its last lease ending            -> _dirty
    plan        lifecycle.plan + admission + residency (pure)         -> _tick
    lives       life.live, one task per admitted generation           -> _admit

All of it runs on one event loop. Every method that changes state is synchronous: there is no await
between a decision and its effect, so nobody ever sees a half-changed state.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from repository.demand import Demand, Take
from repository.errors import DrainingError
from repository.events import EventBus
from repository.life import Means
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.news import tell_folder, tell_step
from repository.lifecycle.pins import Pins
from repository.lifecycle.plan import plan, staying
from repository.lifecycle.register import Register
from repository.lifecycle.residency import expired
from repository.lifecycle.routes import Routes
from repository.lifecycle.states import TERMINAL, Event, IllegalMoveError, State
from repository.lifecycle.wishes import Wanted, Wishes
from repository.observer import Guarded, Observer
from repository.resting import Resting
from repository.snapshot import ModelFolder
from repository.standing import Needs, WhyNot, as_estimated, unknown

log = logging.getLogger("modeldepot.models")

RESOLUTION_S = 0.001  # a timer that is this near is due: clocks round, loops must not spin
ASKED = (Trigger.API, Trigger.WATCH)  # a better reason for a load than requests that wait
BREATH_S = 1.0  # after a bug in the planner, before it tries again


class Reconciler(Resting):
    """`ledgers`: one per device. `load_slots`: how many generations may load at once. `why_not`: what
    a request is told for which nothing serves, nor will."""

    def __init__(
        self,
        means: Means,
        ledgers: Mapping[str, MemoryLedger],
        wishes: Wishes,
        *,
        events: EventBus | None = None,
        observer: Observer | None = None,
        load_slots: int = 4,
        room_wait_s: float = 10.0,
        crash_limit: int = 3,
        demand: Demand | None = None,
        min_residency_s: float = 2.0,
        why_not: WhyNot = unknown,
        needs: Needs = as_estimated,
        pins: Pins | None = None,
    ) -> None:
        self.means = means
        self.ledgers = ledgers
        self.wishes = wishes
        self.events = events or EventBus()
        self.observer = Guarded(observer or Observer())
        self.folders: dict[str, ModelFolder] = {}
        self.register = Register(crash_limit=crash_limit)
        self.generations = self.register.living
        self.history = self.register.history
        self.routes = Routes()
        self.demand = demand or Demand()
        self.demand.deserted = self._deserted
        self._load_slots = load_slots
        self._room_wait_s = room_wait_s
        self._crash_limit = crash_limit
        self.min_residency_s = min_residency_s
        self._why_not = why_not
        self.needs = needs
        self.pins = pins or Pins()
        self._serials = itertools.count(1)
        self._dirty: dict[str, Trigger] = {}
        self._timers: dict[str, float] = {}  # model -> when to plan it again
        self._queue: list[Generation] = []
        self._wake = asyncio.Event()
        self._lives: set[asyncio.Task[None]] = set()
        self._examining: set[Generation] = set()
        self._beds: list[asyncio.Future[None]] = []
        self._clock: Callable[[], float] = lambda: asyncio.get_running_loop().time()
        self._ticking = False
        self._admit_again: float | None = None
        self._closing = False
        self._ensembles: set[str] = set()
        self._drawn = None
        self._fits_of = {}
        self._found = None
        self._used: list[Generation] = []

    # wishes -------------------------------------------------------------------------------------

    def observe(self, folders: Mapping[str, ModelFolder], *, starting: bool = False) -> None:
        """A settled scan of the whole repository. Wanted models follow their files. `starting`: what
        is new in it lay there before the server began, and drives nobody out."""
        trigger = Trigger.STARTUP if starting else Trigger.WATCH
        for name in [n for n in self.folders if n not in folders]:
            del self.folders[name]
            self._drawn = None
            self.wishes.forget(name)
            self.pins.forget(name)
            self._dirty[name] = trigger
            self.events.publish("model.removed", name)
        for name, folder in folders.items():
            old = self.folders.get(name)
            if old != folder:
                self.folders[name] = folder
                self._dirty[name] = trigger
                self._follow(folder)
                tell_folder(self.events, old, folder)
            self.means.shelf.follow(name, folder.adapters)
        self._rename({a: n for n, f in self.folders.items() for a in f.aliases}, trigger)
        self._tick()

    def want(self, model: str, *, force: bool = False, trigger: Trigger) -> list[Generation]:
        """Says that `model` is wanted. Returns the generations that will answer to the wish: those
        that were on their way or serving already, and those that it caused."""
        if self._closing:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)
        self.wishes.load(model, force=force and not self._on_its_way(model))
        self.register.forgive(model)
        self._dirty[model] = trigger
        self._ask_for_parts(model, trigger)
        for gen in self.register.of(model):
            if gen.state is State.QUEUED:
                gen.asked_for(trigger)
        self._tick()
        folder = self.folders.get(model)
        newest = {g.spec.version: g for g in self.register.of(model) if not g.sleeps}
        gens = [newest[v] for v in (folder.specs if folder else ()) if v in newest]
        if gens and all(g.state is State.READY for g in gens):
            self.wishes.granted(model)
        return gens

    def unwant(self, model: str) -> list[Generation]:
        """Says that `model` is not wanted. Returns the generations that are still to end."""
        self.wishes.unload(model)
        self.register.forgive(model)
        going = [g for g in self.register.of(model) if g.state not in TERMINAL]
        for gen in going:  # for those who wait it comes back, but as another generation
            if gen.sleeps or (model in self.demand.models and staying([gen])):
                self._retire(gen, "not wanted")
        self._dirty[model] = Trigger.API
        self._tick()
        return going

    def spare_parts(self, model: str) -> dict[str, list[Generation]]:
        """What was loaded only because this needed it is not wanted any more; what of it is to end."""
        gone = self.spare(model)
        going = {p: [g for g in self.register.of(p) if g.state not in TERMINAL] for p in gone}
        self._tick()
        return going

    def wait_for(self, name: str, version: int | None, take: Take) -> asyncio.Future[None]:
        """A request waits until a version of it serves, and has it loaded if need be; `take` is then
        given a lease that has begun. Raises at once what cannot change by waiting, QueueFullError."""
        if self._closing:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)
        error = self._in_vain(name, version)
        if error is not None:
            raise error
        model = self.routes.model(name)
        first = model not in self.demand.models
        waiter = self.demand.join(model, name, version, take)
        if first:
            self._forgive_for_requests(model)
            self._ask_for_parts(model, Trigger.DEMAND)
            self._dirty[model] = Trigger.DEMAND
            self._tick()
        self.demand.grant(model, self.routes.find)  # it may have come since the caller looked
        return waiter

    @property
    def now(self) -> float:
        return self._clock()

    @property
    def queued(self) -> Sequence[Generation]:
        """Those who wait for memory or a load slot, in their order."""
        return self._queue

    # the loop -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Serves for the length of the block, then unloads everything and waits for the drains."""
        loop = asyncio.create_task(self._reconcile(), name="reconcile")
        try:
            yield
        finally:
            self._closing = True
            self.demand.close()
            loop.cancel()
            try:
                await asyncio.wait([loop])
            finally:  # somebody's second thought must not leave lives behind
                await self._close()

    async def _close(self) -> None:
        try:
            self.wishes = Wishes(everything=False)
            while self._lives or self._queue:
                for gen in itertools.chain(*self.generations.values()):
                    gen.let_go()
                self._dirty.update(dict.fromkeys(self.generations, Trigger.API))
                self._tick()
                if self._lives:
                    await asyncio.wait(self._lives, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for life in self._lives:  # cancelled: no patience left
                life.cancel()
            if self._lives:
                await asyncio.wait(self._lives)

    async def _reconcile(self) -> None:
        while True:
            self._wake.clear()
            due = self._tick_or_say_why()
            try:
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _tick_or_say_why(self) -> float | None:
        """When to look again. A planner that died of a bug would be an outage that nobody sees."""
        try:
            self._tick()
        except Exception:
            log.exception("the planner stumbled; trying again")
            return self._clock() + BREATH_S
        return self._next_look()

    def _next_look(self) -> float | None:
        times = list(self._timers.values())
        if self._admit_again is not None:
            times.append(self._admit_again)
        return min(times, default=None)

    def _tick(self) -> None:
        if self._ticking:  # a step taken inside a tick only marks its model dirty
            return
        self._ticking = True
        try:
            now = self._clock() + RESOLUTION_S
            due = [m for m, at in self._timers.items() if at <= now]
            for model in due:
                del self._timers[model]
                self._dirty.setdefault(model, Trigger.RESTART)
            for _ in range(64):  # a decision may make others due; it settles in a few rounds
                for user in [user for model in self._dirty for user in self.users(model)]:
                    self._dirty.setdefault(user, Trigger.RESTART)
                for model in list(self._dirty):
                    self._plan(model, self._dirty.pop(model), now)
                self._make_room(now)
                if not self._dirty:
                    break
            else:
                self._wake.set()
        finally:
            self._ticking = False

    def _plan(self, model: str, trigger: Trigger, now: float) -> None:
        gens = self.register.of(model)
        folder = self.folders.get(model)
        if folder is not None and model in self.demand.models:
            self.wishes.demand(model)
            trigger = trigger if trigger in ASKED else Trigger.DEMAND
        if self._ensembles and self.wishes.wants(model):
            self._need(model, trigger, asked=model in self.demand.models)
        wanted = {} if self.away(model) else self.wishes.wanted(folder)
        resting = {} if self._closing else self.wishes.resting(folder)
        if not resting:  # nor does anything come back
            self.register.fallback.pop(model, None)
        found = plan(
            wanted,
            gens,
            now=now,
            crash_limit=self._crash_limit,
            fits=self._fits,
            resting=resting,
            fallback=self.register.fallback.get(model, {}),
            footing=self.footing,
        )
        for order in found.retire:
            self._retire(next(g for g in gens if g.serial == order.serial), order.why)
        for start in found.start:
            self._start(start.wanted, trigger)
        self._call_sleepers(self.register.of(model))
        idle = self._idling(model)
        over, next_expiry = expired(idle, now=now)
        for gen in over:
            self._evict(gen, "idle_ttl")
        next_nap = self._doze(idle, now)
        looks = [t for t in (found.again_at, next_expiry, next_nap) if t is not None]
        if looks:
            self._timers[model] = min(looks)
        self.demand.let_down(model, self._in_vain)
        self.register.bury(model, folder, wanted)
        self._forget_if_gone(model)

    def _idling(self, model: str) -> list[Generation]:
        """What its time may be over for: nothing while requests wait for some of it, or it would go and
        come in turns; nor who sleeps and is about to be woken."""
        if model in self.demanded():
            return []
        gens = self.register.of(model)
        called = [g.wakes for g in gens if g.state is State.QUEUED]
        return [g for g in gens if g not in called]

    def _start(self, want: Wanted, trigger: Trigger) -> None:
        """A new try of what has failed is a restart, whatever woke the planner."""
        failed = (g for g in self.register.of(want.spec.model) if g.error and not g.forgiven)
        if want.back or any(g.spec.fingerprint == want.spec.fingerprint for g in failed):
            trigger = Trigger.RESTART
        gen = Generation(
            next(self._serials),
            want.spec,
            on_step=self._stepped,
            on_idle=self._idle,
            clock=self._clock,
            trigger=trigger,
            epoch=want.epoch,
            options=self.options(want.spec),
            rolled_back=want.back,
        )
        self.register.add(gen)
        self._queue.insert(0 if want.back else len(self._queue), gen)  # it had its place before
        self._stepped(gen, State.GONE)

    def _retire(self, gen: Generation, why: str) -> None:
        gen.retire(why)
        if gen.state is State.QUEUED:  # it has no life yet that could do it
            self._leave_queue(gen)
            gen.step(Event.RETIRE, why)

    # happenings ---------------------------------------------------------------------------------

    def _stepped(self, gen: Generation, before: State) -> None:
        if gen.spec.config.ensemble is not None:
            self._drawn = None
        self.routes.update(gen.spec.model, self.register.of(gen.spec.model))
        if gen.pinned or self.pins.wants(gen.spec):
            self._honour_pins()
        if gen.state is State.READY:
            self.wishes.granted(gen.spec.model)
            self.register.serves(gen)
        self._mark(gen.spec.model)
        tell_step(self.events, gen, before)
        self.observer.stepped(gen, before)
        if gen.state is State.READY:
            self.demand.grant(gen.spec.model, self.routes.find)

    def _deserted(self, model: str) -> None:
        """Nobody waits for it any more: if nothing was done for it yet, nothing will be."""
        for name in (model, *self.parts(model)):
            if self._untouched(name):
                self.wishes.withdraw(name)
            self._mark(name)

    def _idle(self, gen: Generation) -> None:
        """The last lease ended: somebody may have waited for that, and its TTL starts now."""
        config = gen.spec.config
        if self._queue or config.ttl_s is not None or config.sleep_s is not None:
            self._mark(gen.spec.model)

    def _mark(self, model: str) -> None:
        self._dirty.setdefault(model, Trigger.RESTART)
        self._wake.set()

    def _life_over(self, gen: Generation, life: asyncio.Task[None]) -> None:
        """Whatever became of the life: nobody may wait for ever for the generation."""
        self._lives.discard(life)
        self._mark(gen.spec.model)
        error = None if life.cancelled() else life.exception()
        if error is not None:
            log.error("%s: its life broke off: %r; story: %s", gen, error, list(gen.story))
        if isinstance(error, IllegalMoveError):
            self.observer.illegal_move(gen)
        if isinstance(error, IllegalMoveError) or gen.state not in TERMINAL:
            gen.break_off(error or asyncio.CancelledError())

    # small things -------------------------------------------------------------------------------

    def _forget_if_gone(self, model: str) -> None:
        if model in self.folders or model in self.generations:
            return
        self.register.forget(model)
        self._timers.pop(model, None)
        self.demand.forget(model)
        self.means.shelf.forget(model)
        self.observer.forgotten(model)
