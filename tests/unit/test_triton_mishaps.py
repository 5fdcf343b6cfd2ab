"""What models for Triton's python backend do wrong and are told; how they load, and how they end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.backends.base import Order
from repository.backends.triton.backend import TritonPythonBackend
from repository.config import Batching, ModelConfig, Sequences, State
from repository.errors import (
    IncompleteFilesError,
    InferenceFailedError,
    LoadFailedError,
    NotFoundError,
)
from repository.messages import InferRequest
from tests.triton_python import REPEAT, Model, ask, loaded, source, tensor, values

HEAD = """
    import numpy as np
    import threading
    import triton_python_backend_utils as pb_utils

    def answer(value=1):
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([value], np.int32))])
"""


def model(body: str) -> str:
    """A class with these methods."""
    return f"{HEAD}\n    class TritonPythonModel:\n{body}"


def executing(lines: str) -> str:
    return model(
        "        def execute(self, requests):\n"
        + "".join(f"            {line}\n" for line in lines.splitlines())
    )


def test_what_execute_raises_is_raised(tmp_path: Path) -> None:
    text = executing("raise pb_utils.TritonModelException('no luck')")
    with loaded(tmp_path, text) as m, pytest.raises(Exception, match="no luck"):
        m.begin(ask())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("return None", "returned None; it must return a list"),
        ("return answer()", "returned an InferenceResponse; it must return a list"),
        ("return []", "returned 0 responses for 2 requests"),
        ("return [answer()] * 3", "returned 3 responses for 2 requests"),
    ],
)
def test_responses_that_fit_no_request_fail_all(tmp_path: Path, lines: str, words: str) -> None:
    with loaded(tmp_path, executing(lines)) as m, pytest.raises(InferenceFailedError, match=words):
        m.begin(ask(), ask())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("None", "returned None for this request"),
        ("7", "returned an int for this request"),
        ("pb_utils.InferenceResponse(requests[0].inputs() * 2)", "two outputs of one name"),
    ],
)
def test_a_response_that_is_none_fails_its_own_request(
    tmp_path: Path, what: str, words: str
) -> None:
    x = np.zeros(1, np.int32)
    with loaded(tmp_path, executing(f"return [{what}, answer()]")) as m:
        wrong, right = m.fails(ask(x=x), ask(x=x))
    assert words in str(wrong) and right is None


def test_a_decoupled_model_that_returns_responses_is_told(tmp_path: Path) -> None:
    text = executing("return [answer()]")
    with (
        loaded(tmp_path, text, decoupled=True) as m,
        pytest.raises(InferenceFailedError, match="returned a list; it must return None"),
    ):
        m.begin(ask())


@pytest.mark.parametrize(
    "lines",
    [
        "pass",
        "for r in requests: r.get_response_sender().send(answer())",
        "self.kept = [r.get_response_sender() for r in requests]; self.kept = None",
    ],
)
def test_a_request_that_the_model_forgets_ends_with_an_error(tmp_path: Path, lines: str) -> None:
    with loaded(tmp_path, executing(lines), decoupled=True) as m:
        (reply,) = m.begin(ask())
        assert "dropped the request without its last response" in str(reply.wait())


def test_a_sender_that_is_kept_keeps_its_request(tmp_path: Path) -> None:
    text = executing("self.kept = [r.get_response_sender() for r in requests]")
    with loaded(tmp_path, text, decoupled=True) as m:
        (reply,) = m.begin(ask())
        assert not reply.over
    assert "unloaded before" in str(reply.wait())


SENDING = """
sender = requests[0].get_response_sender()
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
self.said = []
def told(*a, **k):
    try:
        sender.send(*a, **k)
    except pb_utils.TritonModelException as error:
        self.said.append(str(error))
