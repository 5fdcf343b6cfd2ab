"""Layers become one config that knows its sources; files are guessed from; needs are estimated."""

from __future__ import annotations

import pytest

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.estimate import MIB, bytes_needed, devices_for
from repository.folder.guess import guess, model_file
from repository.folder.layering import merge
from repository.folder.read_yaml import read_yaml
from repository.folder.schema import Layer, check_layer
from repository.folder.versions import choose, missing


def test_later_layers_win_and_every_value_says_where_it_came_from() -> None:
    file = read_yaml(
        b"max_batch_size: 8\nchecks:\n  atol: 1\n  rtol: 2\noptions: {a: 1, b: 1}\n"
        b"version_policy: {latest: 3}\ninputs:\n- name: x\n  datatype: FP32\n  shape: [2]\n"
    )
    request = check_layer(
        Layer(
            "request",
            {"checks": {"rtol": 3}, "options": {"b": 2}, "version_policy": "all", "pin": True},
        )
    )
    config, sources = merge([Layer("guessed", {"backend": "onnx"}), file, request])
    assert (config.backend, config.max_batch_size, config.pin) == ("onnx", 8, True)
    assert (config.checks.atol, config.checks.rtol) == (1, 3)
    assert config.options == {"a": 1, "b": 2}
    assert config.version_policy.all and config.version_policy.latest is None
    assert sources["backend"] == "guessed"
    assert sources["max_batch_size"] == "config.yaml:1"
    assert sources["checks.atol"] == "config.yaml:3"
    assert sources["checks.rtol"] == sources["options.b"] == sources["pin"] == "request"
    assert (
        sources["checks.enabled"] == sources["device"] == sources["inputs.0.optional"] == "default"
    )
    assert sources["inputs.0.shape"] == "config.yaml:10"
    assert sources["version_policy.all"] == "request"
    assert sources["version_policy.latest"] == "default"


def test_a_list_of_a_later_layer_replaces_the_whole_list() -> None:
    file = read_yaml(
        b"outputs:\n- {name: a, datatype: FP32, shape: [1]}\n- {name: b, datatype: FP32, shape: [1]}\n"
    )
    over = Layer("request", {"outputs": [{"name": "c", "datatype": "INT8", "shape": []}]})
    config, sources = merge([file, over])
    assert config.outputs is not None and [o.name for o in config.outputs] == ["c"]
    assert {k: v for k, v in sources.items() if k.startswith("outputs")} == {
        "outputs.0.name": "request",
        "outputs.0.datatype": "request",
        "outputs.0.shape": "request",
        "outputs.0.optional": "default",
        "outputs.0.reshape": "default",
        "outputs.0.labels": "default",
    }


def test_without_any_layer_everything_is_default() -> None:
    config, sources = merge([])
    assert config == ModelConfig()
    assert set(sources.values()) == {"default"} and {"ttl_s", "inputs", "checks.atol"} <= set(
        sources
    )


