"""How many bytes one version will need, from what the look at its files found."""

from __future__ import annotations

import os
from collections.abc import Mapping

from repository.config import ModelConfig
from repository.folder.estimate import (
    OF_WORDS,
    adapter_bytes,
    bytes_needed,
    files_of,
    kv_bytes,
    loaded_size,
    number_size,
    weights_of,
)
from repository.folder.files import Files
from repository.folder.huggingface import Described
from repository.folder.parts import Parts
from repository.folder.whole import Verdict


def needs(
    config: ModelConfig,
    parts: Parts,
    files: Files,
    verdicts: Mapping[str, Verdict],
    about: Described | None,
    layers: Mapping[str, int],
) -> int:
    """For all instances together. `layers`: that adapters change (`estimate.adapter_layers`)."""
    looked = [verdicts[name] for name in parts.weights if name in verdicts]
    tensors = [entry for verdict in looked for entry in verdict.tensors]
    size = loaded_size(config, about)
    if config.backend in ("python", "triton_python"):
        weights = files_of(files.sizes, parts.weights)  # it reads what it likes, as it likes
    else:
        external = {os.path.relpath(e, files.folder) for v in looked for e in v.external}
        plain = {n for n in parts.weights if n not in verdicts or not verdicts[n].tensors}
        weights = weights_of(tensors, size) + files_of(files.sizes, plain | external)
    number = number_size(tensors, size)
    more = adapter_bytes(config, layers, number) + OF_WORDS * files.sizes.get(parts.words, 0)
    if config.backend == "text" and about is not None:
        more += kv_bytes(config, about, number)
    return bytes_needed(config, weights, more)
