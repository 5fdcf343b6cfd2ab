"""`pb_utils.InferenceRequest`: a request that the model got, or one that it makes of another model.

What clients say of sequences, priority and time travels in KServe V2's parameters; here it is what
Triton's models know it as, and back.
"""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from repository.backends.abilities import Others
from repository.backends.triton.answer import InferenceResponse, checked
from repository.backends.triton.errors import TritonModelException, theirs
from repository.backends.triton.sender import InferenceResponseSender, Way
from repository.backends.triton.tensor import Tensor, preferred
from repository.errors import InferenceFailedError, RepositoryError
from repository.messages import InferRequest, InferResponse

SEQUENCE_START, SEQUENCE_END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_...
RELEASE_ALL, RESCHEDULE = 1, 2  # TRITONSERVER_REQUEST_RELEASE_...
# What `parameters()` does not repeat, because it has a call of its own.
KNOWN = frozenset({
    "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers",
    "binary_data_output",
})  # fmt: skip


class MemoryType(enum.IntEnum):
    TRITONSERVER_MEMORY_CPU = 0
    TRITONSERVER_MEMORY_GPU = 2


class PreferredMemory:
    """Where a model wants the tensors of an answer."""

    __slots__ = ("device", "kind")

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        try:
            self.kind = MemoryType(preferred_memory_type)
        except ValueError as error:
            raise TritonModelException(
                "preferred_memory_type is TRITONSERVER_MEMORY_CPU or TRITONSERVER_MEMORY_GPU"
            ) from error
        self.device = preferred_device_id


class InferenceTrace:
    """Traces are not handed to models: this one says nothing."""

    def get_context(self) -> None:
        return None


