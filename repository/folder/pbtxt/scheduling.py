"""How requests wait and go together: `dynamic_batching`, `sequence_batching`, `ensemble_scheduling`."""

from __future__ import annotations

from typing import Any

from repository.folder.pbtxt.page import Page
from repository.folder.pbtxt.tensors import datatype

# Their key -> ours.
BATCHING = {
    "max_queue_delay_microseconds": "max_delay_us",
    "preserve_ordering": "preserve_ordering",
    "priority_levels": "priorities",
    "default_priority_level": "default_priority",
}
QUEUE_POLICY = {
    "max_queue_size": "max_queue",
    "default_timeout_microseconds": "timeout_us",
    "allow_timeout_override": "allow_timeout_override",
}
OLDEST = {
    "max_candidate_sequences": "max_candidates",
    "max_queue_delay_microseconds": "max_delay_us",
    "preserve_ordering": "preserve_ordering",
}
PAIRS = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
CORRID = ("UINT64", "INT64", "UINT32", "INT32", "BYTES")
OFF_AND_ON = "one value for no and one for yes: int32_false_true: [0, 1]"


def read_scheduling(page: Page) -> None:
    match page.message.WhichOneof("scheduling_choice"):
        case "dynamic_batching":
            _batching(page)
        case "sequence_batching":
            _sequences(page)
        case "ensemble_scheduling":
            _ensemble(page)


# dynamic batching ---------------------------------------------------------------------------------


def _batching(page: Page) -> None:
    theirs = page.message.dynamic_batching
    ours: dict[str, Any] = {}
    at = "dynamic_batching"
    if theirs.preferred_batch_size:
        ours["preferred_sizes"] = list(theirs.preferred_batch_size)
        page.place("batching.preferred_sizes", f"{at}.preferred_batch_size")
    for their, our in BATCHING.items():
        if value := getattr(theirs, their):
            ours[our] = value
            page.place(f"batching.{our}", f"{at}.{their}")
    # With us a request may shorten its wait unless the config forbids it, with Triton only
    # where the config allows it: its silence is a word.
    said = _queue_policy(theirs.default_queue_policy)
    ours |= {k: v for k, v in said.items() if v or k == "allow_timeout_override"}
    for their, our in {**QUEUE_POLICY, "timeout_action": "timeout_action"}.items():
        page.place(f"batching.{our}", f"{at}.default_queue_policy.{their}")
    if theirs.priority_levels:
        _priorities(page, theirs, ours)
    elif theirs.priority_queue_policy:
        page.warn(
            f"{at}.priority_queue_policy",
            f"'{at}.priority_queue_policy' does nothing without 'priority_levels'",
        )
    page.set("batching", ours, at)


def _priorities(page: Page, theirs: Any, ours: dict[str, Any]) -> None:
    """A policy of one level replaces the default one whole, what it does not say included."""
    policies = sorted(theirs.priority_queue_policy.items())
    if policies:
        ours["by_priority"] = [
            {"priority": n, "timeout_action": "reject", **_queue_policy(policy)}
            for n, policy in policies
        ]
        page.place("batching.by_priority", "dynamic_batching.priority_queue_policy")


def _queue_policy(policy: Any) -> dict[str, Any]:
    found = {our: getattr(policy, their) for their, our in QUEUE_POLICY.items()}
    if policy.timeout_action:
        found["timeout_action"] = type(policy).TimeoutAction.Name(policy.timeout_action).lower()
    return found


# sequences ----------------------------------------------------------------------------------------


def _sequences(page: Page) -> None:
    theirs = page.message.sequence_batching
    ours: dict[str, Any] = {}
    if theirs.max_sequence_idle_microseconds:
        ours["idle_us"] = theirs.max_sequence_idle_microseconds
    if theirs.iterative_sequence:
        ours["iterative"] = True
    if theirs.HasField("oldest"):
        _oldest(theirs.oldest, ours)
    elif theirs.direct.ListFields():
        ours["max_delay_us"] = theirs.direct.max_queue_delay_microseconds
        ours["min_slots_ratio"] = round(theirs.direct.minimum_slot_utilization, 6)
    controls = [_control(page, control, i) for i, control in enumerate(theirs.control_input)]
    _check_kinds(page, controls)
    ours["controls"] = controls
    ours["states"] = [_state(page, state, i) for i, state in enumerate(theirs.state)]
    page.set("sequences", ours, "sequence_batching")
    page.place("sequences.idle_us", "sequence_batching.max_sequence_idle_microseconds")


