"""What a hostile or clumsy hand can put into the folder of a running server: told, and never opened."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.changes import Told, told_by
from tests.e2e.siege import Siege, besieged, fault_of
from tests.models import add_onnx
from tests.wire import post

pytestmark = pytest.mark.e2e

CHECK = (
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}], '
    + ('"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2, 3, 4, 5]}]}')
)


def away(evil: Path) -> Path:
    """A model and its parts outside of the repository; the secret must never be read."""
    folder = evil.parent.parent / f"away from {evil.name}"
    if not folder.exists():
        add_onnx(folder / "model" / "1" / "model.onnx")
        (folder / "config.yaml").write_text("secret: hunter2\n")
        (folder / "check.json").write_text('{"secret": "hunter2"}')
    return folder


def link_model(evil: Path) -> None:
    evil.symlink_to(away(evil) / "model")


def link_version(evil: Path) -> None:
    evil.mkdir()
    (evil / "1").symlink_to(away(evil) / "model" / "1")


def link_file(evil: Path) -> None:
    (evil / "1").mkdir(parents=True)
    (evil / "1" / "model.onnx").symlink_to(away(evil) / "model" / "1" / "model.onnx")


def link_config(evil: Path) -> None:
    shutil.copytree(away(evil) / "model", evil)
    (evil / "config.yaml").symlink_to(away(evil) / "config.yaml")


def link_check(evil: Path) -> None:
    shutil.copytree(away(evil) / "model", evil)
    (evil / "checks").mkdir()
    (evil / "checks" / "a.json").symlink_to(away(evil) / "check.json")


def link_checks(evil: Path) -> None:
    shutil.copytree(away(evil) / "model", evil)
    (away(evil) / "checks").mkdir()
    (away(evil) / "checks" / "a.json").write_text(CHECK)
    (evil / "checks").symlink_to(away(evil) / "checks")


def link_far(evil: Path) -> None:
    """By way of a link that itself lies inside."""
    (evil.parent / "door").symlink_to(away(evil))
    evil.symlink_to("door/model")


def link_nowhere(evil: Path) -> None:
    evil.symlink_to("/proc/self/root/etc")


def link_to_itself(evil: Path) -> None:
    (evil / "1").mkdir(parents=True)
    (evil / "1" / "model.onnx").symlink_to("model.onnx")


LINKS = {f.__name__: f for f in (
    link_model, link_version, link_file, link_config, link_check, link_checks, link_far,
    link_nowhere, link_to_itself,
)}  # fmt: skip


def accessed(folder: Path) -> list[int]:
    """Times of the last reading of all files below. Old ones: a reading then always shows."""
    return [p.stat().st_atime_ns for p in sorted(folder.rglob("*")) if p.is_file()]


def untouched(folder: Path) -> list[int]:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (1, path.stat().st_mtime))
    return accessed(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def siege(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Siege]:
    """For all links: each has a model of its own, and the others' stay."""
    async with besieged(tmp_path_factory.mktemp("links")) as found:
        yield found


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", LINKS)
async def test_a_link_out_of_the_repository_is_refused_with_a_reason_and_never_opened(
    siege: Siege, name: str
) -> None:
    async with told_by(siege.running) as told:
        evil = siege.repo / name
        before = await siege.truth()
        LINKS[name](evil)
        never_read = untouched(away(evil)) if name != "link_check" else []
        await told.until(
            lambda e: bool(
                "problem" in e.kind
                and re.search(rf"\b{name}\b", f"{e.model} {e.data['message']}")
                and "link" in f"{e.data['rule']} {e.data['message']}"
            )
        )
        answer = await siege.ask(post("/v1/models/load", {"model_name": name}))
        assert 400 <= answer.status <= 500 and "link" in answer.text, answer
        assert fault_of(answer, lambda _: True) == ""
        shown = await siege.client.get(f"/v1/models/{name}")
        assert shown.status_code in (200, 404) and "hunter2" not in shown.text
        if shown.status_code == 200:
            assert shown.json()["state"] != "loaded" and "link" in str(shown.json()["problems"])
        assert (await siege.infer({"inputs": []}, model=name)).status in (400, 404, 503)
        after = await siege.truth()
        assert {k: v for k, v in after.items() if k in before and k != "status"} == {
            k: v for k, v in before.items() if k != "status"
        }
        if never_read:
            assert accessed(away(evil)) == never_read
        assert not [line for line in siege.running.log if "hunter2" in line]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "a bomb": (BOMB, "config.yaml:1: anchors and aliases"),
    "an alias": ("priority: 1\noptions: &o {a: 1}\n", "config.yaml:2: anchors and aliases"),
    "a merge": ("options:\n  <<: {a: 1}\n", "config.yaml:2: merging"),
    "a key twice": ("priority: 1\n\npriority: 2\n", "config.yaml:3: the key 'priority' is there twice"),
    "a key twice, deep": ("options:\n  a: 1\n  a: 2\n", "config.yaml:3: the key 'a'"),
    "a mebibyte": ("# " + "x" * (1 << 20), "256 KiB"),
    "deep": ("options: " + "[" * 5000 + "]" * 5000, "config.yaml:1: nested deeper than 20"),
    "deep and no end": ("\noptions: " + "{a: " * 60_000, "config.yaml:2: nested deeper than 20"),
    "a tag": ("options: !!python/object/apply:os.system ['touch /tmp/x']\n", "config.yaml:1: tags"),
    "two documents": ("priority: 1\n---\npriority: 2\n", "config.yaml:2: a second document"),
    "not UTF-8": (b"priority: 1\nbackend: \xff\xfe\n", "config.yaml:2: the text is not UTF-8"),
    "NULs": (b"\0" * 100, "not YAML"),
    "tabs": ("batching:\n\tmax_queue: 1\n", "config.yaml:2: not YAML"),
    "a list": ("- priority\n", "config.yaml:1: the file must be a mapping"),
    "an unknown key": (
        "priority: 1\nmax_batchsize: 4\n",
        "config.yaml:2: unknown key 'max_batchsize'; did you mean 'max_batch_size'?",
    ),
    "an unknown key, deep": (
        "batching:\n  max_delay: 4\n",
        "config.yaml:2: unknown key 'max_delay' in 'batching'; did you mean 'max_delay_us'?",
    ),
    "a long key": ('? "' + "k" * 200_000 + '"\n: 1\n', "config.yaml:1: unknown key 'kkk"),
    "text for a number": ("max_batch_size: four\n", "config.yaml:1: 'max_batch_size' must be a whole"),
    "a huge number": ("ttl_s: " + "9" * 900, "config.yaml:1: 'ttl_s' must be at most"),
    "a number of 5,000 digits": ("priority: 0x" + "f" * 900, "config.yaml:1: 'priority' must be"),
    "a number to base 60": ("priority: " + "1:" * 5000 + "1", "config.yaml:1: a value without quotes"),
    "not a number": ("checks: {atol: .nan}\n", "config.yaml:1: 'checks.atol' must be a number"),
    "a date": ("priority: 2020-01-01\n", "config.yaml:1: 'priority' must be a whole number"),
    "no date": ("priority: 2020-13-45\n", "config.yaml: a date or number in it cannot be read"),
    "a datatype that numpy trips over": (
        "inputs:\n- {name: x, shape: [4],\n   datatype: 'f4,,'}\n",
        "config.yaml:3: unknown datatype 'f4,,'",
    ),
    "a file outside": (
        "backend: onnx\noptions: {model_file: ../../add/1/model.onnx}\n",
        "config.yaml:2: 'options.model_file' must lie in the version's folder",
    ),
    "an absolute file": ("options: {model_file: /etc/passwd}\n", "config.yaml:1: 'options.model_file'"),
    "an alias out of bounds": ("aliases: ['../x']\n", "config.yaml:1: 'aliases': invalid model name"),
    "a device of another kind": ("device: tpu\n", "config.yaml:1: 'device' must be auto, cpu, cuda"),
}  # fmt: skip


