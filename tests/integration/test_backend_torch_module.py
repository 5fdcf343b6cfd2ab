"""Models of model.safetensors and model.py: what goes in, what comes out, what is told otherwise."""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch

from repository.backends.base import Room
from repository.errors import (
    AdapterNotFoundError,
    IncompleteFilesError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.tensors import DATATYPES, Tensor
from tests.hosting import ask
from tests.torch_models import (
    ECHO,
    MLP,
    answer,
    given,
    listed,
    loaded,
    mlp,
    order_of,
    write,
    write_mlp,
)

ROWS = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)


def returning(what: str, takes: str = "self, x") -> str:
    return f"""
        import collections, dataclasses, torch
        Pair = collections.namedtuple("Pair", "a b")
        @dataclasses.dataclass
        class Data:
            a: torch.Tensor
            b: object = None
        class Model(torch.nn.Module):
            def forward({takes}):
                return {what}
    """


def asked(tmp_path: Any, source: str, only: tuple[str, ...] = (), **config: Any) -> Any:
    """What a model without weights answers to x."""
    with loaded(order_of(write(tmp_path / "1", source), **config)) as (backend, _):
        return answer(backend.infer(ask(*given(x=ROWS), outputs=only)))


# tensors --------------------------------------------------------------------------------------------


def test_every_datatype_makes_the_round_trip_unchanged_small_large_and_misaligned(tmp_path):
    with loaded(order_of(write(tmp_path / "1", ECHO))) as (backend, _):
        for datatype, known in DATATYPES.items():
            if datatype == "BYTES":
                continue
            for shape in ((), (0, 3), (2, 3), (50, 60)):
                bits = np.arange(np.prod(shape, dtype=int) * known.size) % 251
                data = (bits & 1 if datatype == "BOOL" else bits).astype(np.uint8).tobytes()
                crooked = memoryview(b"\0" + data)[1:]
                for sent in (data, memoryview(bytearray(data)), crooked):
                    (got,) = backend.infer(ask(Tensor("x", datatype, shape, sent))).outputs
                    assert (got.name, got.datatype, tuple(got.shape)) == ("y", datatype, shape)
                    assert bytes(got.data) == data
        with pytest.raises(InvalidTensorError, match="BYTES; torch models take numbers"):
            backend.infer(ask(*given(x=np.array([b"a"], dtype=object))))
        with pytest.raises(InvalidTensorError, match="size mismatch"):
            backend.infer(ask(Tensor("x", "FP32", (2, 2), b"123")))


def test_answers_lie_in_the_room_where_there_is_one_whatever_their_strides(tmp_path):
    source = returning("{'t': x.t(), 's': x[:2], 'e': x[::2, 1:]}")
    x = np.random.default_rng(0).normal(size=(60, 70)).astype(np.float32)
    want = {"t": x.T, "s": x[:2], "e": x[::2, 1:]}
    with loaded(order_of(write(tmp_path / "1", source))) as (backend, _):
        for size in (64, 20_000, 1 << 20):
            memory = bytearray(size)
            response = backend.infer_into(ask(*given(x=x)), Room(memoryview(memory)))
            for tensor in response.outputs:
                assert tensor.array().tolist() == want[tensor.name].tolist()
        place = Room(memoryview(memory)).bring(response.outputs[0].data)
        assert place == 0


def test_an_answer_does_not_lie_in_the_requests_memory(tmp_path):
    memory = bytearray(np.ones((100, 100), np.float32).tobytes())
    with loaded(order_of(write(tmp_path / "1", ECHO))) as (backend, _):
        (got,) = backend.infer(ask(Tensor("x", "FP32", (100, 100), memory))).outputs
        memory[:] = bytes(len(memory))
        assert (got.array() == 1).all()


def test_a_model_that_writes_to_its_input_is_noticed_and_gets_copies(tmp_path, caplog):
    source = returning("x.mul_(2)")
    data = np.ones((100, 100), np.float32).tobytes()
    with loaded(order_of(write(tmp_path / "1", source))) as (backend, _):
        for memory in (bytearray(data), data):
            (got,) = backend.infer(ask(Tensor("x", "FP32", (100, 100), memory))).outputs
            assert (got.array() == 2).all()
    assert memory == np.ones((100, 100), np.float32).tobytes()
    assert "the model writes to its input 'x'" in caplog.text


