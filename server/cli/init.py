"""`modeldepot init`: a model folder from a file, put into the repository in one step.

Everything is copied into a hidden folder beside the place (a server does not look into those),
which then gets its name by one rename: a server sees the whole model or nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import click

from server.cli.exits import NOT_FOUND, USAGE, Failure, our_errors

BACKENDS = {".onnx": ("onnx", "model.onnx"), ".py": ("python", "model.py")}

CONFIG = """\
# Every key is optional; what is not written here is guessed from the files.
# `modeldepot validate` checks this file, and the server reads it again whenever it changes.

backend: {backend}

# The largest batch that requests may be put together to. With a value above 0 the batch axis is not
# written in the shapes below; 0 means that shapes are exactly what clients send.
# max_batch_size: 16
# batching: {{max_delay_us: 1000}}

# Only needed where the model file does not say it (python models). -1 is any size.
{tensors}
# device: auto          # auto | cpu | cuda | cuda:0
# instances: 1          # copies that run side by side
# version_policy: {{latest: 1}}
# ttl_s: 600            # leaves memory after so many idle seconds
# pin: true             # never leaves for others
"""
ONNX_TENSORS = """\
# inputs: [{name: x, datatype: FP32, shape: [3, 224, 224]}]
# outputs: [{name: y, datatype: FP32, shape: [1000]}]
"""
PYTHON_TENSORS = """\
# inputs: [{name: x, datatype: FP32, shape: [-1]}]
# outputs: [{name: y, datatype: FP32, shape: [-1]}]
"""


@click.command()
@click.argument("name")
@click.option(
    "--from", "source", required=True, metavar="FILE", type=click.Path(path_type=Path),
    help="model.onnx, model.py, or a folder that becomes the version.",
)  # fmt: skip
@click.option(
    "--repo", default=".", show_default=True, type=click.Path(path_type=Path),
    envvar="MODELDEPOT_REPO", help="The folder of models.",
)  # fmt: skip
@click.option("--version", default=1, show_default=True, type=int)
def init(name: str, source: Path, repo: Path, version: int) -> None:
    """Make the model NAME in a repository from a model file; never overwrites one."""
    from repository.names import check_name, check_version

    with our_errors():
        check_name(name)
        check_version(str(version))
        if not source.exists():
            raise Failure(f"no file '{source}'", NOT_FOUND)
        if not repo.is_dir():
            raise Failure(f"no folder '{repo}'", NOT_FOUND, "name the folder of models with --repo")
        files = _files_of(source)
        place = _place(repo, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        _put(place, version, files, _config_of(files))
    click.echo(f"{place} is there; a server that watches '{repo}' loads it now")
    if any(target == "model.py" for target in files.values()):
        click.echo("  it is code: the server needs --trust-code", err=True)


def _place(repo: Path, name: str) -> Path:
    """Where the folder goes. Raises Failure if something is there, or above it a model."""
    from repository.folder.layout import CONFIGS
    from repository.names import contain

    place = repo / name
    contain(repo, place)
    if os.path.lexists(place):
        raise Failure(
            f"'{place}' exists; init never overwrites",
            USAGE,
            "choose another name, or copy a new version folder into it yourself",
        )
    for above in list(place.relative_to(repo).parents)[:-1]:
        if any((repo / above / config).exists() for config in CONFIGS):
            raise Failure(f"'{above}' is itself a model; a model cannot lie in another", USAGE)
    return place


def _files_of(source: Path) -> dict[Path, str]:
    """What is copied -> its path in the version's folder."""
    if source.is_dir():
        found = sorted(p for p in source.rglob("*") if p.is_file())
        files = {p: str(p.relative_to(source)) for p in found}
        if not files:
            raise Failure(f"'{source}' holds no files", USAGE)
        return files
    if source.suffix not in BACKENDS:
        raise Failure(
            f"'{source.name}' is no model file that can be served",
            USAGE,
            f"it must end in {' or '.join(BACKENDS)}, or be a folder",
        )
    files = {source: BACKENDS[source.suffix][1]}
    if source.suffix == ".onnx":
        files |= _weights_beside(source)
    return files


def _weights_beside(source: Path) -> dict[Path, str]:
    """An ONNX file may keep its weights in files beside it, under names written in it."""
    from repository.errors import IncompleteFilesError
    from repository.folder.onnx_files import external_files
    from repository.names import contain

    try:
        places = {external.location for external in external_files(source)}
    except IncompleteFilesError as error:
        raise Failure(f"'{source}': {error}", USAGE) from error
    found: dict[Path, str] = {}
    for place in sorted(places):
        path = source.parent / place
        contain(source.parent, path)
        if not path.is_file():
            raise Failure(f"'{source.name}' keeps weights in '{place}', which is not beside it")
        found[path] = place
    return found


def _config_of(files: dict[Path, str]) -> str:
    python = "model.py" in files.values() and not any(t.endswith(".onnx") for t in files.values())
    return CONFIG.format(
        backend="python" if python else "onnx",
        tensors=PYTHON_TENSORS if python else ONNX_TENSORS,
    )


def _put(place: Path, version: int, files: dict[Path, str], config: str) -> None:
    hidden = Path(tempfile.mkdtemp(prefix=".init-", dir=place.parent))
    try:
        hidden.chmod(0o755)  # mkdtemp's own is for its maker alone; the server may be another
        (hidden / "config.yaml").write_text(config)
        for source, target in files.items():
            to = hidden / str(version) / target
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)
        if os.path.lexists(place):
            raise Failure(f"'{place}' has come into being meanwhile; nothing was changed")
        hidden.rename(place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
