"""What a load needs: said, measured of an earlier one, or estimated; and what is remembered of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.config import Adapters, ModelConfig
from repository.errors import LoadFailedError, WorkerDiedError, is_out_of_memory
from repository.estimatefile import NAME, STALE
from repository.estimates import MIB, Estimates, key_of
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import Placement
from repository.lifecycle.states import State
from repository.messages import Loaded
from repository.spec import FileStamp, ModelSpec
from tests.fakes.heart import brought, newborn, spec

GPU = "cuda:0"
H200 = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA H200", "cuda:2": "NVIDIA L4"}


def a_model(name: str = "m", size: int = 1000, **config: Any) -> ModelSpec:
    root = Path("/models") / name
    return replace(
        spec(name, print_=f"{name}-{size}-{sorted(config.items())}", n_bytes=50 * MIB, **config),
        folder=root,
        path=root / "1",
        files=(
            FileStamp("config.yaml", 12, 1, 1, 1),
            FileStamp("1/model.onnx", size, 1, 1, 2),
            FileStamp("checks/a.json", 7, 1, 1, 3),
        ),
    )


def ran(
    what: ModelSpec, mib: float, devices: tuple[str, ...] = (GPU,), kinds: str = "weights"
) -> Generation:
    """READY on those devices, and measured with so much on each instance's."""
    needs = dict.fromkeys(devices, what.bytes_needed)
    gen = newborn(what, options=(Placement(devices, needs),))
    brought(gen, State.READY)
    gen.measured = {d: {kinds: int(mib * MIB) * devices.count(d)} for d in devices}
    return gen


def test_what_the_config_says_wins() -> None:
    estimates, said = Estimates(kinds=H200), a_model(memory=7)
    assert estimates.needs(said, GPU) == (7, "config")
    estimates.learn(ran(said, 90))
    assert estimates.needs(said, GPU) == (7, "config")


def test_nothing_known_is_estimated_from_the_files() -> None:
    assert Estimates().needs(a_model(), GPU) == (50 * MIB, "estimate")


def test_what_was_measured_is_needed_again_and_a_little_more() -> None:
    estimates = Estimates(kinds=H200)
    estimates.learn(ran(a_model(), 64))
    assert estimates.needs(a_model(), GPU) == (66 * MIB, "measured")


def test_the_most_that_was_ever_measured_counts() -> None:
    estimates = Estimates(kinds=H200)
    for mib in (32, 64, 16):
        estimates.learn(ran(a_model(), mib))
    assert estimates.needs(a_model(), GPU)[0] == 66 * MIB


def test_room_that_was_taken_and_never_touched_counts_too() -> None:
    gen = ran(a_model(), 10)
    gen.loaded = Loaded(memory={"weights": 8 * MIB, "kv": 56 * MIB})
    estimates = Estimates(kinds=H200)
    estimates.learn(gen)
    assert estimates.needs(a_model(), GPU)[0] == 66 * MIB


def test_of_one_that_has_run_nothing_yet_nothing_is_learned() -> None:
    estimates, cold = Estimates(kinds=H200), a_model(warmup=())
    gen = ran(cold, 1)
    estimates.learn(gen)
    assert estimates.needs(cold, GPU)[1] == "estimate"
    with gen.lease():
        pass
    estimates.learn(gen)
    assert estimates.needs(cold, GPU)[1] == "measured"


def test_adapters_that_come_to_lie_beside_a_model_make_it_another() -> None:
    estimates = Estimates(kinds=H200)
    estimates.learn(ran(a_model(), 64))
    more = replace(a_model(), bytes_needed=70 * MIB)  # the same fingerprint
    assert estimates.needs(more, GPU) == (70 * MIB, "estimate")


def test_a_copy_under_another_name_and_version_is_known() -> None:
    estimates, copy = Estimates(kinds=H200), a_model("copy")
    files = tuple(
        f._replace(path=f.path.replace("1/model", "3/model"), mtime_ns=9) for f in copy.files
    )
    estimates.learn(ran(a_model(), 64))
    assert estimates.needs(replace(copy, path=copy.folder / "3", files=files), GPU)[1] == "measured"


def test_gpus_of_one_sort_know_of_each_other_and_others_do_not() -> None:
    estimates = Estimates(kinds=H200)
    estimates.learn(ran(a_model(), 64, (GPU,)))
    assert estimates.needs(a_model(), "cuda:1")[1] == "measured"
    assert estimates.needs(a_model(), "cuda:2")[1] == "estimate"
    assert estimates.needs(a_model(), "cpu")[1] == "estimate"