def test_not_a_number_and_infinity_come_out_bit_for_bit(tmp_path):
    bits = struct.pack("<4I", 0x7FC01234, 0xFFC00001, 0x7F800000, 0xFF800000)
    with loaded(order_of(write(tmp_path / "1", returning("x + 0")))) as (backend, _):
        (got,) = backend.infer(ask(Tensor("x", "FP32", (4,), bits))).outputs
        assert np.isnan(got.array()[:2]).all()
        assert bytes(got.data)[8:] == bits[8:]


# names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "outputs", "names"),
    [
        ("x", (), ["output"]),
        ("x", ("y",), ["y"]),
        ("(x, x + 1)", (), ["output_0", "output_1"]),
        ("[x, x + 1]", ("a", "b"), ["a", "b"]),
        ("(x, x + 1, None)", ("a", "b"), ["a", "b"]),
        ("{'a': x, 'b': x + 1, 'c': None}", (), ["a", "b"]),
        ("{'a': x, 'b': x + 1}", ("b",), ["b"]),
        ("Data(x)", (), ["a"]),
        ("Data(x, x + 1)", (), ["a", "b"]),
        ("Pair(x, x + 1)", (), ["a", "b"]),
    ],
)
def test_outputs_are_named_by_the_mapping_or_the_config_or_their_number(
    tmp_path, what, outputs, names
):
    config = tuple(listed(name, shape=(-1, 4)) for name in outputs) or None
    got = asked(tmp_path, returning(what), outputs=config)
    assert list(got) == names
    for name, array in got.items():
        assert array.tolist() == (ROWS + (name[-1] in "b1")).tolist()


@pytest.mark.parametrize(
    ("what", "config", "kind", "text"),
    [
        ("3", {}, InferenceFailedError, "it returned int"),
        ("(x, 'a')", {}, InferenceFailedError, "returned str as 'output_1'"),
        ("(x,)", {"outputs": (listed("a"), listed("b"))}, InferenceFailedError, "1 tensors.*2 out"),
        ("{'a': x}", {"outputs": (listed("b"),)}, InferenceFailedError, "no 'b'; it returned 'a'"),
        ("x", {"outputs": (listed("y", "FP64"),)}, InferenceFailedError, "FP32 .*declared as FP64"),
        ("x + 1j", {}, InferenceFailedError, "complex64 .*no datatype"),
        ("x.sum()", {"max_batch_size": 8}, InferenceFailedError, r"shape \[\] for a batch of 5"),
        ("x[1:]", {"max_batch_size": 8}, InferenceFailedError, r"shape \[4, 4\] for a batch of 5"),
    ],
)
def test_what_a_model_may_not_return_is_told(tmp_path, what, config, kind, text):
    with pytest.raises(kind, match=text):
        asked(tmp_path, returning(what), **config)


def test_only_the_outputs_asked_for_come_in_their_order(tmp_path):
    source = returning("{'a': x, 'b': x + 1, 'c': x + 2}")
    assert list(asked(tmp_path, source, only=("c", "a"))) == ["c", "a"]


@pytest.mark.parametrize(
    ("takes", "inputs", "config", "text"),
    [
        ("self, a, b", "b a", (), ""),
        ("self, a, b", "p q", (), ""),
        ("self, a, b", "q p", ("p", "q"), ""),
        ("self, a, *, b", "a b", (), ""),
        ("self, *both", "p q", (), ""),
        ("self, **both", "a b", (), ""),
        ("self, a, b, c=None", "a b", (), ""),
        ("self, a, b", "a", (), r"'b' is missing: forward\(\) takes \(a, b\)"),
        ("self, a, b", "a q", (), r"takes \(a, b\), and no 'q'"),
        ("self, a, b", "p q r", (), r"takes \(a, b\); the request has 3 inputs \(p, q, r\)"),
        ("self, a, b", "p", (), r"takes \(a, b\); the request has 1 inputs"),
        ("self, a, *, b", "p q", (), r"takes \(a, \*, b\)|takes \(a, b\)"),
        ("self, a, b", "q", ("p", "q"), r"'p' is missing|has 1 inputs"),
    ],
)
def test_inputs_go_by_name_where_forward_bears_their_names_else_in_order(
    tmp_path, takes, inputs, config, text
):
    first = "both[0]" if "*both" in takes and "**" not in takes else "a"
    second = "both[1]" if "*both" in takes and "**" not in takes else "b"
    if "**" in takes:
        first, second = "both['a']", "both['b']"
    source = returning(f"{first} - {second}", takes)
    values = {"a": 5.0, "b": 2.0, "p": 5.0, "q": 2.0, "r": 1.0}
    tensors = given(**{name: np.float32([values[name]]) for name in inputs.split()})
    listed_inputs = tuple(listed(name) for name in config) or None
    with loaded(order_of(write(tmp_path / "1", source), inputs=listed_inputs)) as (backend, _):
        if not text:
            assert answer(backend.infer(ask(*tensors)))["output"].tolist() == [3.0]
        else:
            with pytest.raises(InvalidTensorError, match=text):
                backend.infer(ask(*tensors))


