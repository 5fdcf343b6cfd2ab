"""Models on threads of the server's own process: the same answers, the same errors."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import msgspec
import numpy as np
import pytest

from repository.errors import (
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.hosts.choose import make_host
from repository.hosts.inline import InlineHost
from repository.hosts.process import ProcessHost
from repository.hosts.zygotes import Zygotes
from repository.spec import ModelSpec
from repository.tensors import Tensor
from tests import models
from tests.hosting import ask, fails, hosted, make, one, open_files

ROOT = Path(__file__).parents[2]
X = Tensor.of("x", np.zeros((1, 4), np.float32))


def of_device(spec: ModelSpec, *devices: str, host: str | None = None) -> ModelSpec:
    config = msgspec.structs.replace(spec.config, host=host)
    return dataclasses.replace(spec, devices=devices, config=config)


async def test_an_onnx_model_runs_inline(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx", 3.0), instances=2)
    async with hosted(spec, tmp_path / "s") as (host, loaded):
        answers = await asyncio.gather(*(host.infer(ask(X)) for _ in range(20)))
        assert all(one(a).tolist() == [[3.0] * 4] for a in answers)
        assert answers[0].compute_s > 0
        assert loaded.platform == "onnxruntime_onnx"
        assert host.slots == 2
        assert await host.memory() == {}


async def test_stop_ends_the_threads_and_drops_the_model(tmp_path):
    source = """
        class Model:
            def infer(self, inputs):
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    before, files = threading.active_count(), open_files()
    host = make(spec, tmp_path / "s")
    assert isinstance(host, InlineHost)
    await host.load(spec, ["cpu"])
    await host.infer(ask(X))
    backend = host._runners[0].backend
    gone = weakref.ref(backend._model.__class__)  # type: ignore[union-attr]
    del backend
    await host.stop(5.0)
    gc.collect()
    assert gone() is None
    for thread in threading.enumerate():
        if thread.name.startswith("model "):
            thread.join(10)
    assert threading.active_count() <= before + 1  # asyncio.to_thread keeps its own
    assert open_files() == files


async def test_two_generations_inline_do_not_share_modules(tmp_path):
    source = """
        import numpy as np
        import helper
        from . import sibling
        class Model:
            def infer(self, inputs):
                return {"y": np.array([helper.VALUE, sibling.VALUE])}
    """
    specs = [
        models.spec_of(
            models.python_model(
                tmp_path / f"m/{i}", source, helper=f"VALUE = {i}", sibling=f"VALUE = {i}"
            ),
            "python",
        )
        for i in (1, 2)
    ]
    modules, path = set(sys.modules), list(sys.path)
    async with (
        hosted(specs[0], tmp_path / "s") as (first, _),
        hosted(specs[1], tmp_path / "s") as (second, _),
    ):
        assert one(await first.infer(ask())).tolist() == [1, 1]
        assert one(await second.infer(ask())).tolist() == [2, 2]
    assert sys.path == path
    assert "helper" not in sys.modules
    assert not {m for m in set(sys.modules) - modules if m.startswith("modeldepot_model_")}


async def test_errors_inline_are_those_of_a_process(tmp_path):
    source = """
        class Model:
            def infer(self, inputs):
                raise ValueError("too " + "short")
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with hosted(spec, tmp_path / "s") as (host, _):
        with pytest.raises(InferenceFailedError, match=r"^ValueError: too short$"):
            await host.infer(ask(X))
    broken = models.spec_of(
        models.python_model(tmp_path / "b/1", "import nothing_like_it"), "python"
    )
    host = make(broken, tmp_path / "s")
    text = await fails(lambda: host.load(broken, ["cpu"]), LoadFailedError)
    assert text == "ModuleNotFoundError: No module named 'nothing_like_it'"
    await host.stop(5.0)
    onnx = models.spec_of(models.add_onnx(tmp_path / "o/1/model.onnx"))
    async with hosted(onnx, tmp_path / "s") as (host, _):
        with pytest.raises(InvalidTensorError, match="no input 'z'"):
            await host.infer(ask(Tensor.of("z", np.zeros(1))))


async def test_a_model_that_hangs_is_left_behind_in_time(tmp_path):
    release = threading.Event()
    source = """
        import threading
        class Model:
            def infer(self, inputs):
                for thread in threading.enumerate():
                    wait = getattr(thread, "release", None)
                    if wait is not None:
                        wait.wait()
                return inputs
    """
    threading.main_thread().release = release  # type: ignore[attr-defined]
    try:
        spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
        host = make(spec, tmp_path / "s")
        await host.load(spec, ["cpu"])
        asked = host.infer(ask(X))
        await host.stop(0.05)
        assert not asked.done()
    finally:
        release.set()
        del threading.main_thread().release  # type: ignore[attr-defined]
    assert one(await asked).shape == (1, 4)


async def test_inline_refuses_a_gpu(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    host = make(spec, tmp_path / "s")
    text = await fails(lambda: host.load(spec, ["cuda:0"]), LoadFailedError)
    assert "set host to process, or device to cpu" in text
    await host.stop(1.0)


async def test_the_config_chooses_the_host_and_else_the_default(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"), instances=3)
    told = {"zygotes": Zygotes(), "state_dir": tmp_path}
    assert isinstance(make_host(spec, default_host="process", **told), ProcessHost)
    assert isinstance(make_host(spec, default_host="inline", **told), InlineHost)
    wanted = of_device(spec, "cpu", host="inline")
    assert isinstance(make_host(wanted, default_host="process", **told), InlineHost)
    assert make_host(wanted, default_host="process", **told).slots == 3


async def test_a_gpu_model_goes_into_a_process_unless_it_insists(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    told = {"zygotes": Zygotes(), "state_dir": tmp_path}
    gpu = of_device(spec, "cuda:0", "cpu")
    assert isinstance(make_host(gpu, default_host="inline", **told), ProcessHost)
    with pytest.raises(LoadFailedError, match="inline is for CPU models only"):
        make_host(of_device(spec, "cuda:0", host="inline"), default_host="process", **told)


async def test_a_worker_is_as_verbose_as_the_server_when_it_is_made(tmp_path, caplog):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    told = {"zygotes": Zygotes(), "state_dir": tmp_path, "default_host": "process"}
    found = []
    for level in (logging.INFO, logging.DEBUG):
        caplog.set_level(level)
        found.append(make_host(spec, **told)._extra["log_verbose"])
    assert found == [False, True]


def test_the_front_imports_no_framework():
    program = (
        "import sys, repository.hosts.choose, repository.backends.registry\n"
        "print(sorted({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout == "[]\n"
