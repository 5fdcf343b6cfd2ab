"""Keys on a real server: every route, every spelling, a spoilt key file, an address for all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from server.auth import LOOK_S
from tests.e2e.server import serving
from tests.e2e.siege import GOOD, Siege, besieged, fault_of
from tests.wire import Answer, head, post

pytestmark = pytest.mark.e2e

KEYS = {scope: f"key-of-{scope}" for scope in ("inference", "metrics", "admin")}
LOAD = {"model_name": "add"}
ROUTES: dict[tuple[str, str], str] = {
    ("GET", "/health"): "",
    ("GET", "/v2/health/live"): "",
    ("GET", "/v2/health/ready"): "",
    ("GET", "/metrics"): "metrics",
    ("GET", "/v1/models"): "inference",
    ("GET", "/v1/models/status"): "inference",
    ("GET", "/v1/models/add"): "inference",
    ("GET", "/v1/models/org/name"): "inference",
    ("GET", "/v2"): "inference",
    ("GET", "/v2/models/add"): "inference",
    ("GET", "/v2/models/add/ready"): "inference",
    ("POST", "/v2/models/add/infer"): "inference",
    ("POST", "/v2/models/org/name/versions/1/infer"): "inference",
    ("POST", "/v1/models/load"): "admin",
    ("POST", "/v1/models/unload"): "admin",
    ("POST", "/v1/models/unload-all"): "admin",
    ("DELETE", "/v1/models/add"): "admin",
    ("PUT", "/v2/models/add/infer"): "admin",
    ("GET", "/no/such/address"): "admin",
    ("OPTIONS", "/v1/models/load"): "admin",
}
MAY = {
    "inference": {"inference"},
    "metrics": {"metrics"},
    "admin": {"inference", "metrics", "admin"},
}


NO_KEYS = (
    "", "x-api-key: nonsense", "x-api-key:", "Authorization: Bearer nonsense", "Authorization: Bearer",
    f"Authorization: Basic {KEYS['admin']}", "x-api-key: " + "x" * 5000,
)  # fmt: skip


def key_file(path: Path, **keys: str) -> Path:
    lines = ["keys:"]
    for scope, key in keys.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines.append(f'  - {{name: {scope}, sha256: "{digest}", scopes: [{scope}]}}')
    path.write_text("\n".join(lines) + "\n")
    return path


def spellings(path: str) -> Iterator[str]:
    yield path
    yield f"{path}/"
    yield f"/{path}"
    yield path.replace("/", "//")
    yield path.replace("/", "%2f", 2).replace("%2f", "/", 1)
    yield path.replace("v", "%76").replace("l", "%6c")
    yield path.replace("v1", "V1").replace("v2", "V2").replace("models", "Models")
    yield f"/./{path[1:]}"
    yield f"/health/..{path}"
    yield f"/health/%2e%2e{path}"
    yield f"{path};/health"
    yield f"{path}?/health"
    yield f"http://t{path}"


def raw(method: str, path: str, *headers: str) -> bytes:
    body = GOOD if path.rstrip("/").endswith("infer") else LOAD
    whole = post(path, body, *headers) if method != "GET" else head("GET", path, *headers)
    return whole.replace(b"POST", method.encode(), 1)


def is_refused(answer: Answer, status: int) -> bool:
    return answer.status == status and (not answer.body or fault_of(answer) == "")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return key_file(tmp_path / "keys.yaml", **KEYS)


async def test_every_route_wants_its_key_however_it_is_spelled(tmp_path: Path, keys: Path) -> None:
    wrong: list[object] = []
    admin = {"x-api-key": KEYS["admin"]}
    async with besieged(tmp_path, "--api-keys", str(keys), headers=admin) as siege:
        before = await siege.truth()
        for (method, path), need in ROUTES.items():
            for spelling in spellings(path):
                for key in NO_KEYS:
                    answer = await siege.ask(raw(method, spelling, *([key] if key else [])))
                    opened = need == "" and answer.status == 200
                    if not opened and not is_refused(answer, 401):
                        wrong.append((method, spelling, key, answer))
            for name, key in KEYS.items():
                if need and need not in MAY[name]:
                    for spelling in spellings(path):
                        answer = await siege.ask(raw(method, spelling, f"x-api-key: {key}"))
                        if answer.status not in (403, 404, 405):
                            wrong.append((method, spelling, name, answer))
        assert wrong == []
        assert await siege.truth() == before
        assert KEYS["admin"] not in "\n".join(siege.running.log)
        page = (await siege.client.get("/metrics")).text
        assert 'modeldepot_auth_failures_total{scope="admin"}' in page


async def test_the_right_key_opens_each_route_by_either_header(tmp_path: Path, keys: Path) -> None:
    admin = {"x-api-key": KEYS["admin"]}
    async with besieged(tmp_path, "--api-keys", str(keys), headers=admin) as siege:
        for (method, path), need in ROUTES.items():
            for name, may in MAY.items():
                for header in (f"Authorization: Bearer {KEYS[name]}", f"X-API-Key: {KEYS[name]}"):
                    if (need == "" or need in may) and "unload" not in path:
                        answer = await siege.ask(raw(method, path, header))
                        assert answer.status not in (401, 403), (method, path, name, answer)
        two = (f"Authorization: Bearer {KEYS['inference']}", f"x-api-key: {KEYS['admin']}")
        assert (await siege.ask(raw("POST", "/v1/models/load", *two))).status == 403


@dataclass
class Locked:
    """A server, its key file, and the keys that open it, by scope."""

    siege: Siege
    path: Path
    keys: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def locked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Locked]:
    """For all ways of spoiling the file: each leaves a good one with keys of its own."""
    home = tmp_path_factory.mktemp("locked")
    path = key_file(home / "keys.yaml", **KEYS)
    async with besieged(home, "--api-keys", str(path)) as siege:
        yield Locked(siege, path, KEYS)


async def status(siege: Siege, key: str) -> int:
    return (await siege.ask(head("GET", "/v1/models", f"x-api-key: {key}"))).status


def away(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


SPOILT: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_text(""),
    "half": lambda path: path.write_text(path.read_text()[:60]),
    "no YAML": lambda path: path.write_text("keys: [{"),
    "a bomb": lambda path: path.write_text("a: &a [x, x]\nkeys: [*a, *a]\n"),
    "another shape": lambda path: path.write_text("keys: admin\n"),
    "an unknown scope": lambda path: path.write_text(path.read_text().replace("admin", "root")),
    "no hash": lambda path: path.write_text(path.read_text().replace('sha256: "', 'sha256: "zz')),
    "a mebibyte": lambda path: path.write_text("# " + "x" * (1 << 20)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "an endless file": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("how", SPOILT)
async def test_a_spoilt_key_file_keeps_the_old_keys_and_a_good_one_brings_the_new(
    locked: Locked, how: str
) -> None:
    siege, path, old = locked.siege, locked.path, locked.keys
    assert [await status(siege, k) for k in old.values()] == [200, 403, 200]
    before = len(siege.running.log)
    SPOILT[how](path)
    line = r"the key file cannot be used, the keys it held before stay valid: keys.yaml"
    async with siege.asking_on(lambda: status(siege, old["admin"]), every_s=LOOK_S / 4):
        told = await siege.running.said(line, before)
    assert str(path.parent) not in told.string
    assert [await status(siege, k) for k in (*old.values(), "nonsense")] == [200, 403, 200, 401]
    away(path)
    locked.keys = {scope: f"{how}: {key}" for scope, key in KEYS.items()}
    key_file(path, **locked.keys)
    new = locked.keys["admin"]
    async with siege.asking_on(lambda: status(siege, new), every_s=LOOK_S / 4):
        await siege.running.said("keys=3 read again", before)
    assert await status(siege, new) == 200
    assert await status(siege, old["admin"]) == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1.example"])
async def test_an_address_for_all_is_refused_without_keys(tmp_path: Path, host: str) -> None:
    (tmp_path / "models").mkdir()
    async with serving(tmp_path / "models", "--host", host, wait_for="") as running:
        assert await running.code() == 1
        assert any("--api-keys" in line and "--insecure" in line for line in running.log)
        assert not any("serving http" in line for line in running.log)
