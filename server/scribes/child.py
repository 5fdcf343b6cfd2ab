"""A scribe: `python -m server.scribes.child FD`. One job at a time, from the socket FD.

It knows the codecs and nothing of models, HTTP or keys. What it was sent is somebody's request, so
it may be anything: a scribe that takes too long or too much memory is killed, and nothing is lost but
the job. It ends at the end of the stream, and with the server, however that ends.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from repository import linux
from repository.errors import InvalidRequestError
from repository.messages import InferResponse
from repository.tensors import Buffer, Tensor
from server.codecs.v2_binary import encode
from server.codecs.v2_plan import plan_of
from server.scribes import sheets
from server.scribes.sheets import Sheet

OOM_SCORE = 500  # when memory runs out, a scribe goes before models and the server


def work(kind: str, job: Sheet) -> tuple[str, bytes, list[Buffer]]:
    """What to answer: kind, what is told, parts."""
    try:
        return _read(job) if kind == sheets.READ else _write(job)
    except tuple(sheets.ERRORS.values()) as error:
        told = sheets.ToldError(type(error).__name__, _short(str(error)))
        return sheets.ERROR, sheets.tell(told), []


def _read(job: Sheet) -> tuple[str, bytes, list[Buffer]]:
    plan = plan_of(bytes(job.rest))
    told = sheets.tell(sheets.told_of(plan))
    if len(told) > sheets.MOST_TOLD:
        raise InvalidRequestError(
            f"the request's JSON says more than {sheets.MOST_TOLD} bytes besides the data of its "
            f"tensors"
        )
    return sheets.PLAN, told, [p.data for p in plan.pieces if p.data is not None]


def _write(job: Sheet) -> tuple[str, bytes, list[Buffer]]:
    told = sheets.read_answer(job.told)
    parts = job.parts([t.size for t in told.tensors])
    outputs = [
        Tensor(t.name, t.datatype, t.shape, part)
        for t, part in zip(told.tensors, parts, strict=True)
    ]
    response = InferResponse(outputs, told.parameters)
    encoded = encode(sheets.plan_of(told.plan, ()), response, told.model, told.version)
    # Behind the JSON come the holes that stand for binary tensors, which the server has itself.
    return sheets.JSON, b"", [memoryview(encoded.buffers[0])[: encoded.header_length]]


def _short(text: str) -> str:
    if len(text) <= sheets.LONGEST_TEXT:
        return text
    half = sheets.LONGEST_TEXT // 2
    return f"{text[:half]} ... {text[-half:]}"


def run(control: socket.socket) -> None:
    while (found := sheets.receive(control)) is not None:
        kind, told, parts = work(*found)
        del found
        answer = sheets.write(told, parts)
        del parts
        sheets.send(control, kind, len(told), answer)
        os.close(answer)
        gc.collect()  # an error may have left a ring that holds the request


def main(fd: int) -> None:
    linux.die_with_parent(os.getppid(), signal.SIGKILL)
    linux.name_process("md-scribe")
    linux.offer_to_oom_killer(OOM_SCORE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # texts become trees of lists, without rings
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=fd) as control:
        run(control)


if __name__ == "__main__":
    main(int(sys.argv[1]))
