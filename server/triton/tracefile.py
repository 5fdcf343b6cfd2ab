"""Traces as lines of JSON in a file: one request, one line, whole as soon as it is there.

    {"id":1,"model_name":"m","model_version":1,"request_id":"7","outcome":"success",
     "timestamps":[{"name":"HTTP_RECV_START","ns":1790000000000000000}, ...],
     "tensors":[{"activity":"TENSOR_QUEUE_INPUT","name":"x","datatype":"FP32","shape":[1,4],"data":[...]}]}

Triton writes one JSON array, which is none until the server has ended; a tool that wants that can be
given `[line, line, ...]`. With so many traces to a file the names are FILE.0, FILE.1, ...

Rule: a thread of its own writes; what it has not come to yet is bounded, and what is beyond is dropped
and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Any, TextIO

import msgspec

from server.triton.tracing import Record

log = logging.getLogger("modeldepot.trace")

MOST_WAITING = 10_000  # records
CLOSE_S = 5.0


class TraceFile:
    """The folder of `path` must be there. Raises OSError if the file cannot be written to."""

    def __init__(self, path: Path, most_waiting: int = MOST_WAITING) -> None:
        self._path = path
        self._waiting: queue.Queue[tuple[Record, int] | None] = queue.Queue(most_waiting)
        self._dropped = 0
        self._part = self._in_part = 0
        self._file: TextIO | None = open(path, "a", encoding="utf-8")  # noqa: SIM115 - until `close`
        self._at = path
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def put(self, record: Record, *, per_file: int) -> None:
        try:
            self._waiting.put_nowait((record, per_file))
        except queue.Full:
            if not self._dropped:
                log.warning("traces come faster than they can be written; some are left out")
            self._dropped += 1

    def close(self) -> None:
        if self._dropped:
            log.warning("%d traces were left out", self._dropped)
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return  # the disk does not answer; the thread ends with the process
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            record, per_file = item
            try:
                self._write(record, per_file)
                self._trouble = ""
            except (OSError, ValueError) as error:
                if str(error) != self._trouble:
                    log.error("traces cannot be written: %s", error)
                self._trouble = str(error)
        if self._file is not None:
            self._file.close()

    def _write(self, record: Record, per_file: int) -> None:
        if per_file and self._in_part >= per_file:
            self._part, self._in_part = self._part + 1, 0
        wanted = self._path.with_name(f"{self._path.name}.{self._part}") if per_file else self._path
        if wanted != self._at or self._file is None:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._file = open(wanted, "a", encoding="utf-8")  # noqa: SIM115 - until the next one
            self._at = wanted
        self._file.write(line_of(record))
        self._file.flush()
        self._in_part += 1


def line_of(record: Record) -> str:
    told: dict[str, Any] = {
        "id": record.id,
        "model_name": record.model,
        "model_version": record.version,
        "request_id": record.request_id,
        "outcome": record.outcome,
    }
    parent = record.parent
    if parent is not None and parent.span:
        told["parent"] = {"trace_id": parent.value, "span_id": parent.span}
    told["timestamps"] = [{"name": name, "ns": ns} for name, ns in record.moments]
    if record.tensors:
        told["tensors"] = record.tensors
    return msgspec.json.encode(told).decode() + "\n"
