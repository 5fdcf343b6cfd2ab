"""What of the settings the repository is told."""

from __future__ import annotations

from repository.errors import ConfigError
from repository.reports import Options
from server.settings import Settings


def options_of(settings: Settings) -> Options:
    """Raises ConfigError for models to load that are all models and some."""
    if "*" in settings.load_model and len(set(settings.load_model)) > 1:
        raise ConfigError(
            "'*' is every model, and others are named beside it; keep one of them",
            where="--load-model",
        )
    return Options(
        root=settings.repo,
        more_roots=settings.model_repository,
        mode=settings.model_control_mode,
        load=settings.load_model,
        watch=settings.watch,
        settle_s=settings.settle,
        poll_s=settings.poll_secs,
        trust_code=settings.trust_code,
        default_host=settings.default_host,
        memory_budget=settings.memory_budget,
        host_tier=settings.host_tier,
        pin_cap=settings.pin_cap,
        room_wait_s=settings.room_wait,
        crash_limit=settings.crash_limit,
        cpu_fallback=settings.allow_cpu_fallback,
        state_dir=settings.state_dir,
        load_slots=settings.load_slots,
        load_timeout_s=settings.load_timeout,
        drain_s=settings.drain,
        max_queue=settings.max_queue,
        allowed_roots=settings.allowed_root,
        forget=settings.forget,
        default_model=settings.default_model,
        on_demand=settings.enable_inline_model_loading,
        demand_timeout_s=settings.demand_timeout,
        demand_queue=settings.demand_queue,
        min_residency_s=settings.min_residency,
        load_retries=settings.model_load_retry_count,
        config_name=settings.model_config_name or "",
        completes=not settings.disable_auto_complete_config,
        response_cache=settings.response_cache_size or 0,
        allow_files=settings.allow_file_override,
    )
