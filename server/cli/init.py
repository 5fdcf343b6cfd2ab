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

BACKENDS = {
    ".onnx": ("onnx", "model.onnx"),
    ".py": ("python", "model.py"),
    ".pt2": ("torch_export", "model.pt2"),
    ".pt": ("torchscript", "model.pt"),
    ".safetensors": ("torch_module", "model.safetensors"),
}

CONFIG = """\
# Every key is optional; what is not written here is guessed from the files.
# `modeldepot validate` checks this file, and the server reads it again whenever it changes.

backend: {backend}

{own}
# device: auto          # auto | cpu | cuda | cuda:0
# instances: 1          # copies that run side by side
# version_policy: {{latest: 1}}
# ttl_s: 600            # leaves memory after so many idle seconds
# pin: true             # never leaves for others
"""
BATCHES = """\
# The largest batch that requests may be put together to. With a value above 0 the batch axis is not
# written in the shapes below; 0 means that shapes are exactly what clients send.
# max_batch_size: 16
# batching: {max_delay_us: 1000}

"""
SAYS = "# Only needed where the model should say less than its file does. -1 is any size.\n"
SILENT = "# The model's file does not say what it takes and gives. -1 is any size.\n"
TRITON = "# Only what the model's auto_complete_config() does not say. -1 is any size.\n"
ONNX_TENSORS = """\
# inputs: [{name: x, datatype: FP32, shape: [3, 224, 224]}]
# outputs: [{name: y, datatype: FP32, shape: [1000]}]
"""
TENSORS = """\
# inputs: [{name: x, datatype: FP32, shape: [-1]}]
# outputs: [{name: y, datatype: FP32, shape: [-1]}]
"""
ADAPTERS = """\
# LoRA adapters in adapters/: how many are in the model's memory at once, and of which rank at most.
# adapters: {slots: 8, max_rank: 16}
"""
MODULE = """\
# options:
#   class: Model        # in model.py
#   init: {}            # what it is made with
"""
TEXT = """\
# options:
#   slots: 8            # texts that are written at once; each has its room for keys and values
#   max_len: 4096       # tokens of a prompt and its answer together
#   dtype: auto         # auto | float32 | bfloat16 | float16
"""
EMBED = """\
# max_batch_size: 32
# options:
#   max_tokens: 256     # longer texts are cut
#   pooling: mean       # where modules.json and 1_Pooling do not say it
#   normalize: true
"""
OWN = {
    "onnx": BATCHES + SAYS + ONNX_TENSORS,
    "python": BATCHES + SILENT + TENSORS,
    "triton_python": BATCHES + TRITON + TENSORS,
    "torch_module": BATCHES + SILENT + TENSORS + MODULE + ADAPTERS,
    "torch_export": BATCHES + SAYS + TENSORS,
    "torchscript": BATCHES + SILENT + TENSORS,
    "text": TEXT + ADAPTERS,
    "embed": EMBED + ADAPTERS,
}


@click.command()
@click.argument("name")
@click.option(
    "--from", "source", required=True, metavar="FILE", type=click.Path(path_type=Path),
    help="An .onnx, .pt2, .pt or .py file, weights beside a model.py, or a folder (Hugging Face's too).",
)  # fmt: skip
@click.option(
    "--repo", default=".", show_default=True, type=click.Path(path_type=Path),
    envvar="MODELDEPOT_REPO", help="The folder of models.",
)  # fmt: skip
@click.option("--version", default=1, show_default=True, type=int)
def init(name: str, source: Path, repo: Path, version: int) -> None:
    """Make the model NAME in a repository from a model file; never overwrites one."""
    from repository.folder.kind import RUNS_CODE
    from repository.names import check_name, check_version

    with our_errors():
        check_name(name)
        check_version(str(version))
        if not source.exists():
            raise Failure(f"no file '{source}'", NOT_FOUND)
        if not repo.is_dir():
            raise Failure(f"no folder '{repo}'", NOT_FOUND, "name the folder of models with --repo")
        files, backend = _files_of(source)
        place = _place(repo, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        _put(place, version, files, CONFIG.format(backend=backend, own=OWN[backend]))
    click.echo(f"{place} is there ({backend}); a server that watches '{repo}' loads it now")
    if backend in RUNS_CODE:
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


def _files_of(source: Path) -> tuple[dict[Path, str], str]:
    """What is copied -> its path in the version's folder; and the backend."""
    if source.is_dir():
        return _files_of_folder(source)
    if source.suffix not in BACKENDS:
        raise Failure(
            f"'{source.name}' is no model file that can be served",
            USAGE,
            f"it must end in {' or '.join(BACKENDS)}, or be a folder",
        )
    backend, usual = BACKENDS[source.suffix]
    files = {source: usual}
    if backend == "onnx":
        files |= _weights_beside(source)
    if backend == "python":
        from repository.folder.kind import backend_of_code

        backend = backend_of_code(source)
    if backend == "torch_module":
        code = source.parent / "model.py"
        if not code.is_file():
            raise Failure(
                f"'{source.name}' needs a model.py beside it, with the class that it is for",
                USAGE,
                "name the whole folder if it is a Hugging Face model",
            )
        files[code] = "model.py"
    return files, backend


def _files_of_folder(source: Path) -> tuple[dict[Path, str], str]:
    from repository.errors import ConfigError
    from repository.folder.kind import backend_of, files_below

    found = files_below(source)
    if not found:
        raise Failure(f"'{source}' holds no files", USAGE)
    try:
        backend = backend_of(source)
    except ConfigError as error:
        raise Failure(f"'{source}': {error}", USAGE, error.hint) from error
    return {path: name for name, path in found.items()}, backend


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


def _put(place: Path, version: int, files: dict[Path, str], config: str) -> None:
    hidden = Path(tempfile.mkdtemp(prefix=".init-", dir=place.parent))
    try:
        hidden.chmod(0o755)  # mkdtemp's own is for its maker alone; the server may be another
        (hidden / "config.yaml").write_text(config)
        for source, target in files.items():
            to = hidden / target if _is_adapter(target) else hidden / str(version) / target
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)
        if os.path.lexists(place):
            raise Failure(f"'{place}' has come into being meanwhile; nothing was changed")
        hidden.rename(place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _is_adapter(target: str) -> bool:
    """Adapters belong to the model, not to a version."""
    return target.startswith("adapters/")
