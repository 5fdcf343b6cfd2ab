"""Whatever people do to the folders of a repository is seen, and nothing is ever loaded half.

Real commands change a real folder under a real server, which watches by inotify or by polling.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests import models
from tests.e2e.changes import Told, answer, shell, shown, status_of, told_by
from tests.e2e.server import serving

pytestmark = pytest.mark.e2e

SETTLE_S = "0.2"
BIG = 200_000_000  # bytes
BIG_FILE = {"inline": "model.onnx", "external": "weights.bin"}
LONG_AGO = 1_000_000_000.0  # seconds since 1970
WATCH = {"notify": ("--watch=notify",), "poll": ("--watch=poll", "--poll-secs=0.1")}


class Depot(NamedTuple):
    """`away` is a folder beside the repository, on the same file system."""

    repo: Path
    away: Path
    told: Told
    client: httpx.AsyncClient

    async def shell(self, command: str) -> None:
        """In the folder that holds models/ (the repository) and away/."""
        await shell(command, self.repo.parent)


@pytest.fixture(params=["notify", "poll"])
def watch(request: pytest.FixtureRequest) -> str:
    how: str = request.param
    return how


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "away").mkdir()
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@asynccontextmanager
async def watching(repo: Path, watch: str) -> AsyncIterator[Depot]:
    async with (
        serving(repo, "--settle", SETTLE_S, *WATCH[watch]) as server,
        server.client() as client,
        told_by(server) as told,
    ):
        await told.until(lambda event: event.kind == "server.ready")
        yield Depot(repo, repo.parent / "away", told, client)


def add(folder: Path, value: float, version: int = 1) -> Path:
    models.add_onnx(folder / str(version) / "model.onnx", value)
    return folder


async def test_a_folder_is_served_follows_its_files_and_leaves_with_them(
    repo: Path, watch: str
) -> None:
    async with watching(repo, watch) as depot:
        told, client = depot.told, depot.client
        add(depot.away / "m", 1)
        await depot.shell("cp -r away/m models/m")
        first = await told.ready("m")
        assert await answer(client, "m") == 1

        models.add_onnx(depot.away / "next.onnx", 2)
        await depot.shell("cp away/next.onnx models/m/1/model.onnx")
        second = await told.ready("m", after=first.generation)
        assert await answer(client, "m") == 2

        await depot.shell("echo 'ttl_s: 1000' > models/m/config.yaml")
        third = await told.ready("m", after=second.generation)
        config = (await shown(client, "m"))["config"]
        assert isinstance(config, dict)
        assert config["ttl_s"] == {"value": 1000, "source": "config.yaml:1"}

        await depot.shell("sed -i s/1000/2000/ models/m/config.yaml")
        await told.ready("m", after=third.generation)

        await depot.shell("rm -r models/m")
        await told.removed("m")
        assert await status_of(client, "m") == 404
        assert (await client.get("/v1/models/m")).status_code == 404
        assert told.failures() == []


async def test_a_new_version_leaves_the_generations_of_the_others_alone(
    repo: Path, watch: str
) -> None:
    add(repo / "m", 1)
    (repo / "m" / "config.yaml").write_text("version_policy: all\n")
    async with watching(repo, watch) as depot:
        told, client = depot.told, depot.client
        add(depot.away / "m", 2, version=2)
        await depot.shell("cp -r away/m/2 models/m/")
        await told.ready("m", version=2)
        assert await answer(client, "m") == 2
        assert await answer(client, "m", 1) == 1

        await depot.shell("rm -r models/m/2")
        await told.ended(told.generations("m", 2)[0])
        assert await answer(client, "m") == 1
        assert len(told.generations("m", 1)) == 1, "version 1 was loaded again"


async def test_by_default_a_new_version_takes_over_and_a_removed_one_gives_back(
    repo: Path, watch: str
) -> None:
    add(repo / "m", 1)
    async with watching(repo, watch) as depot:
        told, client = depot.told, depot.client
        first = await told.ready("m")
        add(depot.away / "m", 2, version=2)
        await depot.shell("cp -r away/m/2 models/m/")
        second = await told.ready("m", version=2)
        await told.ended(first.generation)
        assert await answer(client, "m") == 2
        await depot.shell("rm -r models/m/2")
        await told.ready("m", version=1, after=first.generation)
        await told.ended(second.generation)  # until its turn comes it serves on
        assert await answer(client, "m") == 1


async def test_renamed_replaced_and_swapped_folders_are_seen(repo: Path, watch: str) -> None:
    add(repo / "a", 1)
    add(repo / "b", 2)
    async with watching(repo, watch) as depot:
        told, client = depot.told, depot.client
        a, b = await told.ready("a"), await told.ready("b")

        await depot.shell("mv models/a away/t && mv models/b models/a && mv away/t models/b")
        await told.ready("a", after=a.generation)
        await told.ready("b", after=b.generation)
        assert (await answer(client, "a"), await answer(client, "b")) == (2, 1)
        assert "model.removed" not in told.kinds("a") + told.kinds("b"), "a swap is no removal"

        await depot.shell("mv models/b models/c")
        await told.ready("c")
        await told.removed("b")
        assert await answer(client, "c") == 1
        assert await status_of(client, "b") == 404

        # The whole folder of one model over the name of another.
        last = told.generations("a")[-1]
        await depot.shell("rm -r models/a && mv models/c models/a")
        await told.ready("a", after=last)
        await told.removed("c")
        assert await answer(client, "a") == 1
        assert told.failures() == []


async def test_an_older_version_restored_with_its_old_times_is_seen(repo: Path, watch: str) -> None:
    """All of these give the files back their mtime, which then lies before the one that served."""
    old = add(repo.parent / "away" / "old", 1) / "1" / "model.onnx"
    new = add(repo.parent / "away" / "new", 2) / "1" / "model.onnx"
    os.utime(old, (LONG_AGO, LONG_AGO))
    commands = [
        "cp -rp away/old/. models/m/",
        "tar -C away/old -cf - . | tar -C models/m -xf -",
        "rm -r models/m && cp -a away/old models/m",
    ]
    if shutil.which("rsync"):
        commands += ["rsync -a away/old/ models/m/", "rsync -a --inplace away/old/ models/m/"]
    add(repo / "m", 2)
    async with watching(repo, watch) as depot:
        serving = await depot.told.ready("m")
        for command in commands:
            assert await answer(depot.client, "m") == 2
            await depot.shell(command)
            assert (repo / "m" / "1" / "model.onnx").stat().st_mtime == LONG_AGO
            serving = await depot.told.ready("m", after=serving.generation)
            assert await answer(depot.client, "m") == 1, command
            await depot.shell(f"cp {new} models/m/1/model.onnx")
            serving = await depot.told.ready("m", after=serving.generation)


async def test_a_nested_model_comes_moves_and_goes(repo: Path, watch: str) -> None:
    async with watching(repo, watch) as depot:
        told, client = depot.told, depot.client
        add(depot.away / "org" / "team" / "m", 1)
        await depot.shell("cp -r away/org models/")
        await told.ready("org/team/m")
        assert await answer(client, "org/team/m") == 1
        await depot.shell("mv models/org models/firm")
        await told.ready("firm/team/m")
        await told.removed("org/team/m")
        assert await status_of(client, "org/team/m") == 404
        await depot.shell("rm -r models/firm")
        await told.removed("firm/team/m")
        assert told.failures() == []


# half a file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`<inline|external>/<value>/model.onnx`: y = x + value for the values 1 and 2, of 200 MB each.

    The value is the last of all numbers, so that a file without its end would answer otherwise.
    """
    home = tmp_path_factory.mktemp("big")
    for how, data in BIG_FILE.items():
        one, two = home / how / "1", home / how / "2"
        one.mkdir(parents=True)
        write_big(one, external=how == "external")
        shutil.copytree(one, two)
        with (two / data).open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            at = content.rfind(np.ones(4, np.float32).tobytes())
            content[at : at + 16] = np.full(4, 2, np.float32).tobytes()
    yield home
    shutil.rmtree(home)


