"""Which requests are traced, and what is told of each: Triton's trace extension.

A request is looked at once, when it has ended: the moments of its life follow from what was measured of
it anyway, so one that is not traced costs the look whether anything is traced at all. Between a
model's queue and its answer lies the way to its worker and back, of which only the sum is known: the
two halves of it are taken for equal.

What becomes of a trace is a `Sink`'s business (`tracefile`, `spans`), which must not wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from repository.errors import InvalidRequestError, RepositoryError
from repository.names import shown as named
from repository.repository import Repository
from repository.tensors import Tensor
from server.metrics.meter import Times, Traced
from server.metrics.traces import Trace
from server.triton.trace_settings import Own, Start, over, shown, updated

NS = 10**9
MOST_VALUES, MOST_BYTES = 1000, 256  # of a tensor that are told; of a value that is bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One trace.

    moments   Triton's names, nanoseconds since 1970, in order
    parent    the trace that the client said it was part of
    tensors   what each held, with its activity, where they are wanted
    """

    id: int
    model: str
    version: int
    outcome: str
    protocol: str
    request_id: str
    moments: tuple[tuple[str, int], ...]
    parent: Trace | None = None
    tensors: tuple[Mapping[str, Any], ...] = ()


class Sink(Protocol):
    def put(self, record: Record, *, per_file: int) -> None:
        """Never waits, never raises; what it has no room for is dropped, and told in the log."""
        ...

    def close(self) -> None:
        """All that was put is written, or given up after a few seconds."""
        ...


def moments_of(times: Times, protocol: str, ended_ns: int) -> tuple[tuple[str, int], ...]:
    """The nine of Triton's, in order. A request that was refused has no compute: then they coincide."""
    word = "GRPC" if protocol == "grpc" else "HTTP"
    began = ended_ns - int(times.duration_s * NS)
    asked = began + int(times.input_s * NS)
    computes = asked + int(times.queue_s * NS)
    answered = ended_ns - int(times.output_s * NS)
    way = max(0, answered - computes - int(times.compute_s * NS))
    begins = computes + way // 2
    ends = max(begins, answered - (way - way // 2))
    told = (
        (f"{word}_RECV_START", began),
        (f"{word}_RECV_END", asked),
        ("REQUEST_START", asked),
        ("QUEUE_START", asked),
        ("COMPUTE_START", computes),
        ("COMPUTE_INPUT_END", begins),
        ("COMPUTE_OUTPUT_START", ends),
        ("COMPUTE_END", answered),
        ("REQUEST_END", answered),
        (f"{word}_SEND_START", answered),
        (f"{word}_SEND_END", ended_ns),
    )
    return tuple(told)


@dataclass(slots=True)
class _Of:
    """One model's, or the server's."""

    own: Own = field(default_factory=Own)
    seen: int = 0
    taken: int = 0


class Tracer:
    """`active`: it is worth telling it of requests (`ended`)."""

    def __init__(
        self,
        start: Start,
        sink: Sink | None,
        models: Repository,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """`sink` None: nowhere to write to, so nothing can be switched on."""
        self._start = start
        self._sink = sink
        self._models = models
        self._clock = clock
        self._all = _Of(start.own)
        self._of: dict[str, _Of] = {}
        self._next = 1
        self.active = False
        self._look()

    # settings -------------------------------------------------------------------------------------

    def settings(self, model: str | None = None) -> dict[str, Any]:
        """The model's, or the server's. Raises InvalidRequestError for a model that there is not."""
        return shown(self._whole(self._checked(model)), self._start)

    def update(self, model: str | None, said: Mapping[str, Any]) -> dict[str, Any]:
        """What holds now. Raises InvalidRequestError, UnsupportedError; then nothing has changed."""
        name = self._checked(model)
        of = self._all if name is None else self._of.get(name, _Of())
        own = updated(of.own, said)
        if name is None:
            own = over(own, self._start.own)
        elif own == Own():
            self._of.pop(name, None)
        else:
            self._of[name] = of
        if any(over(own, self._all.own).level or ()) and self._sink is None:
            raise InvalidRequestError(
                "there is nowhere to write traces to: start the server with --trace-config "
                "triton,file=PATH (or mode=opentelemetry)"
            )
        of.own = own
        if "trace_count" in said:
            of.taken = 0
        self._look()
        return shown(self._whole(name), self._start)

    def _checked(self, model: str | None) -> str | None:
        if model is None:
            return None
        try:
            return self._models.status(model).name
        except RepositoryError as error:
            raise InvalidRequestError(f"Request for unknown model : {named(model)}") from error

    def _whole(self, model: str | None) -> Own:
        of = self._of.get(model) if model is not None else None
        return self._all.own if of is None else over(of.own, self._all.own)

    def _look(self) -> None:
        wanted = [self._all.own, *(over(of.own, self._all.own) for of in self._of.values())]
        self.active = self._sink is not None and any(own.level for own in wanted)

    # requests -------------------------------------------------------------------------------------

    def ended(
        self,
        model: str,
        version: int,
        outcome: str,
        times: Times,
        *,
        protocol: str,
        parent: Trace | None = None,
        of: Traced | None = None,
    ) -> None:
        """A request that held a lease has ended. Must not raise."""
        mine = self._of.get(model, self._all)
        own = mine.own if mine is self._all else over(mine.own, self._all.own)
        if not own.level or self._sink is None or not self._is_due(mine, own):
            return
        tensors: tuple[Mapping[str, Any], ...] = ()
        if of is not None and "TENSORS" in own.level:
            tensors = (
                *(_told("TENSOR_QUEUE_INPUT", tensor) for tensor in of.inputs),
                *(_told("TENSOR_BACKEND_OUTPUT", tensor) for tensor in of.outputs),
            )
        number, self._next = self._next, self._next + 1
        record = Record(
            id=number,
            model=model,
            version=version,
            outcome=outcome,
            protocol=protocol,
            request_id=of.request_id if of is not None else "",
            moments=moments_of(times, protocol, self._clock()),
            parent=parent,
            tensors=tensors,
        )
        self._sink.put(record, per_file=own.log_frequency or 0)

    def _is_due(self, of: _Of, own: Own) -> bool:
        of.seen += 1
        if not own.rate or (of.seen - 1) % own.rate or of.taken == own.count:
            return False
        of.taken += 1
        return True

    def close(self) -> None:
        self.active = False
        if self._sink is not None:
            self._sink.close()


def _told(activity: str, tensor: Tensor) -> dict[str, Any]:
    """A copy: nothing of the request is to be kept for it."""
    told = {
        "activity": activity,
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
    }
    try:
        values = tensor.array().reshape(-1)[:MOST_VALUES].tolist()
    except ValueError:
        return told
    return told | {
        "data": [
            v[:MOST_BYTES].decode(errors="replace") if isinstance(v, bytes) else v for v in values
        ]
    }
