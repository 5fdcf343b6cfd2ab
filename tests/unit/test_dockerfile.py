"""What the Dockerfile promises, as far as its text tells; `tests/e2e/test_image.py` carries it out."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from server.cli import COMMANDS
from server.settings import ENV, FIELDS, resolve
from tests.dockerfile import (
    Ignore,
    chain_of,
    copies_of,
    environment_of,
    last,
    stages_of,
    steps_of,
)

HOME = Path(__file__).resolve().parents[2]
TEXT = (HOME / "Dockerfile").read_text()
IGNORE = Ignore((HOME / ".dockerignore").read_text())
STAGES = stages_of(TEXT)
FINAL = ("cpu", "gpu")


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    if not beside.exists():
        pytest.skip("hadolint is not installed (there is none for this platform on PyPI)")
    said = subprocess.run([beside, HOME / "Dockerfile"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize("device", FINAL)
def test_the_image_is_that_of_the_device(device: str) -> None:
    stages = stages_of(TEXT, DEVICE=device)
    image = list(stages.values())[-1]
    assert (image.base, image.steps) == (device, ())
    copied = [s.text for s in stages[device].steps if s.word == "COPY"]
    assert any(f"--from=depends-{device} " in text for text in copied)


def test_without_an_argument_it_is_for_the_cpu() -> None:
    assert list(STAGES.values())[-1].base == "cpu"


def test_every_base_is_pinned_by_tag_and_can_be_replaced() -> None:
    bases = {stage.base for stage in STAGES.values()} - STAGES.keys()
    assert len(bases) == 1
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)
    digest = stages_of(TEXT, PYTHON="3.12@sha256:0")
    assert {stage.base for stage in digest.values()} - STAGES.keys() == {"python:3.12@sha256:0"}


@pytest.mark.parametrize("stage", STAGES)
def test_everything_that_is_copied_is_there_and_let_through(stage: str) -> None:
    for sources, target in copies_of(list(STAGES[stage].steps)):
        for source in sources:
            assert list(IGNORE.files(HOME, source)), source
            assert not (HOME / source).is_dir() or target.strip("./") == source
    for step in STAGES[stage].steps:
        for name in re.findall(r"--from=(\S+)", step.text):
            assert name in STAGES


def test_nothing_else_is_let_through() -> None:
    copied = {s for stage in STAGES.values() for c in copies_of(list(stage.steps)) for s in c[0]}
    seen = {path.name for path in HOME.iterdir() if not IGNORE(path.name)}
    assert seen == copied
    for path in (".git/config", ".env", "tests/x.py", "server/__pycache__/a.pyc", "server/a.pyc"):
        assert IGNORE(path)


def test_the_lists_of_dependencies_leave_out_what_each_image_chooses() -> None:
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    ours = [d for d in project["dependencies"] if "onnxruntime" in d]
    assert [re.split(r"[><=;]", d)[0] for d in ours] == ["onnxruntime-gpu", "onnxruntime"]
    locked = (HOME / "constraints.txt").read_text()
    assert re.search(r"^onnxruntime-gpu==\S+$", locked, re.MULTILINE)  # the cpu image's sed
    assert re.search(r"^torch==\d+\.\d+\.\d+$", locked, re.MULTILINE)


@pytest.mark.parametrize("stage", FINAL)
def test_what_runs_is_not_root_and_gets_signals(stage: str) -> None:
    steps = chain_of(STAGES, stage)
    user, _, group = last(steps, "USER").text.partition(":")
    assert int(user) >= 10_000 and int(group) >= 10_000
    assert steps.index(last(steps, "USER")) > max(
        n for n, step in enumerate(steps) if step.word == "RUN"
    )
    entry, start = last(steps, "ENTRYPOINT").form(), last(steps, "CMD").form()
    assert entry is not None and start is not None
    assert entry[:2] == ["tini", "--"] and entry[-1] == "modeldepot"
    assert start[0] in COMMANDS
    assert last(steps, "STOPSIGNAL").text == "SIGTERM"


@pytest.mark.parametrize("stage", FINAL)
def test_no_compiler_and_no_installer_is_in_what_runs(stage: str) -> None:
    steps = chain_of(STAGES, stage)
    runs = " ".join(step.text for step in steps if step.word == "RUN")
    assert not re.search(r"gcc|g\+\+|build-essential|\bpip\b", runs)
    assert "--no-install-recommends" in runs and "rm -rf /var/lib/apt/lists/*" in runs
    installers = [step.text for step in STAGES["build"].steps if "venv" in step.text]
    assert all("--without-pip" in text for text in installers)


@pytest.mark.parametrize("stage", FINAL)
def test_its_settings_are_settings_and_are_safe(stage: str) -> None:
    environ = environment_of(chain_of(STAGES, stage), {})
    assert {n[len(ENV) :].lower() for n in environ if n.startswith(ENV)} <= FIELDS.keys()
    settings = resolve({}, environ).settings
    assert (str(settings.repo), str(settings.state_dir)) == ("/models", "/state")
    assert settings.host == "0.0.0.0" and not settings.insecure and not settings.trust_code
    assert settings.grace < 10  # `docker stop` kills after so many seconds


@pytest.mark.parametrize("stage", FINAL)
def test_what_is_written_is_a_volume_and_what_is_served_a_port(stage: str) -> None:
    steps = chain_of(STAGES, stage)
    environ = environment_of(steps, {})
    assert last(steps, "VOLUME").form() == [environ["MODELDEPOT_STATE_DIR"]]
    ports = [environ["MODELDEPOT_PORT"], environ["MODELDEPOT_GRPC_PORT"]]
    assert last(steps, "EXPOSE").text.split() == ports


@pytest.mark.parametrize("stage", FINAL)
def test_its_health_is_asked_of_the_doctor(stage: str) -> None:
    _, _, words = last(chain_of(STAGES, stage), "HEALTHCHECK").text.partition("CMD ")
    assert words == '["modeldepot", "doctor", "--live"]'


def test_its_labels_tell_the_version_of_the_project() -> None:
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    steps = list(STAGES["runtime"].steps)
    assert f"VERSION={project['version']}" in [s.text for s in steps if s.word == "ARG"]
    label = last(steps, "LABEL").text
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in label
    assert project["description"] in label and f'"{project["license"]}"' in label


def test_the_documents_say_what_the_image_does() -> None:
    steps, text = list(STAGES["runtime"].steps), (HOME / "docs/docker.md").read_text()
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    pod = yaml.safe_load(found[1])["spec"]
    user, _, group = last(steps, "USER").text.partition(":")
    may = pod["securityContext"]
    assert (may["runAsUser"], may["runAsGroup"], may["fsGroup"]) == (
        int(user),
        int(group),
        int(group),
    )
    (container,) = pod["containers"]
    environ = {one["name"]: one["value"] for one in container["env"]}
    settings = resolve({}, environ).settings
    assert settings.grace < pod["terminationGracePeriodSeconds"]
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert {"/models", "/state"} <= mounts and str(settings.api_keys).startswith(tuple(mounts))
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert next(iter(STAGES.values())).base in {
        f"python:{t}" for t in re.findall(r"python:(\S+?)`", text)
    }
    for name in re.findall(r"MODELDEPOT_(\w+)", text):
        assert name.lower() in FIELDS


def test_the_parser_knows_every_word_that_is_used() -> None:
    words = {step.word for step in steps_of(TEXT)}
    assert words <= {
        "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN",
        "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "path", "ignored"),
    [
        ("*\n!server", "server/a/b.py", False),
        ("*\n!server\n**/*.pyc", "server/a/b.pyc", True),
        ("*\n!server\nserver/a", "server/a/b.py", True),
        ("docs/*.md", "docs/a/b.md", False),
        ("docs/**", "docs/a/b.md", True),
        ("# docs\n\nbuild/", "build/x", True),
    ],
)
def test_dockerignore_is_read_as_docker_reads_it(patterns: str, path: str, ignored: bool) -> None:
    assert Ignore(patterns)(path) is ignored
