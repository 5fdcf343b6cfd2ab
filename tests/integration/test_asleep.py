"""Moving a model's tensors: what becomes of views, ties and strides, and of who fails on the way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from repository.backends import pages
from repository.backends.asleep import Movable, laid_out, tensors_of
from repository.backends.device_use import CONTEXT, DeviceUse
from repository.backends.ferry import mapped
from repository.backends.weights import read_weights
from repository.reports import GpuProcess

PAGE = pages.PAGE


class Lane:
    """A ferry whose device is this memory too. `room`: bytes that the host has for it."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.out: list[torch.Tensor] = []
        self.emptied = 0

    def memory(self, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        for size in sizes:
            if sum(map(len, self.out)) + size > self.room:
                raise MemoryError(f"no {size} bytes")
            self.out.append(torch.full((size,), 0xEE, dtype=torch.uint8))
            yield self.out[-1]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.late.append((target, source))  # as late as can be, like a device that is busy

    def wait(self) -> None:
        for target, source in self.late:
            target.copy_(source)
        self.late.clear()

    def empty(self) -> None:
        self.emptied += 1

    def give(self, memory: list[torch.Tensor]) -> None:
        assert not self.late, "memory is given back that copies still use"
        for each in memory:
            self.out = [one for one in self.out if one is not each]
        memory.clear()


def test_memory_to_sleep_in_is_private_so_that_it_can_have_huge_pages():
    made = mapped(4 << 20)
    assert made.numel() == 4 << 20 and not made.any()
    at = made.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights, *_ = line.split()
        low, _, high = where.partition("-")
        if int(low, 16) <= at < int(high, 16):
            assert rights == "rw-p"
            break


class Tied(torch.nn.Module):
    """A view, a tie, strides, a buffer, a plain attribute, an empty one and half a byte of nothing."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(64, 32)
        self.one = torch.nn.Parameter(whole[:40], requires_grad=False)
        self.other = torch.nn.Parameter(whole.t()[:, 40:], requires_grad=False)
        self.head = torch.nn.Linear(32, 64, bias=False)
        self.embedding = torch.nn.Embedding(64, 32)
        self.embedding.weight = self.head.weight
        self.register_buffer("scale", torch.randn(3, dtype=torch.float64))
        self.register_buffer("none", torch.empty(0, 7))
        self.plain = torch.arange(5)
        self.requires_grad_(False)


def seen(model: torch.nn.Module) -> list[tuple[bytes, tuple[int, ...], int]]:
    return [
        # A clone: memory that numpy has seen cannot be given back.
        (bytes(t.clone().contiguous().view(torch.uint8).numpy()), t.stride(), t.storage_offset())
        for t in tensors_of(model)
    ]


@pytest.mark.parametrize("block", [512, 1 << 10, 1 << 27])
def test_views_ties_and_strides_are_as_before_whatever_the_blocks(block):
    model, lane = Tied(), Lane()
    before = seen(model)
    movable = Movable("cpu", lambda: {"weights": tensors_of(model)}, ferry=lane, block=block)
    size = sum(s.nbytes() for s in movable._storages()["weights"])
    for _ in range(3):
        movable.sleep()
        assert all(t.untyped_storage().nbytes() == 0 for t in tensors_of(model))
        assert movable.memory() == {"host": {"weights": size}}
        assert all(len(each) <= block for each in lane.out)
        movable.wake()
        assert seen(model) == before and lane.out == []
    assert model.embedding.weight is model.head.weight and lane.emptied == 3
    model.head.weight[0, 0] = 7
    assert model.embedding.weight[0, 0] == 7


def test_who_finds_no_room_in_the_host_has_moved_nothing():
    model, lane = Tied(), Lane(room=3000)
    before = seen(model)
    movable = Movable("cpu", lambda: {"weights": tensors_of(model)}, ferry=lane, block=1024)
    with pytest.raises(MemoryError, match="no 1024 bytes"):
        movable.sleep()
    assert seen(model) == before and lane.out == [] and not movable.sleeping
    lane.room = 1 << 30
    movable.sleep()
    movable.wake()
    assert seen(model) == before


@pytest.mark.parametrize("ferry", [None, Lane()])
def test_scratch_is_given_back_and_zeros_after_waking(ferry):
    keys = [torch.ones(4, 8, 16), torch.ones(4, 8, 16)]
    weight = torch.ones(10)
    row = keys[0][1]
    movable = Movable("cpu", lambda: {"weights": [weight], "kv": keys}, ferry=ferry)
    movable.sleep()
    assert [k.untyped_storage().nbytes() for k in keys] == [0, 0]
    assert "kv" not in movable.memory().get("host", {}) and "cpu" not in movable.memory()
    movable.wake()
    assert not any(k.any() for k in keys) and weight.sum() == 10
    keys[0][1] = 3
    assert (row == 3).all(), "a view of it is one still"


def test_what_two_kinds_share_counts_once():
    weight = torch.ones(1 << 20)
    movable = Movable("cpu", lambda: {"weights": [weight, weight[5:]], "adapters": [weight]})
    (kinds,) = movable.memory().values()
    assert list(kinds) == ["weights"] and 4 << 20 <= kinds["weights"] <= (4 << 20) + 2 * PAGE


def test_blocks_are_full_and_nothing_overlaps():
    sizes, pieces = laid_out([5, 0, 2000, 512, 3], 1024)
    assert sizes == [1024, 1024, 1024, 3]
    assert sum(p.size for p in pieces) == 2520
    taken: set[tuple[int, int]] = set()
    for piece in pieces:
        assert piece.begin + piece.size <= sizes[piece.block]
        mine = {(piece.block, at) for at in range(piece.begin, piece.begin + piece.size)}
        assert not taken & mine
        taken |= mine
    assert laid_out([], 1024) == ([], [])


# pages of files ------------------------------------------------------------------------------------


def test_mapped_weights_give_their_pages_back_and_changed_ones_keep_them(tmp_path):
    torch.manual_seed(0)
    wanted = {"a": torch.randn(1 << 18), "b": torch.randn(1 << 18)}
    save_file(wanted, tmp_path / "m.safetensors")
    found = read_weights([tmp_path / "m.safetensors"], private=True)
    assert found["a"].equal(wanted["a"]) and found["b"].equal(wanted["b"])
    found["b"][5] = 42.0
    movable = Movable("cpu", lambda: {"weights": found.values()})
    there = movable.memory()["cpu"]["weights"]
    assert there >= 2 << 20
    movable.sleep()
    assert movable.memory()["host"]["weights"] <= 2 * PAGE
    movable.wake()
    assert movable.memory()["cpu"]["weights"] <= 2 * PAGE
    assert found["b"][5] == 42.0 and found["a"].equal(wanted["a"])
    assert found["b"][6:].equal(wanted["b"][6:])


def test_memory_of_no_file_is_never_forgotten():
    numbers = torch.arange(1 << 18)
    span = (numbers.data_ptr(), numbers.nbytes)
    assert pages.forget([span]) == 0
    assert numbers.equal(torch.arange(1 << 18))
    assert (pages.resident([span, span]) or 0) >= numbers.nbytes


def test_spans_are_whole_pages_and_none_twice():
    assert pages.merged([(PAGE + 1, 1), (PAGE + 5, PAGE), (9 * PAGE, 0), (5 * PAGE, PAGE)]) == [
        (PAGE, 2 * PAGE),
        (5 * PAGE, PAGE),
    ]


# a GPU ---------------------------------------------------------------------------------------------


class Card:
    """One GPU, with whoever is on it."""

    count = 1
    total = 1000

    def __init__(self, **processes: int) -> None:
        self.on = {int(pid.removeprefix("p")): used for pid, used in processes.items()}
        self.silent = False

    @property
    def free(self) -> int:
        return self.total - sum(self.on.values())

    def read(self, index: int) -> Card | None:
        return None if self.silent else self

    def processes(self, index: int) -> list[GpuProcess]:
        return [] if self.silent else [GpuProcess(pid, None, n) for pid, n in self.on.items()]


def test_the_process_that_came_is_ours_and_is_asked_again_each_time():
    card = Card(p7=100)
    use = DeviceUse(0, card)
    use.before()
    card.on[9] = 50
    use.after(reserved=20)
    assert use.bytes(reserved=20) == 50
    card.on[9] = 80  # kernels were loaded
    assert use.bytes(reserved=20) == 80
    assert use.bytes(reserved=90) == 90


def test_our_own_pid_is_ours_whoever_else_came():
    card = Card()
    use = DeviceUse(0, card)
    use.before()
    card.on |= {5: 300, os.getpid(): 60}
    use.after(reserved=20)
    assert use.bytes(reserved=30) == 60


def test_without_a_name_the_growth_of_the_device_is_the_context():
    card = Card(p7=100)
    use = DeviceUse(0, card)
    use.before()
    card.on |= {8: 25, 9: 50}
    use.after(reserved=20)
    assert use.bytes(reserved=30) == 30 + 55
    card.silent = True
    assert use.bytes(reserved=40) == 40 + 55


def test_what_another_took_meanwhile_is_not_called_our_context():
    card = Card(p7=1 << 30)
    card.total = 80 << 30
    use = DeviceUse(0, card)
    use.before()
    card.on |= {8: 500 << 20, 9: 30 << 30}  # two at once: neither is known to be ours
    use.after(reserved=2 << 20)
    assert use.bytes(reserved=7) == 7 + CONTEXT
    use.after(reserved=0, model=5 << 30)  # of which nobody says what exactly it took
    assert use.bytes(reserved=0) == CONTEXT
    assert use.bytes(reserved=0, model=5 << 30) == (5 << 30) + CONTEXT
    use.after(reserved=0, model=None)
    assert use.bytes(reserved=0) == (30 << 30) + (500 << 20)


def test_without_a_name_what_the_model_took_is_told_only_while_it_has_it():
    card = Card(p7=100)
    use = DeviceUse(0, card)
    use.before()
    card.on |= {8: 25, 9: 50}
    use.after(0, model=60)
    assert use.bytes(0, model=60) == 75 and use.bytes(0) == 15
    with use.giving_back():
        card.on[9] = 40
    assert use.bytes(0) == 5
    with use.giving_back():
        card.on[9] = 50
    assert use.bytes(0) == 15
    with use.giving_back():
        card.silent = True
    assert use.bytes(0) == 15


def test_without_nvml_there_is_what_the_framework_says():
    for gpus in (None, Card()):
        use = DeviceUse(1, gpus)
        use.before()
        use.after(5)
        assert use.bytes(7) == 7


def test_a_gpus_figures_are_kinds_workspace_and_context():
    card = Card()
    use = DeviceUse(0, card)
    use.before()
    card.on[os.getpid()] = 500
    use.after(0)
    weight = torch.ones(100, dtype=torch.uint8)
    movable = Movable(
        "cpu",
        lambda: {"weights": [weight]},
        ferry=Lane(),
        reserved=lambda: 160 if not movable.sleeping else 10,
        use=use,
    )
    assert movable.memory()["cpu"]["context"] == 340
    movable.sleep()
    assert movable.memory() == {
        "host": {"weights": 100},
        "cpu": {"workspace": 10, "context": 490},
    }