def test_a_preferred_size_beyond_the_largest_batch_is_told_at_its_line() -> None:
    layer = read_yaml(b"max_batch_size: 4\nbatching:\n  preferred_sizes: [2, 8]\n")
    with pytest.raises(ConfigError) as caught:
        merge([layer])
    assert caught.value.where == "config.yaml:3"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("priorities: 2", 2, "needs a default_priority of 1 to 2"),
        ("default_priority: 2", 2, "there are 0"),
        ("by_priority:\n  - {priority: 1}", 3, "names priority 1 and there are 0"),
        (
            "priorities: 1\n  default_priority: 1\n  by_priority:\n"
            "  - {priority: 1}\n  - {priority: 1}",
            6,
            "names priority 1 twice",
        ),
        ("timeout_action: delay\n  preserve_ordering: true", 3, "nor with timeout_action delay"),
    ],
)
def test_a_queue_that_contradicts_itself_is_told_at_its_line(
    text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge([read_yaml(f"batching:\n  {text}\n".encode())])
    assert caught.value.where == f"config.yaml:{line}" and message in str(caught.value)


def test_what_a_priority_does_not_say_for_itself_is_as_for_all() -> None:
    text = b"""
batching:
  priorities: 2
  default_priority: 2
  timeout_us: 70
  max_queue: 9
  by_priority: [{priority: 1, timeout_us: 0}]
"""
    config, _ = merge([read_yaml(text)])
    assert config.batching is not None
    first, second = (config.batching.policy(n) for n in (1, 2))
    assert (first.timeout_us, second.timeout_us) == (0, 70)
    assert first.max_queue == second.max_queue == 9
    assert first.timeout_action == "reject" and first.allow_timeout_override is True


@pytest.mark.parametrize(
    ("files", "backend", "main"),
    [
        ({"model.onnx"}, "onnx", "model.onnx"),
        ({"model.py", "weights.npz"}, "python", "model.py"),
        ({"model.py", "model.onnx"}, "onnx", "model.onnx"),
        ({"net.onnx", "net.bin"}, "onnx", "net.onnx"),
    ],
)
def test_the_backend_is_guessed_from_the_files(files: set[str], backend: str, main: str) -> None:
    config, sources = merge([guess(files)])
    assert config.backend == backend and sources["backend"] == "guessed"
    assert model_file(config, files) == main


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (ModelConfig(), {"weights.safetensors"}, "no backend for these files: weights.safetensors"),
        (ModelConfig(), set(), "there are none"),
        (ModelConfig(backend="onnx"), {"a.onnx", "b.onnx"}, "several .onnx files"),
        (ModelConfig(backend="onnx"), {"model.py"}, "'model.onnx' is not there"),
        (ModelConfig(backend="python"), {"model.onnx"}, "'model.py' is not there"),
        (
            ModelConfig(backend="onnx", options={"model_file": "c.onnx"}),
            {"model.onnx"},
            "'c.onnx' is not",
        ),
    ],
)
def test_files_without_one_model_file_are_told(
    config: ModelConfig, files: set[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        model_file(config, files)
    assert caught.value.hint


def test_a_named_model_file_is_taken() -> None:
    config = ModelConfig(backend="onnx", options={"model_file": "b.onnx"})
    assert model_file(config, {"a.onnx", "b.onnx"}) == "b.onnx"


def test_needs_are_weights_and_a_base_for_every_instance() -> None:
    assert bytes_needed(ModelConfig(backend="onnx", instances=2), 10 * MIB) == 2 * 26 * MIB
    assert bytes_needed(ModelConfig(backend="python"), 10 * MIB) == 42 * MIB
    assert bytes_needed(ModelConfig(backend="onnx", memory=5, instances=9), 10 * MIB) == 5


@pytest.mark.parametrize(
    ("device", "gpus", "places"),
    [
        ("auto", (), ("cpu",)),
        ("auto", ("cuda:0", "cuda:1"), ("cuda:0", "cuda:1", "cpu")),
        ("auto", None, ("cpu",)),
        ("cpu", ("cuda:0",), ("cpu",)),
        ("cuda", ("cuda:0", "cuda:1"), ("cuda:0", "cuda:1")),
        ("cuda", None, ("cuda:0",)),
        ("cuda:1", ("cuda:0", "cuda:1"), ("cuda:1",)),
        ("cuda:1", None, ("cuda:1",)),
    ],
)
def test_devices_are_listed_best_first(
    device: str, gpus: tuple[str, ...] | None, places: tuple[str, ...]
) -> None:
    assert devices_for(ModelConfig(backend="onnx", device=device), gpus) == places


def test_a_gpu_that_is_asked_for_and_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        devices_for(ModelConfig(backend="onnx", device="cuda"), ())


@pytest.mark.parametrize(
    ("policy", "chosen", "lacking"),
    [
        ("{latest: 1}", (7,), ()),
        ("{latest: 2}", (7, 3), ()),
        ("all", (7, 3, 1), ()),
        ("{specific: [1, 2, 7]}", (7, 1), (2,)),
    ],
)
def test_a_policy_chooses_newest_first(
    policy: str, chosen: tuple[int, ...], lacking: tuple[int, ...]
) -> None:
    config, _ = merge([read_yaml(f"version_policy: {policy}".encode())])
    assert choose(config.version_policy, [1, 7, 3]) == chosen
    assert missing(config.version_policy, [1, 7, 3]) == lacking