def write_big(folder: Path, *, external: bool) -> None:
    """Which row is added is worked out anew for each request (the last one, always), so that the
    table has to stay in memory, or mapped."""
    table = np.zeros((BIG // 16, 4), np.float32)
    table[-1] = 1
    constants = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array(len(table) - 1, np.int64), "last"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("Mul", ["x", "zero"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["offset"], to=onnx.TensorProto.INT64),
        helper.make_node("Add", ["offset", "last"], ["place"]),
        helper.make_node("Gather", ["table", "place"], ["row"]),
        helper.make_node("Add", ["x", "row"], ["y"]),
    ]
    model = models.onnx_model(nodes, [("x", "FP32", (-1, 4))], [("y", "FP32", (-1, 4))], constants)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=external,
        location="weights.bin" if external else None,
    )


@pytest.mark.parametrize(
    ("watch", "how"), [("notify", "inline"), ("notify", "external"), ("poll", "inline")]
)
async def test_a_file_that_is_written_slowly_is_never_loaded_half(
    repo: Path, big: Path, watch: str, how: str
) -> None:
    """The writer goes on only when the server has believed the pause and judged what is there, so
    that every pause is longer than the settle time, however slow the machine."""
    name, one, two = BIG_FILE[how], big / how / "1", big / how / "2"
    target = repo / "m" / "1"
    target.mkdir(parents=True)
    async with watching(repo, watch) as depot:
        told, client = depot.told, depot.client
        if how == "external":
            shutil.copy(one / "model.onnx", target)
        for begun, source in enumerate((one, two)):  # a new file, then over the one that serves
            with (source / name).open("rb") as whole, (target / name).open("wb", 0) as file:
                size = os.fstat(whole.fileno()).st_size
                for end in (4096, size // 2, size - 20_000, size - 1):
                    file.write(whole.read(end - file.tell()))
                    await told.problem("m", after=told.events[-1].id)
                    assert len(told.generations("m")) == begun, f"begun at {end} of {size}"
                    if begun:
                        assert await answer(client, "m") == 1
                file.write(whole.read())
            await told.ready("m", after=begun)
            assert await answer(client, "m") == begun + 1
        assert told.generations("m") == [1, 2] and told.failures() == []
    shutil.rmtree(target)
