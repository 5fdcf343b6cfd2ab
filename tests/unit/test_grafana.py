"""The boards, alerts and configurations of grafana/, without a server: what is committed is what is
made, names are names that exist, and the tools of those who read them find nothing to say."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana.boards import BOARDS
from grafana.build import made
from grafana.panels import VARIABLES
from server.metrics import names
from tests.e2e.prometheus import GRAFANA, HOME, put, write_config

SCHEMA = HOME / "build" / "schema"  # made by `make schema`
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH"
)
needs_schema = pytest.mark.skipif(
    shutil.which("node") is None or not (SCHEMA / ".installed").exists(),
    reason="needs node and `make schema`",
)
ALERTS = (
    "ServerDown", "ModelFailed", "ModelLoadingTooLong", "ReloadFailing", "ModelFlapping",
    "WatcherDown", "GpuMemoryNearFull", "GpuMemoryUnattributed", "MemoryNotReclaimed",
    "EvictionThrash", "HighErrorRatio", "LatencyP99", "QueueSaturated", "LoadShedding",
    "WorkerRestarting", "AuthFailures",
)  # fmt: skip
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
BY_PROMETHEUS = {"instance", "job"}


def read(path: str) -> Any:
    return yaml.safe_load((GRAFANA / path).read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for board in BOARDS:
        for panel in board.panels:
            for query in panel.queries:
                yield f"{board.title}, {panel.title}", query.expr
        for mark in board.marks:
            yield f"{board.title}, {mark.name}", mark.expr
    for variable in VARIABLES:
        yield f"variable {variable.name}", variable.query
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def series() -> dict[str, set[str]]:
    """Every series that the server may show -> its labels."""
    return {
        family.full + suffix: {*family.labels, *(("le",) if suffix == "_bucket" else ())}
        for family in names.ALL
        for suffix in SUFFIXES.get(family.kind, ("",))
    }


def boards() -> dict[str, Any]:
    return {name: json.loads(text) for name, text in made().items()}


def panels(board: Any) -> list[Any]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def ran(*command: str) -> str:
    """What it says; it must succeed."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


# boards -------------------------------------------------------------------------------------------


def test_what_is_committed_is_what_is_made() -> None:
    committed = {p.name: p.read_text() for p in (GRAFANA / "dashboards").iterdir()}
    assert committed == made(), "run: python -m grafana.build"


def test_there_are_three_boards_that_lead_to_each_other() -> None:
    assert [b["uid"] for b in boards().values()] == [
        "modeldepot-repository", "modeldepot-memory", "modeldepot-inference",
    ]  # fmt: skip
    for board in boards().values():
        (link,) = board["links"]
        assert (link["type"], link["tags"]) == ("dashboards", ["modeldepot"])
        assert link["includeVars"] and link["keepTime"] and board["tags"] == link["tags"]
        named = [variable["name"] for variable in board["templating"]["list"]]
        assert named == ["datasource", "instance", "model", "gpu"]


def test_references_and_ids_are_there_once() -> None:
    for name, board in boards().items():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids)), name
        for panel in panels(board):
            references = [target["refId"] for target in panel["targets"]]
            assert references == list("ABCDEF"[: len(references)]), panel["title"]


