"""Traces as OpenTelemetry's spans, sent by OTLP over HTTP. Needs the extra `otel`.

    InferRequest            all of it; of a client's trace, where it said so
    └── the model's name    from the question to the answer
        └── compute         inside the model

The library sends from a thread of its own, a batch at a time, and drops what it cannot get rid of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repository.errors import ConfigError
from server.triton.trace_settings import FLAG
from server.triton.tracing import Record

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

DEFAULT_URL = "http://localhost:4318/v1/traces"
CLOSE_MS = 5000


class Spans:
    """`exporter`: in place of one to `url`. Raises ConfigError where the library is missing."""

    def __init__(
        self, url: str, resource: Mapping[str, str], exporter: SpanExporter | None = None
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "mode=opentelemetry needs the OpenTelemetry SDK: pip install 'modeldepot[otel]'",
                where=FLAG,
            ) from error
        told = Resource.create({"service.name": "modeldepot", **resource})
        self._provider = TracerProvider(resource=told, shutdown_on_exit=False)
        sender = exporter or OTLPSpanExporter(endpoint=url or DEFAULT_URL)
        self._provider.add_span_processor(BatchSpanProcessor(sender))
        self._tracer = self._provider.get_tracer("modeldepot")

    def put(self, record: Record, *, per_file: int) -> None:
        at = dict(record.moments)
        begin, end = record.moments[0][1], record.moments[-1][1]
        told: dict[str, Any] = {
            "triton.model_name": record.model,
            "triton.model_version": record.version,
            "triton.trace_id": record.id,
            "modeldepot.outcome": record.outcome,
        }
        if record.request_id:
            told["triton.request_id"] = record.request_id
        root = self._tracer.start_span(
            "InferRequest", context=_parent(record), attributes=told, start_time=begin
        )
        for name, ns in record.moments:
            root.add_event(name, timestamp=ns)
        model = self._below(root, record.model, at["REQUEST_START"])
        compute = self._below(model, "compute", at["COMPUTE_START"])
        compute.end(at["COMPUTE_END"])
        model.end(at["REQUEST_END"])
        root.end(end)

    def _below(self, span: Any, name: str, begin: int) -> Any:
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, context=set_span_in_context(span), start_time=begin)

    def close(self) -> None:
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()


def _parent(record: Record) -> Context | None:
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    parent = record.parent
    if parent is None or not parent.span:
        return None
    client = SpanContext(
        int(parent.value, 16),
        int(parent.span, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return set_span_in_context(NonRecordingSpan(client))