class InferenceRequest:
    """`inputs` to `model_name` must be given. `model_version` -1: the newest. `timeout`: microseconds,
    0 for none. `correlation_id`: of a sequence; 0 or "": none. `namespace`: there are none here."""

    others: ClassVar[Others | None] = None  # the module that a model imports has a class of its own

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] | None = None,
        requested_output_names: Sequence[str] | None = None,
        model_name: str | None = None,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Any] | None = None,
        namespace: str | None = None,
    ) -> None:
        if inputs is None or requested_output_names is None or model_name is None:
            raise TypeError(
                "InferenceRequest() needs inputs, requested_output_names and model_name"
            )
        for tensor in inputs:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"inputs holds {type(tensor).__name__}; it takes pb_utils.Tensor alone"
                )
        if isinstance(correlation_id, bool) or not isinstance(correlation_id, int | str):
            raise TritonModelException("correlation_id must be a whole number or text")
        self._inputs = list(inputs)
        self._id = str(request_id)
        self._correlation_id = correlation_id
        self._wanted = list(requested_output_names)
        self._model, self._version = str(model_name), int(model_version)
        self._flags, self._timeout, self._priority = int(flags), int(timeout), 0
        self._parameters = checked(parameters)
        self._memory = preferred_memory
        self._trace = trace or InferenceTrace()
        self._way: Way | None = None
        self._release = RELEASE_ALL

    @classmethod
    def arrived(
        cls, request: InferRequest, wanted: Sequence[str], way: Way, at: tuple[str, int]
    ) -> InferenceRequest:
        """One that the model got. `at`: the model's own name and version."""
        said = request.parameters
        found = cls(
            request_id=request.id,
            correlation_id=said.get("sequence_id", 0),
            inputs=[Tensor.arrived(wire) for wire in request.inputs],
            requested_output_names=wanted,
            model_name=at[0],
            model_version=at[1],
            flags=SEQUENCE_START * bool(said.get("sequence_start"))
            | SEQUENCE_END * bool(said.get("sequence_end")),
            timeout=_number(said.get("timeout")),
        )
        found._parameters = {k: v for k, v in said.items() if k not in KNOWN}
        found._priority = _number(said.get("priority"))
        found._way = way
        return found

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = int(flags)

    def timeout(self) -> int:
        """Microseconds."""
        return self._timeout

    def priority(self) -> int:
        return self._priority

    def parameters(self) -> str:
        """The request's own, as JSON."""
        return json.dumps(self._parameters)

    def trace(self) -> InferenceTrace:
        return self._trace

    def requested_output_names(self) -> list[str]:
        return self._wanted

    def model_name(self) -> str:
        return self._model

    def model_version(self) -> int:
        return self._version

    def preferred_memory(self) -> PreferredMemory | None:
        return self._memory

    # of one that the model got ------------------------------------------------------------------

    def is_cancelled(self) -> bool:
        return self._way is not None and self._way.cancelled

    def get_response_sender(self) -> InferenceResponseSender:
        if self._way is None:
            raise TritonModelException("only a request that the model was given has a sender")
        return InferenceResponseSender(self._way)

    def set_release_flags(self, flags: int) -> None:
        """RESCHEDULE: `execute` gets this request again."""
        if flags not in (RELEASE_ALL, RESCHEDULE):
            raise TritonModelException(
                f"{flags} is no release flag; use TRITONSERVER_REQUEST_RELEASE_ALL or _RESCHEDULE"
            )
        self._release = flags

    def way(self) -> Way:
        assert self._way is not None
        return self._way

    def again(self) -> bool:
        """Whether it is to be run again; said once."""
        release, self._release = self._release, RELEASE_ALL
        return release == RESCHEDULE

    # to another model ---------------------------------------------------------------------------

    def exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """Blocks. What the call came to is in the response: it does not raise for it."""
        answers = ResponseIterator(self._call(), self._memory)
        return answers if decoupled else self._only(answers)

    def async_exec(self, decoupled: bool = False) -> asyncio.Future[Any]:
        """The same, to be awaited on the loop that runs. Begun at once, on its thread: as long as the
        model's own thread runs that loop, nobody else can use it, and a call that would wait for that
        is refused."""
        loop = asyncio.get_running_loop()
        answers = ResponseIterator(self._call(), self._memory)
        if not decoupled:
            return loop.run_in_executor(None, self._only, answers)
        found: asyncio.Future[Any] = loop.create_future()
        found.set_result(answers)
        return found

    def _only(self, answers: ResponseIterator) -> InferenceResponse:
        first = next(answers, None)
        if first is None:
            gone = InferenceFailedError(f"model '{self._model}' sent no response")
            return InferenceResponse(error=theirs(gone))
        if not first.has_error() and next(answers, None) is not None:
            answers.cancel()
            many = InferenceFailedError(
                f"model '{self._model}' sends several responses; call exec(decoupled=True)"
            )
            return InferenceResponse(error=theirs(many))
        return first

    def _call(self) -> Iterator[InferResponse]:
        others = type(self).others
        if others is None:
            raise TritonModelException("other models can be asked by a model that runs in a worker")
        version = self._version if self._version > 0 else None
        return others.call(self._model, version, self._wire())

    def _wire(self) -> InferRequest:
        said = dict(self._parameters)
        if self._correlation_id not in (0, ""):
            said["sequence_id"] = self._correlation_id
            said["sequence_start"] = bool(self._flags & SEQUENCE_START)
            said["sequence_end"] = bool(self._flags & SEQUENCE_END)
        if self._timeout:
            said["timeout"] = self._timeout
        return InferRequest(
            [tensor.wire() for tensor in self._inputs], tuple(self._wanted), self._id, said
        )


class ResponseIterator:
    """`pb_utils.ResponseIterator`: the answers of one call as they come. An error is the last one."""

    def __init__(self, answers: Iterator[InferResponse], memory: PreferredMemory | None) -> None:
        self._answers = answers
        self._memory = memory
        self._over = False

    def __iter__(self) -> ResponseIterator:
        return self

    def __next__(self) -> InferenceResponse:
        if self._over:
            raise StopIteration
        try:
            answer = next(self._answers)
        except StopIteration:
            self._over = True
            raise
        except RepositoryError as error:
            self._over = True
            return InferenceResponse(error=theirs(error))
        tensors = [Tensor.arrived(tensor) for tensor in answer.outputs]
        if self._memory is not None and self._memory.kind == MemoryType.TRITONSERVER_MEMORY_GPU:
            tensors = [preferred(tensor, self._memory.device) for tensor in tensors]
        plain = {
            k: v for k, v in answer.parameters.items() if isinstance(v, str | bool | int | float)
        }
        return InferenceResponse(tensors, parameters=plain)

    def cancel(self) -> None:
        """Leaves the rest."""
        self._over = True
        close = getattr(self._answers, "close", None)
        if close is not None:
            close()


def _number(said: Any) -> int:
    return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else 0
