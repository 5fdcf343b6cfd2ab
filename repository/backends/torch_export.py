"""Exported programs (`torch.export.save`, .pt2), and with `trust_code` AOTInductor packages.

Inputs and outputs are the program's own: names of the arguments, datatypes, shapes with -1 for what
was exported as dynamic. Outputs in a dict keep their keys; others are named by the config in order,
else "output" or "output_0" ... Numbers and None among the arguments keep the values of the export.
An AOTInductor package does not tell its inputs: the config does.

Without `trust_code` an archive that could run code is refused before it is loaded (`pt2_trust`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2  # two seconds: once, in the zygote
from torch.utils import _pytree as pytree

from repository.backends import agreement, pt2_trust, registry, torch_io
from repository.backends.asleep import Moves, Tensors, tensors_of
from repository.backends.base import Order, Room
from repository.backends.ferry import movable
from repository.backends.torch_call import Call
from repository.backends.torch_forward import Forward
from repository.backends.whole_file import check_there, read_whole
from repository.errors import (
    IncompleteFilesError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec

NAME = "torch_export"
MODEL_FILE = "model.pt2"
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
GUARD = "Guard failed: "  # what a program says of an input whose size it was not exported for


class TorchExportBackend(Moves):
    def __init__(self) -> None:
        self._call: Call | None = None
        self._program: Program | Package | None = None

    def load(self, order: Order) -> Loaded:
        registry.check_options(NAME, order.config.options)
        device = torch_io.begin(order)
        self._movable = movable(order.device, self._tensors)
        path = order.path / (order.model_file or MODEL_FILE)
        trusted = bool(order.extra.get("trust_code", False))
        data = read_whole(path)
        names = _members(path, io.BytesIO(data), trusted)
        if pt2_trust.compiled(names):
            program: Program | Package = Package(path, data, order)
        else:
            program = Program(_load_program(path, data, trusted), order, device)
        self._program = program
        inputs, outputs = program.inputs, program.outputs
        config = order.config
        self._call = Call(
            program,
            device,
            inputs,
            outputs,
            batched=config.max_batch_size > 0,
            own=bool(order.extra.get("shares_process", False)),
        )
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config.max_batch_size,
            platform=registry.entry(NAME).platform,
            memory=program.memory,
            details={
                "kind": program.kind,
                "threads": order.threads,
                "torch": str(torch.__version__),
            },
            abilities=("sleep",) if program.can_sleep else (),
        )

    def validate(self, order: Order) -> None:
        """The archive's directory, and whether it may be loaded at all."""
        registry.check_options(NAME, order.config.options)
        path = order.path / (order.model_file or MODEL_FILE)
        check_there(path)
        _members(path, os.fspath(path), bool(order.extra.get("trust_code", False)))

    def _tensors(self) -> Tensors:
        return {"weights": self._program.tensors() if self._program is not None else ()}

    def infer(self, request: InferRequest) -> InferResponse:
        return self._infer(request, None)

    def infer_into(self, request: InferRequest, room: Room) -> InferResponse:
        return self._infer(request, room)

    def unload(self) -> None:
        self._call = self._program = self._movable = None
        torch_io.end()

    def _infer(self, request: InferRequest, room: Room | None) -> InferResponse:
        if self._call is None:
            raise InferenceFailedError("the model is not loaded")
        return self._call(request, room)


class Program:
    """An exported program, to be called with inputs by name."""

    kind = "exported program"
    can_sleep = True

    def __init__(self, exported: Any, order: Order, device: torch.device) -> None:
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, str(device))
        listed = [t.name for t in order.config.outputs or ()]
        places = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
        # Every leaf of what it is called with: a tensor by name, or the value that was exported.
        self._leaves = [_leaf(spec, places) for spec in _user_inputs(exported)]
        specs = [leaf for leaf in self._leaves if isinstance(leaf, TensorSpec)]
        self._spec = exported.call_spec.in_spec
        self.inputs, self.outputs = agreement.reconcile(
            order.config, specs, _outputs(exported, listed)
        )
        self._module = exported.module()
        state = [*exported.state_dict.values(), *exported.constants.values()]
        self._state = [each for each in state if isinstance(each, torch.Tensor)]
        self.memory = {"weights": torch_io.bytes_of_all(self._state)}

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self._state
        yield from tensors_of(self._module)

    def __call__(self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[str]) -> Any:
        leaves: list[Any] = []
        for leaf in self._leaves:
            if not isinstance(leaf, TensorSpec):
                leaves.append(leaf)
            elif leaf.name in inputs:
                leaves.append(inputs[leaf.name])
            else:
                raise InvalidTensorError(f"input '{leaf.name}' is missing")
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        try:
            with torch.inference_mode():
                return self._module(*args, **kwargs)
        except AssertionError as error:
            if str(error).startswith(GUARD):
                text = str(error).removeprefix(GUARD).splitlines()[0]
                raise InvalidTensorError(f"the model was exported for {text}") from error
            raise


