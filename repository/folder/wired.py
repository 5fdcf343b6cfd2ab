"""Whether the steps of an ensemble go together, as far as its own config tells; the models themselves
are looked at when it loads."""

from __future__ import annotations

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.flaws import FlawError
from repository.wiring import Wiring

NOT_ITS_OWN = {"sequences": "its models may take sequences", "devices": "its models have theirs"}


def check_wiring(name: str, config: ModelConfig) -> None:
    """Raises FlawError."""
    is_ensemble = config.backend == "ensemble"
    if is_ensemble is (config.ensemble is not None) is False:
        return
    if not is_ensemble:
        hint = "write 'backend: ensemble', or remove the steps"
        raise FlawError("config", f"'ensemble' is not for the backend {config.backend}", hint)
    for key, why in NOT_ITS_OWN.items():
        if getattr(config, key) is not None:
            raise FlawError("config", f"'{key}' is not for an ensemble: {why}", f"remove '{key}'")
    try:
        Wiring(name, config)
    except ConfigError as error:
        raise FlawError("config", error.message, "mend the steps in its config") from error
