"""The names of the classes of an output, as a file in the model's folder has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.files import Files
from repository.folder.flaws import FlawError
from repository.names import shown

LARGEST = 16 << 20  # bytes; 22,000 names of classes have half a MiB


def read_labels(config: ModelConfig, root: str, folder: str) -> Mapping[str, tuple[str, ...]]:
    """One name per line, for every output that has such a file; empty lines keep their place.

    `root`: real path of the repository, which no link leads out of; `folder`: of the model. Raises
    ConfigError for a file that is not there or cannot be read.
    """
    files = Files(root, folder, {})
    found = {
        output.name: _lines(files, output.labels)
        for output in config.outputs or ()
        if output.labels
    }
    return MappingProxyType(found)


def _lines(files: Files, name: str) -> tuple[str, ...]:
    if not os.path.isfile(os.path.join(files.folder, name)):
        raise ConfigError(
            f"the file of labels '{shown(name)}' is not in the model's folder",
            hint="put it there, beside the version folders, or remove its name from the config",
        )
    try:
        text = files.read(name, LARGEST)
    except FlawError as flaw:
        raise ConfigError(
            f"the labels in '{shown(name)}': {flaw.message}", hint=flaw.hint
        ) from flaw
    lines = text.decode("utf-8-sig", "replace").split("\n")
    if not lines[-1]:
        lines.pop()
    return tuple(line.rstrip("\r") for line in lines)
