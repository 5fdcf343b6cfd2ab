"""Adapters of one model: registered, in host memory, in slots; swapped, removed, pinned, evicted."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends.lora.adapters import LoraAdapters
from repository.config import Adapters
from repository.errors import AdapterNotFoundError, AdapterRefusedError, NoAdapterSlotError
from tests.lora import Made, Mlp, one_thread, order, write

BYTES = 4 * 4 * (16 + 32 + 32 + 8)  # of an adapter of rank 4, float32
NEAR = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> Mlp:
    return Mlp().eval()


def lora_of(model: Mlp, **config: int) -> LoraAdapters:
    return LoraAdapters(model, Adapters(**{"slots": 2, "max_rank": 8, **config}))


def add(lora: LoraAdapters, made: Made, name: str, **wishes: bool) -> AdapterReport:
    (report,) = lora.adapt([order(made.path, name, **wishes)])
    return report


def run(lora: LoraAdapters, model: Mlp, slots: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    lora.rows(slots)
    with torch.inference_mode():
        return model(x)


def residences(lora: LoraAdapters) -> dict[str, str]:
    return {report.name: report.residence for report in lora.adapt([])}


def test_registering_costs_no_host_memory_and_slots_are_made_once(
    tmp_path: Path, model: Mlp
) -> None:
    lora = lora_of(model)
    assert lora.device_bytes == 0
    first = add(lora, write(tmp_path / "a", {"fc1": (32, 16)}), "a")
    assert first == AdapterReport("a", "", "registered", 4, 4 * 4 * 48)
    slots = 3 * 8 * 4  # N + 1, rank, bytes of a float32
    assert lora.device_bytes == slots * 48
    for i in range(5):
        assert not add(lora, write(tmp_path / f"b{i}"), f"b{i}").error
    assert lora.device_bytes == slots * (48 + 40) and lora.host_bytes == 0
    assert lora.adapt([]) == []


def test_an_adapter_goes_from_disk_to_host_to_a_slot_and_back(tmp_path: Path, model: Mlp) -> None:
    lora = lora_of(model, host_memory=2 * BYTES)
    for name in "abcd":
        add(lora, write(tmp_path / name), name)
    for name in "abc":
        slot = lora.take(name)
        assert slot
        lora.give(slot)
    assert residences(lora) == {"b": "device", "c": "device"}  # host memory held two of three
    assert lora.host_bytes == 2 * BYTES
    slot = lora.take("d")
    assert slot
    assert residences(lora) == {"c": "device", "d": "device"}


def test_preloaded_ones_are_in_host_memory_and_pinned_ones_keep_a_slot(
    tmp_path: Path, model: Mlp
) -> None:
    lora = lora_of(model)
    assert add(lora, write(tmp_path / "a", seed=1), "a", preload=True).residence == "host"
    assert add(lora, write(tmp_path / "p", seed=2), "p", pin=True).residence == "device"
    shutil.rmtree(tmp_path / "a")
    pinned = lora.take("p")
    assert pinned
    lora.give(pinned)
    for i in range(4):
        add(lora, write(tmp_path / f"x{i}"), f"x{i}")
        slot = lora.take(f"x{i}")
        assert slot and slot != pinned
        lora.give(slot)
    assert residences(lora)["p"] == "device"
    assert lora.take("a")  # its files are gone, its host copy is not


def test_when_all_slots_are_in_use_one_waits_and_when_all_are_pinned_it_is_told(
    tmp_path: Path, model: Mlp
) -> None:
    lora = lora_of(model)
    made = {name: write(tmp_path / name) for name in "abc"}
    for name, each in made.items():
        add(lora, each, name)
    a, b = lora.take("a"), lora.take("b")
    assert a and b and lora.take("a") == a
    assert lora.take("c") is None
    lora.give(a)
    assert lora.take("c") is None  # it was taken twice
    lora.give(a)
    assert lora.take("c") == a
    lora.give(a)
    lora.give(b)
    assert add(lora, made["a"], "a", pin=True).residence == "device"
    assert add(lora, made["b"], "b", pin=True).residence == "device"
    with pytest.raises(NoAdapterSlotError, match=r"The adapter c .* all 2 slots"):
        lora.take("c")
    assert (
        "all 2 slots of this model are pinned (a, b)" in add(lora, made["c"], "c", pin=True).error
    )
    assert add(lora, made["a"], "a").error == ""  # unpinned
    assert lora.take("c")


def test_a_pinned_adapter_gets_the_next_slot_where_all_are_in_use(
    tmp_path: Path, model: Mlp
) -> None:
    lora = lora_of(model, host_memory=0)
    for name in "abp":
        add(lora, write(tmp_path / name), name)
    a, b = lora.take("a"), lora.take("b")
    assert a and b
    assert add(lora, write(tmp_path / "p"), "p", pin=True).residence == "host"
    assert lora.host_bytes == BYTES
    lora.give(b)
    assert residences(lora)["p"] == "device" and lora.host_bytes == 0
    assert lora.take("p") == b
    lora.give(a)
    lora.give(b)


def test_a_swapped_adapter_stays_what_it_was_for_those_who_run_on_it(
    tmp_path: Path, model: Mlp
) -> None:
    lora = lora_of(model, slots=3)
    x = torch.randn(2, 16)
    old, new = write(tmp_path / "v1", seed=1), write(tmp_path / "v2", seed=2, r=2)
    add(lora, old, "a")
    running = lora.take("a")
    assert running
    add(lora, new, "a", preload=True)
    fresh = lora.take("a")
    assert fresh and fresh != running
    y = run(lora, model, [running, fresh], x)
    lora.rows([0, 0])
    torch.testing.assert_close(y[0], old.mlp(model, x)[0], **NEAR)
    torch.testing.assert_close(y[1], new.mlp(model, x)[1], **NEAR)
    lora.give(running)
    lora.give(fresh)
    for name in "bc":  # the old one's slot is free again
        add(lora, write(tmp_path / name), name)
        assert lora.take(name) != fresh


def test_a_removed_adapter_stays_for_those_who_run_on_it_and_is_not_found_by_others(
    tmp_path: Path, model: Mlp
) -> None:
    lora = lora_of(model, slots=1)
    made, x = write(tmp_path / "a"), torch.randn(1, 16)
    add(lora, made, "a", pin=True)
    slot = lora.take("a")
    assert slot
    assert lora.adapt([AdapterOrder("a", remove=True)]) == [AdapterReport("a")]
    assert lora.adapt([AdapterOrder("a", remove=True)]) == [AdapterReport("a")]
    with pytest.raises(AdapterNotFoundError, match="The adapter a has not been registered"):
        lora.take("a")
    with pytest.raises(AdapterNotFoundError):
        lora.check("a")
    lora.check("")
    y = run(lora, model, [slot], x)
    lora.rows([0])
    torch.testing.assert_close(y, made.mlp(model, x), **NEAR)
    add(lora, write(tmp_path / "b"), "b")
    assert lora.take("b") is None
    lora.give(slot)
    assert lora.take("b") == slot
    assert lora.host_bytes == BYTES


def test_a_refused_swap_leaves_the_old_one_as_it_was(tmp_path: Path, model: Mlp) -> None:
    lora = lora_of(model)
    made = write(tmp_path / "a")
    add(lora, made, "a")
    slot = lora.take("a")
    assert slot
    lora.give(slot)
    report = add(lora, write(tmp_path / "bad", r=16), "a")
    assert "its rank is 16, the slots of this model hold up to 8" in report.error
    assert residences(lora) == {"a": "device"} and lora.take("a") == slot


def test_one_order_that_is_refused_does_not_harm_the_others(tmp_path: Path, model: Mlp) -> None:
    lora = lora_of(model)
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", {"fc9": (8, 8)})
    reports = lora.adapt([order(bad.path, "bad"), order(good.path, "good")])
    assert "matches no layer" in reports[0].error and reports[1].error == ""
    with pytest.raises(AdapterNotFoundError):
        lora.take("bad")
    assert lora.take("good")


def test_an_adapter_that_leaves_a_slot_leaves_nothing_in_it(tmp_path: Path, model: Mlp) -> None:
    lora = lora_of(model, slots=1)
    both = write(tmp_path / "both", seed=1, r=8)
    half = write(tmp_path / "half", {"fc1": (32, 16)}, seed=2, r=2)
    x = torch.randn(3, 16)
    for name, made in (("both", both), ("half", half), ("both", both)):
        add(lora, made, name)
        slot = lora.take(name)
        assert slot == 1
        y = run(lora, model, [1, 0, 1], x)
        torch.testing.assert_close(y[[0, 2]], made.mlp(model_of(), x)[[0, 2]], **NEAR)
        lora.give(slot)


def model_of() -> Mlp:
    return Mlp().eval()


def test_hundreds_of_adapters_over_few_slots_are_always_the_right_ones(tmp_path: Path) -> None:
    """300 adapters, 4 slots, host memory for 10: random batches, swaps, removals."""
    count, chance = 300, random.Random(7)
    model, plain = model_of(), model_of()
    lora = lora_of(model, slots=4, host_memory=10 * BYTES)
    layers = ({"fc1": (32, 16)}, {"fc2": (8, 32)}, {"fc1": (32, 16), "fc2": (8, 32)})
    made: dict[str, Made] = {}

    def renew(name: str, seed: int) -> None:
        ranks = {"r": chance.choice((1, 2, 4, 8)), "alpha": chance.choice((1, 4, 16))}
        made[name] = write(tmp_path / f"{name}-{seed}", chance.choice(layers), seed=seed, **ranks)
        assert add(lora, made[name], name).error == ""

    for seed in range(count):
        renew(f"a{seed}", seed)
    gc.collect()
    device, tensors = lora.device_bytes, tensors_alive()
    for turn in range(160):
        if turn % 10 == 0:
            renew(chance.choice(list(made)), count + turn)
        names = [chance.choice(["", *made]) for _ in range(chance.randint(1, 6))]
        slots = [lora.take(name) for name in names]
        rows = [(name, slot) for name, slot in zip(names, slots, strict=True) if slot is not None]
        assert len({name for name in names if name}) > 4 or len(rows) == len(names)
        x = torch.randn(len(rows), 16)
        y = run(lora, model, [slot for _, slot in rows], x)
        for i, (name, slot) in enumerate(rows):
            expected = made[name].mlp(plain, x) if name else plain(x)
            torch.testing.assert_close(y[i], expected[i], **NEAR)
            lora.give(slot)
        assert lora.host_bytes <= 10 * BYTES
    lora.rows([0])
    gc.collect()
    assert lora.device_bytes == device
    # One piece of memory of each host copy, and its matrices; what the test itself made anew.
    assert tensors_alive() - tensors < 10 * 5 + 25 * 4 + 20


def tensors_alive() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("moment", ["at registration", "at preload", "at take"])
def test_files_that_changed_meanwhile_are_refused(tmp_path: Path, model: Mlp, moment: str) -> None:
    lora = lora_of(model)
    ordered = order(write(tmp_path / "a", seed=1).path, "a", preload=moment == "at preload")
    if moment == "at take":
        assert lora.adapt([ordered])[0].error == ""
    write(tmp_path / "a", seed=2)  # as large as before
    if moment == "at take":
        with pytest.raises(
            AdapterRefusedError, match=r"The adapter a: adapter_.* has changed since"
        ):
            lora.take("a")
        lora.adapt([order(tmp_path / "a", "a")])
        assert lora.take("a")
    else:
        assert "has changed since it was registered" in lora.adapt([ordered])[0].error
    assert str(tmp_path) not in lora.adapt([ordered])[0].error


def test_files_that_went_away_are_refused(tmp_path: Path, model: Mlp) -> None:
    lora = lora_of(model)
    add(lora, write(tmp_path / "a"), "a")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterRefusedError, match=r"adapter_config.json is not there"):
        lora.take("a")
    slot = lora.take("")
    assert slot == 0
    lora.give(slot)
