"""Where traces go, as the flags say."""

from __future__ import annotations

import os
from pathlib import Path

from repository.errors import ConfigError
from server.triton.trace_settings import FLAG, Start
from server.triton.tracing import Sink


def sink_of(start: Start) -> Sink | None:
    """None: nothing was said of it. Raises ConfigError for what cannot be written to."""
    if start.mode == "opentelemetry":
        from server.triton.spans import Spans

        return Spans(start.url, start.resource)
    if not start.file:
        if start.own.level:
            raise ConfigError(
                "there is nowhere to write traces to; say triton,file=PATH or mode=opentelemetry",
                where=FLAG,
            )
        return None
    from server.triton.tracefile import TraceFile

    try:
        return TraceFile(Path(start.file))
    except OSError as error:
        raise ConfigError(
            f"cannot write traces to '{start.file}': {os.strerror(error.errno or 0)}", where=FLAG
        ) from error
