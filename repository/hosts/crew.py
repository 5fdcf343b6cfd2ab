"""The models of an ensemble, held for one request: whatever becomes of them meanwhile, they serve until
it is over.

What the steps are to be was checked with certain generations. A request takes the newest ones that
there are; with others than before it is checked again, so no step ever answers that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from repository.calling import Caller
from repository.errors import ConfigError, ModelNotReadyError, RepositoryError, retold
from repository.lifecycle.generation import Generation, Lease
from repository.wiring import Facts, Fitted, Step, Wiring

REMEMBERED = 16  # sets of generations that need no second look


@runtime_checkable
class Hires(Protocol):
    """The host of an ensemble, as a larger one sees it."""

    def hire(self, parameters: Mapping[str, Any] | None) -> Crew:
        """Holds what it needs."""
        ...


class Crew:
    """Leases that have begun, and the crews of those that are ensembles (`within`). `gens`: by
    step. It ends when all who use it have let go."""

    __slots__ = ("_leases", "_uses", "fitted", "gens", "within")

    def __init__(self, gens: tuple[Generation, ...], leases: list[Lease], fitted: Fitted) -> None:
        self.gens = gens
        self.fitted = fitted
        self.within: list[Crew] = []
        self._leases = leases
        self._uses = 1

    @property
    def holds(self) -> bool:
        return self._uses > 0

    def share(self) -> Crew:
        self._uses += 1
        return self

    def let_go(self) -> None:
        self._uses -= 1
        if self._uses == 0:
            for crew in self.within:
                crew.let_go()
            for lease in self._leases:
                lease.end()


class Crews:
    """Of one generation of an ensemble."""

    def __init__(self, wiring: Wiring, caller: Caller) -> None:
        self._wiring = wiring
        self._caller = caller
        self._fitted: dict[tuple[int, ...], Fitted] = {}
        self._newest: Crew | None = None

    @property
    def gens(self) -> tuple[Generation, ...]:
        """Those that were hired last, by step."""
        return () if self._newest is None else self._newest.gens

    def hire(self, parameters: Mapping[str, Any] | None = None) -> Crew:
        """`parameters`: the request's; a sequence stays with the models in which it has begun.

        Raises what a step's model cannot be had for, told of the step; ModelNotReadyError where one has
        changed so that it does not fit any more."""
        try:
            crew = self._fresh(parameters)
        except RepositoryError:
            # One step of a larger ensemble, whose request has held these since it came.
            if self._newest is not None and self._newest.holds:
                return self._newest.share()
            raise
        self._newest = crew
        return crew

    def _fresh(self, parameters: Mapping[str, Any] | None) -> Crew:
        held: dict[tuple[str, int | None], Generation] = {}
        leases: list[Lease] = []
        try:
            for step in self._wiring.steps:
                key = step.model, step.version
                if key not in held:
                    lease = self._lease(step, parameters)
                    leases.append(lease)
                    held[key] = lease.generation
            gens = tuple(held[s.model, s.version] for s in self._wiring.steps)
            crew = Crew(gens, leases, self._fit(gens))
        except RepositoryError:
            for lease in leases:
                lease.end(used=False)
            raise
        try:
            for gen in held.values():
                if isinstance(gen.host, Hires):
                    crew.within.append(gen.host.hire(parameters))
        except RepositoryError as error:
            crew.let_go()
            raise retold(error, f"in ensemble '{self._wiring.name}', {error}") from error
        return crew

    def _lease(self, step: Step, parameters: Mapping[str, Any] | None) -> Lease:
        try:
            lease = self._caller.lease(step.model, step.version, parameters)
            lease.begin()
        except RepositoryError as error:
            raise retold(
                error, f"in ensemble '{self._wiring.name}', {step.said}: {error}"
            ) from error
        return lease

    def _fit(self, gens: tuple[Generation, ...]) -> Fitted:
        serials = tuple(gen.serial for gen in gens)
        fitted = self._fitted.get(serials)
        if fitted is None:
            try:
                fitted = self._wiring.fit(facts_of(gens))
            except ConfigError as error:
                raise ModelNotReadyError(str(error), retry_after_s=1.0) from error
            if len(self._fitted) >= REMEMBERED:
                self._fitted.clear()
            self._fitted[serials] = fitted
        return fitted


def facts_of(gens: Sequence[Generation]) -> list[Facts]:
    """`gens` are READY, one for each step."""
    return [_facts(gen) for gen in gens]


def _facts(gen: Generation) -> Facts:
    signature, loaded = gen.signature, gen.loaded
    if signature is None or loaded is None:
        return Facts()
    return Facts(
        inputs=signature.inputs,
        required=tuple(spec.name for spec in signature.required),
        outputs=signature.outputs,
        max_batch_size=loaded.max_batch_size,
        decoupled=gen.decoupled,
    )
