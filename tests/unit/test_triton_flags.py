"""Command lines of tritonserver."""

from __future__ import annotations

import click
import pytest

from repository.errors import ConfigError
from server.cli.serve import UNUSED, serve
from server.cli.triton_flags import translated
from server.options import options_of
from server.settings import FIELDS, Settings
from tests.unit.test_settings import HOME, resolve


def given(*args: str) -> tuple[Settings, tuple[str, ...]]:
    """What the server would be started with."""
    context = serve.make_context("serve", list(args))
    flags = {k: v for k, v in context.params.items() if k not in ("config", "print_config")}
    return resolve(flags, HOME).settings, context.meta[UNUSED]


def test_a_tritonserver_command_line_starts_this_server() -> None:
    settings, unused = given(
        "--model-repository=/a", "--model-repository", "/b", "--model-control-mode=explicit",
        "--load-model=*", "--repository-poll-secs=5", "--strict-readiness=false",
        "--exit-on-error=true", "--http-port=8100", "--http-address", "127.0.0.1",
        "--exit-timeout-secs=7", "--http-max-input-size=1048576", "--allow-grpc=0", "--grpc-port=9",
        "--model-load-thread-count=3", "--model-load-retry-count=2", "--log-verbose=1",
        "--backend-directory=/opt", "--pinned-memory-pool-byte-size", "0", "--allow-gpu-metrics=false",
        "--cuda-memory-pool-byte-size=0:1", "--cuda-memory-pool-byte-size=1:1", "--allow-http=true",
        "--backend-config=onnxruntime,x=1", "--log-format=default", "--strict-model-config=true",
        "--server-name=triton", "--metrics-port=8002", "--allow-file-override=True",
    )  # fmt: skip
    assert [str(p) for p in (settings.repo, *settings.model_repository)] == ["/a", "/b"]
    assert (settings.model_control_mode, settings.load_model) == ("explicit", ("*",))
    assert (settings.poll_secs, settings.grace, settings.max_body) == (5, 7, 1 << 20)
    assert (settings.host, settings.port, settings.grpc_port) == ("127.0.0.1", 8100, 9)
    assert (settings.strict_readiness, settings.exit_on_error, settings.allow_grpc) == (
        False, True, False,
    )  # fmt: skip
    assert (settings.load_slots, settings.model_load_retry_count) == (3, 2)
    assert (settings.log_level, settings.log_format) == ("debug", "text")
    assert settings.disable_auto_complete_config and settings.allow_file_override
    assert settings.server_name == "triton" and settings.metrics_port == 8002
    assert unused == (
        "--backend-directory=/opt", "--pinned-memory-pool-byte-size", "--allow-gpu-metrics=false",
        "--cuda-memory-pool-byte-size=0:1", "--cuda-memory-pool-byte-size=1:1",
        "--backend-config=onnxruntime,x=1", "--log-format=default",
    )  # fmt: skip


def test_our_own_spellings_are_as_they_were() -> None:
    settings, unused = given(
        "repo", "--no-fast-path", "--insecure", "--log-format", "json", "--port", "1"
    )
    assert settings.repo.name == "repo" and unused == ()
    assert (settings.fast_path, settings.insecure, settings.log_format) == (False, True, "json")
    settings, _ = given("--insecure", "repo", "--trust-code", "false")
    assert settings.repo.name == "repo" and settings.insecure and not settings.trust_code
    settings, _ = given("--", "--repo")
    assert settings.repo.name == "--repo"


@pytest.mark.parametrize(
    ("args", "level"),
    [
        (["--log-verbose=0"], "info"),
        (["--log-verbose", "2"], "debug"),
        (["--log-info=false"], "warning"),
        (["--log-info=0", "--log-warning=false"], "error"),
        (["--log-info=true", "--log-error=false"], "info"),
        (["--log-info=false", "--log-verbose=1"], "debug"),
        (["--log-verbose=1", "--log-level", "error"], "error"),
    ],
)
def test_their_log_switches_are_our_levels(args: list[str], level: str) -> None:
    assert given(*args)[0].log_level == level


@pytest.mark.parametrize(
    "args",
    [
        ["--grpc-use-ssl=true"], ["--no-such-flag"], ["--allow-http=false"],
        ["--strict-readiness=maybe"], ["--log-verbose=much"], ["--metrics-address=1.2.3.4"],
        ["--backend-dirctory=/x"],
    ],
)  # fmt: skip
def test_what_nobody_knows_or_may_pass_over_is_an_error(args: list[str]) -> None:
    with pytest.raises(click.UsageError):
        serve.make_context("serve", args)


@pytest.mark.parametrize(
    "args",
    [
        ["--cache-config", "local,size=1048576"], ["--cache-config=local,size=1048576"],
        ["--response-cache-byte-size=1048576"], ["--response-cache-byte-size", "1048576"],
        ["--response-cache-size", "1MiB"],
    ],
)  # fmt: skip
def test_their_cache_is_ours(args: list[str]) -> None:
    settings, unused = given(*args)
    assert settings.response_cache_size == 1 << 20 and unused == ()
    assert options_of(settings).response_cache == 1 << 20
    assert options_of(Settings()).response_cache == 0


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("redis,host=x", "the only cache of this server is 'local', not 'redis'"),
        ("local", "must be local,size=BYTES"),
        ("local,size=", "must be local,size=BYTES"),
        ("local,path=x", "must be local,size=BYTES"),
        ("", "the only cache"),
    ],
)
def test_another_cache_is_an_error(said: str, why: str) -> None:
    with pytest.raises(click.UsageError, match=why):
        translated([f"--cache-config={said}"])


def test_no_flag_of_ours_is_passed_over() -> None:
    for name in FIELDS:
        for flag in (name.replace("_", "-"), *FIELDS[name].also):
            assert translated([f"--{flag}=true"]).unused == [], flag


def test_all_models_and_some_is_an_error_at_the_start() -> None:
    assert options_of(Settings(load_model=("*", "*"))).load == ("*", "*")
    with pytest.raises(ConfigError, match=r"--load-model: '\*' is every model"):
        options_of(Settings(load_model=("*", "m")))
