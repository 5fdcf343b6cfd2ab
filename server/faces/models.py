"""GET /v1/models/{name}: all that is known of one model, for people and for tools that wait on it;
with the fields that OpenAI's clients read. Of an adapter ("model:adapter"): those alone.

Times are ISO 8601 in UTC, sizes bytes. No absolute path is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from litestar import Request, Router, get
from litestar.di import NamedDependency

from repository.errors import ModelNotFoundError
from repository.lifecycle.generation import Generation, first_choice
from repository.lifecycle.placement import Placement
from repository.lifecycle.states import TERMINAL, State
from repository.lifecycle.status import ModelStatus, text_of
from repository.names import shown
from repository.reports import AdapterView, StepReport
from repository.repository import Repository
from repository.snapshot import ModelFolder, Problem
from repository.spec import ModelSpec
from server.codecs.memory_views import MemoryView, memory_of, memory_of_one
from server.codecs.openai_models import BETWEEN, ModelCard, cards_of, created_of
from server.settings import Settings

PREFIX = "/v1/models/"


class ErrorView(msgspec.Struct):
    code: str
    message: str
    version: int | None
    at: str | None


class ProblemView(msgspec.Struct):
    """`warning`: it stops nothing. `version` null: the whole model."""

    where: str
    rule: str
    message: str
    hint: str
    version: int | None
    warning: bool


class ValueView(msgspec.Struct):
    value: Any
    source: str


class StepView(msgspec.Struct):
    """`event` is null in the first step: it was born."""

    at: str
    event: str | None
    state: str
    note: str


class GenerationView(msgspec.Struct):
    """`device`: where it runs, or would first; `devices`: of each of its instances. `woken`: it
    took over the worker and the memory of one that slept. `rolled_back`: its successor failed, and it
    came back. `leaked_bytes`: what its device had not given back when it had ended. `sequences`:
    those that are open, each of which is a lease."""

    serial: int
    version: int
    state: str
    trigger: str
    device: str
    devices: list[str]
    pinned: bool
    woken: bool
    rolled_back: bool
    leaked_bytes: int
    fingerprint: str
    born: str
    leases: int
    served: int
    queue_length: int
    in_flight: int
    sequences: int
    error: ErrorView | None
    memory: MemoryView
    loaded: dict[str, Any] | None
    story: list[StepView]


class StepEntry(msgspec.Struct):
    """Of an ensemble. `version` null: the newest; `serving_version` null: nothing of it serves."""

    model: str
    version: int | None
    serving_version: int | None


class AdapterEntry(msgspec.Struct):
    """`state`: settling, registered, loading, loaded, failed; `residence`: where it is nearest to the
    model: registered (its files only), host, device; `origin`: folder or call."""

    name: str
    src: str
    state: str
    residence: str
    origin: str
    preload: bool
    pin: bool
    rank: int
    bytes: int
    error: str | None
    options: dict[str, str]


class ModelView(msgspec.Struct):
    """`asleep`: weights of it wait in host memory, and do not serve. `rolled_back`: what serves came
    back because its successor failed; `last_error` says why. `can_sleep`: what runs of it can; null
    where nothing does, so that nobody knows. `pinned`: nobody drives out what runs of it;
    `pin_refused`: why somebody may, though it was to be pinned. `leaked_bytes`: of the last that
    ended."""

    id: str
    created: int
    owned_by: str
    name: str
    state: str
    reloading: bool
    wanted: bool
    asleep: bool
    rolled_back: bool
    can_sleep: bool | None
    pinned: bool
    pin_refused: str | None
    leaked_bytes: int
    serving_version: int | None
    last_error: ErrorView | None
    changed_at: str | None
    aliases: list[str]
    versions: list[int]
    problems: list[ProblemView]
    memory: MemoryView
    config: dict[str, ValueView]
    adapters: list[AdapterEntry]
    steps: list[StepEntry]
    generations: list[GenerationView]
    object: Literal["model"] = "model"


@get("/v1/models/{name:path}", summary="All that is known of one model", tags=["models"])
async def show(
    request: Request[Any, Any, Any],
    models: NamedDependency[Repository],
    settings: NamedDependency[Settings],
) -> ModelView | ModelCard:
    """The name may hold slashes (a nested model). An alias shows the model that it stands for.

    It is read from the address itself: as a Path, "a/." would be "a".
    """
    name, owner = request.scope["path"].removeprefix(PREFIX), settings.server_name
    if BETWEEN not in name:
        adapters = await models.adapters_now(models.status(name).name)
        status = models.status(name)
        return view_of(status, owner, adapters, models.expects, models.steps(status))
    model, _, adapter = name.partition(BETWEEN)
    status = models.status(model)
    id = f"{status.name}{BETWEEN}{adapter}"
    for card in cards_of(status, models.adapters(status.name), owner):
        if card.id == id:
            return card
    raise ModelNotFoundError(
        f"the model '{status.name}' has no adapter '{shown(adapter)}' that can be used"
    )


def view_of(
    status: ModelStatus,
    owner: str,
    adapters: Iterable[AdapterView] = (),
    expects: Callable[[ModelSpec], Placement] = lambda spec: first_choice(spec)[0],
    steps: Iterable[StepReport] = (),
) -> ModelView:
    """`expects`: what a load would need, of what does not run."""
    folder, spec = status.folder, _current(status)
    error = status.last_error
    return ModelView(
        id=status.name,
        created=created_of(status),
        owned_by=owner,
        name=status.name,
        state=status.state,
        reloading=status.reloading,
        wanted=status.wanted,
        **_standing(status),
        serving_version=status.serving_version,
        last_error=None
        if error is None
        else ErrorView(error.code, error.message, error.version, iso(error.at)),
        changed_at=iso(status.changed_at),
        aliases=list(folder.aliases) if folder else [],
        versions=sorted(folder.versions) if folder else [],
        problems=[_problem(p) for p in folder.problems] if folder else [],
        memory=memory_of(status, expects(spec) if spec else None),
        config=_config(spec),
        adapters=[_adapter(view) for view in adapters],
        steps=[StepEntry(step.model, step.version, step.serving_version) for step in steps],
        generations=[_generation(g) for g in status.generations],
    )


def _adapter(view: AdapterView) -> AdapterEntry:
    return AdapterEntry(
        name=view.name,
        src=view.src,
        state=view.state,
        residence=view.residence,
        origin=view.origin,
        preload=view.preload,
        pin=view.pin,
        rank=view.rank,
        bytes=view.bytes,
        error=view.error or None,
        options=dict(view.options),
    )


def iso(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _problem(problem: Problem) -> ProblemView:
    return ProblemView(
        problem.where, problem.rule, problem.message, problem.hint, problem.version, problem.warning
    )


def _current(status: ModelStatus) -> ModelSpec | None:
    """The spec that people ask about: of what serves, else of what the folder holds, else of the
    newest attempt."""
    ready = [g for g in status.generations if g.state is State.READY]
    if ready:
        return max(ready, key=lambda g: (g.spec.version, g.serial)).spec
    folder: ModelFolder | None = status.folder
    if folder is not None and folder.specs:
        return folder.specs[max(folder.specs)]
    return status.generations[0].spec if status.generations else None


def _standing(status: ModelStatus) -> dict[str, Any]:
    """Whether it sleeps, can, and may be driven out."""
    alive = [gen for gen in status.generations if gen.state not in TERMINAL]
    ended = [gen for gen in (*status.generations, *status.past) if gen.state in TERMINAL]
    ready = [gen for gen in status.generations if gen.state is State.READY]  # newest first
    known = [gen.loaded for gen in alive if gen.loaded is not None]
    last = max(ended, key=lambda gen: gen.serial, default=None)
    refused = [gen.pin_refused for gen in alive if gen.pin_refused]
    return {
        "asleep": status.asleep,
        "rolled_back": bool(ready) and ready[0].rolled_back and not _is_wanted(ready[0], status),
        "can_sleep": all("sleep" in loaded.abilities for loaded in known) if known else None,
        "pinned": bool(alive) and all(gen.pinned for gen in alive),
        "pin_refused": refused[0] if refused else None,
        "leaked_bytes": last.leaked if last else 0,
    }


def _is_wanted(gen: Generation, status: ModelStatus) -> bool:
    """Its files are what the folder holds: again, where it had come back for others."""
    spec = status.folder.specs.get(gen.spec.version) if status.folder is not None else None
    return spec is not None and spec.fingerprint == gen.spec.fingerprint


def _config(spec: ModelSpec | None) -> dict[str, ValueView]:
    """Every key with its value and the place that it came from; a key that is set in parts names
    the first of them."""
    if spec is None:
        return {}
    values: dict[str, Any] = msgspec.to_builtins(spec.config)
    return {key: ValueView(value, _source(spec.sources, key)) for key, value in values.items()}


def _source(sources: Mapping[str, str], key: str) -> str:
    if key in sources:
        return sources[key]
    below = (where for name, where in sources.items() if name.startswith((f"{key}.", f"{key}[")))
    return next((where for where in below if where != "default"), "default")


def _generation(gen: Generation) -> GenerationView:
    error = gen.error
    return GenerationView(
        serial=gen.serial,
        version=gen.spec.version,
        state=gen.state,
        trigger=gen.trigger,
        device=gen.device,
        devices=list(gen.chosen.devices),
        pinned=gen.pinned,
        woken=gen.woken,
        rolled_back=gen.rolled_back,
        leaked_bytes=gen.leaked,
        fingerprint=gen.spec.fingerprint,
        born=iso(_born(gen)) or "",
        leases=gen.leases,
        served=gen.served,
        queue_length=gen.work.waiting,
        in_flight=gen.work.in_flight,
        sequences=len(gen.sequences),
        error=None
        if error is None
        else ErrorView(
            getattr(error, "code", "load_failed"),
            text_of(error),
            gen.spec.version,
            iso(gen.story[-1].at),
        ),
        memory=memory_of_one(gen),
        loaded=msgspec.to_builtins(gen.loaded) if gen.loaded else None,
        story=[StepView(iso(s.at) or "", s.event, s.state, s.note) for s in gen.story],
    )


def _born(gen: Generation) -> float:
    """Wall time. A long story forgets its beginning; `born_at` is the loop's clock, so an age."""
    first = gen.story[0]
    return first.at if first.event is None else time.time() - (gen.clock() - gen.born_at)


router = Router("/", route_handlers=[show])