def _oldest(theirs: Any, ours: dict[str, Any]) -> None:
    ours["strategy"] = "oldest"
    if theirs.preferred_batch_size:
        ours["preferred_sizes"] = list(theirs.preferred_batch_size)
    ours |= {our: value for their, our in OLDEST.items() if (value := getattr(theirs, their))}


def _control(page: Page, theirs: Any, i: int) -> dict[str, Any]:
    at = f"sequence_batching.control_input.{i}"
    if not theirs.name or len(theirs.control) != 1:
        page.fail(at, f"'control_input' {i} needs a 'name' and exactly one 'control'")
    control = theirs.control[0]
    kind = type(control).Kind.Name(control.kind).removeprefix("CONTROL_SEQUENCE_").lower()
    page.place(f"sequences.controls.{i}", at)
    if kind == "corrid":
        said = datatype(control)
        if said not in CORRID:
            page.fail(at, f"'data_type' of the control '{kind}' must be one of {', '.join(CORRID)}")
        return {"name": theirs.name, "kind": kind, "datatype": said}
    given = [name for name in PAIRS if getattr(control, name)]
    if len(given) != 1 or len(getattr(control, given[0])) != 2:
        page.fail(at, f"the control '{kind}' needs {OFF_AND_ON}")
    off, on = getattr(control, given[0])
    return {
        "name": theirs.name,
        "kind": kind,
        "datatype": PAIRS[given[0]],
        "off": float(off),
        "on": float(on),
    }


def _check_kinds(page: Page, controls: list[dict[str, Any]]) -> None:
    for key in ("kind", "name"):
        seen: set[str] = set()
        for i, control in enumerate(controls):
            if control[key] in seen:
                page.fail(
                    f"sequence_batching.control_input.{i}",
                    f"two of 'control_input' have the {key} '{control[key]}'",
                )
            seen.add(control[key])


def _state(page: Page, theirs: Any, i: int) -> dict[str, Any]:
    at = f"sequence_batching.state.{i}"
    page.place(f"sequences.states.{i}", at)
    if not (theirs.input_name and theirs.output_name and datatype(theirs)):
        page.fail(at, f"'state' {i} needs 'input_name', 'output_name' and 'data_type'")
    ours: dict[str, Any] = {
        "input": theirs.input_name,
        "output": theirs.output_name,
        "datatype": datatype(theirs),
        "shape": list(theirs.dims),
    }
    if len(theirs.initial_state) > 1:
        page.fail(at, f"'state' {i} has several 'initial_state'", "keep one")
    for first in theirs.initial_state:
        if first.data_type and datatype(first) != ours["datatype"]:
            page.fail(
                f"{at}.initial_state.0",
                f"'initial_state' is {datatype(first)}, but the state is {ours['datatype']}",
            )
        if first.data_file:
            ours["initial"] = first.data_file
        if -1 in first.dims:
            page.fail(f"{at}.initial_state.0", "'dims' of an 'initial_state' may not have a -1")
        ours["initial_shape"] = list(first.dims)
    return ours


# ensembles ----------------------------------------------------------------------------------------

NOT_OF_ENSEMBLES = {
    "instance_group": "instance group should not be specified for ensemble",
    "optimization": "optimization should not be specified for ensemble",
    "model_warmup": "model warm-up can not be specified for ensemble",
}


def _ensemble(page: Page) -> None:
    theirs = page.message.ensemble_scheduling
    for key, message in NOT_OF_ENSEMBLES.items():
        if any(field.name == key for field, _ in page.message.ListFields()):
            page.fail(key, f"{message} '{page.model}'", "say it of the models in its steps")
    if not theirs.step:
        page.fail("ensemble_scheduling", f"must specify 'step' for ensemble '{page.model}'")
    steps = [_step(page, step, i) for i, step in enumerate(theirs.step)]
    ours = {"steps": steps, "max_inflight": theirs.max_inflight_requests}
    page.set("ensemble", ours, "ensemble_scheduling")


def _step(page: Page, theirs: Any, i: int) -> dict[str, Any]:
    at = f"ensemble_scheduling.step.{i}"
    page.place(f"ensemble.steps.{i}", at)
    for key in ("model_name", "input_map", "output_map"):
        if not getattr(theirs, key):
            page.fail(at, f"must specify '{key}' in step {i} of ensemble '{page.model}'")
    ours: dict[str, Any] = {
        "model": theirs.model_name,
        "inputs": dict(sorted(theirs.input_map.items())),
        "outputs": dict(sorted(theirs.output_map.items())),
    }
    if theirs.model_version not in (-1, 0):
        ours["version"] = theirs.model_version
    return ours