async def told_of(told: Told, text: str, after: int) -> int:
    return (await told.problem("add", text, after)).id


async def test_a_bad_config_is_told_with_file_and_line_and_the_old_one_keeps_serving(
    tmp_path: Path,
) -> None:
    async with besieged(tmp_path) as siege, told_by(siege.running) as told:
        config = tmp_path / "models" / "add" / "config.yaml"
        rss, after = siege.rss(), 0
        for label, (text, reason) in CONFIGS.items():
            config.write_bytes(text if isinstance(text, bytes) else text.encode())
            after = await told_of(told, reason, after)
            assert await siege.works(), label
            shown = (await siege.client.get("/v1/models/add")).json()
            problem = shown["problems"][0]
            assert shown["state"] == "loaded", label
            assert reason in f"{problem['where']}: {problem['message']}", label
            answer = await siege.ask(post("/v1/models/load", {"model_name": "add"}))
            assert answer.status in (400, 500) and reason in answer.text, (label, answer)
            assert fault_of(answer, lambda _: True) == "", (label, answer)
        assert siege.rss() - rss < 64 << 20
        config.unlink()
        await told.until(lambda e: e.id > after and e.kind == "model.changed" and e.model == "add")
        assert (await siege.ask(post("/v1/models/load", {"model_name": "add"}))).status == 200


