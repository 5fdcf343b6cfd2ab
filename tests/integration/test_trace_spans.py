"""Traces reach a collector as OpenTelemetry's spans: a real one of OTLP's, over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # type: ignore[import-untyped]
    ExportTraceServiceRequest,
)

from server.metrics.meter import Times
from server.metrics.traces import Trace
from server.triton.spans import Spans
from server.triton.tracing import Record, moments_of

TIMES = Times(0.1, 0.01, 0.02, 0.03, 0.02)
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    def __init__(self) -> None:
        self.resource: dict[str, str] = {}
        self.spans: dict[str, Any] = {}
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                told.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def take(self, sent: Any) -> None:
        for one in sent.resource_spans:
            self.resource = {a.key: a.value.string_value for a in one.resource.attributes}
            for scope in one.scope_spans:
                self.spans |= {span.name: span for span in scope.spans}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    found.thread.start()
    yield found
    found.server.shutdown()
    found.thread.join()
    found.server.server_close()


def test_a_request_is_three_spans_below_the_clients(collector: Collector) -> None:
    sink = Spans(collector.url, {"service.name": "depot", "site": "a"})
    moments = moments_of(TIMES, "http", 10**18)
    parent = Trace("trace_id", TRACE, SPAN)
    sink.put(Record(1, "m", 2, "success", "http", "7", moments, parent), per_file=0)
    sink.close()
    root, model, compute = (collector.spans[name] for name in ("InferRequest", "m", "compute"))
    assert collector.resource["service.name"] == "depot" and collector.resource["site"] == "a"
    assert root.trace_id.hex() == TRACE and root.parent_span_id.hex() == SPAN
    assert model.parent_span_id == root.span_id and compute.parent_span_id == model.span_id
    assert root.end_time_unix_nano - root.start_time_unix_nano == 100_000_000
    assert root.events[0].name == "HTTP_RECV_START"
    told = {a.key: a.value for a in root.attributes}
    assert told["triton.model_name"].string_value == "m"
    assert told["triton.model_version"].int_value == 2


def test_without_a_parent_a_trace_of_its_own_begins(collector: Collector) -> None:
    sink = Spans(collector.url, {})
    sink.put(
        Record(1, "m", 1, "success", "grpc", "", moments_of(TIMES, "grpc", 10**18)), per_file=0
    )
    sink.close()
    assert collector.spans["InferRequest"].parent_span_id == b""
    assert collector.resource["service.name"] == "modeldepot"
