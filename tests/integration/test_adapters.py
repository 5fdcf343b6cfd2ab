"""Adapters of a model in real worker processes: dropped in, changed, taken away, named by requests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from contextlib import asynccontextmanager
from functools import partial

import numpy as np
import pytest
from httpx import ASGITransport, AsyncClient

from repository.adapters.orders import ROW_ADAPTERS
from repository.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
    InvalidTensorError,
    UnsupportedSourceError,
)
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from server.call import Door
from server.faces import v2_infer
from tests.adapters import weights, write_adapter, write_config
from tests.fakes.bodies import body, tensor
from tests.integration.v2 import Counted
from tests.models import add_onnx, python_model

pytestmark = pytest.mark.timeout(60)

# Adds lora_alpha of the adapter of each row.
ADDS = """
    import json
    import numpy as np
    class Model:
        inputs = [("x", "FP32", (2,))]
        outputs = [("y", "FP32", (2,))]
        def __init__(self):
            self.alphas = {"": 0.0}
        def add_adapter(self, name, path, options):
            if options.get("refuse"):
                raise ValueError("not me: " + str(path))
            self.alphas[name] = json.loads((path / "adapter_config.json").read_text())["lora_alpha"]
        def remove_adapter(self, name):
            del self.alphas[name]
        def infer(self, inputs, adapters):
            more = np.array([self.alphas[name] for name in adapters], np.float32)
            return {"y": inputs["x"] + more[:, None]}
