"""How the steps of an ensemble hang together: who makes which tensor, who takes it, and what comes out.

    Wiring(name, config)   what the config alone tells: each tensor is made once, and there before it is
                           taken; no step waits for itself
    wiring.fit(facts)      the same held against the models themselves: names, datatypes, shapes, batches

Pure. Both raise ConfigError, which names the step, the tensor, and what stands against what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, NoReturn

from repository.config import Ensemble, EnsembleStep, ModelConfig, TensorConfig
from repository.errors import ConfigError
from repository.messages import TensorSpec

Shape = tuple[int, ...]


class Facts(NamedTuple):
    """What the model of one step says of itself. Without inputs, or outputs: it takes, or gives, any."""

    inputs: tuple[TensorSpec, ...] = ()
    required: Collection[str] = ()  # names of the inputs that are not optional
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int = 0
    decoupled: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """`inputs` and `outputs`: (the model's own name, the ensemble's tensor). `after`: the steps that it
    waits for, directly or not."""

    index: int
    said: str  # for people: "step 'resize'", with its number where the model has several
    model: str
    version: int | None
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    asks: tuple[str, ...]  # names of its model's outputs that are wanted
    after: frozenset[int] = frozenset()


class Fitted(NamedTuple):
    """`inputs`, `outputs`: of the ensemble, as its clients see them; empty where that is not known.
    `many`: the steps that give any number of answers, each after the one before it. `level`: of each
    step, how many of those it comes after."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    many: tuple[int, ...]
    level: tuple[int, ...]


@dataclass(slots=True)
class _End:
    """A tensor at one of its ends. `spec` None: not known."""

    said: str
    spec: TensorSpec | None


