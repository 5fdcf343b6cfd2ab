"""The part of the writer that lets a model's own older generation leave for a newer one, where there is
no room for both (`repository.reconciler` is the whole).

    it would have to leave → the newer one's files are looked at (`life.examine`), while it serves on
      ├── something is wrong with them → the newer one fails, and nothing was interrupted
      └── nothing is → the older one sleeps if it can, else it stops; should the newer one fail all the
                       same, it comes back (`plan.Fallback`)

With `reload: replace` it leaves at once, and for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from repository.admission import Decision, Evict
from repository.housing import Housing
from repository.life import examine
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State


class Replacing(Housing):
    """`_examining`: those whose files are being looked at."""

    _examining: set[Generation]

    def _look_first(self, todo: Iterable[Decision]) -> list[Decision]:
        """Those that may be carried out now: files are looked at before anybody leaves for them."""
        found = list(todo)
        unsure = {
            d.room_for
            for d in found
            if isinstance(d, Evict)
            and d.replaced
            and d.gen.state is State.READY
            and d.room_for.spec.config.reload == "auto"
            and not d.room_for.examined
        }
        for gen in unsure - self._examining:
            self._examining.add(gen)
            looking = asyncio.create_task(self._examine(gen), name=f"examine {gen}")
            self._lives.add(looking)
            looking.add_done_callback(self._lives.discard)
        return [d for d in found if not (isinstance(d, Evict) and d.room_for in unsure)]

    async def _examine(self, gen: Generation) -> None:
        try:
            error = await examine(gen, self.means)
        finally:
            self._examining.discard(gen)
        if gen.state is not State.QUEUED:  # nobody wants it any more
            return
        if error is None:
            gen.examined = True
            self._mark(gen.spec.model)
        else:
            self._leave_queue(gen)
            gen.fault(error)

    def _leave_for(self, old: Generation, heir: Generation) -> None:
        """`old` is READY, or asleep from an earlier try."""
        comes_back = heir.spec.config.reload == "auto" and old.state is State.READY
        if comes_back:
            self.register.leaves(old, heir)
        sleeps = comes_back and not self.sleepless(old)
        old.retire(f"makes room for #{heir.serial}, which replaces it", sleeps=sleeps)
