"""Where each instance of a model is to be, when its config says that of every single one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.estimate import NO_GPU, USES_GPU, no_such_gpu

MOST = 64


def spread(config: ModelConfig, gpus: Sequence[str] | None) -> ModelConfig:
    """The config with `devices` named one by one, and `instances` as many. "cuda" is every GPU of this
    machine, "auto" too, or the CPU where there is none. `gpus`: see `estimate.devices_for`.

    Raises ConfigError for a GPU that is not there.
    """
    if config.devices is None:
        return config
    found: list[str] = []
    for wish in config.devices:
        found += _each(wish, config.backend, gpus)
    if len(found) > MOST:
        raise ConfigError(
            f"'devices' makes {len(found)} instances on this machine; at most {MOST} are allowed"
        )
    return msgspec.structs.replace(config, devices=tuple(found), instances=len(found))


def _each(wish: str, backend: str | None, gpus: Sequence[str] | None) -> Sequence[str]:
    there = ("cuda:0",) if gpus is None else tuple(gpus)
    if wish == "auto":
        known = tuple(gpus or ()) if backend in USES_GPU else ()
        return known or ("cpu",)
    if wish == "cuda":
        if not there:
            raise ConfigError(f"'devices' has cuda, {NO_GPU}", hint="let it run on the CPU")
        return there
    if wish != "cpu" and gpus is not None and wish not in gpus:
        raise no_such_gpu("devices", wish, gpus)
    return (wish,)
