"""The one writer. Turns wishes and happenings into plans, and plans into lives.

    wishes      load(), unload(), the settled snapshot in observe()   -> wishes, folders
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
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from repository.admission import MODEST, Admit, Evict, Refuse, decide
from repository.errors import ModelNotFoundError, NoRoomError
from repository.events import EventBus
from repository.life import Means, live
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.plan import plan
from repository.lifecycle.residency import expired
from repository.lifecycle.routes import Routes
from repository.lifecycle.states import TERMINAL, Event, IllegalMoveError, State
from repository.lifecycle.wishes import Wanted, Wishes
from repository.observer import Observer
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec

log = logging.getLogger("modeldepot.models")

RESOLUTION_S = 0.001  # a timer that is this near is due: clocks round, loops must not spin
HISTORY = 8  # ended generations of one model kept for people to read


class Reconciler:
    """`ledgers`: one per device. `load_slots`: how many generations may load at once."""

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
    ) -> None:
        self.means = means
        self.ledgers = ledgers
        self.wishes = wishes
        self.events = events or EventBus()
        self.observer = observer or Observer()
        self.folders: dict[str, ModelFolder] = {}
        self.generations: dict[str, list[Generation]] = {}  # by model, oldest first
        self.history: dict[str, deque[Generation]] = {}
        self.routes = Routes()
        self._load_slots = load_slots
        self._room_wait_s = room_wait_s
        self._crash_limit = crash_limit
        self._serials = itertools.count(1)
        self._dirty: dict[str, Trigger] = {}
        self._timers: dict[str, float] = {}  # model -> when to plan it again
        self._queue: list[Generation] = []
        self._wake = asyncio.Event()
        self._lives: set[asyncio.Task[None]] = set()
        self._clock: Callable[[], float] = lambda: asyncio.get_running_loop().time()
        self._ticking = False
        self._admit_again: float | None = None
        self._seen_first = False

    # wishes -------------------------------------------------------------------------------------

    def observe(self, folders: Mapping[str, ModelFolder]) -> None:
        """A settled scan of the whole repository. Wanted models follow their files."""
        trigger = Trigger.WATCH if self._seen_first else Trigger.STARTUP
        self._seen_first = True
        for name in [n for n in self.folders if n not in folders]:
            del self.folders[name]
            self.wishes.forget(name)
            self._dirty[name] = trigger
            self.events.publish("model.removed", name)
        for name, folder in folders.items():
            old = self.folders.get(name)
            if old == folder:
                continue
            self.folders[name] = folder
            self._dirty[name] = trigger
            self.events.publish("model.added" if old is None else "model.changed", name)
            for problem in (
                folder.problems if old is None or old.problems != folder.problems else ()
            ):
                self.events.publish("model.problem", name, rule=problem.rule, message=str(problem))
        self.routes.rename({a: n for n, f in self.folders.items() for a in f.aliases})
        self._tick()

    def want(self, model: str, *, force: bool = False, trigger: Trigger) -> list[Generation]:
        """Says that `model` is wanted. Returns the generations that will answer to the wish: those
        that were on their way or serving already, and those that it caused."""
        if not self._on_its_way(model):
            stopping = any(g.state is State.FAILING for g in self.generations.get(model, ()))
            self.wishes.load(model, force=force or stopping)
        self._forget_failures(model)
        self._dirty[model] = trigger
        self._tick()
        folder = self.folders.get(model)
        newest = {g.spec.version: g for g in self.generations.get(model, ())}
        return [newest[v] for v in (folder.specs if folder else ()) if v in newest]

    def unwant(self, model: str) -> list[Generation]:
        """Says that `model` is not wanted. Returns the generations that are still to end."""
        self.wishes.unload(model)
        self._forget_failures(model)
        going = [g for g in self.generations.get(model, ()) if g.state not in TERMINAL]
        self._dirty[model] = Trigger.API
        self._tick()
        return going

    def known(self, model: str) -> ModelFolder | None:
        """Its folder; None if the folder is gone and something of it still runs."""
        if model not in self.folders and model not in self.generations:
            raise ModelNotFoundError(f"no model '{model}' in the repository")
        return self.folders.get(model)

    @property
    def now(self) -> float:
        return self._clock()

    # the loop -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Serves for the length of the block, then unloads everything and waits for the drains."""
        loop = asyncio.create_task(self._reconcile(), name="reconcile")
        try:
            yield
        finally:
            loop.cancel()
            await asyncio.wait([loop])
            await self._close()

    async def _close(self) -> None:
        try:
            self.wishes = Wishes(everything=False)
            while self._lives or self._queue:
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
            self._tick()
            due = self._next_look()
            try:
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            except TimeoutError:
                continue

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
                dirty, self._dirty = self._dirty, {}
                for model, trigger in dirty.items():
                    self._plan(model, trigger, now)
                self._make_room(now)
                if not self._dirty:
                    break
            else:
                self._wake.set()
        finally:
            self._ticking = False

    def _plan(self, model: str, trigger: Trigger, now: float) -> None:
        gens = self.generations.get(model, [])
        wanted = self.wishes.wanted(self.folders.get(model))
        found = plan(wanted, gens, now=now, crash_limit=self._crash_limit, fits=self._fits)
        for order in found.retire:
            self._retire(next(g for g in gens if g.serial == order.serial), order.why)
        for start in found.start:
            self._start(start.wanted, self._cause(gens, start.wanted, trigger))
        over, next_expiry = expired(gens, now=now)
        for gen in over:
            self._evict(gen, "idle_ttl")
        looks = [t for t in (found.again_at, next_expiry) if t is not None]
        if looks:
            self._timers[model] = min(looks)
        self._bury(model, wanted)

    @staticmethod
    def _cause(gens: Iterable[Generation], want: Wanted, trigger: Trigger) -> Trigger:
        """A new try of what has failed is a restart, whatever woke the planner."""
        again = any(g.error and g.spec.fingerprint == want.spec.fingerprint for g in gens)
        return Trigger.RESTART if again else trigger

    def _start(self, want: Wanted, trigger: Trigger) -> None:
        gen = Generation(
            next(self._serials),
            want.spec,
            on_step=self._stepped,
            on_idle=self._idle,
            clock=self._clock,
            trigger=trigger,
            epoch=want.epoch,
            device=self.place(want.spec),
        )
        self.generations.setdefault(gen.spec.model, []).append(gen)
        self._queue.append(gen)
        self._stepped(gen, State.GONE)

    def _retire(self, gen: Generation, why: str) -> None:
        gen.retire(why)
        if gen.state is State.QUEUED:  # it has no life yet that could do it
            self._queue.remove(gen)
            gen.step(Event.RETIRE, why)

    def _make_room(self, now: float) -> None:
        """Admits, evicts and refuses until nothing more can be decided now."""
        self._admit_again = None
        if not self._queue:
            return
        found = decide(
            self._queue,
            (g for gens in self.generations.values() for g in gens),
            self.ledgers,
            load_slots=self._load_slots,
            room_wait_s=self._room_wait_s,
            now=now,
        )
        self._admit_again = found.again_at
        for decision in found.todo:
            match decision:
                case Admit(gen):
                    self._admit(gen)
                case Evict(gen, room_for):
                    if decision.replaced:
                        gen.retire(f"makes room for #{room_for.serial}, which replaces it")
                    else:
                        self._evict(gen, "memory")
                case Refuse(gen, error):
                    self._refuse(gen, error)

    def _admit(self, gen: Generation) -> None:
        self._queue.remove(gen)
        self.ledgers[gen.device].take(gen.spec.bytes_needed)
        gen.reserved = gen.spec.bytes_needed
        self.observer.phase(gen, "queue", self._clock() - gen.born_at)
        gen.step(Event.ADMIT)
        life = asyncio.create_task(live(gen, self.means, self._give_back), name=str(gen))
        self._lives.add(life)
        life.add_done_callback(lambda task: self._life_over(gen, task))

    def _evict(self, gen: Generation, reason: str) -> None:
        self.wishes.evict(gen.spec.model)
        self._dirty[gen.spec.model] = Trigger.API  # its other versions leave with it
        gen.retire(f"evicted: {reason}")
        self.observer.evicted(gen, reason)
        self.events.publish(
            "model.evicted", gen.spec.model, gen.spec.version, gen.serial, reason=reason
        )

    def _refuse(self, gen: Generation, error: NoRoomError) -> None:
        """A wish of that moment that could not be granted is not kept: else the model would come up by
        surprise later. What policy wants is made up for when memory comes free."""
        asked = gen.trigger not in MODEST and gen.trigger is not Trigger.WATCH
        if asked and self.routes.find(gen.spec.model) is None:
            self.wishes.evict(gen.spec.model)
        self._queue.remove(gen)
        gen.fault(error)

    def _give_back(self, gen: Generation) -> None:
        self.ledgers[gen.device].give(gen.reserved)
        gen.reserved = 0
        self._retry_the_refused()

    # happenings ---------------------------------------------------------------------------------

    def _stepped(self, gen: Generation, before: State) -> None:
        self.routes.update(gen.spec.model, self.generations[gen.spec.model])
        self._mark(gen.spec.model)
        step = gen.story[-1]
        log.info(
            "model=%s version=%d gen=%d %s→%s %.3fs%s",
            gen.spec.model,
            gen.spec.version,
            gen.serial,
            before,
            gen.state,
            self._clock() - gen.born_at,
            f" {step.note}" if step.note else "",
        )
        self.events.publish(
            "model.state",
            gen.spec.model,
            gen.spec.version,
            gen.serial,
            before=before if len(gen.story) > 1 else None,
            state=gen.state,
            note=step.note,
        )
        self.observer.stepped(gen, before)

    def _idle(self, gen: Generation) -> None:
        """The last lease ended: somebody may have waited for that, and its TTL starts now."""
        if self._queue or gen.spec.config.ttl_s is not None:
            self._mark(gen.spec.model)

    def _mark(self, model: str) -> None:
        self._dirty.setdefault(model, Trigger.RESTART)
        self._wake.set()

    def _life_over(self, gen: Generation, life: asyncio.Task[None]) -> None:
        self._lives.discard(life)
        self._mark(gen.spec.model)
        if life.cancelled():
            return
        error = life.exception()
        if error is not None:
            log.error("%s: its life broke off: %r; story: %s", gen, error, list(gen.story))
        if isinstance(error, IllegalMoveError):
            gen.break_off(error)
            self.observer.illegal_move(gen)

    # small things -------------------------------------------------------------------------------

    def place(self, spec: ModelSpec) -> str:
        """The first device of the spec that has a ledger. `spec.devices` has the best one first."""
        return next((d for d in spec.devices if d in self.ledgers), next(iter(self.ledgers)))

    def _fits(self, spec: ModelSpec) -> bool:
        return not self._queue and spec.bytes_needed <= self.ledgers[self.place(spec)].free

    def _retry_the_refused(self) -> None:
        """Memory came back: models that found no room are planned again."""
        for model, gens in self.generations.items():
            if gens[-1].state is State.FAILED:
                self._mark(model)

    def _on_its_way(self, model: str) -> bool:
        """A forced load joins one that is rising for the same files."""
        wanted = self.wishes.wanted(self.folders.get(model))
        rising = {
            (g.spec.version, g.spec.fingerprint)
            for g in self.generations.get(model, ())
            if not g.settled.is_set() and not g.retire_asked.is_set()
        }
        return bool(wanted) and all((v, w.spec.fingerprint) in rising for v, w in wanted.items())

    def _forget_failures(self, model: str) -> None:
        self._drop(model, [g for g in self.generations.get(model, ()) if g.state is State.FAILED])

    def _bury(self, model: str, wanted: Mapping[int, Wanted]) -> None:
        """Lets go of generations that no plan looks at: the gone, and faults of older files once a
        newer generation of that version has settled."""
        gens = self.generations.get(model, [])
        newest = {g.spec.version: g for g in gens if g.settled.is_set()}
        self._drop(
            model,
            [
                g
                for g in gens
                if g.state is State.GONE
                or (g.state is State.FAILED and self._is_history(g, newest, wanted))
            ],
        )

    @staticmethod
    def _is_history(
        gen: Generation, newest: Mapping[int, Generation], wanted: Mapping[int, Wanted]
    ) -> bool:
        want = wanted.get(gen.spec.version)
        if want is not None and want.spec.fingerprint == gen.spec.fingerprint:
            return False  # counts towards the crash limit
        return newest[gen.spec.version] is not gen

    def _drop(self, model: str, gone: list[Generation]) -> None:
        if not gone:
            return
        kept = [g for g in self.generations[model] if g not in gone]
        self.history.setdefault(model, deque(maxlen=HISTORY)).extend(gone)
        if kept:
            self.generations[model] = kept
        else:
            del self.generations[model]
            self.routes.update(model, ())
            if model not in self.folders:
                self.history.pop(model, None)
                self._timers.pop(model, None)
                self.observer.forgotten(model)
