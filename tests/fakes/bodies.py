"""Infer bodies, made with nothing of ours: as another program would write them."""

from __future__ import annotations

import json
from typing import Any


def body(*inputs: dict[str, Any], blobs: bytes = b"", **rest: Any) -> tuple[bytes, bytes | None]:
    """The body and its Inference-Header-Content-Length, None where no blob follows."""
    header = json.dumps({"inputs": list(inputs), **rest}).encode()
    return header + blobs, b"%d" % len(header) if blobs else None


def tensor(
    name: str, shape: list[int], datatype: str, data: Any = None, **parameters: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
    if data is not None:
        found["data"] = data
    if parameters:
        found["parameters"] = parameters
    return found
