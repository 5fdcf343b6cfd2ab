"""config.pbtxt (Triton's ModelConfig in protobuf's text form) -> a layer.

What we honour is mapped to our keys; what is set and not honoured becomes a warning, so that nobody
believes in it; what would give wrong answers if it were ignored is an error. The protobuf classes
take a while to import, so they are imported when the first such file is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NoReturn

from repository.errors import ConfigError
from repository.folder.pbtxt_lines import line_map
from repository.folder.read_yaml import MAX_SIZE
from repository.folder.schema import Layer, check_layer, nearest
from repository.names import shown
from repository.snapshot import Problem

SOURCE = "config.pbtxt"
PLATFORMS = {
    "onnxruntime_onnx": "onnx",
    "pytorch_libtorch": "torchscript",
    "torch_aoti": "torch_export",
}
# Triton's "pytorch" is torch_export where the file is a .pt2 (`guess.as_triton_means`).
BACKENDS = {"onnxruntime": "onnx", "python": "python", "pytorch": "torchscript"}

HONOURED = {
    "": {
        "name", "platform", "backend", "version_policy", "max_batch_size", "input", "output",
        "instance_group", "dynamic_batching", "default_model_filename", "parameters",
        "model_warmup",
    },
    "input": {"name", "data_type", "dims", "optional"},
    "output": {"name", "data_type", "dims"},
    "instance_group": {"name", "kind", "count", "gpus"},
    "dynamic_batching": {
        "preferred_batch_size", "max_queue_delay_microseconds", "default_queue_policy",
        "preserve_ordering", "priority_levels", "default_priority_level", "priority_queue_policy",
    },
    "dynamic_batching.default_queue_policy": {
        "max_queue_size", "default_timeout_microseconds", "timeout_action",
        "allow_timeout_override",
    },
    "model_warmup": {"name", "batch_size", "inputs", "count"},
}  # fmt: skip
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
# Parameters of Triton's PyTorch backend that change how fast a model runs, and nothing else.
OF_PYTORCH = frozenset({
    "DISABLE_CUDNN", "DISABLE_OPTIMIZED_EXECUTION", "ENABLE_CACHE_CLEANING", "ENABLE_JIT_EXECUTOR",
    "ENABLE_JIT_PROFILING", "ENABLE_TENSOR_FUSER", "ENABLE_WEIGHT_SHARING", "INFERENCE_MODE",
    "INTER_OP_THREAD_COUNT", "INTRA_OP_THREAD_COUNT",
})  # fmt: skip
# Served without these, a model would answer, and wrongly.
REFUSED = {
    "ensemble_scheduling": "ensembles are not supported",
    "sequence_batching": "sequences are not supported: requests would lose their state",
}


def read_pbtxt(text: bytes, model: str) -> Layer:
    """`model` is the folder's name, which `name` must repeat if it is there (for "org/m" also "m").

    Raises ConfigError with "config.pbtxt:LINE".
    """
    if len(text) > MAX_SIZE:
        raise ConfigError(f"the file has more than {MAX_SIZE // 1024} KiB", where=SOURCE)
    try:
        plain = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ConfigError("the text is not UTF-8", where=f"{SOURCE}:{line}") from error
    message = _parse(plain)
    return check_layer(_Reader(message, line_map(plain), model).layer())


def _parse(plain: str) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(plain, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        line = error.GetLine()
        where = f"{SOURCE}:{line}" if line else SOURCE
        said = re.sub(r"^\d+:\d+ : ", "", str(error)).replace("inference.", "")
        unknown = re.search(r'Message type "(\w+)" has no field named "(\w+)"', said)
        if unknown:
            known = getattr(model_config_pb2, unknown[1], None)
            fields = [f.name for f in known.DESCRIPTOR.fields] if known else []
            said = f"unknown key '{unknown[2]}'{nearest(unknown[2], fields)}"
        raise ConfigError(said[:300], where=where) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            "the file cannot be read as a model configuration", where=SOURCE
        ) from error


class _Reader:
    def __init__(self, message: Any, lines: dict[str, int], model: str) -> None:
        self._message, self._lines, self._model = message, lines, model
        self._values: dict[str, Any] = {}
        self._places: dict[str, int] = {}  # our keys -> line
        self._warnings: list[Problem] = []

    def layer(self) -> Layer:
        m = self._message
        self._check_name()
        for key, why in REFUSED.items():
            if m.HasField(key):
                self._fail(key, f"'{key}': {why}")
        self._backend()
        if "max_batch_size" in self._lines:
            self._set("max_batch_size", m.max_batch_size, "max_batch_size")
        for theirs, ours in (("input", "inputs"), ("output", "outputs")):
            if getattr(m, theirs):
                self._tensors(theirs, ours)
        self._instances()
        self._batching()
        self._version_policy()
        self._warmup()
        self._options()
        self._warn_of_rest(m, "")
        return Layer(SOURCE, self._values, self._places, tuple(self._warnings))

    # what we honour -----------------------------------------------------------------------------

    def _check_name(self) -> None:
        name = self._message.name
        if name and name not in (self._model, self._model.rpartition("/")[2]):
            self._fail(
                "name",
                f"unexpected directory name '{self._model}' for model '{shown(name)}', directory name "
                "must equal model name",
                "change 'name' or leave it out",
            )

    def _backend(self) -> None:
        said = {}
        for key, known in (("platform", PLATFORMS), ("backend", BACKENDS)):
            wish = getattr(self._message, key)
            if wish and wish not in known:
                near = nearest(wish, known)
                hint = "supported: " + ", ".join([*PLATFORMS, *BACKENDS])
                self._fail(key, f"the {key} '{shown(wish)}' is not supported{near}", hint)
            if wish:
                said[key] = known[wish]
        if said.get("platform") == "torch_export" and said.get("backend") == "torchscript":
            del said["backend"]  # backend pytorch, and what sort of it
        if len(set(said.values())) > 1:
            self._fail("backend", "'platform' and 'backend' contradict each other", "keep one")
        for key, backend in said.items():
            self._set("backend", backend, key)

    def _tensors(self, theirs: str, ours: str) -> None:
        types = self._message.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
        tensors = []
        for i, tensor in enumerate(getattr(self._message, theirs)):
            at = f"{theirs}.{i}"
            if tensor.data_type == 0:
                self._fail(at, f"'{theirs}' {i} needs a 'data_type'")
            datatype = types[tensor.data_type].name.removeprefix("TYPE_")
            values = {
                "name": tensor.name,
                "datatype": "BYTES" if datatype == "STRING" else datatype,
                "shape": list(tensor.dims),
            }
            if getattr(tensor, "optional", False):
                values["optional"] = True
            tensors.append(values)
            self._place(f"{ours}.{i}", at)
            for our, their in (("name", "name"), ("datatype", "data_type"), ("shape", "dims")):
                self._place(f"{ours}.{i}.{our}", f"{at}.{their}")
            self._warn_of_rest(tensor, at)
        self._set(ours, tensors, theirs)

    def _instances(self) -> None:
        groups = self._message.instance_group
        if not groups:
            return
        first = groups[0]
        if len(groups) > 1:
            self._warn("instance_group.1", "only the first 'instance_group' is honoured")
        if first.count:
            self._set("instances", first.count, "instance_group.0.count")
        kind = type(first).Kind.Name(first.kind)
        if kind == "KIND_CPU":
            self._set("device", "cpu", "instance_group.0.kind")
        elif kind == "KIND_GPU" or first.gpus:
            device = f"cuda:{first.gpus[0]}" if first.gpus else "cuda"
            self._set("device", device, "instance_group.0.gpus")
        if len(first.gpus) > 1:
            self._warn("instance_group.0.gpus", "only the first of 'gpus' is honoured")
        self._warn_of_rest(first, "instance_group.0")

    def _batching(self) -> None:
        if not self._message.HasField("dynamic_batching"):
            return
        theirs = self._message.dynamic_batching
        ours: dict[str, Any] = {}
        at = "dynamic_batching"
        if theirs.preferred_batch_size:
            ours["preferred_sizes"] = list(theirs.preferred_batch_size)
            self._place("batching.preferred_sizes", f"{at}.preferred_batch_size")
        for their, our in BATCHING.items():
            if value := getattr(theirs, their):
                ours[our] = value
                self._place(f"batching.{our}", f"{at}.{their}")
        policy = theirs.default_queue_policy
        # With us a request may shorten its wait unless the config forbids it, with Triton only
        # where the config allows it: its silence is a word.
        said = _queue_policy(policy)
        ours |= {k: v for k, v in said.items() if v or k == "allow_timeout_override"}
        for their, our in {**QUEUE_POLICY, "timeout_action": "timeout_action"}.items():
            self._place(f"batching.{our}", f"{at}.default_queue_policy.{their}")
        if theirs.priority_levels:
            self._priorities(theirs, ours)
        elif theirs.priority_queue_policy:
            self._warn(
                f"{at}.priority_queue_policy",
                f"'{at}.priority_queue_policy' does nothing without 'priority_levels'",
            )
        self._set("batching", ours, at)
        self._warn_of_rest(theirs, at)
        self._warn_of_rest(policy, f"{at}.default_queue_policy")

    def _priorities(self, theirs: Any, ours: dict[str, Any]) -> None:
        """A policy of one level replaces the default one whole, what it does not say included."""
        policies = sorted(theirs.priority_queue_policy.items())
        if policies:
            ours["by_priority"] = [
                {"priority": n, "timeout_action": "reject", **_queue_policy(policy)}
                for n, policy in policies
            ]
            self._place("batching.by_priority", "dynamic_batching.priority_queue_policy")

    def _version_policy(self) -> None:
        policy = self._message.version_policy
        match policy.WhichOneof("policy_choice"):
            case "latest":
                value: dict[str, Any] = {"latest": policy.latest.num_versions or 1}
            case "specific":
                value = {"specific": list(policy.specific.versions)}
            case "all":
                value = {"all": True}
            case _:
                return
        self._set("version_policy", value, "version_policy")

    def _warmup(self) -> None:
        requests = []
        for i, theirs in enumerate(self._message.model_warmup):
            ours: dict[str, Any] = {
                "batch_size": theirs.batch_size or 1,
                "count": theirs.count or 1,
                "size": self._warmup_size(theirs),
            }
            kinds = {x.WhichOneof("input_data_type") for x in theirs.inputs.values()}
            if "random_data" in kinds:
                ours["data"] = "random"
            if "input_data_file" in kinds:
                self._warn(f"model_warmup.{i}", "'input_data_file' is not read: zeros are sent")
            requests.append(ours)
            self._place(f"warmup.{i}", f"model_warmup.{i}")
            self._warn_of_rest(theirs, f"model_warmup.{i}")
        if requests:
            self._set("warmup", requests, "model_warmup")

    def _warmup_size(self, warmup: Any) -> int:
        """Ours has one size for all free axes: the largest that theirs gives to one."""
        sizes = [1]
        for declared in self._message.input:
            if declared.name in warmup.inputs:
                given = warmup.inputs[declared.name].dims
                sizes += [g for d, g in zip(declared.dims, given, strict=False) if d == -1]
        return max(sizes)

    def _options(self) -> None:
        options: dict[str, Any] = {}
        pytorch = self._values.get("backend") in ("torchscript", "torch_export")
        for key, parameter in sorted(self._message.parameters.items()):
            if pytorch and key in OF_PYTORCH:
                self._warn("parameters", f"the parameter '{key}' is not honoured")
            else:
                options[key] = parameter.string_value
        if self._message.default_model_filename:
            options["model_file"] = self._message.default_model_filename
            self._place("options.model_file", "default_model_filename")
        if options:
            self._set("options", options, "parameters")

    # what we do not -----------------------------------------------------------------------------

    def _warn_of_rest(self, message: Any, at: str) -> None:
        """Every field that is set and that HONOURED does not have. Defaults count as not set."""
        known = HONOURED[re.sub(r"\.\d+", "", at)]
        for name in _set_fields(message):
            if name not in known:
                key = f"{at}.{name}" if at else name
                self._warn(key, f"'{re.sub(r'[.][0-9]+', '', key)}' is not honoured")

    def _warn(self, key: str, message: str) -> None:
        place = Layer(SOURCE, {}, self._lines).place(key)
        self._warnings.append(
            Problem(place, "config", message, "remove it if you can do without", warning=True)
        )

    def _fail(self, key: str, message: str, hint: str = "") -> NoReturn:
        raise ConfigError(message, where=Layer(SOURCE, {}, self._lines).place(key), hint=hint)

    # values and their lines ---------------------------------------------------------------------

    def _set(self, key: str, value: Any, theirs: str) -> None:
        self._values[key] = value
        self._place(key, theirs)

    def _place(self, ours: str, theirs: str) -> None:
        key = theirs
        while key and key not in self._lines:
            key = key.rpartition(".")[0]
        if key:
            self._places[ours] = self._lines[key]


def _set_fields(message: Any) -> Iterator[str]:
    return (field.name for field, _ in message.ListFields())


def _queue_policy(policy: Any) -> dict[str, Any]:
    found = {our: getattr(policy, their) for their, our in QUEUE_POLICY.items()}
    if policy.timeout_action:
        found["timeout_action"] = type(policy).TimeoutAction.Name(policy.timeout_action).lower()
    return found
