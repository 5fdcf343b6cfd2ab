"""Adapters for tests, in PEFT's format and without a framework: files, and what a scan makes of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from repository.adapters.orders import AdapterFile
from repository.adapters.sources import AdapterFacts, AdapterSource

SIZE = 8  # features of the one layer, "layers.0.q"


def write_config(folder: Path, *, r: int = 4, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["q"], **more}
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(said))
    return path


def weights(*, r: int = 4, value: float = 0.0) -> bytes:
    """A safetensors file: A and B of one layer, all numbers `value`."""
    header, at = {}, 0
    for name, shape in (("lora_A", (r, SIZE)), ("lora_B", (SIZE, r))):
        size = 4 * shape[0] * shape[1]
        header[f"base_model.model.layers.0.q.{name}.weight"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": (at, at + size),
        }
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", value) * (at // 4)


def write_adapter(folder: Path, *, r: int = 4, value: float = 0.0, **config: Any) -> Path:
    write_config(folder, r=r, **config)
    (folder / "adapter_model.safetensors").write_bytes(weights(r=r, value=value))
    return folder


def source(name: str = "a1", print_: str = "f1", **rest: Any) -> AdapterSource:
    """As a scan gives it; good, unless it has a problem."""
    rest.setdefault("facts", None if rest.get("problem") else AdapterFacts({"q": (8, 8)}, 4, 256))
    rest.setdefault("files", (AdapterFile("adapter_config.json", 1, 1, 1),))
    path = rest.pop("path", Path("/models/m/adapters") / name)
    return AdapterSource(name, path, print_, **rest)
