"""What `sequences` of a config.yaml may say, and what a model must have for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.config import Control, ModelConfig, Sequences, State, TensorConfig
from repository.errors import ConfigError, LoadFailedError
from repository.folder.schema import Layer, check_layer
from repository.messages import Loaded, TensorSpec
from repository.sequences.beginning import first_states
from repository.sequences.whole import untold, whole
from repository.signature import Signature
from repository.spec import ModelSpec

START = {"name": "START", "kind": "start", "datatype": "INT32"}
ID = {"name": "ID", "kind": "corrid", "datatype": "UINT64"}
STATE = {"input": "in", "output": "out", "datatype": "FP32", "shape": [2]}


def checked(**sequences: Any) -> Layer:
    return check_layer(Layer("config.yaml", {"sequences": sequences}))


@pytest.mark.parametrize(
    ("written", "meant"),
    [(True, {}), ("oldest", {"strategy": "oldest"}), ({"idle_us": 5}, {"idle_us": 5})],
)
def test_there_are_short_ways_to_say_it(written: Any, meant: dict[str, Any]) -> None:
    assert check_layer(Layer("config.yaml", {"sequences": written})).values["sequences"] == meant


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"strategy": "newest"}, "must be one of direct, oldest"),
        ({"idle_us": 0}, "'sequences.idle_us' must be at least 1"),
        ({"min_slots_ratio": 1.5}, "must be at most 1"),
        ({"controls": [START, {**START, "kind": "end"}]}, "they need different names"),
        (
            {"controls": [START, {**START, "name": "x"}]},
            "two of 'sequences.controls' are of the kind",
        ),
        ({"controls": [{**START, "datatype": "BYTES"}]}, "'start' cannot be 'BYTES'"),
        ({"controls": [{**ID, "datatype": "FP32"}]}, "'corrid' cannot be 'FP32'"),
        ({"controls": [{"name": "x"}]}, "needs the key 'kind'"),
        ({"states": [{**STATE, "datatype": "INT3"}]}, "unknown datatype 'INT3'"),
        ({"states": [STATE, {**STATE, "input": "x"}]}, "they need different names"),
        ({"states": [STATE], "controls": [{**START, "name": "in"}]}, "they need different names"),
        (
            {"states": [{**STATE, "initial": "../x"}]},
            "must lie in the model's folder initial_state",
        ),
        ({"states": [{**STATE, "shape": [-2]}]}, "must be at least -1"),
        ({"slots": 3}, "unknown key 'slots' in 'sequences'"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        checked(**said)


def test_what_is_honoured_in_part_is_a_warning() -> None:
    (problem,) = checked(iterative=True).problems
    assert problem.warning and "cannot ask to be called again" in problem.message
    assert checked(iterative=False).problems == ()


# what the model has -------------------------------------------------------------------------------


def spec_of(folder: Path = Path(), **rules: Any) -> ModelSpec:
    return ModelSpec("m", 1, "f", folder=folder, config=ModelConfig(sequences=Sequences(**rules)))


def loaded_of(*inputs: TensorSpec, most: int = 4) -> Loaded:
    outputs = (TensorSpec("y", "FP32", (-1, 1)), TensorSpec("out", "FP32", (-1, 2)))
    return Loaded(inputs, outputs if inputs else (), most)


X = TensorSpec("x", "FP32", (-1, 1))


@pytest.mark.parametrize(
    ("have", "why"),
    [
        ((X,), "need the input 'START', which the model does not have; it has 'x'"),
        (
            (X, TensorSpec("START", "FP32", (-1, 1))),
            "is INT32 in the config; in the model it is FP32",
        ),
        ((X, TensorSpec("START", "INT32", (-1, 3))), "a control is one value for each request"),
    ],
)
def test_a_control_must_be_what_the_model_has(have: tuple[TensorSpec, ...], why: str) -> None:
    control = Control(name="START", kind="start", datatype="INT32")
    with pytest.raises(LoadFailedError, match=why):
        first_states(spec_of(controls=(control,)), loaded_of(*have))


@pytest.mark.parametrize(
    ("control", "why"),
    [
        (Control(name="a", kind="start", datatype="UINT8", on=300.0), "300 does not fit UINT8"),
        (Control(name="a", kind="ready", datatype="BF16"), "cannot be BF16"),
        (Control(name="a", kind="corrid", datatype="BOOL"), "an id can be one of UINT64"),
        (Control(name="a", kind="end", datatype="INT3"), "has no datatype 'INT3'"),
    ],
)
def test_a_control_must_be_able_to_say_it(control: Control, why: str) -> None:
    with pytest.raises(LoadFailedError, match=why):
        first_states(spec_of(controls=(control,)), loaded_of())


@pytest.mark.parametrize(("state", "shape"), [((2,), (1, 2)), ((-1, 3), (1, 1, 3)), ((), (1,))])
def test_a_state_begins_with_zeros(state: tuple[int, ...], shape: tuple[int, ...]) -> None:
    kept = State(input="in", output="out", datatype="INT64", shape=state)
    found = first_states(spec_of(states=(kept,)), loaded_of())["in"]
    assert found.shape == shape and not found.array().any()


def test_a_state_of_texts_begins_with_empty_ones() -> None:
    kept = State(input="in", output="out", datatype="BYTES", shape=(2,))
    assert first_states(spec_of(states=(kept,)), loaded_of())["in"].array().tolist() == [[b"", b""]]


def test_a_state_may_begin_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "initial_state").mkdir()
    (tmp_path / "initial_state" / "one").write_bytes(np.arange(6, dtype="<f4").tobytes())
    kept = State(
        input="in",
        output="out",
        datatype="FP32",
        shape=(-1, 2),
        initial="one",
        initial_shape=(3, 2),
    )
    found = first_states(spec_of(tmp_path, states=(kept,)), loaded_of())["in"]
    assert found.array().tolist() == [[[0, 1], [2, 3], [4, 5]]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"initial_shape": (3, 4)}, "cannot begin with"),
        ({"initial_shape": (4, 2)}, "initial_state/one has 24 bytes; state 'in' begins with 32"),
        ({"initial": "none"}, "initial_state/none cannot be read"),
        ({"initial": "out"}, "leads out of the folder initial_state"),
        ({"shape": (-1, 2**31 - 1), "initial_shape": None}, "one may have 1GiB"),
        ({"shape": (2**31 - 1,), "initial_shape": None, "datatype": "BYTES"}, "one may have 1GiB"),
    ],
)
def test_a_first_state_must_fit(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    (tmp_path / "initial_state").mkdir()
    (tmp_path / "initial_state" / "one").write_bytes(bytes(24))
    (tmp_path / "secret").write_bytes(bytes(24))
    (tmp_path / "initial_state" / "out").symlink_to(tmp_path / "secret")
    said = {
        "datatype": "FP32",
        "shape": (-1, 2),
        "initial": "one",
        "initial_shape": (3, 2),
        **changes,
    }
    kept = State(input="in", output="out", **said)
    with pytest.raises(LoadFailedError, match=why) as raised:
        first_states(spec_of(tmp_path, states=(kept,)), loaded_of())
    assert str(tmp_path) not in str(raised.value)


def test_clients_see_neither_controls_nor_states_and_the_model_both() -> None:
    config = ModelConfig(
        inputs=(TensorConfig(name="x", datatype="FP32", shape=(1,)),),
        outputs=(TensorConfig(name="y", datatype="FP32", shape=(1,)),),
        sequences=Sequences(
            controls=(Control(name="START", kind="start", datatype="INT32"),),
            states=(State(input="in", output="out", datatype="FP32", shape=(2,)),),
        ),
    )
    spec = ModelSpec("m", 1, "f", config=config)
    told = whole(spec).config
    assert [t.name for t in told.inputs or ()] == ["x", "START", "in"]
    assert [t.name for t in told.outputs or ()] == ["y", "out"]
    assert untold(spec).config.sequences is None and untold(spec).config.inputs == told.inputs
    loaded = loaded_of(X, TensorSpec("START", "INT32", (-1, 1)), TensorSpec("in", "FP32", (-1, 2)))
    signature = Signature("m", loaded, config)
    assert [t.name for t in signature.inputs] == ["x"] == [t.name for t in signature.required]
    assert [t.name for t in signature.outputs] == ["y"]