def test_requests_that_do_not_fit_the_config_are_the_clients_fault(tmp_path):
    order = order_of(write(tmp_path / "1", ECHO), inputs=(listed("x"),), outputs=(listed("y"),))
    with loaded(order) as (backend, _):
        for request, text in (
            (ask(*given(z=ROWS)), "no input 'z'"),
            (ask(*given(x=ROWS.astype(np.float64))), "is FP64; the model wants FP32"),
            (ask(*given(x=ROWS), outputs=("q",)), "no output 'q'"),
        ):
            with pytest.raises(InvalidTensorError, match=text):
                backend.infer(request)


# loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"options": {"class": "Net"}}, "model.py has no class 'Net'"),
        ({"options": {"class": "torch"}}, "model.py has no class 'torch'"),
        ({"options": {"class": "Plain"}}, "'Plain' in model.py is no torch.nn.Module"),
        ({"options": {"init": [1]}}, "options.init is .* must be of type dict"),
        ({"options": {"init": {1: 2}}}, "options.init must be a mapping of names"),
        ({"options": {"dtype": "int8"}}, "options.dtype is 'int8'; .* float16, bfloat16"),
        ({"options": {"strickt": True}}, "did you mean 'strict'"),
        ({"inputs": (listed("x"), listed("y"))}, r"takes \(x\), and no 'y'; name the inputs"),
    ],
)
def test_a_config_that_cannot_be_meant_fails_the_load(tmp_path, config, text):
    folder = write(tmp_path / "1", MLP + "    class Plain:\n        pass\n", mlp().state_dict())
    with pytest.raises(LoadFailedError, match=text), loaded(order_of(folder, **config)):
        pass


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"two.bias": None}, "it lacks two.bias, which the class has"),
        ({"three": torch.ones(2)}, "it has three, which the class lacks"),
        ({"two.bias": torch.ones(9)}, r"size mismatch for two.bias: .*\[9\].*\[3\]"),
    ],
)
def test_weights_and_class_must_agree_by_name_and_shape(tmp_path, change, text):
    tensors = {k: v for k, v in {**mlp().state_dict(), **change}.items() if v is not None}
    folder = write(tmp_path / "1", MLP, tensors)
    with (
        pytest.raises(LoadFailedError, match=f"^model.safetensors does not fit: .*{text}") as told,
        loaded(order_of(folder)),
    ):
        pass
    loose = order_of(folder, options={"strict": False})
    if "size" in text:
        with pytest.raises(LoadFailedError, match=text), loaded(loose):
            pass
    else:
        assert "options.strict" in str(told.value)
        with loaded(loose) as (_, said):
            named = said.details["weights_missing"] + said.details["weights_unused"]
            assert named == list(change)


def test_options_build_the_class_and_choose_its_precision(tmp_path):
    state = mlp(width=16).state_dict()
    options = {"init": {"width": 16}, "dtype": "bfloat16", "class": "Model"}
    order = order_of(
        write(tmp_path / "1", MLP, state), options=options, outputs=(listed("y", shape=(-1, 3)),)
    )
    with loaded(order) as (backend, said):
        assert said.memory["weights"] == 2 * sum(t.numel() for t in state.values())
        got = answer(backend.infer(ask(*given(x=ROWS))))["y"]
        want = mlp(width=16).bfloat16()(torch.from_numpy(ROWS).bfloat16()).float().numpy()
        assert got.dtype == np.float32 and got.tobytes() == want.tobytes()


