"""Which requests are traced, what is told of each, and what changes that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import ConfigError, InvalidRequestError
from repository.tensors import Tensor
from server.metrics.meter import Times
from server.metrics.tally import Tallies
from server.metrics.traces import Trace
from server.refusals import UnsupportedError
from server.triton.sinks import sink_of
from server.triton.trace_settings import start_of
from server.triton.tracefile import TraceFile, line_of
from server.triton.tracing import MOST_BYTES, MOST_VALUES, Record, Tracer, moments_of
from tests.fakes.repository import FakeRepository

TIMES = Times(duration_s=0.1, input_s=0.01, queue_s=0.02, compute_s=0.03, output_s=0.02)
ON = ("level=TIMESTAMPS", "rate=1")


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def put(self, record: Record, *, per_file: int) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


class Asked:
    request_id = "7"
    inputs = (Tensor.of("x", np.arange(2 * MOST_VALUES, dtype=np.int32)),)
    outputs = (Tensor.of("y", np.array([b"a"], object)),)


class Scene:
    def __init__(self, *texts: str, sink: bool = True) -> None:
        self.sink = Kept()
        models = FakeRepository()
        models.add("m", 1)
        models.add("n", 1)
        self.tracer = Tracer(start_of(texts), self.sink if sink else None, models, lambda: 10**18)

    def ends(self, model: str = "m", times: int = 1, **more: Any) -> list[Record]:
        for _ in range(times):
            self.tracer.ended(model, 1, "success", TIMES, protocol="http", **more)
        return self.sink.records


def test_nothing_is_traced_unless_it_is_said() -> None:
    scene = Scene()
    assert not scene.tracer.active and scene.ends() == []
    assert scene.tracer.settings() == {
        "trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0",
        "trace_file": "", "trace_mode": "triton",
    }  # fmt: skip


def test_one_of_so_many_is_traced_and_the_first_is_one() -> None:
    assert len(Scene("level=TIMESTAMPS", "rate=3").ends(times=7)) == 3
    assert len(Scene("level=TIMESTAMPS", "rate=0").ends(times=7)) == 0


def test_no_more_than_were_wanted_are_traced_until_somebody_says_the_count_again() -> None:
    scene = Scene(*ON, "count=2")
    assert len(scene.ends(times=5)) == 2
    scene.tracer.update(None, {"trace_count": "1"})
    assert len(scene.ends(times=5)) == 3


def test_a_model_has_settings_of_its_own_and_the_servers_where_it_has_none() -> None:
    scene = Scene()
    shown = scene.tracer.update("m", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    assert shown["trace_level"] == ["TIMESTAMPS"] and shown["trace_count"] == "-1"
    assert scene.tracer.settings()["trace_level"] == ["OFF"]
    assert scene.tracer.active
    assert [record.model for record in scene.ends("n") + scene.ends("m")] == ["m", "m"]
    scene.tracer.update(None, {"log_frequency": 5})
    assert scene.tracer.settings("m")["log_frequency"] == "5"


def test_null_clears_a_models_setting_to_the_servers_and_the_servers_to_that_of_the_start() -> None:
    scene = Scene("rate=7")
    scene.tracer.update("m", {"trace_rate": "3", "trace_level": ["TIMESTAMPS"]})
    scene.tracer.update(None, {"trace_rate": "5"})
    scene.tracer.update("m", {"trace_rate": None, "trace_level": None})
    assert scene.tracer.settings("m")["trace_rate"] == "5" and not scene.tracer.active
    assert scene.tracer.update(None, {"trace_rate": None})["trace_rate"] == "7"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"trace_rate": "x"}, "Unable to parse 'trace_rate', got: x"),
        ({"trace_rate": "-1"}, "Unable to parse 'trace_rate', got: -1"),
        ({"trace_rate": True}, "Unable to parse 'trace_rate'"),
        ({"trace_rate": ["1", "2"]}, "Unable to parse 'trace_rate'"),
        ({"trace_count": "-2"}, "Unable to parse 'trace_count', got: -2"),
        ({"log_frequency": 2**40}, "Unable to parse 'log_frequency'"),
        ({"trace_level": ["LOUD"]}, "Unable to parse 'trace_level', got: LOUD"),
        ({"trace_level": ["OFF", "TENSORS"]}, "OFF stands alone"),
        ({"trace_level": []}, "must be a list"),
        ({"trace_speed": "1"}, "unknown trace setting 'trace_speed'"),
    ],
)
def test_what_cannot_be_read_changes_nothing(said: dict[str, Any], words: str) -> None:
    scene = Scene()
    with pytest.raises(InvalidRequestError, match=words):
        scene.tracer.update(None, {"log_frequency": "9", **said})
    assert scene.tracer.settings()["log_frequency"] == "0"


def test_file_and_mode_are_said_at_the_start_alone() -> None:
    for said in ({"trace_file": "x"}, {"trace_mode": "opentelemetry"}):
        with pytest.raises(UnsupportedError, match="--trace-config"):
            Scene().tracer.update(None, said)


def test_a_model_that_there_is_not_has_no_settings() -> None:
    for ask in (Scene().tracer.settings, lambda name: Scene().tracer.update(name, {})):
        with pytest.raises(InvalidRequestError, match="Request for unknown model : nobody"):
            ask("nobody")


def test_without_a_place_to_write_to_nothing_can_be_switched_on() -> None:
    scene = Scene(sink=False)
    with pytest.raises(InvalidRequestError, match="nowhere to write"):
        scene.tracer.update("m", {"trace_level": ["TIMESTAMPS"]})
    assert not scene.tracer.active and scene.tracer.settings("m")["trace_level"] == ["OFF"]


def test_the_moments_are_tritons_in_order_and_add_up() -> None:
    at = dict(moments_of(TIMES, "http", 10**9))
    assert at["HTTP_RECV_START"] == 900_000_000 and at["HTTP_SEND_END"] == 10**9
    assert at["REQUEST_START"] == at["QUEUE_START"] == 910_000_000
    assert at["COMPUTE_START"] == 930_000_000
    assert at["COMPUTE_OUTPUT_START"] - at["COMPUTE_INPUT_END"] == 30_000_000
    assert at["COMPUTE_END"] == at["HTTP_SEND_START"] == 980_000_000
    assert moments_of(TIMES, "grpc", 0)[0][0] == "GRPC_RECV_START"


@given(st.tuples(*[st.floats(0, 10) for _ in range(5)]))
def test_moments_never_go_back_whatever_was_measured(times: Any) -> None:
    found = moments_of(Times(*times)._replace(duration_s=sum(times)), "http", 10**18)
    assert [ns for _, ns in found] == sorted(ns for _, ns in found)


def test_tensors_are_told_as_a_copy_up_to_a_limit_where_they_are_wanted() -> None:
    (record,) = Scene("level=TIMESTAMPS", "level=TENSORS", "rate=1").ends(of=Asked())
    x, y = record.tensors
    assert (x["activity"], x["shape"]) == ("TENSOR_QUEUE_INPUT", [2 * MOST_VALUES])
    assert x["data"] == list(range(MOST_VALUES))
    assert (y["activity"], y["data"]) == ("TENSOR_BACKEND_OUTPUT", ["a"])
    assert record.request_id == "7"
    assert Scene(*ON).ends(of=Asked())[0].tensors == ()


def test_the_meter_tells_the_tracer_of_requests_that_held_a_model() -> None:
    scene, tallies = Scene(*ON), Tallies()
    tallies.tracer = scene.tracer
    tallies.done("_unknown", 0, "bad_request", duration_s=0.1)
    tallies.done("m", 1, "timeout", duration_s=0.1, protocol="grpc", of=Asked())
    (record,) = scene.sink.records
    assert (record.model, record.outcome, record.request_id) == ("m", "timeout", "7")
    scene.tracer.close()
    assert scene.sink.closed and not scene.tracer.active


# files ------------------------------------------------------------------------------------------


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(count: int) -> list[Record]:
    return Scene(*ON).ends(times=count, parent=Trace("trace_id", "a" * 32, "b" * 16), of=Asked())


def test_each_trace_is_a_line_of_json(tmp_path: Path) -> None:
    sink = TraceFile(tmp_path / "t.jsonl")
    for record in records(2):
        sink.put(record, per_file=0)
    sink.close()
    first, second = lines(tmp_path / "t.jsonl")
    assert (first["id"], second["id"]) == (1, 2)
    assert (first["model_name"], first["model_version"], first["request_id"]) == ("m", 1, "7")
    assert first["parent"] == {"trace_id": "a" * 32, "span_id": "b" * 16}
    assert first["timestamps"][0]["name"] == "HTTP_RECV_START"


def test_so_many_traces_go_into_each_file(tmp_path: Path) -> None:
    sink = TraceFile(tmp_path / "t")
    for record in records(5):
        sink.put(record, per_file=2)
    sink.close()
    assert [len(lines(tmp_path / f"t.{n}")) for n in range(3)] == [2, 2, 1]


def test_what_cannot_be_written_is_told_once_and_ends_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t.0").mkdir()  # where the first part is to be
    sink = TraceFile(tmp_path / "t")
    for record in records(3):
        sink.put(record, per_file=100)
    sink.close()
    assert [r.message for r in caplog.records if "cannot be written" in r.message] != []
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


def test_more_than_can_be_written_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = TraceFile(tmp_path / "t", most_waiting=1)
    for record in records(50) * 40:
        sink.put(record, per_file=0)
    sink.close()
    written = len(lines(tmp_path / "t"))
    told = [r.message for r in caplog.records if "left out" in r.message]
    assert written == 2000 or len(told) == 2


def test_a_line_has_no_line_break_in_it() -> None:
    (record,) = records(1)
    assert line_of(record).count("\n") == 1


# flags ------------------------------------------------------------------------------------------


def test_the_flag_is_read_as_tritons() -> None:
    start = start_of(
        [
            "mode=opentelemetry", "level=TIMESTAMPS", "level=TENSORS", "rate=2", "count=5",
            "triton,file=/t", "triton,log-frequency=3", "opentelemetry,url=http://c",
            "opentelemetry,resource=service.name=depot", "opentelemetry,resource=a=b=c",
        ]
    )  # fmt: skip
    assert start.own.level == ("TIMESTAMPS", "TENSORS")
    assert (start.own.rate, start.own.count, start.own.log_frequency) == (2, 5, 3)
    assert (start.mode, start.file, start.url) == ("opentelemetry", "/t", "http://c")
    assert start.resource == {"service.name": "depot", "a": "b=c"}


@pytest.mark.parametrize(
    "text",
    ["", "rate", "rate=x", "level=LOUD", "mode=x", "speed=1", "triton,url=x", "opentelemetry,rate=1",
     "opentelemetry,resource=x"],
)  # fmt: skip
def test_a_flag_that_says_no_such_thing_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(ConfigError, match="--trace-config"):
        start_of([text])


def test_tracing_without_a_file_or_with_one_that_cannot_be_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere to write"):
        sink_of(start_of(["level=TIMESTAMPS"]))
    with pytest.raises(ConfigError, match="No such file or directory"):
        sink_of(start_of([f"file={tmp_path}/no/t"]))
    assert sink_of(start_of([])) is None


def test_of_a_long_text_only_the_beginning_is_told() -> None:
    class Long(Asked):
        inputs = (Tensor.of("x", np.array([b"a" * 10_000, b"b"], object)),)

    scene = Scene("level=TENSORS", "level=TIMESTAMPS", "rate=1")
    (record,) = scene.ends(of=Long)
    assert record.tensors[0]["data"] == ["a" * MOST_BYTES, "b"]