"""


def sending(m: Model, request: InferRequest | None = None) -> tuple[Any, list[str]]:
    (reply,) = m.begin(request or ask())
    error = reply.wait()
    return error or reply.answers, m.backend._model.said


def test_what_cannot_be_sent_is_told_to_the_model(tmp_path: Path) -> None:
    text = executing(
        SENDING + "told(answer(), 5)\ntold()\ntold(7)\ntold(answer())\ntold(flags=FINAL)\n"
        "told(answer())\ntold(flags=FINAL)"
    )
    with loaded(tmp_path, text, decoupled=True) as m:
        answers, said = sending(m)
    assert values(answers, "y") == [1]
    words = ["flags is 5", "needs a response", "not int", "has ended", "has ended"]
    assert [word in text for word, text in zip(words, said, strict=True)] == [True] * 5


def test_an_error_ends_the_answers_and_the_model_may_go_on(tmp_path: Path) -> None:
    error = "pb_utils.InferenceResponse(error=pb_utils.TritonError('halfway'))"
    text = executing(
        SENDING
        + f"told(answer())\ntold({error})\ntold(answer())\ntold(flags=FINAL)\ntold(answer())"
    )
    with loaded(tmp_path, text, decoupled=True) as m:
        (reply,) = m.begin(ask())
        assert str(reply.wait()) == "halfway" and len(reply.answers) == 1
        (said,) = m.backend._model.said
    assert "has ended" in said


def test_a_model_that_is_not_decoupled_may_use_a_sender_for_its_one_response(
    tmp_path: Path,
) -> None:
    with loaded(
        tmp_path, executing(SENDING + "told(answer())\ntold(answer())\ntold(flags=FINAL)")
    ) as m:
        answers, said = sending(m)
        assert values(answers, "y") == [1] and "sends one response for each" in said[0]
    with loaded(tmp_path, executing(SENDING + "told(flags=FINAL)\nreturn [None]")) as m:
        error, _ = sending(m)
        assert "sent no response" in str(error)


def test_after_execute_has_failed_its_senders_are_closed(tmp_path: Path) -> None:
    text = executing(SENDING + "self.told = told\nraise ValueError('broken')")
    with loaded(tmp_path, text, decoupled=True) as m:
        with pytest.raises(ValueError, match="broken"):
            m.begin(ask())
        m.backend._model.told(None, 1)
        assert "has ended" in m.backend._model.said[0]


def test_another_datatype_than_declared_is_sent_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = (tensor("y", "FP32", 1),)
    with loaded(tmp_path, executing("return [answer() for r in requests]"), outputs=outputs) as m:
        ((answer,), _) = m.run(ask(), ask())
    assert answer.outputs[0].datatype == "INT32"
    assert capsys.readouterr().err.count("answers 'y' as INT32, the config says FP32") == 1


def test_only_what_is_declared_or_asked_for_is_sent(tmp_path: Path) -> None:
    lines = (
        "t = [pb_utils.Tensor(n, np.zeros(1, np.int32)) for n in 'abs']\n"
        "self.wanted = [r.requested_output_names() for r in requests]\n"
        "return [pb_utils.InferenceResponse(t) for r in requests]"
    )
    outputs = (tensor("a", "INT32", 1), tensor("b", "INT32", 1))
    states = Sequences(states=(State("s_in", "s", "INT32", (1,)),))
    with loaded(tmp_path, executing(lines), outputs=outputs, sequences=states) as m:
        found = m.run(ask(), ask("b"))
        assert m.backend._model.wanted == [["a", "b", "s"], ["b"]]
    assert [[t.name for t in a.outputs] for (a,) in found] == [["a", "b", "s"], ["b"]]
    with loaded(tmp_path, executing(lines)) as m:
        assert sorted(m.one(ask())) == ["a", "b", "s"]


def test_a_model_sees_its_own_shapes_and_clients_theirs(tmp_path: Path) -> None:
    lines = (
        "x = pb_utils.get_input_tensor_by_name(requests[0], 'x')\n"
        "assert x.as_numpy().shape == (2, 3)\n"
        "return [pb_utils.InferenceResponse([pb_utils.Tensor('y', x.as_numpy())])]"
    )
    config: dict[str, Any] = {
        "max_batch_size": 4,
        "inputs": (tensor("x", "FP32", -1, 1, reshape=(-1,)),),
        "outputs": (tensor("y", "FP32", -1, 1, reshape=(-1,)),),
    }
    with loaded(tmp_path, executing(lines), **config) as m:
        assert m.loaded.inputs[0].shape == (-1, -1, 1)
        assert m.one(ask(x=np.zeros((2, 3, 1), np.float32)))["y"].shape == (2, 3, 1)
        (error,) = m.fails(ask(x=np.zeros((2, 3), np.float32)))
        assert "does not fit" in str(error)


def test_one_request_can_be_inferred_as_of_any_model(tmp_path: Path) -> None:
    with loaded(tmp_path, source("square")) as m:
        answer = m.backend.infer(ask(IN=np.array([1], np.int32)))
        assert answer.outputs[0].array().tolist() == [1]
        with pytest.raises(InferenceFailedError, match="sent 2 responses"):
            m.backend.infer(ask(IN=np.array([2], np.int32)))
    with loaded(tmp_path, source("errors")) as m, pytest.raises(NotFoundError):
        m.backend.infer(ask(CODE=np.array([2], np.int32)))


# load and unload ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Model: ...", "has no class 'TritonPythonModel'"),
        ("class TritonPythonModel: ...", "has no method execute"),
        (
            "class TritonPythonModel:\n"
            "    def auto_complete_config(c): return None\n"
            "    def execute(self, requests): ...",
            "returned NoneType; it must return the ModelConfig",
        ),
    ],
)
def test_what_is_no_model_does_not_load(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(LoadFailedError, match=words), loaded(tmp_path, text):
        pass


def test_a_model_cannot_share_the_servers_process(tmp_path: Path) -> None:
    with (
        pytest.raises(LoadFailedError, match="set host to process"),
        loaded(tmp_path, source("add_sub"), extra={"shares_process": True}),
    ):
        pass


def test_a_model_that_refuses_its_config_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(Exception, match="can only run as a decoupled"),
        loaded(tmp_path, source("repeat"), **{**REPEAT, "decoupled": False}),
    ):
        pass


def test_after_the_unload_the_module_is_gone_and_finalize_was_called(tmp_path: Path) -> None:
    text = executing("return [answer()]") + (
        "        def finalize(self):\n            raise ValueError('in finalize')\n"
    )
    with pytest.raises(ValueError, match="in finalize"), loaded(tmp_path, text) as m:
        assert m.one(ask())["y"].tolist() == [1]
    assert importlib.util.find_spec("triton_python_backend_utils") is None


def test_validation_reads_the_file_and_runs_nothing(tmp_path: Path) -> None:
    order = Order("m", 1, tmp_path, "model.py", ModelConfig(backend="triton_python"))
    backend = TritonPythonBackend()
    with pytest.raises(IncompleteFilesError):
        backend.validate(order)
    (tmp_path / "model.py").write_text("raise SystemExit\nclass TritonPythonModel: ...")
    backend.validate(order)
    (tmp_path / "model.py").write_text("class Model: ...")
    with pytest.raises(LoadFailedError, match="no class 'TritonPythonModel'"):
        backend.validate(order)


def test_the_config_is_tritons_with_numbers_where_protobuf_writes_text(tmp_path: Path) -> None:
    text = model(
        "        def initialize(self, args):\n            self.config = args['model_config']\n"
        "        def execute(self, requests): ...\n"
    )
    triton = {
        "name": "m",
        "backend": "python",
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1"], "format": "FORMAT_NHWC"}],
        "version_policy": {"specific": {"versions": ["1", "3"]}},
        "dynamic_batching": {
            "max_queue_delay_microseconds": "100",
            "priority_queue_policy": {"1": {"default_timeout_microseconds": "5"}},
        },
        "parameters": {"dims": {"string_value": "7"}},
    }
    config: dict[str, Any] = {
        "triton": triton,
        "max_batch_size": 2,
        "inputs": (tensor("x", "FP32", -1),),
        "outputs": (tensor("y", "BYTES", 1),),
        "batching": Batching(),
    }
    with loaded(tmp_path, text, **config) as m:
        found = json.loads(m.backend._model.config)
    assert found["max_batch_size"] == 2 and found["backend"] == "python"
    assert found["input"] == [
        {
            "name": "x",
            "data_type": "TYPE_FP32",
            "dims": [-1],
            "format": "FORMAT_NHWC",
            "optional": False,
        }
    ]
    assert found["output"][0]["data_type"] == "TYPE_STRING"
    assert found["version_policy"]["specific"]["versions"] == [1, 3]
    assert found["dynamic_batching"] == {
        "max_queue_delay_microseconds": 100,
        "priority_queue_policy": {"1": {"default_timeout_microseconds": 5}},
    }
    assert found["parameters"]["dims"] == {"string_value": "7"}
    assert found["instance_group"][0]["kind"] == "KIND_CPU"
