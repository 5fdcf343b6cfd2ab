"""What a worker is told about threads and memory reaches the libraries that it imports."""

from __future__ import annotations

from typing import Any

import numpy as np

from repository.hosts.zygotes import SETTINGS
from repository.tensors import Tensor
from tests import models
from tests.hosting import ask, forking, hosted, one

TELLS = """
    import os
    import numpy as np
    class Model:
        def infer(self, inputs):
            found = [os.environ.get(str(n.decode()), "") for n in inputs["x"].reshape(-1)]
            return {"y": np.array(found, object)}
"""
X = Tensor.of("x", np.zeros((1, 4), np.float32))


async def environment(tmp_path: Any, names: list[str], **config: Any) -> list[str]:
    spec = models.spec_of(models.python_model(tmp_path / "m/1", TELLS), "python", **config)
    names_in = Tensor.of("x", np.array(names, object))
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        return [value.decode() for value in one(await host.infer(ask(names_in)))]


async def test_pools_that_do_not_spin_and_memory_that_stays_reach_every_worker(tmp_path):
    told = {name: value for name, value in SETTINGS.items() if not name.endswith("_THREADS")}
    assert {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} <= told.keys()
    assert {"MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} <= told.keys()
    assert await environment(tmp_path, list(told)) == list(told.values())


async def test_a_python_models_threads_option_reaches_the_libraries_that_it_imports(tmp_path):
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    assert await environment(tmp_path, names, options={"threads": 7}) == ["7"] * 3


async def test_an_onnx_models_threads_option_is_what_its_session_gets(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"), options={"threads": 3})
    for zygoted in (True, False):
        async with forking() as zygotes:
            place = zygotes if zygoted else None
            async with hosted(spec, tmp_path / "s", place) as (_, loaded):
                assert loaded.details["threads"] == 3