def test_no_two_panels_lie_upon_each_other() -> None:
    for name, board in boards().items():
        taken: dict[tuple[int, int], str] = {}
        for panel in board["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    other = taken.setdefault((x, y), panel["title"])
                    assert other == panel["title"], f"{name}: {other} and {panel['title']}"


def test_every_panel_says_what_it_shows_and_why_it_may_be_empty() -> None:
    for board in boards().values():
        for panel in panels(board):
            assert len(panel["description"]) > 40, panel["title"]
            assert panel["fieldConfig"]["defaults"]["noValue"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"


def test_what_needs_a_gpu_says_so_where_there_is_none() -> None:
    for board in BOARDS:
        for panel in board.panels:
            asks = any("_gpu_" in q.expr or "cuda:(" in q.expr for q in panel.queries)
            assert asks == (panel.needs == "gpu"), panel.title
            assert (panel.none == "no GPU") == asks, panel.title


def test_every_series_that_is_asked_for_exists_with_these_labels() -> None:
    known = series()
    for where, expr in expressions():
        for name, matchers in re.findall(r"(modeldepot_\w+)(?:\{([^}]*)\})?", expr):
            assert name in known, f"{where}: there is no {name}"
            asked = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", matchers))
            assert asked <= known[name] | BY_PROMETHEUS, f"{where}: {name} has no {asked}"


OF_KEPT_ANSWERS = (
    "response_cache_hits", "response_cache_misses", "response_cache_limit_bytes",
    "response_cache_bytes", "response_cache_entries", "response_cache_evictions",
)  # fmt: skip


def test_every_series_of_the_table_is_on_a_board_or_in_an_alert() -> None:
    """Or is named here, with the reason."""
    text = " ".join(expr for _, expr in expressions())
    unseen = {
        family.full
        for family in names.ALL
        if family.prefix == names.PREFIX and not re.search(rf"\b{family.full}(_|\b)", text)
    }
    assert unseen <= {
        "modeldepot_server_draining",  # seconds; server_ready is 0 then
        "modeldepot_repository_scans",  # that scans happen is seen from their duration
        "modeldepot_gpu_memory_free_bytes",  # total less used
        "modeldepot_model_unload_duration_seconds",  # for those who look into one case
        "modeldepot_model_pinned",
        "modeldepot_watch_overflows",
        *(f"modeldepot_{name}" for name in OF_KEPT_ANSWERS),  # most servers keep none
    }, unseen


@needs_promtool
def test_every_expression_can_be_read_by_prometheus(tmp_path: Path) -> None:
    records = [
        {
            "record": f"r{number}",
            "expr": put(expr, instance=".*", window="1m", step="15s", shown="1h"),
        }
        for number, (where, expr) in enumerate(expressions())
        if not where.startswith("variable")
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": records}]}))
    assert f"{len(records)} rules found" in ran("promtool", "check", "rules", str(path))


@needs_schema
async def test_the_boards_are_of_grafanas_own_types() -> None:
    """Also that the check finds what is wrong: a word that no enum has, a key that nobody knows."""
    whole = made()
    wrong = {
        "a word": whole["memory.json"].replace('"displayMode": "list"', '"displayMode": "lst"', 1),
        "a key": whole["memory.json"].replace('"noValue"', '"noValu"', 1),
        "a kind": whole["memory.json"].replace('"type": "stat"', '"type": "statt"', 1),
    }
    said = await asyncio.to_thread(checked, {**whole, **wrong})
    assert {name for name in (*whole, *wrong) if f"{stem(name)}.ts" in said} == set(wrong), said


def stem(name: str) -> str:
    return name.removesuffix(".json").replace(" ", "_")


def checked(texts: dict[str, str]) -> str:
    types = (GRAFANA / "schema.ts").read_text()
    for name, text in texts.items():
        path = SCHEMA / f"{stem(name)}.ts"
        path.write_text(f"{types}\nexport const board: Board = {text};\n")
    ended = subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", "--strict", "--noEmit", "--skipLibCheck",
         "--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler",
         *(f"{stem(name)}.ts" for name in texts)],
        cwd=SCHEMA, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ended.stdout + ended.stderr


# alerts -------------------------------------------------------------------------------------------


def test_every_alert_is_there_and_says_what_to_do() -> None:
    assert {rule["alert"] for rule in rules()} == set(ALERTS)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 80


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires, silent = set(), set()
    for case in read("alerts_test.yml")["tests"]:
        for look in case["promql_expr_test"]:
            (alert,) = re.findall(r'alertname="(\w+)"', look["expr"])
            (fires if look["exp_samples"] else silent).add(alert)
    # One model of the case of ReloadFailing is silent while another fires, and later both are.
    assert fires == set(ALERTS) and silent == set(ALERTS)


@needs_promtool
def test_the_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in ran("promtool", "test", "rules", str(GRAFANA / "alerts_test.yml"))


# what is mounted ----------------------------------------------------------------------------------


def mounts(service: str) -> dict[str, tuple[str, str]]:
    """Where -> what, and whether it may be written to."""
    found = {}
    for line in read("docker-compose.yaml")["services"][service].get("volumes", ()):
        source, target, mode = re.fullmatch(r"(\$\{.*?\}|[^:]+):([^:]+)(?::(ro))?", line).groups()  # type: ignore[union-attr]
        found[target] = (source, mode or "rw")
    return found


@needs_promtool
def test_prometheus_reads_the_configuration_as_it_is_mounted(tmp_path: Path) -> None:
    found = mounts("prometheus")
    folder = "/etc/prometheus/"
    for target, (source, _) in found.items():
        if target.startswith(folder):
            text = "" if source.startswith("$") else (GRAFANA / source).read_text()
            (tmp_path / target.removeprefix(folder)).write_text(text)
    said = ran("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    assert f"{len(ALERTS)} rules found" in said
    assert write_config(tmp_path / "test", "k", {"s": "127.0.0.1:1"}).exists()


def test_what_is_mounted_exists_and_only_what_is_theirs_may_be_written_to() -> None:
    compose = read("docker-compose.yaml")
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert "build" in service or re.fullmatch(r".+:v?\d+\.\d+\.\d+", service["image"]), name
        assert "healthcheck" in service or "build" in service, name
        for source, mode in mounts(name).values():
            if mode == "rw":
                assert source in compose["volumes"], f"{name}: {source}"
            elif not source.startswith("$"):
                assert (GRAFANA / source).exists(), source
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} would be open to everybody"


def test_the_parts_agree_on_where_things_are() -> None:
    compose = read("docker-compose.yaml")["services"]
    (provider,) = read("provisioning/dashboards/modeldepot.yaml")["providers"]
    (source,) = read("provisioning/datasources/prometheus.yaml")["datasources"]
    config = read("prometheus/prometheus.yml")
    assert mounts("grafana")[provider["options"]["path"]] == ("./dashboards", "ro")
    assert source["url"] == "http://prometheus:9090"
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "modeldepot:8000" and "127.0.0.1:8000:8000" in compose["modeldepot"]["ports"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/repository.json"
    stages = re.findall(r"^FROM .* AS (\w+)$", (HOME / "Dockerfile").read_text(), re.MULTILINE)
    assert {"cpu", "gpu"} <= set(stages)
