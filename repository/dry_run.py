"""What a load would do, asked of the same decision that a real load goes through."""

from __future__ import annotations

from dataclasses import replace

from repository.admission import Admit, Evict, Refuse, decide
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.plan import answers
from repository.lifecycle.states import RISING, State
from repository.lifecycle.wishes import Wanted
from repository.reconciler import Reconciler
from repository.reports import DryRun
from repository.sizes import human
from repository.snapshot import ModelFolder

FOREVER = float("inf")


def foresee(models: Reconciler, folder: ModelFolder) -> DryRun:
    """Changes nothing. All versions that would be started are taken together as one request for
    memory, which is what they need in the end."""
    gens = models.generations.get(folder.name, [])
    here = [g for g in gens if g.state in RISING or g.state is State.READY]
    new = [s for s in folder.specs.values() if not any(answers(g, Wanted(s)) for g in here)]
    if not new:
        device = here[-1].device if here else next(iter(models.ledgers))
        return DryRun(
            model=folder.name,
            would_load=False,
            bytes_needed=0,
            bytes_free=models.ledgers[device].free,
            device=device,
            would_evict=(),
            message=f"Model {folder.name} is loaded or loading already",
        )
    needed = sum(s.bytes_needed for s in new)
    device = models.place(new[0])
    asked = Generation(
        0,
        replace(new[0], bytes_needed=needed),
        on_step=lambda gen, before: None,
        on_idle=lambda gen: None,
        clock=lambda: 0.0,
        trigger=Trigger.API,
        device=device,
    )
    found = decide(
        [asked],
        [g for of in models.generations.values() for g in of],
        models.ledgers,
        load_slots=len(models.generations) + 10**6,
        room_wait_s=FOREVER,
        now=models.now,
        outgoing=lambda gen: not any(answers(gen, Wanted(s)) for s in folder.specs.values()),
    )
    free = models.ledgers[device].free
    would, message = True, f"Model {folder.name} would be loaded"
    evict: tuple[str, ...] = ()
    match found.todo:
        case [Refuse(_, error)]:
            would, message = False, str(error)
        case [Admit(_)]:
            pass
        case [Evict(), *_] as leave:
            evict = tuple(sorted({e.gen.spec.model for e in leave if isinstance(e, Evict)}))
            message += f" after {', '.join(evict)} made room"
        case _:
            message += f" once {human(needed - free)} more are free: others are busy or leaving"
    return DryRun(folder.name, would, needed, free, device, evict, message)
