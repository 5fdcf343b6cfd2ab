"""Triton's sequence_batching and ensemble_scheduling in our words, and what they may not be."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from repository.errors import ConfigError
from repository.folder.layering import merge
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.schema import Layer


def read(text: str) -> Layer:
    return read_pbtxt(textwrap.dedent(text).encode(), "m")


def value(text: str, key: str) -> Any:
    """Of our config, as it is after all layers."""
    return getattr(merge([read(text)])[0], key)


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        merge([read(text)])
    return str(caught.value)


SEQUENCES = """\
max_batch_size: 8
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  direct { max_queue_delay_microseconds: 20 minimum_slot_utilization: 0.7 }
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ -1, 7 ] } ] },
    { name: "ID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } ] }
  ]
  state [
    { input_name: "s_in" output_name: "s_out" data_type: TYPE_INT32 dims: [ -1 ]
      initial_state: { data_type: TYPE_INT32 dims: [ 3 ] data_file: "first" name: "first" } },
    { input_name: "t_in" output_name: "t_out" data_type: TYPE_FP32 dims: [ 2 ]
      initial_state: { data_type: TYPE_FP32 dims: [ 2 ] zero_data: true name: "zero" } }
  ]
}
"""


def test_sequences_have_a_strategy_controls_and_states() -> None:
    found = value(SEQUENCES, "sequences")
    assert (found.strategy, found.idle_us, found.max_delay_us) == ("direct", 5_000_000, 20)
    assert found.min_slots_ratio == 0.7
    assert [(c.name, c.kind, c.datatype, c.off, c.on) for c in found.controls] == [
        ("START", "start", "FP32", 0, 1),
        ("READY", "ready", "BOOL", 0, 1),
        ("END", "end", "INT32", -1, 7),
        ("ID", "corrid", "BYTES", 0, 1),
    ]
    first, second = found.states
    assert (first.input, first.output, first.shape) == ("s_in", "s_out", (-1,))
    assert (first.initial, first.initial_shape) == ("first", (3,))
    assert (second.initial, second.initial_shape) == ("", (2,))
    assert read(SEQUENCES).problems == ()


def test_the_oldest_sequences_have_batches_of_their_own() -> None:
    text = """\
        max_batch_size: 8
        sequence_batching {
          oldest { max_candidate_sequences: 4 preferred_batch_size: [ 2 ]
                   max_queue_delay_microseconds: 100 preserve_ordering: true }
          iterative_sequence: true
        }"""
    found = value(text, "sequences")
    assert (found.strategy, found.max_candidates, found.iterative) == ("oldest", 4, True)
    assert (found.preferred_sizes, found.max_delay_us, found.preserve_ordering) == ((2,), 100, True)
    assert value("sequence_batching { }", "sequences").idle_us == 1_000_000


@pytest.mark.parametrize(
    ("control", "why"),
    [
        ("{ name: 'a' }", "exactly one 'control'"),
        ("{ name: 'a' control { int32_false_true: [ 0 ] } }", "one value for no and one for yes"),
        ("{ name: 'a' control { kind: CONTROL_SEQUENCE_END } }", "the control 'end' needs one"),
        (
            "{ name: 'a' control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } }",
            "must be one of UINT64",
        ),
        (
            "[ { name: 'a' control { int32_false_true: [ 0, 1 ] } },"
            "  { name: 'b' control { int32_false_true: [ 0, 1 ] } } ]",
            "two of 'control_input' have the kind 'start'",
        ),
    ],
)
def test_a_control_that_tells_nothing_is_refused(control: str, why: str) -> None:
    assert why in refused(f"sequence_batching {{ control_input {control} }}")


ENSEMBLE = """\
platform: "ensemble"
max_batch_size: 1
ensemble_scheduling {
  max_inflight_requests: 16
  step [
    { model_name: "first" model_version: -1
      input_map { key: "raw" value: "IMAGE" } output_map { key: "out" value: "middle" } },
    { model_name: "second" model_version: 3
      input_map { key: "in" value: "middle" } output_map { key: "probabilities" value: "CLASS" } }
  ]
}
"""


def test_an_ensemble_is_its_steps() -> None:
    config, sources = merge([read(ENSEMBLE)])
    assert config.backend == "ensemble" and config.ensemble is not None
    first, second = config.ensemble.steps
    assert (first.model, first.version, first.inputs, first.outputs) == (
        "first", None, {"raw": "IMAGE"}, {"out": "middle"},
    )  # fmt: skip
    assert (second.model, second.version) == ("second", 3)
    assert config.ensemble.max_inflight == 16
    assert sources["ensemble.steps.1.model"] == "config.pbtxt:8"
    assert read(ENSEMBLE.replace('platform: "ensemble"', "")).values["backend"] == "ensemble"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("platform: 'ensemble'", "ensemble scheduling must be set for ensemble m"),
        (
            ENSEMBLE.replace('"ensemble"', '"onnxruntime_onnx"'),
            "ensemble scheduling cannot be set for model 'm' whose platform is not ensemble",
        ),
        (ENSEMBLE + "instance_group { count: 1 }", "instance group should not be specified"),
        (ENSEMBLE + "optimization { }", "optimization should not be specified for ensemble 'm'"),
        (
            ENSEMBLE + "model_warmup { name: 'w' }",
            "model warm-up can not be specified for ensemble 'm'",
        ),
        ("ensemble_scheduling { }", "must specify 'step' for ensemble 'm'"),
        ("ensemble_scheduling { step { } }", "must specify 'model_name' in step 0 of ensemble 'm'"),
        (
            "ensemble_scheduling { step { model_name: 'a' } }",
            "must specify 'input_map' in step 0 of ensemble 'm'",
        ),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused_in_tritons_words(text: str, why: str) -> None:
    assert why in refused(text)