"""


@asynccontextmanager
async def serving(root, **options):
    options.setdefault("settle_s", 0.1)
    models = Repository(Options(root, trust_code=True, state_dir=root.parent / "state", **options))
    async with models.running():
        yield models


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "models"
    python_model(path / "m" / "1", ADDS)
    (path / "m/config.yaml").write_text("max_batch_size: 8\n")
    return path


def drop(root, name, alpha, model="m"):
    """At once, as `mv` does it."""
    new = write_adapter(root.parent / "new" / name, lora_alpha=alpha)
    place = root / model / "adapters" / name
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(root.parent / f"old-{time.time_ns()}")
    new.rename(place)
    return place


async def ask(models, rows=1, name="m", **parameters):
    x = Tensor.of("x", np.zeros((rows, 2), np.float32))
    with models.lease(name) as gen:
        response = await models.infer(gen, InferRequest([x], parameters=parameters))
    return response.outputs[0].array()[:, 0].tolist()


async def until(models, condition):
    with models.events.subscribe(after=0) as events:
        while not condition():
            await anext(events)


def alphas(models):
    return {view.name: view.state for view in models.adapters("m")}


async def until_told(models, expected):
    """What a worker has taken is no event of its own: look after each answer of the worker."""
    async with asyncio.timeout(20):
        while alphas(models) != expected:
            await ask(models)


async def test_adapters_are_followed_while_the_model_serves(root):
    drop(root, "early", 5)
    async with serving(root) as models:
        await models.load("m")
        gen = models.lease("m").generation
        assert await ask(models) == [0] and await ask(models, adapter="early") == [5]
        with pytest.raises(AdapterNotFoundError, match="The adapter a has not been registered"):
            await ask(models, adapter="a")

        drop(root, "a", 1)
        await until_told(models, {"a": "loaded", "early": "loaded"})
        assert await ask(models, 3, adapters=["a", "", "early"]) == [1, 0, 5]
        drop(root, "a", 2)
        async with asyncio.timeout(20):
            while await ask(models, adapter="a") != [2]:
                pass
        # Requests for different adapters, at once: one batch, each with its own.
        asked = [ask(models, adapter=n) for n in ("a", "early", "", "a")]
        assert await asyncio.gather(*asked) == [[2], [5], [0], [2]]

        shutil.rmtree(root / "m/adapters/a")
        await until_told(models, {"early": "loaded"})
        with pytest.raises(AdapterNotFoundError):
            await ask(models, adapter="a")
        assert models.lease("m").generation is gen

        (root / "m/config.yaml").write_text("max_batch_size: 4\n")
        await models.load("m")
        assert models.lease("m").generation is not gen
        assert await ask(models, adapter="early") == [5]


async def test_at_default_settings_a_dropped_adapter_is_used_within_two_seconds(root):
    async with serving(root, settle_s=1.0) as models:
        await models.load("m")
        drop(root, "a", 1)
        began = time.perf_counter()
        await until(models, lambda: "a" in alphas(models))
        await until_told(models, {"a": "loaded"})
        assert await ask(models, adapter="a") == [1]
        assert time.perf_counter() - began < 2.0


async def test_where_nobody_watches_a_load_looks_at_the_adapters_too(root):
    async with serving(root, mode="explicit", watch="off") as models:
        await models.load("m")
        drop(root, "a", 1)
        while alphas(models) != {"a": "loaded"}:
            assert (await models.load("m")).already
        assert await ask(models, adapter="a") == [1]


async def test_a_half_written_adapter_waits_and_a_broken_one_says_why(root):
    async with serving(root, settle_s=0.5) as models:
        await models.load("m")
        place = root / "m/adapters/slow"
        write_config(place)
        file = place / "adapter_model.safetensors"
        whole = weights()
        for size in range(0, len(whole), 60):
            file.write_bytes(whole[:size])
            await asyncio.sleep(0.1)
            assert alphas(models) == {}
        (settling,) = await models.adapters_now("m")
        assert (settling.name, settling.state) == ("slow", "settling")
        file.write_bytes(whole)
        await until_told(models, {"slow": "loaded"})
        file.write_bytes(whole[:-1])
        await until(models, lambda: models.adapters("m")[0].error)
        assert alphas(models) == {"slow": "loaded"} and await ask(models, adapter="slow") == [8]
        write_config(root / "m/adapters/never")
        await until(models, lambda: "never" in alphas(models))
        broken = models.adapters("m")[0]
        assert broken.state == "failed" and "is missing" in broken.error
        with pytest.raises(AdapterRefusedError, match="is missing"):
            await ask(models, adapter="never")


async def test_calls_register_swap_and_unregister_in_every_worker(root, tmp_path):
    (root / "m/config.yaml").write_text("max_batch_size: 8\ninstances: 2\n")
    write_adapter(root / "m/loras/x", lora_alpha=3)
    write_adapter(root / "shared/y", lora_alpha=4)
    write_adapter(tmp_path / "allowed/z", lora_alpha=6)
    outside = write_adapter(tmp_path / "outside", lora_alpha=9)
    async with serving(root, allowed_roots=(tmp_path / "allowed",)) as models:
        await models.load("m")
        view = await models.register_adapter("m", "a", "loras/x")
        assert (view.src, view.state, view.origin, view.rank) == ("loras/x", "loaded", "call", 4)
        assert [await ask(models, adapter="a") for _ in range(4)] == [[3]] * 4
        view = await models.update_adapter("m", "a", src=f"file://{root}/shared/y")
        assert view.src == "../shared/y" and await ask(models, adapter="a") == [4]
        view = await models.register_adapter("m", "b", str(tmp_path / "allowed/z"))
        assert view.src == "allowed/z" and await ask(models, adapter="b") == [6]
        for src, error in (
            (str(outside), AdapterRefusedError),
            ("../../outside", AdapterRefusedError),
            ("nowhere", AdapterRefusedError),
            ("s3://bucket/a", UnsupportedSourceError),
            ("a\0b", InvalidRequestError),
        ):
            with pytest.raises(error) as refused:
                await models.register_adapter("m", "c", src)
            assert str(tmp_path) not in str(refused.value)
        with pytest.raises(AdapterRefusedError, match="ValueError: not me") as refused:
            await models.register_adapter("m", "c", "loras/x", options={"refuse": "1"})
        assert str(root) not in str(refused.value)
        assert sorted(alphas(models)) == ["a", "b"]
        await models.unregister_adapter("m", "a")
        with pytest.raises(AdapterNotFoundError):
            await ask(models, adapter="a")


async def test_what_was_registered_by_call_comes_back_with_the_worker(root):
    write_adapter(root / "m/loras/x", lora_alpha=3)
    write_adapter(root / "m/loras/y", lora_alpha=4)
    async with serving(root) as models:
        await models.load("m")
        await models.register_adapter("m", "x", "loras/x")
        await models.register_adapter("m", "y", "loras/y")
        shutil.rmtree(root / "m/loras/x")
        gen = models.lease("m").generation
        os.kill(gen.loaded.details["pids"][0], signal.SIGKILL)
        await until(
            models,
            lambda: (g := models.status("m").generations[0]) is not gen and g.ready_at is not None,
        )
        assert await ask(models, adapter="y") == [4]
        assert alphas(models) == {"x": "failed", "y": "loaded"}
        assert "cannot be read" in models.adapters("m")[0].error


async def test_a_model_without_adapters_says_so_and_hides_the_hidden_input(root):
    add_onnx(root / "plain/1/model.onnx")
    python_model(
        root / "any/1", "class Model:\n    def infer(self, inputs):\n        return inputs"
    )
    drop(root, "a", 1, model="plain")
    async with serving(root) as models:
        await models.load("plain")
        await models.load("any")
        (view,) = models.adapters("plain")
        assert view.state == "failed" and "takes no adapters (backend 'onnx')" in view.error
        x = Tensor.of("x", np.zeros((1, 4), np.float32))
        hidden = Tensor.of(ROW_ADAPTERS, np.array([b"a"], object))
        with models.lease("plain") as gen, pytest.raises(AdapterNotFoundError):
            await models.infer(gen, InferRequest([x], parameters={"adapter": "a"}))
        with models.lease("any") as gen, pytest.raises(InvalidTensorError):
            await models.infer(gen, InferRequest([x, hidden]))
        json.dumps([e.data for e in models.events._kept])  # what is told can be sent


async def test_clients_name_adapters_by_a_parameter_of_v2(root):
    drop(root, "a", 1)
    x = tensor("x", [2, 2], "FP32", binary_data_size=16)
    meter = Counted()
    async with serving(root) as models:
        await models.load("m")
        door = Door(models=models, meter=meter)
        transport = ASGITransport(partial(v2_infer.infer, door=door))
        async with AsyncClient(transport=transport, base_url="http://t") as client:

            async def post(**parameters):
                content, length = body(x, parameters=parameters, blobs=bytes(16))
                headers = {"Inference-Header-Content-Length": length.decode()}
                return await client.post("/v2/models/m/infer", content=content, headers=headers)

            for _ in range(3):  # the second time its header is known
                reply = await post(adapter="a")
                assert reply.status_code == 200, reply.text
                assert reply.json()["outputs"][0]["data"] == [1, 1, 1, 1]
            reply = await post(adapters='["", "a"]')
            assert reply.json()["outputs"][0]["data"] == [0, 0, 1, 1]
            refused = await post(adapter="b")
            assert refused.status_code == 424
            assert refused.json() == {"error": "The adapter b has not been registered"}
            assert (await post(adapters='["a"]')).status_code == 400
        assert models.adapters("m")[0].requests == 4
        assert meter.outcomes == ["success"] * 4 + ["bad_request"] * 2