def test_it_is_counted_by_instance() -> None:
    estimates, four = Estimates(kinds=H200), a_model(instances=4)
    estimates.learn(ran(four, 64, (GPU, "cuda:1", GPU, "cuda:1")))
    assert estimates.needs(four, GPU) == (4 * 66 * MIB, "measured")


def test_other_libraries_are_another_measurement() -> None:
    one, two = (key_of(a_model(), "cpu", f"torch 2.{n}") for n in (9, 10))
    assert one != two


@pytest.mark.parametrize(
    "config",
    [
        {"pin": True},
        {"ttl_s": 5.0},
        {"priority": 3},
        {"reload": "overlap"},
        {"device": "cuda"},
        {"aliases": ("other",)},
    ],
)
def test_settings_that_take_no_memory_do_not_make_it_another(config: dict[str, Any]) -> None:
    assert key_of(a_model(**config), "cpu", "") == key_of(a_model(), "cpu", "")


@pytest.mark.parametrize(
    "config",
    [
        {"max_batch_size": 8},
        {"adapters": Adapters(slots=2)},
        {"options": {"max_len": 9}},
        {"options": {"when": object}},  # whatever a config may hold
        {"host": "inline"},
    ],
)
def test_settings_that_may_take_memory_do(config: dict[str, Any]) -> None:
    assert key_of(a_model(**config), "cpu", "") != key_of(a_model(), "cpu", "")


names = st.text("abc", min_size=1, max_size=5)
contents = st.dictionaries(names, st.integers(0, 9), max_size=4)


@given(contents, contents, st.integers(0, 99))
def test_equal_names_and_sizes_are_the_same_content(
    one: dict[str, int], two: dict[str, int], when: int
) -> None:
    def key(files: dict[str, int], mtime: int, inode: int) -> str:
        stamps = tuple(FileStamp(p, n, mtime, mtime, inode) for p, n in files.items())
        return key_of(replace(a_model(), files=stamps), "cpu", "")

    assert (key(one, 0, 1) == key(dict(reversed(two.items())), when, when)) == (one == two)


@given(st.sampled_from(ModelConfig.__struct_fields__), st.booleans())
def test_every_setting_has_a_key_that_can_be_written(field: str, on_gpu: bool) -> None:
    config = ModelConfig(**{field: getattr(ModelConfig(), field)})
    assert len(key_of(ModelSpec("m", 1, "p", config=config), GPU if on_gpu else "cpu", "")) == 32


# out of memory ------------------------------------------------------------------------------------


def test_a_load_that_ran_out_needs_more_the_next_time_until_one_succeeds() -> None:
    estimates = Estimates(kinds=H200)
    gen = brought(newborn(a_model(), options=(Placement((GPU,), {GPU: 64 * MIB}),)), State.LOADING)
    estimates.ran_out(gen, {GPU: 1000 * MIB})
    assert estimates.needs(a_model(), GPU) == (80 * MIB, "measured")
    estimates.learn(ran(a_model(), 64))
    assert estimates.needs(a_model(), GPU) == (66 * MIB, "measured")


def test_what_ran_out_is_never_said_to_need_more_than_there_can_be() -> None:
    estimates = Estimates(kinds=H200)
    for _ in range(30):
        needed, _ = estimates.needs(a_model(), GPU)
        gen = newborn(a_model(), options=(Placement((GPU,), {GPU: needed}),))
        estimates.ran_out(brought(gen, State.LOADING), {GPU: 100 * MIB})
    assert estimates.needs(a_model(), GPU)[0] == 100 * MIB


def test_words_of_frameworks_for_no_memory_are_understood() -> None:
    for text in (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: CUDA failure 2: out of memory",
        "Failed to allocate memory for requested buffer of size 8",
        "std::bad_alloc",
        "MemoryError",
    ):
        assert is_out_of_memory(LoadFailedError(text)), text
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(WorkerDiedError("exit code 3")) and not is_out_of_memory(None)


# what outlasts the server -------------------------------------------------------------------------


async def reopened(folder: Path, **options: Any) -> Estimates:
    found = Estimates(folder, H200, libraries="", **options)
    await found.open()
    return found


