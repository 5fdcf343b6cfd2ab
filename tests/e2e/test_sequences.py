"""Sequences as Triton's clients speak them, at a real server with models that remember."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.e2e.lasting import Lasting, lasting
from tests.e2e.server import WITHIN_S
from tests.sequence_models import sum_onnx, write_sums

pytestmark = pytest.mark.e2e

OLDEST = "oldest { max_candidate_sequences: 4 }"
IDLE_S = 0.5
PYTHON = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        def given(name):
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        who = request.correlation_id()
        begun = 0 if given("START").any() else self.sums[who]
        self.sums[who] = begun + given("INPUT")
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("OUTPUT", self.sums[who].astype(np.int32)),
            pb_utils.Tensor("ENDS", np.array([[int(given("END").any())]], np.int32)),
        ])
"""
PYTHON_CONFIG = """
backend: "python"
max_batch_size: 4
input [{ name: "INPUT" data_type: TYPE_INT32 dims: [1] }]
output [
  { name: "OUTPUT" data_type: TYPE_INT32 dims: [1] }, { name: "ENDS" data_type: TYPE_INT32 dims: [1] }
]
sequence_batching {
  %s
  max_sequence_idle_microseconds: 60000000
  control_input [
    { name: "START" control [{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }] },
    { name: "END" control [{ kind: CONTROL_SEQUENCE_END bool_false_true: [false, true] }] }
  ]
}
"""


def write_python(repo: Path, name: str, strategy: str) -> None:
    folder = repo / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(PYTHON)
    (folder / "config.pbtxt").write_text(PYTHON_CONFIG % strategy)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequences") / "models"


@pytest.fixture(scope="module")
def server(repo: Path) -> Iterator[Lasting]:
    write_sums(repo, "direct", more="instance_group [{ count: 2 kind: KIND_CPU }]")
    write_sums(repo, "oldest", strategy=OLDEST)
    write_sums(repo, "texts", strategy=OLDEST, ids="BYTES")
    write_sums(repo, "alone", rows=0, idle_us=int(IDLE_S * 1e6), first=[100])
    write_sums(repo, "reloaded")
    write_python(repo, "python_direct", "direct {}")
    write_python(repo, "python_oldest", OLDEST)
    with lasting(repo, grpc=True) as running:
        yield running


@pytest.fixture
def client(server: Lasting) -> Iterator[triton.InferenceServerClient]:
    with closing(one_more(server)) as client:
        yield client


def one_more(server: Lasting) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=2)


def say(
    client: triton.InferenceServerClient,
    model: str,
    value: int,
    sequence: int | str,
    *,
    start: bool = False,
    end: bool = False,
    flat: bool = False,
) -> Any:
    shape = (1,) if flat else (1, 1)
    given = triton.InferInput("INPUT", shape, "INT32")
    given.set_data_from_numpy(np.full(shape, value, np.int32))
    return client.infer(
        model, [given], sequence_id=sequence, sequence_start=start, sequence_end=end
    )


def total(answer: Any) -> int:
    return int(answer.as_numpy("OUTPUT").reshape(-1)[0])


