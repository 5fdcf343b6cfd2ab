"""Models written for Triton's python backend, as they are, against a way back that only notes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.errors import (
    InferenceFailedError,
    NotFoundError,
    RequestCancelledError,
)
from repository.messages import InferRequest, InferResponse, TensorSpec
from repository.tensors import Tensor
from tests.fakes.asking import FakeOthers
from tests.triton_python import REPEAT, ask, loaded, source, tensor, values

INT = np.array([[1, 2, 3, 4]], np.int32)
ADD_SUB: dict[str, Any] = {
    "max_batch_size": 8,
    "inputs": (tensor("INPUT0", "INT32", 4), tensor("INPUT1", "INT32", 4)),
    "outputs": (tensor("OUTPUT0", "INT32", 4), tensor("OUTPUT1", "INT32", 4)),
}


def add_sub(request: InferRequest) -> Iterator[InferResponse]:
    a, b = (t.array() for t in request.inputs)
    yield InferResponse([Tensor.of("OUTPUT0", a + b), Tensor.of("OUTPUT1", a - b)])


def test_adding_and_subtracting_answers_each_of_a_batch(tmp_path: Path) -> None:
    with loaded(tmp_path, source("add_sub"), **ADD_SUB) as m:
        assert m.loaded.abilities == ("ask",) and m.loaded.platform == "python"
        assert m.loaded.inputs[0] == TensorSpec("INPUT0", "INT32", (-1, 4))
        assert m.loaded.max_batch_size == 8
        one, two = m.run(
            ask(INPUT0=INT, INPUT1=INT), ask("OUTPUT1", INPUT0=INT * 3, INPUT1=INT, id="b")
        )
    assert [t.array().tolist() for t in one[0].outputs] == [(INT * 2).tolist(), (INT * 0).tolist()]
    assert [(t.name, t.array().tolist()) for t in two[0].outputs] == [
        ("OUTPUT1", (INT * 2).tolist())
    ]


def test_a_decoupled_model_answers_from_its_threads_in_any_number(tmp_path: Path) -> None:
    with loaded(tmp_path, source("repeat"), **REPEAT) as m:
        assert m.loaded.abilities == ("ask", "decoupled")
        first, second = m.run(
            ask(IN=np.array([4, 2, 0], np.int32), DELAY=np.array([2, 1, 0], np.uint32)),
            ask(IN=np.zeros(0, np.int32), DELAY=np.zeros(0, np.uint32)),
        )
    assert values(first, "OUT") == [4, 2, 0] and values(first, "IDX") == [0, 1, 2]
    assert second == []


def test_a_model_hears_that_nobody_wants_the_rest(tmp_path: Path) -> None:
    with loaded(tmp_path, source("repeat"), **REPEAT) as m:
        (reply,) = m.begin(ask(IN=np.arange(1000, dtype=np.int32), DELAY=np.ones(1000, np.uint32)))
        reply.came.acquire()
        reply.cancelled = True
        assert reply.wait() is None
    assert len(reply.answers) < 1000


def test_a_pool_of_threads_answers_many_requests(tmp_path: Path) -> None:
    with loaded(tmp_path, source("square")) as m:
        assert m.loaded.abilities == ("ask", "decoupled")
        assert m.loaded.details["triton_config"]["model_transaction_policy"] == {"decoupled": True}
        found = m.run(*[ask(IN=np.array([n], np.int32)) for n in range(20)])
    assert [values(answers, "OUT") for answers in found] == [[n] * n for n in range(20)]


def test_a_model_asks_another(tmp_path: Path) -> None:
    others = FakeOthers(add_sub=add_sub)
    name = np.array([b"add_sub"], object)
    with loaded(tmp_path, source("bls_sync"), others) as m:
        found = m.one(ask(INPUT0=INT, INPUT1=INT, MODEL_NAME=name))
        assert found["OUTPUT0"].tolist() == (INT * 2).tolist()
        gone = ask(INPUT0=INT, INPUT1=INT, MODEL_NAME=np.array([b"gone"], object))
        with pytest.raises(Exception, match="'gone' is not found"):
            m.run(gone)


def test_a_model_asks_another_several_times_at_once(tmp_path: Path) -> None:
    others = FakeOthers(add_sub=add_sub)
    with loaded(tmp_path, source("bls_async"), others) as m:
        for _ in range(2):
            assert m.one(ask(INPUT0=INT, INPUT1=INT))["OUTPUT0"].tolist() == (INT * 8).tolist()
    assert len(others.calls) == 8


def test_a_model_reads_all_that_a_decoupled_one_answers(tmp_path: Path) -> None:
    def square(request: InferRequest) -> Iterator[InferResponse]:
        for _ in range(int(request.inputs[0].array()[0])):
            yield InferResponse([Tensor.of("OUT", request.inputs[0].array())])
        yield InferResponse([])

    with loaded(tmp_path, source("bls_decoupled"), FakeOthers(square=square)) as m:
        assert m.one(ask(IN=np.array([5], np.int32)))["SUM"].tolist() == [25]


def test_a_model_completes_its_own_config(tmp_path: Path) -> None:
    with loaded(tmp_path, source("auto_complete")) as m:
        assert m.loaded.inputs == (TensorSpec("INPUT0", "FP32", (-1, 4)),)
        assert m.loaded.outputs == (TensorSpec("OUTPUT0", "FP32", (-1, 4)),)
        assert m.loaded.max_batch_size == 8
        assert "dynamic_batching" in m.loaded.details["triton_config"]
        x = np.ones((1, 4), np.float32)
        found = m.run(ask(INPUT0=x), ask(INPUT0=np.vstack([x, x])))
    assert [a[0].outputs[0].shape for a in found] == [(1, 4), (2, 4)]


def test_a_model_completes_nothing_where_that_is_switched_off(tmp_path: Path) -> None:
    with loaded(tmp_path, source("auto_complete"), extra={"auto_complete": False}) as m:
        assert m.loaded.inputs == () and m.loaded.max_batch_size == 0


def test_each_request_fails_for_itself_with_the_code_that_the_model_gave(tmp_path: Path) -> None:
    with loaded(tmp_path, source("errors")) as m:
        codes = [ask(CODE=np.array([n], np.int32)) for n in (-1, 1, 2, 7)]
        found = m.fails(*codes)
    assert [type(error) for error in found] == [
        type(None), InferenceFailedError, NotFoundError, RequestCancelledError,
    ]  # fmt: skip
    assert str(found[1]) == "An Error Occurred"


def test_texts_come_as_bytes_and_go_as_bytes_or_text(tmp_path: Path) -> None:
    with loaded(tmp_path, source("texts")) as m:
        texts = np.array([[b"abc", "lü".encode()]], object)
        found = m.one(ask(TEXT=texts))
    assert found["BYTES"].tolist() == [[b"cba", "ül".encode()]]
    assert found["STR"].tolist() == [b"cba", "ül".encode()]
    assert found["FIXED"].tolist() == [b"ab", b"c"]


def test_tensors_go_through_torch(tmp_path: Path) -> None:
    outputs = (tensor("Y", "FP32", -1), tensor("HALF", "BF16", -1))
    with loaded(tmp_path, source("dlpack"), outputs=outputs) as m:
        ((answer,),) = m.run(ask(X=np.array([1.5, -2], np.float32)))
    y, half = answer.outputs
    assert y.array().tolist() == [3, -4]
    assert half.datatype == "BF16" and half.array().tolist() == [0x3FC0, 0xC000]


def test_a_stateful_model_tells_sequences_apart(tmp_path: Path) -> None:
    def step(sequence: Any, value: int, **flags: bool) -> InferRequest:
        said = {"sequence_id": sequence, **{f"sequence_{k}": v for k, v in flags.items()}}
        return ask(INPUT=np.array([value], np.int32), parameters=said)

    with loaded(tmp_path, source("accumulator")) as m:
        found = m.run(
            step(1, 10, start=True), step("one", 5, start=True), step(1, 20),
            step("one", 6, end=True), step(1, 30, end=True),
        )  # fmt: skip
        assert m.backend._model.sums == {}
    assert [values(a, "OUTPUT")[0] for a in found] == [10, 5, 30, 11, 60]


def test_a_model_is_told_where_and_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "repo" / "m" / "1"
    with loaded(
        home, source("talkative"), extra={"folder": str(home.parent)},
        options={"parameters": {"depth": 3}},
    ) as m:  # fmt: skip
        request = ask(id="r7", parameters={"a": "b", "n": 2, "timeout": 900, "priority": 1})
        ((answer,),) = m.run(request)
    said = json.loads(answer.outputs[0].array()[0])
    assert said == {
        "args": {
            "model_instance_kind": "CPU", "model_instance_name": "m_0_0",
            "model_instance_device_id": "0", "model_repository": str(home.parent),
            "model_version": "1", "model_name": "m",
        },
        "config": {"depth": {"string_value": "3"}},
        "request": {"a": "b", "n": 2}, "id": "r7", "timeout": 900, "seen": 1.0, "dir": str(home),
    }  # fmt: skip
    assert answer.parameters == {"kind": "said", "n": 1}
    lines = [line.split("Z ")[1] for line in capsys.readouterr().err.splitlines()]
    assert "WARNING model.m: Warning Msg!" in lines and "ERROR   model.m: Specific Msg!" in lines
    assert not any("Verbose" in line for line in lines)


def test_coroutines_of_a_decoupled_model_run_beside_each_other(tmp_path: Path) -> None:
    def named(name: bytes) -> InferRequest:
        return ask(NAME=np.array([name], object))

    with loaded(tmp_path, source("beside"), decoupled=True) as m:
        (first,) = m.begin(named(b"a"))
        first.came.acquire()
        assert not first.over
        (second,) = m.begin(named(b"go:a"))
        assert second.wait() is None and first.wait() is None
        assert values(first.answers, "NAME") == [b"a"]
        (broken,) = m.fails(named(b"raise"))
        assert str(broken) == "ValueError: too late"
        (left,) = m.begin(named(b"left"))
        left.came.acquire()
    assert "unloaded before" in str(left.wait())


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_request_may_ask_to_be_run_again(tmp_path: Path, decoupled: bool) -> None:
    with loaded(tmp_path, source("countdown"), decoupled=decoupled) as m:
        three, one = m.run(
            ask(IN=np.array([3], np.int32), id="a"), ask(IN=np.array([1], np.int32), id="b")
        )
    assert values(three, "OUT") == ([2, 1, 0] if decoupled else [3])
    assert values(one, "OUT") == ([0] if decoupled else [1])


def test_a_request_that_nobody_wants_is_not_run_again(tmp_path: Path) -> None:
    with loaded(tmp_path, source("countdown")) as m:
        request = ask(IN=np.array([1 << 30], np.int32), id="a")
        rounds = m.backend._model.execute

        def execute(requests: Any) -> Any:
            requests[0].way()._reply.cancelled = True
            return rounds(requests)

        assert m.backend._running is not None
        m.backend._running._execute = execute
        (error,) = m.fails(request)
    assert isinstance(error, RequestCancelledError)


def test_a_model_imports_what_lies_beside_it_and_beside_its_versions(tmp_path: Path) -> None:
    home = tmp_path / "m" / "1"
    home.mkdir(parents=True)
    (home / "near_by.py").write_text("import triton_python_backend_utils as pb_utils\nFACTOR = 2\n")
    (home / "relative.py").write_text("TERM = 1\n")
    (tmp_path / "m" / "shared_by_versions.py").write_text("def times(x, n):\n    return x * n\n")
    text = """
        import near_by, shared_by_versions
        from .relative import TERM

        class TritonPythonModel:
            def execute(self, requests):
                pb = near_by.pb_utils
                x = pb.get_input_tensor_by_name(requests[0], "x").as_numpy()
                y = pb.Tensor("y", shared_by_versions.times(x, near_by.FACTOR) + TERM)
                return [pb.InferenceResponse([y])]
    """
    before = list(sys.path)
    with loaded(home, text, extra={"folder": str(home.parent)}) as m:
        assert m.one(ask(x=np.array([5], np.int32)))["y"].tolist() == [11]
    assert str(home.parent) not in sys.path
    sys.path[:] = before
    for name in ("near_by", "shared_by_versions"):
        del sys.modules[name]
