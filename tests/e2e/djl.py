"""Servers with models that take adapters, and DJL's calls as a client of theirs makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests import adapters, lora
from tests.e2e.lasting import Lasting, lasting
from tests.e2e.server import WITHIN_S
from tests.models import python_model
from tests.torch_models import write_mlp

# Adds lora_alpha of each row's adapter; one of the name "held" makes it wait at a gate.
SOURCE = """
    import json, pathlib, time
    import numpy as np
    HERE = pathlib.Path({here!r})

    class Model:
        inputs = [("x", "FP32", (2,))]
        outputs = [("y", "FP32", (2,))]

        def __init__(self):
            self.alphas = {{"": 0.0}}

        def add_adapter(self, name, path, options):
            if "refuse" in options:
                raise ValueError("the model was told to refuse it")
            said = json.loads((path / "adapter_config.json").read_text())
            self.alphas[name] = said["lora_alpha"] + float(options.get("more", 0))

        def remove_adapter(self, name):
            del self.alphas[name]

        def infer(self, inputs, adapters):
            if "held" in adapters:
                (HERE / "held.reached").touch()
                while not (HERE / "held.open").exists():
                    time.sleep(0.005)
            more = np.array([self.alphas[name] for name in adapters], np.float32)
            return {{"y": inputs["x"] + more[:, None]}}
"""
PLAIN = """
    class Model:
        inputs = outputs = [("x", "FP32", (2,))]
        def infer(self, inputs):
            return inputs
"""
MANY = "m"  # the model that most is tried with
SAGEMAKER = "X-Amzn-SageMaker-Adapter-Identifier"
MLP = {"one": (8, 4), "two": (3, 8)}  # layer -> [out, in]
TYPES = {
    400: "BadRequest",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    415: "BadRequest",
    424: "FailedDependency",
    507: "InsufficientCapacity",
}


class Depot:
    """A server of its own, a client, and the folders."""

    def __init__(self, server: Lasting, client: httpx.Client, home: Path) -> None:
        self.server, self.client, self.home = server, client, home
        self.repo, self.gates = home / "models", home / "gates"

    def call(self, method: str, path: str, model: str = MANY, **rest: Any) -> httpx.Response:
        return self.client.request(method, f"/models/{model}/adapters{path}", **rest)

    def good(self, method: str, path: str, model: str = MANY, **rest: Any) -> Any:
        found = self.call(method, path, model, **rest)
        assert found.status_code == 200, found.text
        return found.json()

    def register(self, name: str, src: str = "loras/three", model: str = MANY, **more: Any) -> None:
        said = self.good("POST", "", model, params={"name": name, "src": src, **more})
        assert said == {"status": f"Adapter {name} registered"}

    def unregister(self, *names: str, model: str = MANY) -> None:
        for name in names:
            said = self.good("DELETE", f"/{name}", model)
            assert said == {"status": f"Adapter {name} unregistered"}

    def names(self, model: str = MANY) -> list[str]:
        return [one["name"] for one in self.good("GET", "", model)["adapters"]]

    def shown(self, name: str, model: str = MANY) -> dict[str, Any]:
        (found,) = self.good("GET", f"/{name}", model)
        return found  # type: ignore[no-any-return]

    def infer(
        self, rows: int = 2, model: str = MANY, query: str = "", **rest: Any
    ) -> httpx.Response:
        headers = rest.pop("headers", None)
        x = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [0] * 2 * rows}
        path = f"/v2/models/{model}/infer{query}"
        return self.client.post(path, json={"inputs": [x], **rest}, headers=headers)

    def added(self, rows: int = 2, **rest: Any) -> list[float]:
        """What each row's adapter has added."""
        found = self.infer(rows, **rest)
        assert found.status_code == 200, found.text
        return found.json()["outputs"][0]["data"][::2]  # type: ignore[no-any-return]


@contextmanager
def serving(home: Path, *flags: str) -> Iterator[Depot]:
    """What lies in `home`, at the settle time that servers have."""
    with (
        lasting(home / "models", "--settle", "1", *flags) as server,
        client_of(server) as client,
    ):
        yield Depot(server, client, home)


def add_model(home: Path, model: str, slots: int = 8) -> Path:
    """With adapters in loras/ that add three or five, and none in adapters/."""
    (home / "gates").mkdir(exist_ok=True)
    folder = home / "models" / model
    python_model(folder / "1", SOURCE.format(here=str(home / "gates")))
    (folder / "config.yaml").write_text(f"max_batch_size: 8\nadapters: {{slots: {slots}}}\n")
    adapters.write_adapter(folder / "loras/three", lora_alpha=3)
    adapters.write_adapter(folder / "loras/five", lora_alpha=5)
    return folder


def add_mlp(folder: Path) -> None:
    """A torch_module, and adapters that do and do not fit it."""
    write_mlp(folder / "1")
    (folder / "config.yaml").write_text("backend: torch_module\nmax_batch_size: 8\n")
    lora.write(folder / "loras/good", MLP, r=2)
    lora.write(folder / "loras/elsewhere", {"three": (3, 8)}, r=2)
    lora.write(folder / "loras/wide", {"one": (8, 5)}, r=2)
    lora.write(folder / "loras/high", MLP, r=32)
    lora.write(folder / "loras/dora", MLP, r=2, use_dora=True)
    pickled = lora.write(folder / "loras/pickled", MLP, r=2).path
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    cut = lora.write(folder / "loras/cut", MLP, r=2).path / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])


def client_of(server: Lasting) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=WITHIN_S)


def refused(found: httpx.Response, status: int, message: str) -> None:
    """With that text, or a text that holds it where it begins with "..."."""
    body = found.json()
    assert (found.status_code, body["code"]) == (status, status), found.text
    assert body["type"] == f"{TYPES[status]}Exception" and set(body) == {"code", "type", "message"}
    said = body["message"]
    assert said == message or (message.startswith("...") and message[3:] in said), said
