"""What several workers have in memory, told as one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from repository.hosts import together
from repository.lifecycle.placement import all_memory, by_kind

KINDS = st.dictionaries(st.sampled_from(["weights", "kv", "adapters"]), st.integers(0, 1000))


def test_the_rest_of_a_process_is_workspace() -> None:
    known = {"cpu": {"kv": 5}, "host": {"weights": 20}, "cuda:0": {"context": 7}}
    assert together.with_the_rest(known, 40) == {
        "cpu": {"kv": 5, "workspace": 15},
        "host": {"weights": 20},
        "cuda:0": {"context": 7},
    }
    assert known["cpu"] == {"kv": 5}
    assert together.with_the_rest({}, 3) == {"cpu": {"workspace": 3}}


@given(here=KINDS, asleep=KINDS, resident=st.integers(0, 5000))
def test_what_lies_here_and_what_sleeps_here_are_what_the_process_has(
    here: dict[str, int], asleep: dict[str, int], resident: int
) -> None:
    found = together.with_the_rest({"cpu": here, "host": asleep, "cuda:1": {"kv": 9}}, resident)
    assert sum(by_kind(found).values()) == resident + 9
    assert all(size >= 0 for kinds in found.values() for size in kinds.values())


def test_workers_are_added_up_by_device_and_kind() -> None:
    one, other = {"cuda:0": {"weights": 1}}, {"cuda:1": {"weights": 2}, "cuda:0": {"weights": 3}}
    assert all_memory([one, other]) == {"cuda:0": {"weights": 4}, "cuda:1": {"weights": 2}}
