"""The part of the facade that pins models (`repository.repository` is the whole).

Nobody drives a pinned model out: not for room, not for idling. An operator may cap what pinned models
hold (`lifecycle.pins`); loading and unloading by call go on as they do without a pin.
"""

from __future__ import annotations

from repository.lifecycle.states import State
from repository.loading import Loading
from repository.reports import PinReport


class Pinning(Loading):
    async def pin(self, model: str, pinned: bool) -> PinReport:
        """Pins or unpins `model`, whatever its config says, until somebody says otherwise or its folder
        goes; also over a restart. It is not loaded for that. Idempotent; answers once it is kept.

        `honoured` false: pinned models may hold no more (--pin-cap); it is pinned as soon as others
        hold less. Raises ModelNotFoundError, InvalidNameError, DrainingError; NotKeptError where it is
        done, and a restart may not know of it.
        """
        self._not_draining()
        name = self._model_of(model)
        self._models.pin(name, pinned)
        report = self._pin_report(name, pinned)
        await self._kept(f"'{name}' is {'pinned' if pinned else 'not pinned'}")
        return report

    def _pin_report(self, name: str, pinned: bool) -> PinReport:
        there = [g for g in self._of(name) if g.state in (State.READY, State.ASLEEP)]
        refused = [g.pin_refused for g in there if g.pin_refused]
        if refused:
            return PinReport(name, pinned, not pinned, refused[0] if pinned else "")
        why = "" if there or not pinned else "it is not loaded; it will be pinned once it is"
        return PinReport(name, pinned, True, why)
