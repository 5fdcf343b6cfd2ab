"""LoRA adapters on a plain torch module: as PEFT applies them, each row of a batch by one of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repository.adapters.orders import ROW_ADAPTERS
from repository.backends.torch_module import TorchModuleBackend
from repository.config import Adapters
from repository.errors import AdapterNotFoundError, InvalidTensorError
from repository.messages import InferRequest
from repository.tensors import Tensor
from tests import tiny
from tests.hosting import ask
from tests.lora import order
from tests.torch_models import answer, given, loaded, mlp, order_of, write_mlp

NAMES = ("a0", "a1", "a2", "a3")
ROWS = np.random.default_rng(7).normal(size=(9, 4)).astype(np.float32)
MIXED = ("a1", "", "a3", "a0", "a2", "a1", "", "a2", "a0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and four adapters of different ranks for its layers."""
    home = tmp_path_factory.mktemp("lora")
    write_mlp(home / "1")
    for i, name in enumerate(NAMES):
        targets = ("one", "two") if i % 2 else ("two",)
        tiny.write_adapter(home / name, mlp(), seed=i, r=1 + i, targets=targets)
    return home


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, Any]:
    """What PEFT makes of all rows under each adapter."""
    from peft import PeftModel

    x = torch.from_numpy(ROWS)
    found = {"": mlp()(x).numpy()}
    for name in NAMES:
        wrapped = PeftModel.from_pretrained(copy.deepcopy(mlp()), str(home / name))
        with torch.no_grad():
            found[name] = wrapped(x).numpy()
    return found


def asking(names: Sequence[str], rows: int = len(ROWS)) -> InferRequest:
    named = Tensor.of(ROW_ADAPTERS, np.array([n.encode() for n in names], dtype=object))
    return ask(*given(x=ROWS[:rows]), named)


def added(backend: TorchModuleBackend, home: Path) -> None:
    reports = backend.adapt([order(home / name, name) for name in NAMES])
    assert [(r.name, r.error) for r in reports] == [(name, "") for name in NAMES]


def chosen(expected: dict[str, Any], names: Sequence[str]) -> Any:
    return np.stack([expected[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("slots", [8, 2, 1])
def test_each_row_is_as_peft_gives_it_also_where_the_slots_do_not_suffice(home, expected, slots):
    config = {"max_batch_size": 16, "adapters": Adapters(slots=slots, max_rank=8)}
    with loaded(order_of(home / "1", **config)) as (backend, told):
        assert told.abilities == ("adapt", "sleep")
        added(backend, home)
        for names in (MIXED, MIXED[::-1], ("a1",) * 9):
            got = answer(backend.infer(asking(names)))["output"]
            np.testing.assert_allclose(got, chosen(expected, names), rtol=1e-5, atol=1e-5)
        plain = answer(backend.infer(ask(*given(x=ROWS))))["output"]
        assert plain.tobytes() == expected[""].tobytes()
        residences = [report.residence for report in backend.adapt([])]
        assert residences.count("device") == min(slots, len(NAMES))


TURNED = {
    "rows second": "self.one(x.transpose(0, 1)).transpose(0, 1)",
    "rows flat, second": "self.one(x.transpose(0, 1).flatten(0, 1)).view(x[0].shape[0], len(x), -1)"
    ".transpose(0, 1)",
    "rows twice": "torch.stack(self.one(torch.cat([x[:, 0], x[:, 1]])).chunk(2), 1)",
    "rows first": "self.one(x)",
}


@pytest.mark.parametrize("way", TURNED)
@pytest.mark.parametrize("length", [2, 5])
def test_a_model_that_turns_its_axes_gives_each_row_its_own_adapter(tmp_path, way, length):
    """Also where there are as many rows as there is of the other axis."""
    torch.manual_seed(3)
    write_turning(tmp_path / "1", TURNED[way])
    for i in range(2):
        tiny.write_adapter(tmp_path / f"a{i}", turning(), seed=i, r=2, targets=("one",))
    x = np.random.default_rng(1).normal(size=(5, length, 4)).astype(np.float32)
    names = ["a1", "a0", "", "a1", "a0"]
    with loaded(order_of(tmp_path / "1", max_batch_size=8)) as (backend, _):
        reports = backend.adapt([order(tmp_path / f"a{i}", f"a{i}") for i in range(2)])
        assert not any(report.error for report in reports)

        def run(x: Any, names: Sequence[str]) -> Any:
            named = Tensor.of(ROW_ADAPTERS, np.array([n.encode() for n in names], dtype=object))
            return answer(backend.infer(ask(*given(x=x), named)))["output"]

        alone = np.concatenate([run(x[i : i + 1], [name]) for i, name in enumerate(names)])
        np.testing.assert_allclose(run(x, names), alone, rtol=1e-4, atol=1e-5)


def turning() -> torch.nn.Module:
    model = torch.nn.Module()
    model.one = torch.nn.Linear(4, 4)
    return model


def write_turning(folder: Path, way: str) -> None:
    folder.mkdir()
    save_file(turning().state_dict(), folder / "model.safetensors")
    (folder / "model.py").write_text(
        "import torch\n\n\nclass Model(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.one = torch.nn.Linear(4, 4)\n\n"
        f"    def forward(self, x):\n        return {way}\n"
    )


def test_without_batching_a_request_has_one_adapter(home, expected):
    with loaded(order_of(home / "1")) as (backend, _):
        added(backend, home)
        got = answer(backend.infer(asking(["a3"])))["output"]
        np.testing.assert_allclose(got, expected["a3"], rtol=1e-5, atol=1e-5)
        with pytest.raises(InvalidTensorError, match="names 2 adapters; without batching"):
            backend.infer(asking(["a3", "a1"]))


def test_one_that_is_not_registered_or_was_removed_is_refused_and_nothing_else_is(home, expected):
    with loaded(order_of(home / "1", max_batch_size=16)) as (backend, _):
        added(backend, home)
        with pytest.raises(AdapterNotFoundError, match="The adapter zz has not been registered"):
            backend.infer(asking((*MIXED[:8], "zz")))
        backend.adapt([order(home / "a1", "a1", remove=True)])
        with pytest.raises(AdapterNotFoundError, match="The adapter a1 "):
            backend.infer(asking(MIXED))
        got = answer(backend.infer(asking(("a3",) * 9)))["output"]
        np.testing.assert_allclose(got, expected["a3"], rtol=1e-5, atol=1e-5)


def test_a_model_that_switches_adapters_off_says_so(home):
    config = {"adapters": Adapters(enabled=False)}
    with loaded(order_of(home / "1", **config)) as (backend, told):
        assert told.abilities == ("sleep",)
        (report,) = backend.adapt([order(home / "a0", "a0")])
        assert "adapters.enabled is false" in report.error