async def test_what_was_learned_outlasts_the_server(tmp_path: Path) -> None:
    estimates = await reopened(tmp_path)
    for mib in (16, 64):
        estimates.learn(ran(a_model(), mib))
        await estimates.write()
    assert (await reopened(tmp_path)).needs(a_model(), GPU) == (66 * MIB, "measured")
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


async def test_nothing_new_is_nothing_to_write(tmp_path: Path) -> None:
    estimates = await reopened(tmp_path)
    for _ in range(3):
        estimates.learn(ran(a_model(), 64))
        await estimates.write()
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 1


async def test_who_starts_clean_forgets_it(tmp_path: Path) -> None:
    estimates = await reopened(tmp_path)
    estimates.learn(ran(a_model(), 64))
    await estimates.write()
    clean = Estimates(tmp_path, H200, libraries="")
    await clean.open(forget=True)
    assert clean.needs(a_model(), GPU)[1] == "estimate"
    assert (await reopened(tmp_path)).needs(a_model(), GPU)[1] == "estimate"


async def test_a_line_that_is_spoilt_or_torn_costs_only_itself(tmp_path: Path) -> None:
    estimates = await reopened(tmp_path)
    estimates.learn(ran(a_model(), 64))
    await estimates.write()
    file = tmp_path / NAME
    good = file.read_bytes()
    file.write_bytes(b'\xff\xfe\n["k",-1,0]\n["k","x",0]\n{}\n' + good + b'["torn')
    again = await reopened(tmp_path)
    assert again.needs(a_model(), GPU) == (66 * MIB, "measured")
    again.learn(ran(a_model(size=2), 16))
    await again.write()
    third = await reopened(tmp_path)
    assert [third.needs(a_model(size=n), GPU)[1] for n in (1000, 2)] == ["measured"] * 2


@pytest.mark.parametrize("rubbish", [b"\0", b"x\n"])
async def test_a_file_that_is_too_long_to_be_ours_is_written_anew(
    tmp_path: Path, rubbish: bytes
) -> None:
    estimates = await reopened(tmp_path, most=3)
    estimates.learn(ran(a_model(), 64))
    await estimates.write()
    file = tmp_path / NAME
    file.write_bytes(file.read_bytes() + rubbish * 100_000)
    again = await reopened(tmp_path, most=3)
    again.learn(ran(a_model(size=2), 16))
    await again.write()
    third = await reopened(tmp_path, most=3)
    assert [third.needs(a_model(size=n), GPU)[1] for n in (1000, 2)] == ["measured"] * 2
    assert file.stat().st_size < 1000


async def test_the_least_recently_used_go(tmp_path: Path) -> None:
    estimates = await reopened(tmp_path, most=3)
    for size in (1, 2, 3):
        estimates.learn(ran(a_model(size=size), 64))
    estimates.needs(a_model(size=1), GPU)
    estimates.learn(ran(a_model(size=4), 64))
    known = [n for n in (1, 2, 3, 4) if estimates.needs(a_model(size=n), GPU)[1] == "measured"]
    assert known == [1, 3, 4]


async def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    estimates = await reopened(tmp_path, most=3)
    for n in range(40):
        estimates.learn(ran(a_model(size=n), 64))
        await estimates.write()
        lines = len((tmp_path / NAME).read_bytes().splitlines())
        assert lines <= STALE * 3
    assert (await reopened(tmp_path, most=3)).needs(a_model(size=39), GPU)[1] == "measured"


async def test_a_folder_that_cannot_be_written_is_no_error_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    estimates = await reopened(folder)  # there is no such folder
    for mib in (32, 64):
        estimates.learn(ran(a_model(), mib))
        await estimates.write()
    assert estimates.needs(a_model(), GPU) == (66 * MIB, "measured")
    assert [NAME in r.getMessage() for r in caplog.records] == [True]
    folder.mkdir()
    await estimates.write()  # what waited
    assert (await reopened(folder)).needs(a_model(), GPU)[0] == 66 * MIB


async def test_a_link_or_a_pipe_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('["k",1,1]\n')
    (tmp_path / NAME).symlink_to(tmp_path / "other")
    estimates = await reopened(tmp_path)
    estimates.learn(ran(a_model(), 64))
    await estimates.write()
    assert (tmp_path / "other").read_text() == '["k",1,1]\n'
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    await reopened(tmp_path)  # and does not wait for a writer