async def test_a_new_model_with_a_bad_config_has_failed_with_that_reason(tmp_path: Path) -> None:
    def build(repo: Path) -> None:
        for number, (text, _) in enumerate(CONFIGS.values()):
            add_onnx(repo / f"m{number}" / "1" / "model.onnx")
            raw = text if isinstance(text, bytes) else text.encode()
            (repo / f"m{number}" / "config.yaml").write_bytes(raw)
        add_onnx(repo / "add" / "1" / "model.onnx")

    async with besieged(tmp_path, build=build) as siege:
        assert await siege.works()
        for number, (label, (_, reason)) in enumerate(CONFIGS.items()):
            shown = (await siege.client.get(f"/v1/models/m{number}")).json()
            assert shown["state"] == "failed" and shown["generations"] == [], label
            assert reason in shown["last_error"]["message"], (label, shown["last_error"])
        health = (await siege.client.get("/health")).json()
        assert health["status"] == "degraded"


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe for a config": lambda f: os.mkfifo(f / "config.yaml"),
    "a pipe for a model": lambda f: os.mkfifo(f / "1" / "pipe.onnx"),
    "a name that is not UTF-8": lambda f: os.mkdir(os.fsencode(f) + b"/1/\xff\xfe"),
    "a file whose name is not UTF-8": lambda f: add_onnx(f / "1" / "\udcff.onnx"),
    "a config that may not be read": lambda f: (f / "config.yaml").mkdir(),
    "a name with a line feed": lambda f: add_onnx(f / "1" / "a\nb.onnx"),
    "deep folders": lambda f: (f / "1" / Path(*"abcdefghijklmnop")).mkdir(parents=True),
}


async def test_strange_files_neither_stop_the_watch_nor_the_others(tmp_path: Path) -> None:
    async with besieged(tmp_path, "--poll-secs", "0.2") as siege, told_by(siege.running) as told:
        repo = tmp_path / "models"
        for number, (label, strange) in enumerate(STRANGE.items()):
            folder = add_onnx(repo / f"s{number}" / "1" / "model.onnx").parent.parent
            strange(folder)
            (repo / f"bad\n{number}").mkdir()
            add_onnx(repo / f"next{number}" / "1" / "model.onnx")
            await told.ready(f"next{number}")
            assert await siege.works(f"next{number}"), label
        names = (await siege.client.get("/v1/models/status")).json()["loading_status"]
        assert len([n for n in names if n.startswith("s")]) == len(STRANGE)
        for number in range(len(STRANGE)):
            async with asyncio.timeout(30):
                answer = await siege.ask(post("/v1/models/load", {"model_name": f"s{number}"}))
            assert answer.status in (200, 400, 500) and fault_of(answer, lambda _: True) in (
                "", "no error text"
            ), answer  # fmt: skip
