"""When a scan is believed, what is kept when it is broken, and when to look again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.config import VersionPolicy
from repository.folder.settle import Settler, keeping
from repository.snapshot import ModelFolder, Problem, Snapshot
from tests.fakes.heart import folder, spec

T = 1_000_000.0  # a wall clock
BROKEN = Problem("m/config.yaml:1", "config", "broken")


def model(
    fingerprint: str, ctime: float = math.inf, name: str = "m", **rest: object
) -> ModelFolder:
    """By default so fresh that only a second scan can vouch for it."""
    return folder(spec(name, 1, fingerprint), newest_ctime=ctime, **rest)


def seen(*models: ModelFolder, problems: tuple[Problem, ...] = ()) -> Snapshot:
    return Snapshot({m.name: m for m in models}, problems)


def out(settler: Settler, snapshot: Snapshot, now: float) -> dict[str, str]:
    return {n: m.fingerprint for n, m in settler.offer(snapshot, now).snapshot.models.items()}


def test_new_content_counts_when_two_scans_a_settle_time_apart_agree() -> None:
    settler = Settler(1.0)
    first = settler.offer(seen(model("a")), T)
    assert (dict(first.snapshot.models), first.changed, first.look_again_s) == ({}, set(), 1.0)
    second = settler.offer(seen(model("a")), T + 0.6)
    assert second.changed == set() and second.look_again_s == pytest.approx(0.4)
    third = settler.offer(seen(model("a")), T + 1.0)
    assert third.changed == {"m"} and third.look_again_s is None


def test_what_has_been_quiet_for_the_settle_time_counts_at_once() -> None:
    settled = Settler(1.0).offer(seen(model("a", T - 1.0)), T)
    assert settled.changed == {"m"} and settled.look_again_s is None
    fresh = Settler(1.0).offer(seen(model("a", T - 0.75)), T)
    assert fresh.changed == set() and fresh.look_again_s == pytest.approx(0.25)


def test_a_stamp_of_the_future_is_not_quiet() -> None:
    settled = Settler(1.0).offer(seen(model("a", math.inf)), T)
    assert settled.changed == set() and settled.look_again_s == 1.0


def test_until_then_what_was_accepted_stands_and_every_change_begins_anew() -> None:
    settler = Settler(1.0)
    assert out(settler, seen(model("a", T - 9)), T) == {"m": "a"}
    for i in range(10):
        assert out(settler, seen(model(f"half{i}")), T + i) == {"m": "a"}
    assert out(settler, seen(model("whole")), T + 11) == {"m": "a"}
    assert out(settler, seen(model("whole")), T + 12) == {"m": "whole"}


def test_content_that_returns_to_what_it_was_needs_no_waiting() -> None:
    settler = Settler(1.0)
    out(settler, seen(model("a", T - 9)), T)
    out(settler, seen(model("b")), T + 1)
    back = settler.offer(seen(model("a")), T + 1.5)
    assert back.look_again_s is None and back.changed == set()
    assert out(settler, seen(model("b")), T + 2.4) == {"m": "a"}


def test_a_swap_by_two_renames_does_not_lose_the_model() -> None:
    settler = Settler(1.0)
    out(settler, seen(model("a", T - 9)), T)
    gone = settler.offer(seen(), T + 1)
    assert (
        list(gone.snapshot.models) == ["m"] and gone.changed == set() and gone.look_again_s == 1.0
    )
    assert out(settler, seen(model("b")), T + 1.1) == {"m": "a"}
    assert out(settler, seen(model("b")), T + 2.1) == {"m": "b"}


def test_a_model_that_stays_away_is_gone_after_the_settle_time() -> None:
    settler = Settler(1.0)
    out(settler, seen(model("a", T - 9)), T)
    assert out(settler, seen(), T + 1) == {"m": "a"}
    left = settler.offer(seen(), T + 2)
    assert (dict(left.snapshot.models), left.changed, left.look_again_s) == ({}, {"m"}, None)


def test_a_model_behind_a_folder_that_cannot_be_read_is_not_gone() -> None:
    settler = Settler(1.0)
    out(settler, seen(model("a", T - 9, "org/m")), T)
    for where in ("org", "org/m", "."):
        unread = Problem(where, "io", "cannot be read: Permission denied")
        for now in (T + 1, T + 100):
            settled = settler.offer(seen(problems=(unread,)), now)
            assert list(settled.snapshot.models) == ["org/m"] and settled.look_again_s is None
    assert out(settler, seen(problems=(Problem("or", "io", ""),)), T + 200) == {"org/m": "a"}
    assert out(settler, seen(problems=(Problem("or", "io", ""),)), T + 201) == {}


def test_a_clock_that_is_set_back_only_costs_time() -> None:
    settler = Settler(1.0)
    out(settler, seen(model("a")), T)
    assert settler.offer(seen(model("a")), T - 500).look_again_s == 1.0
    assert out(settler, seen(model("a")), T - 499) == {"m": "a"}


def test_a_timer_that_fires_early_is_not_asked_for_again_at_once() -> None:
    settler = Settler(1.0)
    settler.offer(seen(model("a")), T)
    again = settler.offer(seen(model("a")), T + 0.999_999).look_again_s
    assert again is not None and again >= 0.01


def test_news_that_are_not_in_the_files_are_passed_on_at_once() -> None:
    settler = Settler(1.0)
    settler.offer(seen(model("a", T - 9)), T)
    warned = model("a", T - 9, problems=(Problem("m", "alias", "taken", warning=True),))
    assert settler.offer(seen(warned), T).changed == {"m"}
    assert settler.offer(seen(model("a", T - 8, problems=warned.problems)), T).changed == set()


def test_an_alias_has_one_owner_also_among_old_and_new_content() -> None:
    settler = Settler(1.0)
    settler.offer(seen(model("b", T - 9, "b", aliases=("x",))), T)
    settled = settler.offer(
        seen(model("b2", name="b"), model("a", T - 9, "a", aliases=("x",))), T + 1
    )
    assert {n: m.aliases for n, m in settled.snapshot.models.items()} == {"a": ("x",), "b": ()}


# what is kept -------------------------------------------------------------------------------------


def test_a_model_that_breaks_keeps_serving_what_it_was() -> None:
    settler = Settler(1.0)
    settler.offer(seen(model("a", T - 9, aliases=("x",))), T)
    broken = ModelFolder("m", "b", problems=(BROKEN,), newest_ctime=T - 9)
    kept = settler.offer(seen(broken), T + 1).snapshot.models["m"]
    assert kept.fingerprint == "b" and kept.problems == (BROKEN,) and kept.aliases == ("x",)
    assert kept.specs[1].fingerprint == "a"
    still = settler.offer(seen(ModelFolder("m", "c", problems=(BROKEN,), newest_ctime=T)), T + 9)
    assert still.snapshot.models["m"].specs[1].fingerprint == "a"
    mended = settler.offer(seen(model("d", T)), T + 20).snapshot.models["m"]
    assert mended.specs[1].fingerprint == "d" and mended.problems == ()


def versions(
    fingerprint: str, *numbers: int, latest: int = 1, broken: tuple[int, ...] = ()
) -> ModelFolder:
    policy = VersionPolicy(latest=latest)
    specs = [spec("m", n, f"{fingerprint}{n}", version_policy=policy) for n in numbers]
    problems = tuple(Problem(f"m/{n}", "incomplete", "half", version=n) for n in broken)
    return ModelFolder("m", fingerprint, {s.version: s for s in specs}, problems=problems)


def test_a_version_that_breaks_keeps_its_old_spec_and_its_place_in_the_policy() -> None:
    kept = keeping(versions("new", 1, broken=(2,)), versions("old", 2))
    assert {v: s.fingerprint for v, s in kept.specs.items()} == {2: "old2"}
    kept = keeping(versions("new", 2, 1, latest=2, broken=(3,)), versions("old", 3, 2, latest=2))
    assert {v: s.fingerprint for v, s in kept.specs.items()} == {3: "old3", 2: "new2"}


def test_a_new_version_that_is_broken_leaves_the_rest_as_it_is_now() -> None:
    new = versions("new", 1, broken=(2,))
    assert keeping(new, versions("old", 1)) is new


def test_a_warning_keeps_nothing() -> None:
    new = ModelFolder("m", "b", problems=(Problem("m", "alias", "taken", warning=True),))
    assert keeping(new, model("a")) is new and not new.broken


# the promise as a whole ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    after_s: float
    content: int | None  # None: gone
    age_s: float  # of the newest change


LOOKS = st.lists(
    st.builds(
        Look,
        st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 3.0]),
        st.none() | st.integers(0, 3),
        st.sampled_from([-math.inf, -5.0, 0.0, 0.3, 0.99, 1.0, 60.0]),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=400)
@given(LOOKS, st.sampled_from([0.0, 1.0, 2.5]))
def test_nothing_is_told_that_was_not_seen_twice_or_quiet_and_what_lasts_is_told_in_the_end(
    looks: list[Look], settle_s: float
) -> None:
    settler = Settler(settle_s)
    now, told = T, None
    since: tuple[int | None, float] = (None, -math.inf)  # what is seen now, and since when
    for look in looks:
        now += look.after_s
        if look.content != since[0]:
            since = (look.content, now)
        models = [] if look.content is None else [model(str(look.content), now - look.age_s)]
        settled = settler.offer(seen(*models), now)
        after = settled.snapshot.models.get("m")
        text = after.fingerprint if after else None
        quiet = look.content is not None and look.age_s >= settle_s
        if text != told:
            assert text == (None if look.content is None else str(look.content))
            assert quiet or now - since[1] >= settle_s
        assert ("m" in settled.changed) is (text != told)
        assert (settled.look_again_s is None) is (
            text == (models[0].fingerprint if models else None)
        )
        told = text
    if looks:
        last = looks[-1].content
        models = [] if last is None else [model(str(last))]
        for _ in range(3):
            final = settler.offer(seen(*models), now)
            now += final.look_again_s or 0.0
        assert {m.fingerprint for m in final.snapshot.models.values()} == {
            m.fingerprint for m in models
        }
        assert final.look_again_s is None