def test_weights_of_another_precision_become_the_classs_own(tmp_path):
    state = {name: tensor.half() for name, tensor in mlp().state_dict().items()}
    with loaded(order_of(write(tmp_path / "1", MLP, state))) as (backend, _):
        same = mlp()
        same.load_state_dict(state)
        want = same(torch.from_numpy(ROWS)).numpy()
        assert answer(backend.infer(ask(*given(x=ROWS))))["output"].tobytes() == want.tobytes()


def test_parameters_under_two_names_may_lie_in_the_file_once(tmp_path):
    source = """
        import torch
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.Linear(4, 4, bias=False)
                self.b = torch.nn.Linear(4, 4, bias=False)
                self.b.weight = self.a.weight
            def forward(self, x):
                return self.b(self.a(x))
    """
    folder = write(tmp_path / "1", source, {"b.weight": 2 * torch.eye(4)})
    with loaded(order_of(folder)) as (backend, said):
        assert answer(backend.infer(ask(*given(x=ROWS))))["output"].tolist() == (4 * ROWS).tolist()
        assert said.memory["weights"] == 64


def test_a_private_snapshot_is_mapped_and_answers_the_same(tmp_path):
    want = mlp()(torch.from_numpy(ROWS)).numpy()
    order = order_of(write_mlp(tmp_path / "1"), private=True)
    with loaded(order) as (backend, _):
        with open("/proc/self/maps") as maps:
            assert str(tmp_path / "1" / "model.safetensors") in maps.read()
        assert answer(backend.infer(ask(*given(x=ROWS))))["output"].tobytes() == want.tobytes()
    del backend
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()


def test_two_versions_in_one_process_have_modules_of_their_own_and_leave_none(tmp_path):
    before = set(sys.modules)
    backends = []
    for version in (1, 2):
        folder = write(tmp_path / str(version), "from part import *\n")
        (folder / "part.py").write_text(
            "import torch\n"
            "class Model(torch.nn.Module):\n"
            f"    def forward(self, x): return x + {version}\n"
        )
        backends.append(loaded(order_of(folder)))
    (one_, two) = backends
    with one_ as (first, _), two as (second, _):
        for backend, plus in ((first, 1), (second, 2)):
            got = answer(backend.infer(ask(*given(x=ROWS))))["output"]
            assert got.tolist() == (ROWS + np.float32(plus)).tolist()
    assert not {n for n in set(sys.modules) - before if "modeldepot" in n or n == "part"}
    assert not list(tmp_path.rglob("__pycache__"))


def test_files_that_are_missing_or_elsewhere_named(tmp_path):
    folder = write_mlp(tmp_path / "1")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with (
        pytest.raises(IncompleteFilesError, match=r"^model\.safetensors is missing$"),
        loaded(order_of(folder)),
    ):
        pass
    with loaded(order_of(folder, model_file="other.safetensors")) as (backend, _):
        assert answer(backend.infer(ask(*given(x=ROWS))))
    (folder / "model.py").unlink()
    with (
        pytest.raises(IncompleteFilesError, match=r"^model\.py is missing$"),
        loaded(order_of(folder, model_file="other.safetensors")),
    ):
        pass


def test_a_wish_for_a_gpu_that_is_not_there_fails(tmp_path):
    with (
        pytest.raises(LoadFailedError, match=r"wants cuda:7, .* set device to cpu"),
        loaded(order_of(write_mlp(tmp_path / "1"), device="cuda:7")),
    ):
        pass


# adapters --------------------------------------------------------------------------------------------


def test_a_request_for_an_adapter_that_nobody_registered_is_refused(tmp_path):
    rows = Tensor.of("@adapters", np.array([b"", b"a1", b"", b"", b""], dtype=object))
    none = Tensor.of("@adapters", np.array([b""] * 5, dtype=object))
    with loaded(order_of(write_mlp(tmp_path / "1"), max_batch_size=8)) as (backend, _):
        with pytest.raises(AdapterNotFoundError, match="The adapter a1 has not been registered"):
            backend.infer(ask(*given(x=ROWS), rows))
        want = mlp()(torch.from_numpy(ROWS)).numpy()
        assert (
            answer(backend.infer(ask(*given(x=ROWS), none)))["output"].tobytes() == want.tobytes()
        )
