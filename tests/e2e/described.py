"""The document of a server, as its tests read it; and a repository in which its examples hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tests.models import add_onnx
from tests.tiny import model_of, write_adapter, write_encoder, write_text_model

VERBS = ("get", "post", "put", "delete", "patch", "head", "options")
KEYS = {scope: f"key-of-{scope}" for scope in ("inference", "metrics", "admin")}


@dataclass(frozen=True)
class Described:
    """One operation of the document, with all of it behind it."""

    method: str
    path: str
    found: dict[str, Any]
    document: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def sample(self) -> str:
        """The path with its examples."""
        path = self.path
        for param in self.params("path"):
            path = path.replace(f"{{{param['name']}}}", str(param["example"]))
        return path

    def params(self, where: str) -> list[dict[str, Any]]:
        return [p for p in self.found.get("parameters", ()) if p["in"] == where]

    def query(self) -> dict[str, str]:
        """The examples of what is required, or has one."""
        return {p["name"]: p["example"] for p in self.params("query") if "example" in p}

    def requests(self) -> Iterator[tuple[str, Any, Any]]:
        """The example bodies: media type, schema, value."""
        for media, content in self.found.get("requestBody", {}).get("content", {}).items():
            for example in content.get("examples", {}).values():
                yield media, content["schema"], example["value"]

    def answers(self) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
        """Status, media type, schema, examples by name."""
        for status, answer in self.found["responses"].items():
            for media, content in answer.get("content", {}).items():
                yield status, media, content["schema"], content.get("examples", {})

    def faults(self, schema: Any, value: Any) -> list[str]:
        """How the value differs from the schema."""
        whole = {**schema, "components": self.document["components"]}
        return [
            f"{e.json_path}: {e.message}" for e in Draft202012Validator(whole).iter_errors(value)
        ]


def operations(document: dict[str, Any]) -> list[Described]:
    return [
        Described(verb.upper(), path, item[verb], document)
        for path, item in document["paths"].items()
        for verb in VERBS
        if verb in item
    ]


def models_of_the_examples(repo: Path) -> None:
    add_onnx(repo / "iris" / "1" / "model.onnx")
    write_text_model(repo / "tiny-lm")
    write_adapter(repo / "tiny-lm" / "adapters" / "pirate", model_of("llama"))
    write_encoder(repo / "minilm")


def key_file(path: Path) -> Path:
    """One key for each scope."""
    lines = ["keys:"]
    for scope, key in KEYS.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines.append(f'  - {{name: {scope}, sha256: "{digest}", scopes: [{scope}]}}')
    path.write_text("\n".join(lines) + "\n")
    return path
