"""What Triton's four clients may rely on when they ask models: the same promises of each, at one real
server."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException, shared_memory

from tests.e2e.lasting import Lasting, lasting
from tests.e2e.server import open_gate
from tests.e2e.triton_clients import KINDS, Answer, Client, Grpc, GrpcAio, connected
from tests.e2e.triton_scene import write_repository
from tests.triton_models import ELEMENTS, LABELS

pytestmark = pytest.mark.e2e

ROW = np.arange(ELEMENTS, dtype=np.int32)
ONES = np.ones(ELEMENTS, np.int32)
RUN = uuid.uuid4().hex[:12]
HELD = {"x": np.array([1, 2], np.float32)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    write_repository(folder / "models", folder / "gates")
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Lasting]:
    with lasting(home / "models", "--allow-client-shm", grpc=True) as running:
        yield running


@pytest.fixture(params=KINDS)
def client(server: Lasting, request: pytest.FixtureRequest) -> Iterator[Client]:
    with connected(request.param, server) as client:
        yield client


def sums(row: int = 0, rows: int = 1, kind: Any = np.int32) -> dict[str, np.ndarray]:
    both = (ROW + np.int32(row), ONES)
    return {f"INPUT{n}": np.tile(one.astype(kind), (rows, 1)) for n, one in enumerate(both)}


def texts(*values: object) -> np.ndarray:
    each = [v if isinstance(v, bytes) else str(v).encode() for v in values]
    return np.array([each], object)


def plain(values: Any) -> list[Any]:
    """BYTES of JSON come as str."""
    return [v.encode() if isinstance(v, str) else v for v in np.asarray(values).reshape(-1)]


# tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "kind"), [("simple", np.int32), ("simple_int8", np.int8)])
def test_sums_and_differences_of_a_batch(client: Client, model: str, kind: Any) -> None:
    asked = sums(100, 3, kind)
    answer = client.infer(model, asked, request_id="i")
    assert (answer.id, answer.model, answer.version) == ("i", model, "1")
    assert np.array_equal(answer.arrays["OUTPUT0"], asked["INPUT0"] + asked["INPUT1"])
    assert np.array_equal(answer.arrays["OUTPUT1"], asked["INPUT0"] - asked["INPUT1"])
    assert answer.arrays["OUTPUT0"].dtype == kind and answer.arrays["OUTPUT0"].shape == (3, 16)


def test_only_what_is_asked_for_is_answered_and_an_id_only_if_there_is_one(client: Client) -> None:
    answer = client.infer("simple", sums(), "OUTPUT1", model_version="1")
    assert list(answer.arrays) == ["OUTPUT1"] and answer.id == ""
    answer = client.infer("simple", sums(), "OUTPUT1", "OUTPUT0")
    assert np.array_equal(answer.arrays["OUTPUT0"][0], ROW + 1)


def test_sums_of_numbers_that_are_texts(client: Client) -> None:
    asked = {"INPUT0": texts(*ROW), "INPUT1": texts(*ONES)}
    answer = client.infer("simple_string", asked)
    assert [int(t) for t in answer.arrays["OUTPUT0"][0]] == (ROW + 1).tolist()
    assert [int(t) for t in answer.arrays["OUTPUT1"][0]] == (ROW - 1).tolist()


def test_texts_come_back_byte_by_byte(client: Client) -> None:
    sent = texts(b"", b"a\0b", "é", b'"\\\n', b"x" * 70_000, b"")
    any_bytes = texts(b"\xff\xfe\0x", *sent[0], bytes(range(256)))
    for model, values in (("simple_identity", sent), ("python_identity", any_bytes)):
        answer = client.infer(model, {"INPUT0": values})
        assert answer.arrays["OUTPUT0"].tolist() == values.tolist()
    error = client.refused("infer", "simple_identity", {"INPUT0": any_bytes})
    assert "'INPUT0' holds bytes that are not UTF-8" in error, "which onnxruntime cannot hold"


@pytest.mark.parametrize("name", ["http", "http.aio"])
def test_over_http_tensors_may_be_json_one_by_one(server: Lasting, name: str) -> None:
    with connected(name, server) as client:
        inputs = client.inputs(sums())
        inputs[0].set_data_from_numpy(sums()["INPUT0"], binary_data=False)
        outputs = [
            *client.outputs("OUTPUT0", binary_data=False), *client.outputs("OUTPUT1"),
        ]  # fmt: skip
        answer = client.infer("simple", inputs, outputs=outputs)
        assert np.array_equal(answer.arrays["OUTPUT0"][0], ROW + 1)
        assert np.array_equal(answer.arrays["OUTPUT1"][0], ROW - 1)
        sent = texts("é", "", "\n")
        one = client.kinds.InferInput("INPUT0", [1, 3], "BYTES")
        one.set_data_from_numpy(sent, binary_data=False)
        answer = client.infer(
            "simple_identity", [one], outputs=client.outputs("OUTPUT0", binary_data=False)
        )
        assert plain(answer.arrays["OUTPUT0"]) == plain(sent)


def test_inputs_are_used_again_with_other_values_and_for_another_model(client: Client) -> None:
    inputs = client.inputs(sums())
    outputs = client.outputs("OUTPUT0")
    for row in range(3):
        inputs[0].set_data_from_numpy(sums(row)["INPUT0"])
        for model in ("simple", "labelled"):
            answer = client.infer(model, inputs, outputs=outputs)
            assert np.array_equal(answer.arrays["OUTPUT0"][0], ROW + row + 1)


def test_compression_changes_nothing(client: Client) -> None:
    sent = texts(b"long text " * 5000, b"", b"\0")
    for coding in client.codings:
        answer = client.infer("simple_identity", {"INPUT0": sent}, coding=coding)
        assert answer.arrays["OUTPUT0"].tolist() == sent.tolist(), coding


def test_many_are_under_way_at_once_and_each_gets_its_own(client: Client) -> None:
    for n, answer in enumerate(client.at_once("simple", [sums(n) for n in range(100)])):
        assert np.array_equal(answer.arrays["OUTPUT0"][0], ROW + n + 1)


def test_classes_with_their_labels_in_place_of_an_output(client: Client) -> None:
    outputs = client.outputs("OUTPUT0", class_count=5)
    answer = client.infer("labelled", sums(rows=2), outputs=outputs)
    row = [f"{n + 1}.000000:{n}" + (f":{LABELS[n]}" if n < 12 else "") for n in range(15, 10, -1)]
    found = answer.arrays["OUTPUT0"]
    assert found.shape == (2, 5) and [t.decode() for t in found[1]] in (row, _ours(row))


def _ours(row: list[str]) -> list[str]:
    return [text.replace(".000000", "") for text in row]


# what goes along ----------------------------------------------------------------------------------


def said(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plain(answer.arrays["SAID"])[0])
    return found


def test_a_models_request_has_what_its_client_said(client: Client) -> None:
    answer = client.infer(
        "talkative",
        {"X": np.zeros(1, np.int32)},
        request_id="é-7",
        priority=1,
        timeout=60_000_000,
        parameters={"text": "é", "number": 7, "yes": True},
        headers={"x-modeldepot-test": "1"},
    )
    found = said(answer)
    assert found["request"] == {"text": "é", "number": 7, "yes": True}
    assert (found["id"], answer.id, found["timeout"]) == ("é-7", "é-7", 60_000_000)
    assert answer.parameters == {"kind": "said", "n": 1}


def test_tritons_own_names_are_no_parameters(client: Client) -> None:
    with pytest.raises(InferenceServerException, match="sequence_id"):
        client.infer("talkative", {"X": np.zeros(1, np.int32)}, parameters={"sequence_id": 1})
    error = client.refused(
        "infer", "talkative", {"X": np.zeros(1, np.int32)}, parameters={"triton_x": 1}
    )
    assert "triton_" in error


# models of models ---------------------------------------------------------------------------------


def test_an_ensemble_of_onnx_and_python(client: Client) -> None:
    asked = sums(5, 3)
    answer = client.infer("chain", asked, request_id="c")
    assert (answer.id, answer.model) == ("c", "chain")
    for n in range(2):
        assert np.array_equal(answer.arrays[f"OUTPUT{n}"], 2 * asked[f"INPUT{n}"])


@pytest.mark.parametrize("model", ["simple", "chain"])
def test_a_model_that_asks_another(client: Client, model: str) -> None:
    name = np.array([model.encode()], object)
    answer = client.infer("bls", {**sums(), "MODEL_NAME": name})
    wanted = ROW + 1 if model == "simple" else 2 * ROW
    assert np.array_equal(answer.arrays["OUTPUT0"][0], wanted)
    nobody = np.array([b"nobody"], object)
    assert "nobody" in client.refused("infer", "bls", {**sums(), "MODEL_NAME": nobody})


# sequences ----------------------------------------------------------------------------------------


def number(client: Client, model: str, value: int, **how: Any) -> int:
    answer = client.infer(model, {"INPUT": np.array([[value]], np.int32)}, **how)
    return int(answer.arrays["OUTPUT"][0, 0])


@pytest.mark.parametrize(
    ("model", "ids"),
    [("sums", (1001, 2**63 - 1)), ("sums_oldest", (1001, 1002)), ("sums_text", ("a", "é" * 20))],
)
def test_two_sequences_by_turns_each_have_their_own_sum(
    client: Client, model: str, ids: tuple[Any, Any]
) -> None:
    for value in range(1, 5):
        ends = {"sequence_start": value == 1, "sequence_end": value == 4}
        total = value * (value + 1) // 2
        assert number(client, model, value, sequence_id=ids[0], **ends) == total
        assert number(client, model, -value, sequence_id=ids[1], **ends) == -total


def test_a_sequence_has_a_number_or_a_name_and_a_beginning(client: Client) -> None:
    one = {"INPUT": np.array([[1]], np.int32)}
    error = client.refused("infer", "sums", one)
    assert "must specify a non-zero or non-empty correlation ID" in error
    error = client.refused("infer", "sums", one, sequence_id=77)
    assert "must specify the START flag on the first request of the sequence" in error


# shared memory ------------------------------------------------------------------------------------


@contextmanager
def memory(client: Client, name: str, size: int) -> Iterator[Any]:
    """Shared memory of this process, that the server knows."""
    key = f"/mdtest-{RUN}-{os.getpid()}-{name}"
    handle = shared_memory.create_shared_memory_region(name, key, size)
    try:
        client.do("register_system_shared_memory", name, key, size)
        yield handle
        client.do("unregister_system_shared_memory", name)
    finally:
        shared_memory.destroy_shared_memory_region(handle)


def test_inputs_and_outputs_in_shared_memory(client: Client) -> None:
    size = 4 * ELEMENTS
    with memory(client, "in", 2 * size) as inside, memory(client, "out", 2 * size) as outside:
        shared_memory.set_shared_memory_region(inside, [ROW, ONES])
        inputs = client.inputs(sums())
        outputs = client.outputs("OUTPUT0", "OUTPUT1")
        for n in range(2):
            inputs[n].set_shared_memory("in", size, offset=n * size)
            outputs[n].set_shared_memory("out", size, offset=n * size)
        answer = client.infer("simple", inputs, outputs=outputs)
        found = shared_memory.get_contents_as_numpy(outside, np.int32, [2, ELEMENTS])
        assert np.array_equal(found, [ROW + 1, ROW - 1]) and answer.arrays == {}
        assert answer.shared["OUTPUT1"] == {
            "shared_memory_region": "out", "shared_memory_byte_size": size,
            "shared_memory_offset": size,
        }  # fmt: skip
        outputs[0].unset_shared_memory()
        answer = client.infer("simple", inputs, outputs=outputs)
        assert np.array_equal(answer.arrays["OUTPUT0"][0], ROW + 1)
        status = client.show("get_system_shared_memory_status")
        names = [r["name"] for r in (status if isinstance(status, list) else status.values())]
        assert sorted(names) == ["in", "out"]
        again = client.refused("register_system_shared_memory", "in", "/mdtest-none", size)
        assert "shared memory region 'in' already in manager" in again
        inputs[0].set_shared_memory("in", 3 * size)
        assert "'in'" in client.refused("infer", "simple", inputs)
    assert not client.show("get_system_shared_memory_status")


# what goes wrong ----------------------------------------------------------------------------------

WRONG: dict[str, tuple[Mapping[str, Any], str]] = {
    "an unknown model": ({"model": "nobody"}, "Request for unknown model: 'nobody' is not found"),
    "an unknown version": ({"model_version": "7"}, "version 7"),
    "a missing input": (
        {"arrays": {"INPUT0": ROW.reshape(1, -1)}},
        "expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], but missing "
        "required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    "an input of another name": (
        {"arrays": {"INPUT0": ROW.reshape(1, -1), "OTHER": ROW.reshape(1, -1)}}, "'simple'",
    ),
    "another shape": (
        {"arrays": {n: a[:, :15] for n, a in sums().items()}},
        "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,15]",
    ),
    "another datatype": (
        {"arrays": sums(kind=np.float32)},
        "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",
    ),
    "too many rows": (
        {"arrays": sums(rows=9)}, "inference request batch-size must be <= 8 for 'simple'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_request_is_told_in_tritons_words(client: Client, what: str) -> None:
    change, text = WRONG[what]
    how: dict[str, Any] = {"model": "simple", "arrays": sums(), "request_id": "r"}
    assert text in client.refused("infer", **how | dict(change))
    answer = client.infer("simple", sums())
    assert np.array_equal(answer.arrays["OUTPUT0"][0], ROW + 1), "and the server lives on"


def test_an_output_that_there_is_not(client: Client) -> None:
    outputs = client.outputs("OUTPUT7")
    error = client.refused("infer", "simple", sums(), outputs=outputs)
    assert "unexpected inference output 'OUTPUT7' for model 'simple'" in error


def test_who_does_not_wait_for_an_answer_leaves_nothing_behind(server: Lasting, home: Path) -> None:
    """Its model holds every request until all clients have given up."""
    for name in KINDS:
        with connected(name, server) as client, pytest.raises(Exception) as caught:  # noqa: PT011 - each has its own
            client.impatient("held", HELD, server)
        said = f"{type(caught.value).__name__} {caught.value}".lower()
        assert "timeout" in said or "timed out" in said or "deadline" in said, said
    open_gate(home / "gates", "infer")
    with connected("grpc", server) as client:
        assert client.infer("held", HELD).arrays["y"].tolist() == [1, 2]


# streams ------------------------------------------------------------------------------------------


def repeat(*values: int) -> dict[str, np.ndarray]:
    return {"IN": np.array(values, np.int32), "DELAY": np.zeros(len(values), np.uint32)}


def test_a_decoupled_model_answers_a_stream_as_often_as_it_likes(server: Lasting) -> None:
    with connected("grpc", server) as client, client.stream() as following:  # type: ignore[attr-defined]
        assert isinstance(client, Grpc)
        client.ours.async_stream_infer(
            "repeat_int32", client.inputs(repeat(4, 2, 7)), request_id="s"
        )
        found = [following() for _ in range(3)]
        assert [(a.id, int(a.arrays["OUT"][0])) for a in found] == [("s", 4), ("s", 2), ("s", 7)]
        client.ours.async_stream_infer(
            "repeat_int32", client.inputs(repeat()), enable_empty_final_response=True
        )
        last = following()
        assert last.arrays == {} and last.parameters["triton_final_response"] is True
        client.ours.async_stream_infer("nobody", client.inputs(sums()))
        with pytest.raises(InferenceServerException, match="'nobody' is not found"):
            following()
        for value in (1, 2, 3):
            client.ours.async_stream_infer(
                "sums", client.inputs({"INPUT": np.array([[value]], np.int32)}), sequence_id=5,
                sequence_start=value == 1, sequence_end=value == 3,
            )  # fmt: skip
        assert [int(following().arrays["OUTPUT"][0, 0]) for _ in range(3)] == [1, 3, 6]


def test_an_asynchronous_stream_carries_several_models_and_their_errors(server: Lasting) -> None:
    with connected("grpc.aio", server) as client:
        assert isinstance(client, GrpcAio)
        found = client.streamed(
            [
                {"model_name": "simple", "inputs": sums(3), "request_id": "a"},
                {"model_name": "nobody", "inputs": sums()},
                {"model_name": "repeat_int32", "inputs": repeat(1, 2), "request_id": "b"},
            ]
        )
    texts_ = [one for one in found if isinstance(one, str)]
    answers = [one for one in found if isinstance(one, Answer)]
    assert len(texts_) == 1 and "'nobody' is not found" in texts_[0]
    (first,) = [a for a in answers if a.id == "a"]
    assert np.array_equal(first.arrays["OUTPUT0"][0], ROW + 4)
    assert [int(a.arrays["OUT"][0]) for a in answers if a.id == "b"] == [1, 2]


@pytest.mark.parametrize("name", KINDS)
def test_a_decoupled_model_has_no_single_answer(server: Lasting, name: str) -> None:
    with connected(name, server) as client:
        error = client.refused("infer", "repeat_int32", repeat(1))
    assert "decoupled transaction policy" in error
