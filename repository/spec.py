"""What to load: one version of one model, at one fingerprint of its files, under one config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from repository.config import ModelConfig


class Key(NamedTuple):
    model: str
    version: int


class FileStamp(NamedTuple):
    """One file as a scan saw it. `path` is relative to the model's folder, with '/'."""

    path: str
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Two specs with one fingerprint are interchangeable. Paths are resolved and inside the repository.

    folder        the model's folder: config, checks/, adapters/
    path          the version's folder (the same as `folder` where there are no version folders)
    files         what the fingerprint was made of, so that a load can be checked against it
    config        merged; `sources` says where each value came from: {"max_batch_size":
                  "config.yaml:3", "device": "default"}; nested keys are dotted
    backend       resolved name: "onnx", "python"
    model_file    the file the backend opens, relative to `path` ("model.onnx"); "" for a whole folder
    bytes_needed  estimate for all instances together, reserved before the load
    devices       where it may go, best first: ("cuda:0", "cpu")
    labels        of an output: the names of its classes, as its config's file has them
    """

    model: str
    version: int
    fingerprint: str
    folder: Path = Path()
    path: Path = Path()
    files: tuple[FileStamp, ...] = ()
    config: ModelConfig = ModelConfig()
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    backend: str = ""
    model_file: str = ""
    bytes_needed: int = 0
    devices: tuple[str, ...] = ("cpu",)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def key(self) -> Key:
        return Key(self.model, self.version)
