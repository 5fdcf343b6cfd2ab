"""A ModelInferResponse, written: what is said of the tensors by the message's class, and once for each
form of answer; then their bytes, as they came from the model.

The one copy is where all of it is joined, which is what gRPC takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2

from repository.errors import InferenceFailedError
from repository.messages import InferResponse, Parameters
from repository.tensors import Buffer, Tensor
from server.codecs.v2_plan import Place, Plan
from server.rpc.requests import REGION, REGION_OFFSET, REGION_SIZE, told_of
from server.rpc.wire import field, key_of, size_of, varint

MOST_READY = 16  # forms of answers to one form of request whose head is kept
RAW_CONTENTS = key_of(6)
INFER_RESPONSE = key_of(2)
_PARAMETERS, FINAL = 4, "triton_final_response"
_TRUE = service_pb2.InferParameter(bool_param=True).SerializeToString()
# A map's entry is a message of its key and its value. (A bool that is false is written too: it is
# one of several kinds.)
_FALSE = service_pb2.InferParameter(bool_param=False).SerializeToString()
IS_FINAL = field(_PARAMETERS, field(1, FINAL.encode()) + field(2, _TRUE))
NOT_FINAL = field(_PARAMETERS, field(1, FINAL.encode()) + field(2, _FALSE))


class Ready(NamedTuple):
    """`head`: all but the tensors' bytes. `picks`: which outputs follow, in order; -1 for one whose
    bytes are in a client's shared memory, and which has its place in the row all the same."""

    head: bytes
    picks: tuple[int, ...]


def encode(plan: Plan, response: InferResponse, model: str, version: int) -> list[Buffer]:
    """In pieces. Raises InferenceFailedError for an output that was asked for and is not there."""
    outputs = response.outputs
    ready = _ready(plan, response, model, version)
    pieces: list[Buffer] = [ready.head]
    for i in ready.picks:
        data = outputs[i].data if i >= 0 else b""
        pieces += (RAW_CONTENTS, varint(len(data)), data)
    return pieces


def _ready(plan: Plan, response: InferResponse, model: str, version: int) -> Ready:
    """With a plan and an answer whose forms are known, it was written before."""
    asked, told = plan.form, response.form
    if asked is None or told is None:
        return _write(plan, response, model, version)
    known: dict[Any, Ready] | None = asked.reply
    if known is None:
        known = asked.reply = {}
    key = (told, model, version, plan.id)
    found = known.get(key)
    if found is None:
        found = _write(plan, response, model, version)
        if len(known) >= MOST_READY:
            known.clear()
        known[key] = found
    return found


def _write(plan: Plan, response: InferResponse, model: str, version: int) -> Ready:
    picks = _picks(plan.outputs, response.outputs, model)
    given = plan.extras.given if plan.extras is not None else {}
    tensors = [response.outputs[i] for i in picks]
    head = service_pb2.ModelInferResponse(
        model_name=model,
        model_version=str(version),
        id=plan.id,
        parameters=told_of(response.parameters),
        outputs=[_described(tensor, given.get(tensor.name)) for tensor in tensors],
    )
    places = zip(picks, tensors, strict=True)
    picks = tuple([-1 if tensor.name in given else i for i, tensor in places])
    return Ready(head.SerializeToString(), picks)


def _described(tensor: Tensor, given: Place | None) -> Any:
    where: Parameters = {}
    if given is not None:
        where = {REGION: given.region, REGION_SIZE: len(tensor.data), REGION_OFFSET: given.offset}
    return service_pb2.ModelInferResponse.InferOutputTensor(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.shape, parameters=told_of(where)
    )


def _picks(names: tuple[str, ...], outputs: list[Tensor], model: str) -> tuple[int, ...]:
    """The places of the outputs that were named, in that order; all where none was."""
    if not names:
        return tuple(range(len(outputs)))
    places = {tensor.name: i for i, tensor in enumerate(outputs)}
    for name in names:
        if name not in places:
            raise InferenceFailedError(
                f"model '{model}' did not return the requested output '{name}'"
            )
    return tuple([places[name] for name in names])


def streamed(pieces: list[Buffer], *, final: bool) -> bytes:
    """A ModelStreamInferResponse of such an answer."""
    pieces = [*pieces, IS_FINAL if final else NOT_FINAL]
    return b"".join([INFER_RESPONSE, varint(size_of(pieces)), *pieces])


def streamed_end(id: str, model: str, version: int) -> bytes:
    """The answer that says nothing but that no more will come."""
    head = service_pb2.ModelInferResponse(model_name=model, model_version=str(version), id=id)
    return streamed([head.SerializeToString()], final=True)


def streamed_error(id: str, text: str) -> bytes:
    """`id` of the request that it answers, "" where that could not be read."""
    answer = service_pb2.ModelInferResponse(id=id)
    reply = service_pb2.ModelStreamInferResponse(error_message=text, infer_response=answer)
    return bytes(reply.SerializeToString())