class Wiring:
    """`steps` in the order of the config, `order`: so that each comes after those that it waits for.
    `makers`: tensor -> the step that makes it. `inputs`, `outputs`: names of the ensemble's own."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name = name
        self.config = config
        ensemble = config.ensemble or Ensemble()
        if not ensemble.steps:
            self._fail("it has no steps; name the models in 'ensemble.steps'")
        self.makers = self._makers(ensemble.steps)
        plain = [self._step(i, step, ensemble.steps) for i, step in enumerate(ensemble.steps)]
        given = {part.name for part in config.inputs or ()}
        for step in plain:
            self._check_step(step, given)
        self.order = self._order(plain)
        after: dict[int, frozenset[int]] = {}
        for i in self.order:
            before = {self.makers[t] for _, t in plain[i].inputs if t in self.makers}
            after[i] = frozenset(before).union(*(after[b] for b in before))
        self.steps = tuple(_behind(step, after[step.index]) for step in plain)
        taken = dict.fromkeys(t for step in self.steps for _, t in step.inputs)
        self.inputs = (
            tuple(part.name for part in config.inputs)
            if config.inputs is not None
            else tuple(t for t in taken if t not in self.makers)
        )
        self.outputs = self._outputs(taken)

    # what the config tells --------------------------------------------------------------------------

    def _makers(self, steps: Sequence[EnsembleStep]) -> dict[str, int]:
        makers: dict[str, int] = {}
        given = {part.name for part in self.config.inputs or ()}
        for i, step in enumerate(steps):
            for tensor in step.outputs.values():
                if tensor in given:
                    self._fail(
                        f"{_said(i, steps)} makes the tensor '{tensor}', which is an input of the "
                        f"ensemble; give one of them another name"
                    )
                if tensor in makers:
                    self._fail(
                        f"the tensor '{tensor}' is made twice, by {_said(makers[tensor], steps)} and "
                        f"{_said(i, steps)}; give one of them another name"
                    )
                makers[tensor] = i
        return makers

    def _step(self, i: int, step: EnsembleStep, steps: Sequence[EnsembleStep]) -> Step:
        return Step(
            index=i,
            said=_said(i, steps),
            model=step.model,
            version=step.version,
            inputs=tuple(step.inputs.items()),
            outputs=tuple(step.outputs.items()),
            asks=tuple(step.outputs),
        )

    def _check_step(self, step: Step, given: Collection[str]) -> None:
        if not step.model:
            self._fail(f"step {step.index + 1} names no model")
        if step.model == self.name:
            self._fail(f"{step.said} is the ensemble itself")
        if not step.outputs:
            self._fail(f"{step.said} has no outputs, so nothing would come of it")
        if self.config.inputs is None:
            return
        for own, tensor in step.inputs:
            if tensor not in self.makers and tensor not in given:
                self._fail(
                    f"{step.said}: its input '{own}' is the tensor '{tensor}', which no step makes "
                    f"and which is no input of the ensemble"
                )

    def _order(self, steps: Sequence[Step]) -> tuple[int, ...]:
        waits = {s.index: {self.makers[t] for _, t in s.inputs if t in self.makers} for s in steps}
        order: list[int] = []
        while len(order) < len(steps):
            free = [i for i, before in waits.items() if i not in order and before <= set(order)]
            if not free:
                left = [steps[i].said for i in waits if i not in order]
                self._fail(f"these steps wait for each other in a circle: {', '.join(left)}")
            order += free
        return tuple(order)

    def _outputs(self, taken: Mapping[str, None]) -> tuple[str, ...]:
        if self.config.outputs is None:
            return tuple(t for t in self.makers if t not in taken)
        for part in self.config.outputs:
            if part.name not in self.makers:
                self._fail(f"no step makes its output '{part.name}'")
        return tuple(part.name for part in self.config.outputs)

    # what the models tell ---------------------------------------------------------------------------

    def fit(self, facts: Sequence[Facts]) -> Fitted:
        """`facts`: of each step's model. Raises ConfigError."""
        ends: dict[str, _End] = {}
        for part in self.config.inputs or ():
            ends[part.name] = _End(f"input '{part.name}' of the ensemble", self._own(part))
        for step, fact in zip(self.steps, facts, strict=True):
            self._check_batch(step, fact)
            self._check_names(step, fact)
            known = {spec.name: spec for spec in fact.outputs}
            for own, tensor in step.outputs:
                ends[tensor] = _End(f"output '{own}' of {step.said}", known.get(own))
        for step, fact in zip(self.steps, facts, strict=True):
            self._check_inputs(step, fact, ends)
        for part in self.config.outputs or ():
            here = _End(f"output '{part.name}' of the ensemble", self._own(part))
            self._agree(part.name, ends[part.name], here)
        many, level = self._levels(facts)
        return Fitted(self._all_inputs(facts), self._all_outputs(ends), many, level)

    def _check_batch(self, step: Step, fact: Facts) -> None:
        most = self.config.max_batch_size
        if 0 < fact.max_batch_size < most:
            self._fail(
                f"it takes batches of {most}, and {step.said} no more than {fact.max_batch_size}; "
                f"lower the ensemble's max_batch_size, or raise the model's"
            )

    def _check_names(self, step: Step, fact: Facts) -> None:
        for kind, mine, theirs in (
            ("input", step.inputs, fact.inputs),
            ("output", step.outputs, fact.outputs),
        ):
            names = [spec.name for spec in theirs]
            for own, _ in mine:
                if names and own not in names:
                    self._fail(
                        f"{step.said}: its model has no {kind} '{own}'; it has {_list(names)}"
                    )
        mapped = {own for own, _ in step.inputs}
        for name in fact.required:
            if name not in mapped:
                self._fail(f"{step.said}: its model needs the input '{name}', which gets no tensor")

    def _check_inputs(self, step: Step, fact: Facts, ends: dict[str, _End]) -> None:
        known = {spec.name: spec for spec in fact.inputs}
        for own, tensor in step.inputs:
            here = _End(f"input '{own}' of {step.said}", known.get(own))
            if tensor not in ends:  # an input of the ensemble that its config does not describe
                ends[tensor] = here
            else:
                self._agree(tensor, ends[tensor], here)

    def _agree(self, tensor: str, one: _End, other: _End) -> None:
        if one.spec is None or other.spec is None:
            return
        if one.spec.datatype != other.spec.datatype or not alike(one.spec.shape, other.spec.shape):
            self._fail(
                f"the tensor '{tensor}' does not fit: {one.said} is {_kind(one.spec)}, and "
                f"{other.said} is {_kind(other.spec)}"
            )

    def _levels(self, facts: Sequence[Facts]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        many = [i for i in self.order if facts[i].decoupled]
        for one, other in pairwise(many):
            if one not in self.steps[other].after:
                self._fail(
                    f"{self.steps[one].said} and {self.steps[other].said} both give any number of "
                    f"answers, and neither comes after the other: which belong together is not told"
                )
        level = tuple(sum(m in step.after for m in many) for step in self.steps)
        return tuple(many), level

    def _all_inputs(self, facts: Sequence[Facts]) -> tuple[TensorSpec, ...]:
        if self.config.inputs is not None:
            return tuple(self._own(part) for part in self.config.inputs)
        found: dict[str, TensorSpec] = {}
        for step, fact in zip(self.steps, facts, strict=True):
            known = {spec.name: spec for spec in fact.inputs}
            for own, tensor in step.inputs:
                if tensor in self.inputs and own in known:
                    optional = own not in fact.required and (
                        tensor not in found or found[tensor].optional
                    )
                    spec = found.get(tensor, known[own])
                    found[tensor] = TensorSpec(tensor, spec.datatype, spec.shape, optional)
        return _all_or_none(found, self.inputs)

    def _all_outputs(self, ends: Mapping[str, _End]) -> tuple[TensorSpec, ...]:
        if self.config.outputs is not None:
            return tuple(self._own(part) for part in self.config.outputs)
        known = {name: end.spec for name, end in ends.items() if end.spec is not None}
        found = {n: TensorSpec(n, s.datatype, s.shape) for n, s in known.items()}
        return _all_or_none(found, self.outputs)

    def _own(self, part: TensorConfig) -> TensorSpec:
        axis = (-1,) if self.config.max_batch_size else ()
        return TensorSpec(part.name, part.datatype, axis + part.shape, part.optional)

    def _fail(self, why: str) -> NoReturn:
        raise ConfigError(f"in ensemble '{self.name}', {why}")


@dataclass(slots=True)
class Needs:
    """Which steps a request needs that wants only some of the outputs. Remembers what it was asked."""

    wiring: Wiring
    _known: dict[tuple[str, ...], frozenset[int]] = field(default_factory=dict)

    def of(self, outputs: tuple[str, ...]) -> frozenset[int]:
        """Without `outputs`: for all of them."""
        found = self._known.get(outputs)
        if found is None:
            wiring = self.wiring
            ends = {wiring.makers[o] for o in outputs or wiring.outputs if o in wiring.makers}
            found = frozenset(ends).union(*(wiring.steps[i].after for i in ends))
            if len(self._known) < 64:  # names come from requests
                self._known[outputs] = found
        return found


def alike(one: Shape, other: Shape) -> bool:
    """Some shape is both."""
    if len(one) != len(other):
        return False
    return all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def models_of(config: ModelConfig) -> tuple[str, ...]:
    """Those that its steps name; of anything but an ensemble none."""
    steps = config.ensemble.steps if config.ensemble is not None else ()
    return tuple(dict.fromkeys(step.model for step in steps))


def _said(i: int, steps: Sequence[EnsembleStep]) -> str:
    alone = sum(step.model == steps[i].model for step in steps) == 1
    return f"step '{steps[i].model}'" if alone else f"step {i + 1} ('{steps[i].model}')"


def _behind(step: Step, after: frozenset[int]) -> Step:
    return Step(
        step.index, step.said, step.model, step.version, step.inputs, step.outputs, step.asks, after
    )


def _all_or_none(found: Mapping[str, TensorSpec], names: Iterable[str]) -> tuple[TensorSpec, ...]:
    """A model describes all of its inputs, or is taken to describe none."""
    listed = list(names)
    return tuple(found[n] for n in listed) if all(n in found for n in listed) else ()


def _kind(spec: TensorSpec) -> str:
    return f"{spec.datatype} [{','.join(map(str, spec.shape))}]"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