class Package:
    """Compiled by AOTInductor. It holds a library, which is loaded into this process: trusted code."""

    kind = "AOTInductor package"
    can_sleep = False  # its weights belong to the library that it is

    def __init__(self, path: Path, data: bytes, order: Order) -> None:
        from torch._inductor import aoti_load_package

        config = order.config
        index = torch.device(order.device).index
        self._model = aoti_load_package(
            io.BytesIO(data),
            device_index=-1 if index is None else index,
        )
        self.inputs = agreement.configured(config.inputs, config.max_batch_size)
        self.outputs = agreement.configured(config.outputs, config.max_batch_size)
        found = [Parameter("inputs", Parameter.VAR_POSITIONAL)]
        self._forward = Forward(self._model, found, [spec.name for spec in self.inputs])
        self.memory: dict[str, int] = {"weights": len(data)}

    def tensors(self) -> Iterator[torch.Tensor]:
        """None that torch knows of."""
        return iter(())

    def __call__(self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[str]) -> Any:
        with torch.inference_mode():
            return self._forward({name: each.contiguous() for name, each in inputs.items()})


# loading ----------------------------------------------------------------------------------------


def _members(path: Path, archive: io.BytesIO | str, trusted: bool) -> list[str]:
    """What is in the archive (its bytes, or where it lies); looked at closely unless it is trusted."""
    try:
        reader = PT2ArchiveReader(archive)
    except (RuntimeError, AssertionError, UnicodeDecodeError) as error:
        raise IncompleteFilesError(
            f"{path.name} is no complete archive of torch.export.save (torch 2.8 or newer): copy it "
            "again, or export it again"
        ) from error
    if not trusted:
        pt2_trust.check(reader, path.name)
    return reader.get_file_names()


def _load_program(path: Path, data: bytes, trusted: bool) -> Any:
    if trusted:
        return torch.export.load(io.BytesIO(data))
    # Not torch.export.load: what this reader does not understand it would give to an older one, which
    # may see other members than those that were looked at.
    # Belt and braces: should a pickle have escaped us, it is still not loaded unsafely.
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        programs = load_pt2(io.BytesIO(data)).exported_programs
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
    if "model" not in programs:
        there = ", ".join(f"'{name}'" for name in programs) or "no program"
        raise LoadFailedError(f"{path.name} holds {there}; it must hold one named 'model'")
    return programs["model"]


def _user_inputs(exported: Any) -> list[Any]:
    kinds = torch.export.graph_signature.InputKind
    return [s.arg for s in exported.graph_signature.input_specs if s.kind is kinds.USER_INPUT]


def _leaf(arg: Any, places: Mapping[str, Any]) -> Any:
    """A TensorSpec, or the constant that was exported in its place."""
    signature = torch.export.graph_signature
    if isinstance(arg, signature.ConstantArgument):
        return arg.value
    if not isinstance(arg, signature.TensorArgument):
        raise LoadFailedError(
            f"input '{arg.name}' of the program is no tensor; export the model so that it takes a "
            "tensor there"
        )
    return _spec("input", arg.name, places[arg.name].meta["val"])


def _outputs(exported: Any, listed: Sequence[str]) -> list[TensorSpec]:
    """Of the tensors that the program returns, named as `torch_io.named` will name them."""
    signature = exported.graph_signature
    made = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    kinds = torch.export.graph_signature.OutputKind
    leaves = [
        made.get(s.arg.name) if hasattr(s.arg, "name") else None
        for s in signature.output_specs
        if s.kind is kinds.USER_OUTPUT
    ]
    answer = pytree.tree_unflatten(leaves, exported.call_spec.out_spec)
    try:
        found = torch_io.named(answer, listed)
    except InferenceFailedError as error:
        raise LoadFailedError(str(error)) from error
    return [_spec("output", name, value) for name, value in found.items()]


def _spec(side: str, name: str, value: torch.Tensor) -> TensorSpec:
    datatype = torch_io.DATATYPES.get(value.dtype)
    if datatype is None:
        raise LoadFailedError(
            f"{side} '{name}' is of type {value.dtype}, for which KServe V2 has no datatype"
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(name, datatype, shape)
