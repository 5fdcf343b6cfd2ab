"""Where a setting comes from, what it may be, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import ConfigError
from server.binding import check_bind, is_loopback
from server.options import options_of
from server.settings import FIELDS, Resolved, Settings, lines_of, resolve

HOME = {"HOME": "/home/someone"}


def config(folder: Path, text: str) -> Path:
    path = folder / "depot.yaml"
    path.write_text(text)
    return path


def refusal(**given: Any) -> str:
    flags, environ, path = given.get("flags", {}), given.get("environ", {}), given.get("path")
    with pytest.raises(ConfigError) as caught:
        resolve(flags, {**HOME, **environ}, path)
    return str(caught.value)


# precedence -------------------------------------------------------------------------------------


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path: Path,
) -> None:
    path = config(tmp_path, "port: 1\nhost: localhost\nsettle: 3\n")
    found = resolve({"port": 3}, {**HOME, "MODELDEPOT_PORT": "2", "MODELDEPOT_SETTLE": "4"}, path)
    assert (found.settings.port, found.sources["port"]) == (3, "--port")
    assert (found.settings.settle, found.sources["settle"]) == (4.0, "MODELDEPOT_SETTLE")
    assert (found.settings.host, found.sources["host"]) == ("localhost", "depot.yaml:2")
    assert (found.settings.grace, found.sources["grace"]) == (30.0, "default")


def test_a_flag_that_was_not_given_hides_nothing() -> None:
    found = resolve({"port": None, "load_model": ()}, {**HOME, "MODELDEPOT_PORT": "2"})
    assert found.settings.port == 2


def test_false_as_a_flag_is_given() -> None:
    found = resolve({"insecure": False}, {**HOME, "MODELDEPOT_INSECURE": "true"})
    assert found.settings.insecure is False


def test_every_setting_can_come_from_the_environment() -> None:
    samples = {
        "port": "1", "model_control_mode": "none", "load_model": "a, b/c", "watch": "off",
        "settle": "2", "poll_secs": "1", "insecure": "1", "trust_code": "yes",
        "default_host": "inline", "memory_budget": "cpu=2GiB,cuda:0=3GiB", "load_slots": "7",
        "load_timeout": "9", "drain": "1", "grace": "2", "max_body": "1MiB", "max_queue": "5",
        "keepalive": "3", "log_format": "json", "log_level": "DEBUG", "strict_readiness": "on",
        "exit_on_error": "true", "fast_path": "off", "forget": "true", "allowed_root": "/a:/b",
        "enable_inline_model_loading": "true", "demand_timeout": "7", "demand_queue": "8",
        "min_residency": "9", "host_tier": "3GiB", "pin_cap": "0.5,cuda:0=0.2", "room_wait": "4",
        "crash_limit": "5", "allow_cpu_fallback": "on", "metrics_port": "8002",
        "triton_metrics": "off", "model_repository": "/a:/b", "allow_grpc": "off", "grpc_port": "9",
        "grpc_max_message": "1MiB", "model_load_retry_count": "2", "allow_client_shm": "on",
        "disable_auto_complete_config": "on", "allow_file_override": "on", "response_cache_size": "1MiB",
    }  # fmt: skip
    values = {key: samples.get(key, "/text") for key in FIELDS}
    environ = {f"MODELDEPOT_{key.upper()}": value for key, value in values.items()}
    found = resolve({}, {**HOME, **environ})
    assert set(found.sources.values()) == set(environ)
    default = Settings()
    same = [k for k in FIELDS if getattr(found.settings, k) == getattr(default, k)]
    assert same == []


def test_a_setting_in_the_file_may_be_spelled_like_its_flag(tmp_path: Path) -> None:
    found = resolve({}, HOME, config(tmp_path, "model-control-mode: explicit\nload-model: [a]\n"))
    assert found.settings.model_control_mode == "explicit"
    assert found.settings.load_model == ("a",)


def test_off_in_yaml_is_a_word_and_not_false(tmp_path: Path) -> None:
    assert resolve({}, HOME, config(tmp_path, "watch: off\n")).settings.watch == "off"


def test_paths_in_the_file_start_at_the_file(tmp_path: Path) -> None:
    found = resolve({}, HOME, config(tmp_path, "repo: models\napi_keys: /etc/keys.yaml\n"))
    assert found.settings.repo == tmp_path / "models"
    assert found.settings.api_keys == Path("/etc/keys.yaml")


def test_a_budget_may_be_a_mapping_in_the_file(tmp_path: Path) -> None:
    found = resolve({}, HOME, config(tmp_path, "memory_budget:\n  cpu: 2GiB\n"))
    assert dict(found.settings.memory_budget) == {"cpu": 2 * 1024**3}


# mistakes ---------------------------------------------------------------------------------------


def test_an_unknown_key_names_its_line_and_the_nearest_setting(tmp_path: Path) -> None:
    text = refusal(path=config(tmp_path, "host: localhost\nlod_model: [a]\n"))
    assert "depot.yaml:2" in text and "lod_model" in text and "'load_model'" in text


def test_a_variable_that_is_nearly_a_setting_is_refused() -> None:
    text = refusal(environ={"MODELDEPOT_MODEL_CONTROL": "none"})
    assert "MODELDEPOT_MODEL_CONTROL" in text and "'model_control_mode'" in text


def test_what_kubernetes_sets_for_a_service_of_our_name_is_not_ours() -> None:
    environ = {
        "MODELDEPOT_PORT": "tcp://10.0.0.1:8000",
        "MODELDEPOT_SERVICE_HOST": "10.0.0.1",
        "MODELDEPOT_SERVICE_PORT": "8000",
        "MODELDEPOT_SERVICE_PORT_HTTP": "8000",
        "MODELDEPOT_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    found = resolve({}, {**HOME, **environ})
    assert found.settings.port == 8000 and set(found.sources.values()) == {"default"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "http"}, ["--port", "whole number", "'http'"]),
        ({"port": 70000}, ["--port", "0 to 65535"]),
        ({"settle": "-1"}, ["--settle", "at least 0"]),
        ({"settle": "nan"}, ["--settle", "number"]),
        ({"insecure": "maybe"}, ["--insecure", "true or false"]),
        ({"watch": "always"}, ["--watch", "notify, poll, off"]),
        ({"max_body": "64 apples"}, ["--max-body", "MiB"]),
        ({"prot": 1}, ["--prot", "'port'"]),
        ({"port": True}, ["--port", "whole number"]),
    ],
)
def test_a_bad_value_names_its_source_and_what_would_do(
    flags: dict[str, Any], words: list[str]
) -> None:
    text = refusal(flags=flags)
    assert all(word in text for word in words), text


def test_a_config_file_that_is_missing_or_hostile_is_refused(tmp_path: Path) -> None:
    assert "depot.yaml" in refusal(path=tmp_path / "depot.yaml")
    assert "mapping" in refusal(path=config(tmp_path, "- port\n"))
    assert "alias" in refusal(path=config(tmp_path, "a: &a [1]\nport: *a\n"))


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.text(max_size=20)))
@settings(deadline=None)
def test_whatever_is_given_either_resolves_or_is_a_config_error(flags: dict[str, str]) -> None:
    try:
        found = resolve(flags, HOME)
    except ConfigError:
        return
    assert isinstance(found, Resolved)


# what is made of them ---------------------------------------------------------------------------


def test_two_repositories_never_share_a_state_folder(tmp_path: Path) -> None:
    one = resolve({"repo": tmp_path / "a"}, {"XDG_STATE_HOME": "/state"}).settings.state_dir
    two = resolve({"repo": tmp_path / "b"}, {"XDG_STATE_HOME": "/state"}).settings.state_dir
    same = resolve({"repo": tmp_path / "c" / ".." / "a"}, {"XDG_STATE_HOME": "/state"})
    assert one is not None and one.is_relative_to("/state/modeldepot") and one != two
    assert same.settings.state_dir == one
    at_home = resolve({"repo": tmp_path}, {**HOME, "XDG_STATE_HOME": "relative"})
    assert str(at_home.settings.state_dir).startswith("/home/someone/.local/state/modeldepot/")


def test_options_carry_every_setting_of_the_repository(tmp_path: Path) -> None:
    flags = {
        "repo": tmp_path, "model_control_mode": "explicit", "load_model": ("a",), "watch": "poll",
        "settle": 0.1, "poll_secs": 0.2, "trust_code": True, "default_host": "inline",
        "load_slots": 3, "load_timeout": 4.0, "drain": 5.0, "max_queue": 6,
        "memory_budget": "cpu=2GiB", "state_dir": tmp_path / "state",
        "allowed_root": (tmp_path / "more",), "forget": True, "default_model": "a",
        "enable_inline_model_loading": True, "demand_timeout": 7.0, "demand_queue": 8,
        "min_residency": 9.0, "host_tier": "3GiB", "pin_cap": "0.5,cuda:0=0.2", "room_wait": 4.0,
        "crash_limit": 5, "allow_cpu_fallback": True,
    }  # fmt: skip
    options = options_of(resolve(flags, HOME).settings)
    assert options.root == tmp_path and options.mode == "explicit" and options.load == ("a",)
    assert (options.watch, options.settle_s, options.poll_s) == ("poll", 0.1, 0.2)
    assert (options.trust_code, options.default_host) == (True, "inline")
    assert (options.load_slots, options.load_timeout_s) == (3, 4.0)
    assert (options.drain_s, options.max_queue) == (5.0, 6)
    assert dict(options.memory_budget) == {"cpu": 2 * 1024**3}
    assert options.state_dir == tmp_path / "state"
    assert (options.allowed_roots, options.forget) == ((tmp_path / "more",), True)
    assert (options.default_model, options.on_demand) == ("a", True)
    assert (options.demand_timeout_s, options.demand_queue) == (7.0, 8)
    assert options.min_residency_s == 9.0
    assert options.host_tier == 3 * 1024**3
    assert dict(options.pin_cap) == {"": 0.5, "cuda:0": 0.2}
    assert (options.room_wait_s, options.crash_limit, options.cpu_fallback) == (4.0, 5, True)


@pytest.mark.parametrize(
    "said", ["1.5", "-0.1", "half", "cpu=", "=0.5", "cpu=0.1,cpu=0.2", "0.1,0.2"]
)
def test_a_pin_cap_that_is_no_share_says_how_it_should_look(said: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a share from 0 to 1, or look like"):
        resolve({"pin_cap": said}, HOME)


def test_print_config_shows_every_value_with_its_source() -> None:
    lines = lines_of(resolve({"port": 9}, {**HOME, "MODELDEPOT_LOAD_MODEL": "a,b"}))
    assert len(lines) == len(FIELDS)
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert shown["port"] == ["9", "--port"]
    assert shown["load_model"] == ["a,b", "MODELDEPOT_LOAD_MODEL"]
    assert shown["insecure"] == ["false", "default"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_bind(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "myhost", "127.0.0.1.evil.org", ""])
def test_a_public_address_needs_keys_or_an_explicit_word(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-keys"):
        check_bind(Settings(host=host))
    check_bind(Settings(host=host, insecure=True))
    check_bind(Settings(host=host, api_keys=Path("keys.yaml")))
