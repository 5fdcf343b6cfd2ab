"""Loading and unloading in Triton's way: its parameters, its order of events, its words.

What is refused before anything is tried, and what a model itself failed with, have Triton's texts with
our reason behind them. What Triton has no words for (no room, no disk, files still being written, a
server that ends) is told in ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from repository.errors import (
    CapacityError,
    ConflictError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
    RepositoryError,
    SupersededError,
    UnavailableError,
)
from repository.lifecycle.generation import Generation
from repository.lifecycle.status import text_of
from repository.names import check_name, shown
from repository.reports import Brought
from repository.repository import Repository
from server.refusals import FailedToLoadError, LoadRefusedError, UnsupportedError

Value: TypeAlias = bool | int | str | bytes

CONFIG, FILE, DEPENDENTS = "config", "file:", "unload_dependents"
NO_NAME = "Model name cannot be empty. Please enter a valid name to deploy."
OUTDATED = (
    "Newer operation has been applied to the model lifecycle, current load operation is out-dated."
)
NO_FILES = (
    "loads that bring files are disabled. Start the server with '--allow-file-override' to enable."
)
KINDS = {bool: "BOOL", int: "INT", str: "STRING", bytes: "BYTES"}
UNLOAD_WAIT_S = 0.5  # for what usually takes less; the rest happens behind the answer


async def load(
    models: Repository, name: str, parameters: Mapping[str, Value], *, allow_files: bool
) -> None:
    """Returns when every version that is meant to serve does. `parameters`: `config`, a ModelConfig as
    JSON; `file:PATH`, the content of a file.

    Raises LoadRefusedError (400), FailedToLoadError (500), UnsupportedError, CapacityError,
    UnavailableError.
    """
    _check_name(name)
    brought = _read(name, parameters, allow_files=allow_files)
    try:
        await models.load(name, config=brought)
    except (CapacityError, UnavailableError):
        raise
    except RepositoryError as error:
        raise _told(models, name, error) from error


async def unload(models: Repository, name: str, parameters: Mapping[str, Value]) -> None:
    """No request that comes after it finds the model. Its memory comes back when the last one that runs
    has ended: usually before the answer. A model that is not there is unloaded already."""
    dependents = parameters.get(DEPENDENTS, False)
    if not isinstance(dependents, bool):
        raise InvalidRequestError(f"'{DEPENDENTS}' must be a boolean")
    try:
        check_name(name)
        await models.unload_soon(name, unload_dependents=dependents, wait_s=UNLOAD_WAIT_S)
    except (InvalidNameError, ModelNotFoundError):
        return


def _check_name(name: str) -> None:
    if not name:
        raise LoadRefusedError(NO_NAME)
    if name.startswith("/") or "\\" in name or any(s in ("", ".", "..") for s in name.split("/")):
        raise LoadRefusedError(
            f"invalid model name '{shown(name)}', model name must not contain path traversal "
            "characters"
        )
    check_name(name)


def _read(name: str, parameters: Mapping[str, Value], *, allow_files: bool) -> Brought:
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in parameters.items():
        if key == CONFIG and isinstance(value, str):
            config = value
        elif key.startswith(FILE) and isinstance(value, bytes):
            files[key.removeprefix(FILE)] = value
        else:
            kind = KINDS.get(type(value), type(value).__name__)
            raise LoadRefusedError(f"Unrecognized load parameter '{shown(key)}' with type '{kind}'")
    if files and not allow_files:
        raise UnsupportedError(NO_FILES)
    if files and config is None:
        raise _failed(name, "files need the parameter 'config' that they are loaded under")
    return Brought(config, files)


def _told(models: Repository, name: str, error: RepositoryError) -> Exception:
    if isinstance(error, SupersededError):
        return LoadRefusedError(f"{OUTDATED} ({error})")
    if isinstance(error, InvalidNameError):
        return LoadRefusedError(str(error))
    failed = _failures(models, name, error)
    if failed:
        said = "".join(
            f" version {g.spec.version} is at UNAVAILABLE state: Internal: {text_of(e)};"
            for g in failed
            if (e := g.error) is not None
        )
        return LoadRefusedError(f"load failed for model '{name}':{said}\n")
    if isinstance(error, InvalidRequestError) or (
        isinstance(error, ConflictError) and not isinstance(error, SupersededError)
    ):
        return LoadRefusedError(str(error))
    return _failed(name, str(error))


def _failed(name: str, why: str) -> FailedToLoadError:
    return FailedToLoadError(
        f"failed to load '{shown(name)}', failed to poll from model repository: {why}"
    )


def _failures(models: Repository, name: str, error: RepositoryError) -> list[Generation]:
    """Those that the load was waiting for, by version: the one that failed with `error`, and others of
    the same breath. None, where nothing was tried."""
    try:
        status = models.status(name)
    except RepositoryError:
        return []
    gens = {g.serial: g for g in (*status.generations, *status.past) if g.error is not None}
    first = [g for g in gens.values() if g.error is error or g.error is error.__cause__]
    if not first:
        return []
    since = first[0].born_at
    versions = {g.spec.version: g for g in gens.values() if g.born_at >= since}
    return [versions[v] for v in sorted(versions | {first[0].spec.version: first[0]})]
