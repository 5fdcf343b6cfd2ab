"""The command lines with which Aphrodite introduced its calls, run as they stand there by a real curl.

Host and port are this server's, and the folder /root/models is one of the test's.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from tests.e2e.processes import started
from tests.tiny import write_text_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl"),
]

UNLOAD = "curl -s -X POST http://localhost:2242/v1/unload_model"
LOAD = "curl -s -X POST http://localhost:2242/v1/load_model"
LOAD_YAML = 'curl -s -X POST http://localhost:2242/v1/load_model -F "config=@config.yaml"'
LOAD_JSON = r"""curl -s -X POST http://localhost:2242/v1/load_model \
  -H "Content-Type: application/json" \
  -d '{
    "model": "Qwen/Qwen3-32B-FP8",
    "config": {
      "tensor_parallel_size": 2,
      "max_model_len": 32768
    }
  }'"""
LOAD_PATH = r"""curl -s -X POST http://localhost:2242/v1/load_model \
  -H "Content-Type: application/json" \
  -d '{"model": "/root/models/Meta-Llama-3.1-8B-Instruct"}'"""
INLINE = r"""curl -s -X POST http://localhost:2242/v1/completions \
  -H "Content-Type: application/json" \
  -d '{"model": "/root/models/Meta-Llama-3.1-8B-Instruct", """ + (
    """"prompt": "Once upon a time", "max_tokens": 128}'"""
)
CONFIG = "model: Qwen/Qwen3-32B-FP8\ntensor_parallel_size: 1\nmax_model_len: 8192\n"
QWEN, LLAMA = "Qwen/Qwen3-32B-FP8", "/root/models/Meta-Llama-3.1-8B-Instruct"
POSITIONS = 32768


class Shell(NamedTuple):
    """`root`: what /root/models is here."""

    url: str
    root: Path

    async def run(self, line: str) -> dict[str, Any]:
        line = line.replace("http://localhost:2242", self.url)
        line = line.replace("/root/models", str(self.root))
        process = await asyncio.create_subprocess_shell(
            line, cwd=self.root, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        said, wrong = await process.communicate()
        assert process.returncode == 0, wrong.decode()
        found: dict[str, Any] = json.loads(said)
        return found

    @property
    def llama(self) -> str:
        return LLAMA.replace("/root/models", str(self.root))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shell(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shell]:
    """One model in the repository, another in an allowed folder beside it."""
    home = tmp_path_factory.mktemp("aphrodite-seed")
    repo, root = home / "models", home / "elsewhere"
    write_text_model(repo / QWEN, "qwen3", max_position_embeddings=POSITIONS)
    (repo / QWEN / "config.yaml").write_text("options: {slots: 1}\nwarmup: []\n")
    llama = write_text_model(root / Path(LLAMA).name, "llama", max_position_embeddings=POSITIONS)
    (llama / "aphrodite_config.yaml").write_text(
        "max_model_len: 4096\ntensor_parallel_size: 1\ngpu_memory_utilization: 0.9\n"
    )
    (root / "config.yaml").write_text(CONFIG)
    flags = ("--model-control-mode", "explicit", "--allowed-root", str(root))
    async with started(repo, *flags, "--enable-inline-model-loading") as (server, _, _):
        yield Shell(server.url, root)


def applied(source: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {key: {"value": value, "source": source} for key, value in values.items()}


def is_loaded(found: dict[str, Any], model: str, config: dict[str, Any] | None) -> None:
    took_s = found["load_time_s"]
    wanted = {
        "status": "success",
        "message": f"Model loaded successfully in {took_s:.2f}s.",
        "load_time_s": took_s,
        "model": model,
    }
    assert found == (wanted if config is None else {**wanted, "config_applied": config})


async def test_the_model_is_loaded_again_after_it_was_unloaded(shell: Shell) -> None:
    assert (await shell.run(UNLOAD))["message"] == "Model is already unloaded."
    is_loaded(await shell.run(LOAD), QWEN, None)
    found = await shell.run(UNLOAD)
    assert found["status"] == "success" and found["unloaded_models"] == [QWEN]
    assert round(found["drain_time_s"] + found["shutdown_time_s"], 2) == found["total_time_s"]


async def test_a_config_file_is_uploaded(shell: Shell) -> None:
    config = applied("uploaded", model=QWEN, tensor_parallel_size=1, max_model_len=8192)
    is_loaded(await shell.run(LOAD_YAML), QWEN, config)


async def test_launch_arguments_are_passed_directly(shell: Shell) -> None:
    """Two GPUs for one model are more than this server does: it says so, and does nothing."""
    refused = (await shell.run(LOAD_JSON))["error"]
    assert refused["code"] == 400 and "tensor_parallel_size" in refused["message"]

    values = applied("uploaded", tensor_parallel_size=1, max_model_len=32768)
    one = LOAD_JSON.replace('"tensor_parallel_size": 2', '"tensor_parallel_size": 1')
    is_loaded(await shell.run(one), QWEN, {**applied("request", model=QWEN), **values})


async def test_a_model_is_loaded_by_its_path_with_the_config_of_its_folder(shell: Shell) -> None:
    values = applied(
        "model_dir", max_model_len=4096, tensor_parallel_size=1, gpu_memory_utilization=0.9
    )
    config = {**applied("request", model=shell.llama), **values}
    is_loaded(await shell.run(LOAD_PATH), shell.llama, config)


async def test_a_request_for_another_model_loads_it_and_is_answered(shell: Shell) -> None:
    await shell.run(LOAD)
    await shell.run(f"{UNLOAD} -H 'Content-Type: application/json' -d '{{\"model\": \"{LLAMA}\"}}'")
    found = await shell.run(INLINE)
    assert found["object"] == "text_completion" and found["model"] == shell.llama
    (choice,) = found["choices"]
    assert choice["finish_reason"] in ("length", "stop") and found["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("kind", ["max_model_len", "dtype"])
async def test_what_was_applied_is_true_of_the_model_that_runs(shell: Shell, kind: str) -> None:
    """A sequence that is longer is refused; one type of numbers takes half of the other's bytes."""
    await shell.run(UNLOAD)
    post = f'{LOAD} -H \'Content-Type: application/json\' -d \'{{"model": "{QWEN}", '
    if kind == "max_model_len":
        await shell.run(post + '"max_model_len": 16}\'')
        ask = INLINE.replace(LLAMA, QWEN).replace(
            "Once upon a time", "a b c d e f g h i j k l m n o"
        )
        error = (await shell.run(ask))["error"]
        assert "16" in error["message"], error
    else:
        freed = []
        for dtype in ("float32", "bfloat16"):
            found = await shell.run(post + f'"dtype": "{dtype}"}}\'')
            assert found["config_applied"]["dtype"] == {"value": dtype, "source": "uploaded"}
            freed.append((await shell.run(UNLOAD))["freed_bytes"])
        assert freed[1] < freed[0]
