"""What a model accepts, in the words that Triton's clients look for."""

from __future__ import annotations

import numpy as np
import pytest

from repository.config import ModelConfig, TensorConfig
from repository.errors import InvalidTensorError
from repository.messages import InferRequest, Loaded, TensorSpec
from repository.signature import Signature
from repository.tensors import Tensor

ADD = Loaded(
    (TensorSpec("INPUT0", "FP32", (-1, 16)), TensorSpec("INPUT1", "FP32", (-1, 16))),
    (TensorSpec("OUTPUT0", "FP32", (-1, 16)),),
    max_batch_size=8,
)
EXACT = Loaded((TensorSpec("x", "INT32", (2, -1)),), (TensorSpec("y", "INT32", (2, -1)),))
OPTIONAL = Loaded((TensorSpec("a", "INT8", (1,)), TensorSpec("b", "INT8", (1,), optional=True)))


def tensor(name: str, *shape: int, datatype: str = "FP32") -> Tensor:
    size = {"FP32": 4, "INT32": 4, "INT8": 1}[datatype]
    return Tensor(name, datatype, shape, bytes(max(0, int(np.prod(shape))) * size))


def ask(*inputs: Tensor, outputs: tuple[str, ...] = ()) -> InferRequest:
    return InferRequest(list(inputs), outputs)


def both(*shape: int, outputs: tuple[str, ...] = ()) -> InferRequest:
    return ask(tensor("INPUT0", *shape), tensor("INPUT1", *shape), outputs=outputs)


@pytest.mark.parametrize(
    ("loaded", "request_"),
    [
        (ADD, both(1, 16)),
        (ADD, both(8, 16, outputs=("OUTPUT0",))),
        (ADD, both(0, 16)),
        (EXACT, ask(tensor("x", 2, 5, datatype="INT32"))),
        (EXACT, ask(tensor("x", 2, 0, datatype="INT32"))),
        (OPTIONAL, ask(tensor("a", 1, datatype="INT8"))),
        (OPTIONAL, ask(*[tensor(n, 1, datatype="INT8") for n in "ba"])),
        (Loaded(), ask(tensor("anything", 3), tensor("else", 4), outputs=("z",))),
        (Loaded(), ask()),
    ],
)
def test_what_fits_is_accepted(loaded: Loaded, request_: InferRequest):
    Signature("m", loaded).accept(request_)


