"""A Triton repository of python models, as users have it: real folders, real workers, models that ask
each other through the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from repository.errors import (
    AlreadyThereError,
    InferenceFailedError,
    InvalidRequestError,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
    UnsupportedRequestError,
)
from repository.messages import InferResponse
from repository.repository import Options, Repository
from tests.fakes.serving import serving
from tests.triton_python import ask, source

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

INT = np.array([[1, 2, 3, 4]], np.int32)


def io(side: str, *tensors: tuple[str, str, str]) -> str:
    return "\n".join(
        f'{side} [ {{ name: "{n}" data_type: TYPE_{t} dims: {d} }} ]' for n, t, d in tensors
    )


TWO_IN = (("INPUT0", "INT32", "[ 4 ]"), ("INPUT1", "INT32", "[ 4 ]"))
TWO_OUT = (("OUTPUT0", "INT32", "[ 4 ]"), ("OUTPUT1", "INT32", "[ 4 ]"))
CONFIGS: dict[str, str | None] = {
    "add_sub": "max_batch_size: 8 dynamic_batching {} "
    + io("input", *TWO_IN)
    + io("output", *TWO_OUT),
    "repeat": "model_transaction_policy { decoupled: true } "
    + io("input", ("IN", "INT32", "[ -1 ]"), ("DELAY", "UINT32", "[ -1 ]"))
    + io("output", ("OUT", "INT32", "[ 1 ]"), ("IDX", "UINT32", "[ 1 ]")),
    "square": None,  # no config.pbtxt at all
    "bls_sync": io("input", ("INPUT0", "INT32", "[ -1, 4 ]"), ("INPUT1", "INT32", "[ -1, 4 ]"))
    + io("input", ("MODEL_NAME", "STRING", "[ 1 ]"))
    + io("output", ("OUTPUT0", "INT32", "[ -1, 4 ]"), ("OUTPUT1", "INT32", "[ -1, 4 ]")),
    "bls_async": "max_batch_size: 8 " + io("input", *TWO_IN) + io("output", TWO_OUT[0]),
    "bls_decoupled": io("input", ("IN", "INT32", "[ 1 ]"))
    + io("output", ("SUM", "INT32", "[ 1 ]")),
    "auto_complete": None,
    "accumulator": "sequence_batching { max_sequence_idle_microseconds: 60000000 } "
    + io("input", ("INPUT", "INT32", "[ 1 ]"))
    + io("output", ("OUTPUT", "INT32", "[ 1 ]")),
    "errors": io("input", ("CODE", "INT32", "[ 1 ]")) + io("output", ("OUT", "INT32", "[ 1 ]")),
    "paths": io("input", ("KIND", "INT32", "[ 1 ]")) + io("output", ("OUT", "INT32", "[ 1 ]")),
    "texts": io("input", ("TEXT", "STRING", "[ -1 ]"))
    + io("output", ("BYTES", "STRING", "[ -1 ]"), ("STR", "STRING", "[ -1 ]"))
    + io("output", ("FIXED", "STRING", "[ 2 ]")),
    "talkative": 'parameters { key: "depth" value { string_value: "3" } } '
    + io("input", ("X", "INT32", "[ 1 ]"))
    + io("output", ("SAID", "STRING", "[ 1 ]")),
}


def write(root: Path, name: str, config: str | None) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(source(name))
    if config is not None:
        text = f'name: "{name}"\nbackend: "python"\n{config}\n'
        (root / name / "config.pbtxt").write_text(text)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Repository]:
    found = repository(tmp_path_factory.mktemp("triton"), *CONFIGS)
    async with found.running():
        await asyncio.gather(*[found.load(name) for name in CONFIGS])
        yield found


def repository(home: Path, *names: str, mode: Any = "poll") -> Repository:
    """Of these models, not running yet."""
    for name in names:
        write(home / "models", name, CONFIGS.get(name, ""))
    return Repository(
        Options(
            home / "models",
            mode=mode,
            state_dir=home / "state",
            settle_s=0.05,
            watch="off",
            trust_code=True,
        )
    )


async def answers(models: Repository, name: str, *outputs: str, **said: Any) -> list[InferResponse]:
    with models.lease(name) as gen:
        responses = models.stream(gen, ask(*outputs, **said))
        return [answer async for answer in responses]


async def one(models: Repository, name: str, **said: Any) -> dict[str, Any]:
    (answer,) = await answers(models, name, **said)
    return {t.name: t.array() for t in answer.outputs}


def numbers(found: list[InferResponse], name: str) -> list[int]:
    return [int(t.array()[0]) for answer in found for t in answer.outputs if t.name == name]


async def test_requests_of_many_clients_are_each_answered(models: Repository) -> None:
    asked = [one(models, "add_sub", INPUT0=INT * n, INPUT1=INT) for n in range(50)]
    for n, found in enumerate(await asyncio.gather(*asked)):
        assert found["OUTPUT0"].tolist() == (INT * (n + 1)).tolist()
        assert found["OUTPUT1"].tolist() == (INT * (n - 1)).tolist()


async def test_large_tensors_come_and_go_whole(models: Repository) -> None:
    texts = np.array([b"x" * 100_000, b"ab"] * 20, object)
    found = await one(models, "texts", TEXT=texts)
    assert found["BYTES"].tolist() == [t[::-1] for t in texts]
    assert found["STR"].tolist() == [t[::-1] for t in texts]


async def test_a_decoupled_model_answers_while_others_do(models: Repository) -> None:
    slow = {"IN": np.arange(5, dtype=np.int32), "DELAY": np.full(5, 5, np.uint32)}
    none = {"IN": np.zeros(0, np.int32), "DELAY": np.zeros(0, np.uint32)}
    found = await asyncio.gather(
        *[answers(models, "repeat", **slow) for _ in range(4)], answers(models, "repeat", **none)
    )
    assert [numbers(each, "OUT") for each in found] == [[0, 1, 2, 3, 4]] * 4 + [[]]


async def test_a_model_without_a_config_is_known_by_its_class(models: Repository) -> None:
    gen = models.lease("square").generation
    assert gen.spec.backend == "triton_python" and gen.decoupled
    found = await asyncio.gather(
        *[answers(models, "square", IN=np.array([n], np.int32)) for n in (0, 1, 7)]
    )
    assert [numbers(each, "OUT") for each in found] == [[], [1], [7] * 7]
    doubled = await one(models, "auto_complete", INPUT0=np.ones((2, 4), np.float32))
    assert doubled["OUTPUT0"].tolist() == [[2.0] * 4] * 2


async def test_models_ask_each_other(models: Repository) -> None:
    name = np.array([b"add_sub"], object)
    asked = {"INPUT0": INT, "INPUT1": INT}
    sync = await one(models, "bls_sync", **asked, MODEL_NAME=name)
    assert sync["OUTPUT0"].tolist() == (INT * 2).tolist()
    several = await asyncio.gather(*[one(models, "bls_async", **asked) for _ in range(4)])
    assert [found["OUTPUT0"].tolist() for found in several] == [(INT * 8).tolist()] * 4
    total = await one(models, "bls_decoupled", IN=np.array([5], np.int32))
    assert total["SUM"].tolist() == [25]


async def test_what_a_call_came_to_is_told_on(models: Repository) -> None:
    gone = np.array([b"gone"], object)
    with pytest.raises(InferenceFailedError, match="'gone' is not found"):
        await one(models, "bls_sync", INPUT0=INT, INPUT1=INT, MODEL_NAME=gone)
    wrong = np.array([b"repeat"], object)
    with pytest.raises(InferenceFailedError, match="input"):
        await one(models, "bls_sync", INPUT0=INT, INPUT1=INT, MODEL_NAME=wrong)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (0, InferenceFailedError), (1, InferenceFailedError), (2, NotFoundError),
        (3, InvalidRequestError), (4, UnavailableError), (5, UnsupportedRequestError),
        (6, AlreadyThereError), (7, RequestCancelledError),
    ],
)  # fmt: skip
async def test_codes_of_a_model_arrive_as_errors_of_their_kind(
    models: Repository, code: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="An Error Occurred") as caught:
        await one(models, "errors", CODE=np.array([code], np.int32))
    assert type(caught.value) is kind
    assert (await one(models, "errors", CODE=np.array([-1], np.int32)))["OUT"].tolist() == [-1]


async def test_over_http_codes_are_tritons_numbers_and_a_model_is_what_it_says(
    tmp_path: Path,
) -> None:
    found = repository(tmp_path, "errors", "auto_complete", "square")
    async with serving(found) as client:
        await asyncio.gather(*[found.load(name) for name in ("errors", "auto_complete", "square")])
        numbers = []
        for code in range(1, 8):
            one = {"name": "CODE", "datatype": "INT32", "shape": [1], "data": [code]}
            response = await client.post("/v2/models/errors/infer", json={"inputs": [one]})
            assert "An Error Occurred" in response.json()["error"]
            numbers.append(response.status_code)
        described = await client.get("/v2/models/auto_complete")
        config = (await client.get("/v2/models/square/config")).json()
    assert numbers == [500, 404, 400, 503, 501, 400, 400]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert (config["backend"], config["input"][0]["name"]) == ("python", "IN")
    assert described.json()["inputs"] == [{"name": "INPUT0", "datatype": "FP32", "shape": [-1, 4]}]


async def test_no_error_of_a_model_shows_where_its_files_lie(models: Repository) -> None:
    with pytest.raises(NotFoundError) as caught:
        await one(models, "paths", KIND=np.array([0], np.int32))
    assert "/" not in str(caught.value) and "weights.bin" in str(caught.value)
    with pytest.raises(InferenceFailedError) as raised:
        await one(models, "paths", KIND=np.array([1], np.int32))
    assert "/" not in str(raised.value) and "weights.bin" in str(raised.value)


async def test_a_model_is_told_where_it_lives_and_what_was_asked(models: Repository) -> None:
    (answer,) = await answers(
        models,
        "talkative",
        X=np.zeros(1, np.int32),
        id="r1",
        parameters={"a": 1, "timeout": 5_000_000},
    )
    said = json.loads(answer.outputs[0].array()[0])
    gen = models.lease("talkative").generation
    assert said["args"]["model_repository"] == str(gen.spec.folder)
    assert said["config"] == {"depth": {"string_value": "3"}}
    assert (said["id"], said["timeout"]) == ("r1", 5_000_000)
    assert said["request"] == {"a": 1}
    assert answer.parameters == {"kind": "said", "n": 1}


async def test_nobody_waits_for_answers_that_nobody_wants(models: Repository) -> None:
    endless = ask(IN=np.zeros(100_000, np.int32), DELAY=np.ones(100_000, np.uint32))
    with models.lease("repeat") as gen:
        responses = models.stream(gen, endless)
        await anext(responses)
        responses.close()
    three = {"IN": np.array([3], np.int32), "DELAY": np.zeros(1, np.uint32)}
    assert numbers(await answers(models, "repeat", **three), "OUT") == [3]


async def test_a_stateful_model_sums_each_sequence(models: Repository) -> None:
    async def step(sequence: Any, value: int, **flags: bool) -> int:
        said = {"sequence_id": sequence, **{f"sequence_{k}": v for k, v in flags.items()}}
        found = await one(models, "accumulator", INPUT=np.array([value], np.int32), parameters=said)
        return int(found["OUTPUT"][0])

    async def sequence(name: Any, *values: int) -> list[int]:
        last = len(values) - 1
        return [
            await step(name, value, start=n == 0, end=n == last) for n, value in enumerate(values)
        ]

    sums = await asyncio.gather(sequence(7, 1, 2, 3), sequence("seven", 10, 20, 30))
    assert sums == [[1, 3, 6], [10, 30, 60]]


async def test_a_model_may_load_and_ask_another_while_it_loads(tmp_path: Path) -> None:
    found = repository(tmp_path, "add_sub", "starter", mode="explicit")
    async with found.running():
        await found.load("starter")
        assert (await one(found, "starter"))["VALUE"].tolist() == [2] * 4


async def test_the_examples_are_served(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples" / "triton_python"
    options = Options(
        examples, state_dir=tmp_path / "state", settle_s=0.05, watch="off", trust_code=True
    )
    found = Repository(options)
    async with found.running():
        await asyncio.gather(found.load("count"), found.load("sum_of_counts"))
        assert numbers(await answers(found, "count", N=np.array([3], np.int32)), "NUMBER") == [
            0,
            1,
            2,
        ]
        total = await one(found, "sum_of_counts", N=np.array([100], np.int32))
        assert total["SUM"].tolist() == [4950]


async def test_a_changed_model_takes_over_and_the_old_one_is_finalized(
    tmp_path: Path,
) -> None:
    found, mark = repository(tmp_path, "add_sub"), tmp_path / "mark"
    file = tmp_path / "models" / "add_sub" / "1" / "model.py"
    text = file.read_text()
    file.write_text(
        text.replace(
            "def finalize(self):", f"def finalize(self):\n        open({str(mark)!r}, 'w')"
        )
    )
    async with found.running():
        await found.load("add_sub")
        assert (await one(found, "add_sub", INPUT0=INT, INPUT1=INT))["OUTPUT0"].tolist() == [
            [2, 4, 6, 8]
        ]
        file.write_text(text.replace("in_0 + in_1", "in_0 * 10"))
        await found.load("add_sub")
        assert (await one(found, "add_sub", INPUT0=INT, INPUT1=INT))["OUTPUT0"].tolist() == [
            [10, 20, 30, 40]
        ]
    assert mark.exists()