def refusal(of: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as raised:
        of()
    return raised.value.status(), raised.value.message()


@pytest.mark.parametrize("model", ["direct", "oldest", "python_direct", "python_oldest"])
def test_two_clients_speak_by_turns_and_at_once_and_neither_hears_the_other(
    server: Lasting, model: str
) -> None:
    sums: dict[int, list[int]] = {}

    def speak(sequence: int, values: list[int]) -> None:
        with closing(one_more(server)) as mine:
            last = len(values) - 1
            sums[sequence] = [
                total(say(mine, model, v, sequence, start=i == 0, end=i == last))
                for i, v in enumerate(values)
            ]

    said = {n: [n * k for k in (1, 2, 3, 4, 5, 6)] for n in range(1001, 1008)}
    speakers = [threading.Thread(target=speak, args=item) for item in said.items()]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join()
    assert sums == {n: [n, 3 * n, 6 * n, 10 * n, 15 * n, 21 * n] for n in said}


def test_the_model_is_told_who_speaks(client: triton.InferenceServerClient) -> None:
    answer = say(client, "direct", 3, 2**63 + 5, start=True, end=True)
    assert answer.as_numpy("WHO").tolist() == [[2**63 + 5]]
    assert [o["name"] for o in answer.get_response()["outputs"]] == ["OUTPUT", "WHO"]


def test_an_id_may_be_a_text(client: triton.InferenceServerClient) -> None:
    assert total(say(client, "texts", 1, "one and only", start=True)) == 1
    answer = say(client, "texts", 2, "one and only", end=True)
    assert (total(answer), answer.as_numpy("WHO").tolist()) == (3, [[b"one and only"]])
    status, message = refusal(lambda: say(client, "direct", 1, "a text", start=True))
    assert status == "400" and "is a text; model 'direct' takes a number" in message


def test_who_says_nothing_of_a_sequence_is_told_so(client: triton.InferenceServerClient) -> None:
    status, message = refusal(lambda: say(client, "direct", 1, 0, start=True))
    assert status == "400"
    assert message.startswith(
        "inference request to model 'direct' must specify a non-zero or non-empty correlation ID"
    )


def test_who_goes_on_without_having_begun_is_told_so(client: triton.InferenceServerClient) -> None:
    status, message = refusal(lambda: say(client, "direct", 1, 77))
    assert status == "400"
    assert message.startswith(
        "inference request for sequence 77 to model 'direct' must specify the START flag on the first "
        "request of the sequence"
    )


def test_the_metadata_has_what_clients_send_and_get(client: triton.InferenceServerClient) -> None:
    told = client.get_model_metadata("direct")
    assert [t["name"] for t in told["inputs"]] == ["INPUT"]
    assert [t["name"] for t in told["outputs"]] == ["OUTPUT", "WHO"]


def test_a_silent_client_loses_its_place_to_the_next(client: triton.InferenceServerClient) -> None:
    began = time.monotonic()
    assert total(say(client, "alone", 1, 5, start=True, flat=True)) == 101
    assert total(say(client, "alone", 2, 6, start=True, end=True, flat=True)) == 102
    assert time.monotonic() - began >= IDLE_S
    assert "silent for more than 0.5 s" in refusal(lambda: say(client, "alone", 1, 5, flat=True))[1]


def test_a_sequence_that_is_open_keeps_its_memory_through_a_reload(
    repo: Path, client: triton.InferenceServerClient
) -> None:
    assert total(say(client, "reloaded", 1, 5, start=True)) == 1
    sum_onnx(repo / "reloaded" / "1" / "model.onnx", add=1000)
    until = time.monotonic() + WITHIN_S
    while total(say(client, "reloaded", 1, 6, start=True, end=True)) != 1001:
        assert time.monotonic() < until
    assert total(say(client, "reloaded", 2, 5)) == 3
    assert total(say(client, "reloaded", 4, 5, end=True)) == 7
    assert total(say(client, "reloaded", 1, 5, start=True, end=True)) == 1001


@pytest.mark.parametrize("model", ["direct", "oldest", "python_oldest"])
def test_a_stream_carries_two_sequences(server: Lasting, model: str) -> None:
    heard: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with closing(triton_grpc.InferenceServerClient(server.grpc)) as client:
        client.start_stream(callback=lambda result, error: heard.put((result, error)))
        for i, value in enumerate((11, 7, 5, 3, 2, 0, 1)):
            for sequence, sign in ((2001, 1), (2002, -1)):
                given = triton_grpc.InferInput("INPUT", (1, 1), "INT32")
                given.set_data_from_numpy(np.array([[sign * value]], np.int32))
                client.async_stream_infer(
                    model, [given], request_id=f"{sequence}_{i}", sequence_id=sequence,
                    sequence_start=i == 0, sequence_end=i == 6,
                )  # fmt: skip
        answers = [heard.get(timeout=WITHIN_S) for _ in range(14)]
        client.stop_stream()
    assert [error for _, error in answers if error is not None] == []
    sums = {result.get_response().id: total(result) for result, _ in answers}
    for sequence, sign in ((2001, 1), (2002, -1)):
        said = [sums[f"{sequence}_{i}"] for i in range(7)]
        assert said == [sign * n for n in (11, 18, 23, 26, 28, 28, 29)]


def test_over_grpc_too_a_sequence_must_begin(server: Lasting) -> None:
    given = triton_grpc.InferInput("INPUT", (1, 1), "INT32")
    given.set_data_from_numpy(np.zeros((1, 1), np.int32))
    with (
        closing(triton_grpc.InferenceServerClient(server.grpc)) as client,
        pytest.raises(InferenceServerException, match="must specify the START flag") as raised,
    ):
        client.infer("texts", [given], sequence_id="nobody")
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
