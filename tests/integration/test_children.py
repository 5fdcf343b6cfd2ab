"""Children of the server are started by `python -m`: which modules they find, and what they are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

from repository import children
from repository.hosts import snapshots
from repository.hosts.zygotes import Zygotes
from repository.reports import Options
from repository.repository import Repository
from tests.e2e.server import add_model

ROOT = Path(__file__).parents[2]
STARTS = {
    "a scribe": """
        from server.scribes.scribes import Scribes

        async def start():
            scribes = Scribes()
            try:
                await scribes.plan_of(b'{"inputs":[]}')
            finally:
                await scribes.close()
    """,
    "a zygote": """
        from repository.hosts.zygotes import Zygotes

        async def start():
            zygotes = Zygotes()
            try:
                await zygotes.warm("python")
            finally:
                await zygotes.close()
    """,
}


TELLS = """
    import json, os, server, socket, sys
    told = [sys.argv[2:], dict(os.environ), os.getpgid(0) == os.getpid(), server.__file__]
    socket.socket(fileno=int(sys.argv[1])).sendall(json.dumps(told).encode())
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nothing is installed for."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    return home / "bin" / "python"


@pytest.mark.parametrize("child", STARTS)
def test_a_source_tree_that_is_not_installed_can_start(child: str, bare_python: Path) -> None:
    # What we depend on is named, so that the .pth file by which the tree itself may be installed
    # beside it is not read.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    script = textwrap.dedent(STARTS[child]) + "import asyncio; asyncio.run(start())"
    ended = subprocess.run(
        [bare_python, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_a_child_has_its_group_our_modules_and_the_environment_without_our_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells.py").write_text(textwrap.dedent(TELLS))
    here = tmp_path / "here"
    (here / "server").mkdir(parents=True)
    (here / "server" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MODELDEPOT_API_KEYS", "secret")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    monkeypatch.setenv("CHOSEN", "by the user")
    defaults = {"CHOSEN": "by us", "LEFT": "to us"}
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = children.start("tells", theirs.fileno(), args=["a", "b"], defaults=defaults)
        with ours.makefile() as heard:
            args, env, leads, found = json.load(heard)
        assert child.wait() == 0
    assert (args, leads) == (["a", "b"], True)
    assert Path(found).is_relative_to(ROOT)
    assert "MODELDEPOT_API_KEYS" not in env
    assert env["OPENBLAS_NUM_THREADS"] == "1"
    assert (env["CHOSEN"], env["LEFT"]) == ("by the user", "to us")


TEMPORARY = """
    import os, pathlib, tempfile

    class Model:
        def load(self, *_):
            pathlib.Path(tempfile.mkdtemp(prefix="mine-"), "notes").write_text("x")

        def infer(self, inputs):
            return {"y": inputs["x"]}
"""


@pytest.mark.parametrize("given", [False, True])
async def test_temporary_files_of_workers_lie_in_the_state_folder_and_go_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    (tmp_path / "elsewhere").mkdir()
    if given:
        monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    add_model(tmp_path / "models", tmp_path, "m")
    (tmp_path / "models/m/model.py").write_text(textwrap.dedent(TEMPORARY))
    state = tmp_path / "state"
    options = Options(root=tmp_path / "models", settle_s=0.05, trust_code=True, state_dir=state)
    models = Repository(options)
    async with models.running():
        await models.load("m")
        inside = [path.name[:5] for path in state.glob("scratch/*/*")]
        outside = [path.name[:5] for path in (tmp_path / "elsewhere").iterdir()]
    assert (inside, outside) == (([], ["mine-"]) if given else (["mine-"], []))
    assert list((state / "scratch").glob("*")) == []


async def test_a_state_folder_that_cannot_be_written_leaves_the_machines_temporary_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "state").write_text("in the way")
    zygotes = Zygotes(tmp_path / "state")
    try:
        assert not (await zygotes.warm("python")).dead
    finally:
        await zygotes.close()


def test_temporary_files_that_a_killed_server_left_are_swept(tmp_path: Path) -> None:
    own = snapshots.fresh(tmp_path, "scratch")
    left = own.with_name(f"{os.getpid()}-1-1")  # of a process that had our number before us
    for folder in (own, left):
        folder.mkdir()
        (folder / "notes").touch()
    assert snapshots.sweep(tmp_path) == 1
    assert [path.name for path in own.parent.iterdir()] == [own.name]
