"""Marqo's own clients, as pip installs them, against a real server (`make clients` installs them)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.grid import ADMIN, Grid, grid_in

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

CLIENTS = Path(__file__).resolve().parents[2] / "build" / "marqo"
SCRIPT = Path(__file__).with_name("marqo_client.py")
MODEL = "ViT-L/{}"  # one for each client, so that all can run at once
DEVICE = {"2.1.0": ("cpu",), "3.18.0": ("cpu",), "3.18.2": ()}  # the newest asks for no device
STAYS = "hf/all_datasets_v4_MiniLM-L6"


class Said:
    """What a client printed, and what it warned of."""

    def __init__(self, out: bytes, err: bytes) -> None:
        self.found: dict[str, Any] = json.loads(out)
        self.warnings = err.decode()


def python_of(version: str) -> Path:
    return CLIENTS / version / "bin" / "python"


def installed(version: str) -> bool:
    return (CLIENTS / version / ".installed").exists()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def said(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Said]]:
    """By version, of those that are installed."""
    versions = [version for version in DEVICE if installed(version)]
    if not versions:
        yield {}
        return
    names = [MODEL.format(version) for version in DEVICE]
    async with grid_in(tmp_path_factory.mktemp("marqo"), STAYS, *names) as grid:
        await grid.clear(STAYS, *names)
        answers = await asyncio.gather(*(run(grid, version) for version in versions))
        yield dict(zip(versions, answers, strict=True))


async def run(grid: Grid, version: str) -> Said:
    process = await asyncio.create_subprocess_exec(
        python_of(version), "-I", SCRIPT,
        grid.running.url, ADMIN, MODEL.format(version), *DEVICE[version],
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return Said(out, err)


@pytest.fixture(params=DEVICE)
def client(request: pytest.FixtureRequest, said: dict[str, Said]) -> tuple[str, Said]:
    version: str = request.param
    if version not in said:
        pytest.skip(f"marqo {version} is not installed in build/marqo: run `make clients`")
    return version, said[version]


async def test_it_lists_what_is_loaded_and_where(client: tuple[str, Said]) -> None:
    version, told = client
    rows = told.found["loaded"]["said"]["models"]
    for name in (MODEL.format(version), STAYS):
        assert {"model_name": name, "model_device": "cpu"} in rows


async def test_it_finds_the_servers_version_new_enough(client: tuple[str, Said]) -> None:
    assert "Marqo" not in client[1].warnings


async def test_it_ejects_a_model_whose_name_holds_a_slash(client: tuple[str, Said]) -> None:
    version, told = client
    where = " from device `cpu`" if DEVICE[version] else ""
    assert told.found["ejected"]["said"] == {
        "result": "success",
        "message": f"successfully eject model_name `{MODEL.format(version)}`{where}",
    }
    left = [row["model_name"] for row in told.found["left"]["said"]["models"]]
    assert STAYS in left and MODEL.format(version) not in left


@pytest.mark.parametrize("case", ["again", "unknown"])
async def test_what_is_not_loaded_is_told_in_marqos_words(
    client: tuple[str, Said], case: str
) -> None:
    """Also a name that only begins like another."""
    version, told = client
    found = told.found[case]
    name = MODEL.format(version)[: None if case == "again" else -1]
    device = " device `cpu`" if DEVICE[version] else ""
    assert found["message"] == f"The model_name `{name}`{device} is not cached or found"
    assert (found["status"], found["code"]) == (404, "model_not_in_cache")
    assert found["type"] == "invalid_request" and found["link"] is None


async def test_it_reads_how_busy_the_machine_is(client: tuple[str, Said]) -> None:
    found = client[1].found["cpu"]["said"]
    assert all(isinstance(value, str) for value in found.values())
    assert found["cpu_usage_percent"].endswith(" %") and float(found["memory_used_gb"]) > 0


async def test_it_is_told_that_there_is_no_gpu(client: tuple[str, Said]) -> None:
    found = client[1].found["cuda"]
    if "said" in found:
        assert found["said"]["cuda_devices"]
        return
    assert (found["status"], found["code"]) == (400, "hardware_compatability_error")
    assert found["message"] == "CUDA is not available on this instance"


async def test_it_can_tell_a_wrong_key_from_a_broken_server(client: tuple[str, Said]) -> None:
    found = client[1].found["stranger"]
    assert (found["status"], found["code"]) == (401, "unauthorized")
    assert found["type"] == "invalid_request"
