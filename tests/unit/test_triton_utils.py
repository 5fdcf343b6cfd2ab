"""What `import triton_python_backend_utils as pb_utils` gives a model, call by call."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from repository.backends.triton import utils
from repository.backends.triton.errors import OURS, TritonError, ours, theirs
from repository.errors import (
    AlreadyThereError,
    InferenceFailedError,
    InvalidRequestError,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
    UnsupportedRequestError,
)
from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor as Wire
from tests.fakes.asking import FakeOthers

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def others() -> FakeOthers:
    def double(request: InferRequest) -> Iterator[InferResponse]:
        yield InferResponse([Wire.of("y", t.array() * 2) for t in request.inputs])

    def twice(request: InferRequest) -> Iterator[InferResponse]:
        yield InferResponse([Wire.of("n", np.array([1]))], {"part": 1, "odd": [1]})
        yield InferResponse([Wire.of("n", np.array([2]))])

    def broken(request: InferRequest) -> Iterator[InferResponse]:
        yield InferResponse([])
        raise UnavailableError("not now")

    def nothing(request: InferRequest) -> Iterator[InferResponse]:
        yield from ()

    return FakeOthers(double=double, twice=twice, breaks=broken, nothing=nothing)


@pytest.fixture
def pb(others: FakeOthers, tmp_path: Path) -> Iterator[ModuleType]:
    module = utils.make("m", tmp_path, others)
    utils.install(module)
    try:
        yield importlib.import_module("triton_python_backend_utils")
    finally:
        utils.remove(module)


def call(pb: ModuleType, model: str, **more: Any) -> Any:
    inputs = more.pop("inputs", [pb.Tensor("x", X)])
    names = more.pop("requested_output_names", [])
    return pb.InferenceRequest(
        model_name=model, requested_output_names=names, inputs=inputs, **more
    )


# the module ---------------------------------------------------------------------------------------


def test_both_names_are_the_module_while_its_model_lives_and_no_longer(tmp_path: Path) -> None:
    module = utils.make("m", tmp_path, None)
    utils.install(module)
    for name in utils.NAMES:
        assert importlib.import_module(name) is module
    another = utils.make("n", tmp_path, None)
    utils.remove(another)
    assert set(utils.NAMES) <= set(sys.modules)
    utils.remove(module)
    for name in utils.NAMES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_the_models_folder_is_where_its_file_lies(pb: ModuleType, tmp_path: Path) -> None:
    assert pb.get_model_dir() == str(tmp_path)


def test_the_constants_are_those_of_tritonserver_h(pb: ModuleType) -> None:
    assert pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL == 1
    assert pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START == 1
    assert pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END == 2
    assert pb.TRITONSERVER_REQUEST_RELEASE_ALL == 1
    assert pb.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE == 2
    assert pb.TRITONSERVER_MEMORY_CPU != pb.TRITONSERVER_MEMORY_GPU
    codes = ["UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED"]
    codes += ["ALREADY_EXISTS", "CANCELLED"]
    assert [getattr(pb.TritonError, code) for code in codes] == list(range(8))


# responses and errors -----------------------------------------------------------------------------


def test_a_response_holds_tensors_or_an_error_and_parameters(pb: ModuleType) -> None:
    tensor = pb.Tensor("y", X)
    response = pb.InferenceResponse(output_tensors=[tensor], parameters={"a": 1, "b": "c"})
    assert response.output_tensors() == [tensor] and not response.has_error()
    assert json.loads(response.parameters()) == {"a": 1, "b": "c"}
    assert pb.get_output_tensor_by_name(response, "y") is tensor
    assert pb.get_output_tensor_by_name(response, "z") is None
    failed = pb.InferenceResponse([], pb.TritonError("no"))
    assert failed.has_error() and failed.error().message() == str(failed.error()) == "no"
    assert failed.error().code() == pb.TritonError.INTERNAL


def test_a_response_of_something_else_is_refused(pb: ModuleType) -> None:
    with pytest.raises(pb.TritonModelException, match="holds ndarray"):
        pb.InferenceResponse([X])
    with pytest.raises(pb.TritonModelException, match="TritonError, not str"):
        pb.InferenceResponse(error="no")
    with pytest.raises(pb.TritonModelException, match="parameter 'a'"):
        pb.InferenceResponse([], parameters={"a": [1]})
    with pytest.raises(pb.TritonModelException, match="no error code"):
        pb.TritonError("no", 77)


def test_every_code_is_an_error_of_ours_and_comes_back() -> None:
    kinds = [type(ours(TritonError("no", code))) for code in OURS]
    assert kinds == [
        InferenceFailedError, InferenceFailedError, NotFoundError, InvalidRequestError,
        UnavailableError, UnsupportedRequestError, AlreadyThereError, RequestCancelledError,
    ]  # fmt: skip
    for code in list(OURS)[1:]:
        assert theirs(ours(TritonError("no", code))).code() == code


def test_the_exception_has_its_text(pb: ModuleType) -> None:
    assert pb.TritonModelException("why").message() == "why"


# other models -------------------------------------------------------------------------------------


def test_another_model_is_asked_with_all_that_a_request_can_say(
    pb: ModuleType, others: FakeOthers
) -> None:
    request = call(
        pb, "double", requested_output_names=["y"], request_id="7", correlation_id=4,
        model_version=3, timeout=500, parameters={"k": True}, trace=pb.InferenceTrace(),
        flags=pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
        preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
    )  # fmt: skip
    response = request.exec()
    assert not response.has_error()
    np.testing.assert_array_equal(response.output_tensors()[0].as_numpy(), X * 2)
    ((model, version, sent),) = others.calls
    assert (model, version, sent.id, sent.outputs) == ("double", 3, "7", ("y",))
    assert sent.parameters == {
        "k": True, "sequence_id": 4, "sequence_start": True, "sequence_end": False, "timeout": 500,
    }  # fmt: skip


def test_a_sequence_may_be_named_by_a_text(pb: ModuleType, others: FakeOthers) -> None:
    call(pb, "double", correlation_id="s", flags=3).exec()
    assert others.calls[0][2].parameters == {
        "sequence_id": "s",
        "sequence_start": True,
        "sequence_end": True,
    }


def test_without_a_version_the_newest_is_asked(pb: ModuleType, others: FakeOthers) -> None:
    call(pb, "double").exec()
    assert others.calls[0][1] is None and others.calls[0][2].parameters == {}


def test_what_a_call_came_to_is_in_its_response(pb: ModuleType) -> None:
    gone = call(pb, "gone").exec()
    assert gone.has_error() and "is not found" in gone.error().message()
    assert gone.error().code() == pb.TritonError.NOT_FOUND
    assert "no response" in call(pb, "nothing").exec().error().message()
    assert "decoupled=True" in call(pb, "twice").exec().error().message()


def test_a_decoupled_model_is_read_answer_by_answer(pb: ModuleType) -> None:
    answers = call(pb, "twice").exec(decoupled=True)
    assert [int(a.output_tensors()[0].as_numpy()[0]) for a in answers] == [1, 2]
    first, second = call(pb, "breaks").exec(decoupled=True)
    assert not first.has_error()
    assert second.error().code() == pb.TritonError.UNAVAILABLE


def test_parameters_of_an_answer_are_read_as_far_as_a_model_may_have_them(pb: ModuleType) -> None:
    answers = call(pb, "twice").exec(decoupled=True)
    assert json.loads(next(answers).parameters()) == {"part": 1}


def test_who_cancels_an_iteration_leaves_the_rest(pb: ModuleType, others: FakeOthers) -> None:
    answers = call(pb, "twice").exec(decoupled=True)
    next(answers)
    answers.cancel()
    assert list(answers) == [] and others.left == 1


async def test_calls_are_awaited_together(pb: ModuleType, others: FakeOthers) -> None:
    found = await asyncio.gather(*[call(pb, "double").async_exec() for _ in range(3)])
    assert [r.has_error() for r in found] == [False] * 3 and len(others.calls) == 3
    answers = await call(pb, "twice").async_exec(decoupled=True)
    assert len(list(answers)) == 2


def test_a_request_needs_a_model_inputs_and_outputs(pb: ModuleType) -> None:
    with pytest.raises(TypeError, match="needs inputs, requested_output_names and model_name"):
        pb.InferenceRequest(model_name="m", inputs=[])
    with pytest.raises(TypeError, match="holds ndarray"):
        call(pb, "double", inputs=[X])
    with pytest.raises(pb.TritonModelException, match="correlation_id"):
        call(pb, "double", correlation_id=1.5)
    with pytest.raises(pb.TritonModelException, match="has a sender"):
        call(pb, "double").get_response_sender()
    with pytest.raises(pb.TritonModelException, match="no release flag"):
        call(pb, "double").set_release_flags(9)
    with pytest.raises(pb.TritonModelException, match="preferred_memory_type"):
        pb.PreferredMemory(5)


def test_a_request_tells_what_it_was_made_of(pb: ModuleType) -> None:
    request = call(
        pb, "double", requested_output_names=["y"], request_id="7", correlation_id=4, timeout=9
    )
    assert (request.model_name(), request.model_version()) == ("double", -1)
    assert (request.request_id(), request.correlation_id(), request.timeout()) == ("7", 4, 9)
    assert request.requested_output_names() == ["y"] and request.parameters() == "{}"
    assert pb.get_input_tensor_by_name(request, "x").name() == "x"
    assert pb.get_input_tensor_by_name(request, "z") is None
    assert request.trace().get_context() is None and not request.is_cancelled()
    assert request.preferred_memory() is None and request.priority() == 0
    request.set_flags(2)
    assert request.flags() == 2


def test_without_other_models_the_model_is_told_so(tmp_path: Path) -> None:
    alone = utils.make("m", tmp_path, None)
    with pytest.raises(alone.TritonModelException, match="runs in a worker"):
        call(alone, "double").exec()
    with pytest.raises(alone.TritonModelException, match="runs in a worker"):
        alone.load_model("m")


def test_models_are_loaded_unloaded_and_looked_at(pb: ModuleType, others: FakeOthers) -> None:
    assert pb.is_model_ready("double") and pb.is_model_ready("double", model_version="1")
    assert not pb.is_model_ready("double", "2") and not pb.is_model_ready(model_name="gone")
    pb.load_model(model_name="a", config='{"max_batch_size": 2}')
    pb.load_model("b")
    pb.load_model("c", "{}", files={"file:1/model.onnx": b"x"}, namespace="none")
    pb.unload_model(model_name="a", unload_dependents=True)
    pb.unload_model("b")
    assert others.done == [
        ("load", "a", '{"max_batch_size": 2}'),
        ("load", "b", ""),
        ("load", "c", "{}", "1/model.onnx"),
        ("unload", "a", "dependents"),
        ("unload", "b"),
    ]
    with pytest.raises(pb.TritonModelException, match="failed to load"):
        pb.load_model("broken")
    with pytest.raises(pb.TritonModelException, match="content as bytes"):
        pb.load_model("a", "{}", files={"file:1/model.onnx": "text"})
    with pytest.raises(pb.TritonModelException, match="no version"):
        pb.is_model_ready("double", "newest")


# config, logs, metrics ----------------------------------------------------------------------------


def config(pb: ModuleType, **more: Any) -> Any:
    return pb.ModelConfig({"name": "m", "max_batch_size": 0, "input": [], "output": [], **more})


def test_a_config_is_completed(pb: ModuleType) -> None:
    found = config(pb)
    sizes = tuple(np.array([4]))  # as shapes of arrays often are
    found.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": sizes, "optional": True})
    found.add_output({"name": "y", "data_type": "TYPE_STRING", "dims": [-1]})
    found.set_max_batch_size(8)
    found.set_dynamic_batching()
    found.set_model_transaction_policy({"decoupled": True})
    done = found.as_dict()
    assert json.loads(json.dumps(done)) == done
    assert done["max_batch_size"] == 8 and done["dynamic_batching"] == {}
    assert pb.get_input_config_by_name(done, "x")["dims"] == [4]
    assert pb.get_output_config_by_name(done, "y")["data_type"] == "TYPE_STRING"
    assert pb.get_input_config_by_name(done, "y") is None
    assert pb.using_decoupled_model_transaction_policy(done)
    done["max_batch_size"] = 1
    assert found.as_dict()["max_batch_size"] == 8


def test_what_the_file_says_is_kept_and_what_it_leaves_out_is_filled_in(pb: ModuleType) -> None:
    found = config(pb, max_batch_size=2, input=[{"name": "x", "dims": [4]}])
    found.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [4]})
    assert found.as_dict()["input"] == [{"name": "x", "dims": [4], "data_type": "TYPE_FP32"}]
    found.set_max_batch_size(4)
    assert found.as_dict()["max_batch_size"] == 4


@pytest.mark.parametrize(
    ("what", "given", "words"),
    [
        ("set_max_batch_size", 1, "config says max_batch_size 2"),
        ("set_max_batch_size", "1", "no whole number"),
        ("add_input", {"name": "x", "data_type": "TYPE_FP32", "dims": [5]}, "dims \\[4\\]"),
        ("add_input", {"name": "x", "data_type": "TYPE_FP64", "dims": [4]}, "data_type TYPE_FP32"),
        ("add_input", {"name": "z", "dims": [5]}, "lacks 'data_type'"),
        ("add_input", {"name": "z", "data_type": "FLOAT", "dims": [5]}, "no data type"),
        ("add_input", {"data_type": "TYPE_FP32", "dims": [5]}, "no 'name'"),
        ("add_input", {"name": "z", "data_type": "TYPE_FP32", "dims": ["a"]}, "whole numbers"),
        ("add_input", {"name": "z", "data_type": "TYPE_FP32", "dims": 5}, "whole numbers"),
        ("add_output", {"name": "y", "is_shape": 1}, "has 'is_shape'"),
        ("set_model_transaction_policy", {"decoupled": True}, "says decoupled False"),
        ("set_model_transaction_policy", {"decoupled": True, "more": 1}, "nothing else"),
        ("set_model_transaction_policy", {"decoupled": "yes"}, "neither True nor False"),
    ],
)
def test_a_model_that_contradicts_its_file_is_told_both(
    pb: ModuleType, what: str, given: Any, words: str
) -> None:
    found = config(
        pb,
        max_batch_size=2,
        input=[{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
        model_transaction_policy={"decoupled": False},
    )
    before = found.as_dict()
    with pytest.raises(ValueError, match=words):
        getattr(found, what)(given)
    assert found.as_dict() == before


def test_dynamic_batching_does_not_go_with_sequences(pb: ModuleType) -> None:
    with pytest.raises(ValueError, match="sequence_batching"):
        config(pb, sequence_batching={}).set_dynamic_batching()


def test_a_model_logs_lines_of_the_servers_form(
    pb: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logger = pb.Logger
    logger.log_info("one")
    logger.log_warn("two")
    logger.log_error("three\nand more")
    logger.log_verbose("not shown")
    logger.log("four")
    logger.log("five", logger.LogLevel.WARNING)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("Z ", 1)[1] for line in lines if "Z " in line] == [
        "INFO    model.m: one", "WARNING model.m: two", "ERROR   model.m: three",
        "INFO    model.m: four", "WARNING model.m: five",
    ]  # fmt: skip
    assert "    and more" in lines
    utils.make("m", tmp_path, None, verbose=True).Logger.log_verbose("shown")
    assert "VERBOSE model.m: shown" in capsys.readouterr().err


def test_metrics_count_in_the_worker(pb: ModuleType) -> None:
    family = pb.MetricFamily(name="n", description="d", kind=pb.MetricFamily.COUNTER)
    metric = family.Metric(labels={"a": "b"})
    metric.increment(2)
    family.Metric(labels={"a": "b"}).increment(0.5)
    assert metric.value() == 2.5 and family.Metric().value() == 0
    with pytest.raises(pb.TritonModelException, match="only grows"):
        metric.increment(-1)
    with pytest.raises(pb.TritonModelException, match="counter has no set"):
        metric.set(1)
    gauge = pb.MetricFamily("g", "d", pb.MetricFamily.GAUGE).Metric()
    gauge.set(5)
    gauge.increment(-2)
    assert gauge.value() == 3
    histogram = pb.MetricFamily("h", "d", pb.MetricKind.HISTOGRAM).Metric(buckets=[1, 2])
    histogram.observe(1.5)
    with pytest.raises(pb.TritonModelException, match="histogram has no value"):
        histogram.value()
    for kind, buckets, words in [
        (pb.MetricFamily.HISTOGRAM, None, "needs buckets"),
        (pb.MetricFamily.GAUGE, [1], "only a histogram"),
        (pb.MetricFamily.HISTOGRAM, [2, 1], "ascend"),
    ]:
        with pytest.raises(pb.TritonModelException, match=words):
            pb.MetricFamily("other", "d", kind).Metric(buckets=buckets)