REFUSED = {
    "missing": (
        ADD,
        ask(tensor("INPUT0", 1, 16)),
        "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['INPUT0'], but missing "
        "required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    "none": (
        ADD,
        ask(),
        "expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required "
        "input(s) ['INPUT0','INPUT1']. Please provide all required input(s).",
    ),
    "unexpected": (
        EXACT,
        ask(tensor("z", 2, 1)),
        "unexpected inference input 'z' for model 'm'",
    ),
    "one too many": (
        EXACT,
        ask(tensor("x", 2, 1, datatype="INT32"), tensor("z", 1)),
        "expected 1 inputs but got 2 inputs for model 'm'. Got input(s) ['x','z']: unexpected "
        "inference input 'z' for model 'm'",
    ),
    "required missing beside optional": (
        OPTIONAL,
        ask(tensor("b", 1, datatype="INT8")),
        "expected between 1 and 2 inputs but got 1 inputs for model 'm'. Got input(s) ['b'], but "
        "missing required input(s) ['a']. Please provide all required input(s).",
    ),
    "twice": (
        ADD,
        ask(tensor("INPUT0", 1, 16), tensor("INPUT0", 1, 16)),
        "input 'INPUT0' already exists in request",
    ),
    "datatype": (
        EXACT,
        ask(tensor("x", 2, 1)),
        "inference input 'x' data-type is 'FP32', but model 'm' expects 'INT32'",
    ),
    "exact shape": (
        EXACT,
        ask(tensor("x", 3, 1, datatype="INT32")),
        "unexpected shape for input 'x' for model 'm'. Expected [2,-1], got [3,1].",
    ),
    "rank": (
        EXACT,
        ask(tensor("x", 2, datatype="INT32")),
        "unexpected shape for input 'x' for model 'm'. Expected [2,-1], got [2].",
    ),
    "batched shape": (
        ADD,
        both(1, 15),
        "unexpected shape for input 'INPUT0' for model 'm'. Expected [-1,16], got [1,15]. "
        "NOTE: Setting a non-zero max_batch_size",
    ),
    "too many rows": (ADD, both(9, 16), "inference request batch-size must be <= 8 for 'm'"),
    "different rows": (
        ADD,
        ask(tensor("INPUT0", 1, 16), tensor("INPUT1", 2, 16)),
        "input 'INPUT1' batch size does not match other inputs for 'm': 2 and 1",
    ),
    "no batch axis": (
        Loaded(max_batch_size=4),
        ask(tensor("x")),
        "input 'x' has no shape but model requires batch dimension for 'm'",
    ),
    "byte size": (
        EXACT,
        ask(Tensor("x", "INT32", (2, 1), b"1234567")),
        "input byte size mismatch for input 'x'. Expected 8, got 7",
    ),
    "byte size of anything": (
        Loaded(),
        ask(Tensor("x", "BYTES", (2,), b"\x00" * 4)),
        "input 'x' holds 1 elements; shape [2] needs 2",
    ),
    "negative size": (
        EXACT,
        ask(Tensor("x", "INT32", (2, -1), b"")),
        "tensor 'x' has shape [2, -1]; no size may be negative",
    ),
    "negative of anything": (
        Loaded(),
        ask(Tensor("x", "INT32", (-2, -2), bytes(16))),
        "tensor 'x' has shape [-2, -2]; no size may be negative",
    ),
    "no such datatype": (
        Loaded(),
        ask(Tensor("x", "FP8", (1,), b"1")),
        "tensor 'x' has datatype 'FP8', unknown to KServe V2",
    ),
    "unknown output": (
        ADD,
        both(1, 16, outputs=("OUTPUT9",)),
        "unexpected inference output 'OUTPUT9' for model 'm'",
    ),
    "output twice": (
        ADD,
        both(1, 16, outputs=("OUTPUT0", "OUTPUT0")),
        "output 'OUTPUT0' already exists in request",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_in_words(why: str):
    loaded, request_, text = REFUSED[why]
    with pytest.raises(InvalidTensorError) as refusal:
        Signature("m", loaded).accept(request_)
    assert str(refusal.value).startswith(text)


def test_a_config_speaks_for_a_model_that_is_silent():
    part = TensorConfig(name="x", datatype="FP32", shape=(3,))
    config = ModelConfig(inputs=(part,), outputs=(part,))
    signature = Signature("m", Loaded(max_batch_size=4), config)
    described = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert signature.metadata() == {"inputs": described, "outputs": described}
    with pytest.raises(InvalidTensorError, match=r"Expected \[-1,3\]"):
        signature.accept(ask(tensor("x", 3)))


def test_a_config_can_make_an_input_optional():
    part = TensorConfig(name="INPUT1", datatype="FP32", shape=(16,), optional=True)
    signature = Signature("m", ADD, ModelConfig(inputs=(part,)))
    signature.accept(ask(tensor("INPUT0", 1, 16)))
    assert [entry["shape"] for entry in signature.metadata()["inputs"]] == [[-1, 16]] * 2


def test_a_form_that_was_accepted_is_refused_again_when_its_data_is_short():
    signature = Signature("m", EXACT)
    signature.accept(ask(tensor("x", 2, 5, datatype="INT32")))
    signature.accept(ask(tensor("x", 2, 5, datatype="INT32")))
    with pytest.raises(InvalidTensorError, match="Expected 40, got 39"):
        signature.accept(ask(Tensor("x", "INT32", (2, 5), bytes(39))))


def test_bytes_are_walked_every_time():
    signature = Signature("m", Loaded((TensorSpec("x", "BYTES", (1,)),)))
    signature.accept(ask(Tensor("x", "BYTES", (1,), b"\x01\x00\x00\x00a")))
    with pytest.raises(InvalidTensorError, match="declares 2 bytes"):
        signature.accept(ask(Tensor("x", "BYTES", (1,), b"\x02\x00\x00\x00a")))
