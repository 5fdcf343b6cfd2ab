"""Whether a model's answers are kept, as far as its config tells (`response_cache`)."""

from __future__ import annotations

from repository.config import ModelConfig

REMOVE = "remove 'response_cache'"


def never_kept(config: ModelConfig, *, server: bool) -> tuple[str, str] | None:
    """Why they are not though the model wants it, and what to do; None: nothing is known against it.
    `server`: it has memory for them."""
    if config.sequences is not None:
        return "for an answer depends on what came before in its sequence", REMOVE
    if config.decoupled:
        return "for a request may have any number of answers ('decoupled')", REMOVE
    if config.ensemble is not None:
        return "for it is an ensemble", "say 'response_cache' of the models that are its steps"
    if not server:
        hint = f"start it with --response-cache-size 64MiB, or {REMOVE}"
        return "unless the server is started with --response-cache-size", hint
    return None
