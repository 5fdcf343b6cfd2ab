"""What a caller is told who cannot have a model: the error that fits what is known of it."""

from __future__ import annotations

from repository.errors import (
    IncompleteFilesError,
    LoadFailedError,
    ModelNotReadyError,
    RepositoryError,
    UntrustedCodeError,
    VersionNotFoundError,
    WorkerDiedError,
)
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING
from repository.lifecycle.status import ModelStatus, text_of
from repository.snapshot import ModelFolder

KINDS = {"trust": UntrustedCodeError, "incomplete": IncompleteFilesError}


def not_serving(name: str, version: int | None, status: ModelStatus) -> RepositoryError:
    """To a request; in Triton's words, which its clients look for. `name` as the request had it."""
    gens = [g for g in status.generations if version in (None, g.spec.version)]
    if any(g.state in RISING for g in gens):
        return ModelNotReadyError(f"model '{name}' is still loading", retry_after_s=1.0)
    if status.wanted and gens and _will_be_back(gens[0]):
        return ModelNotReadyError(
            f"the worker of model '{name}' died; it is being started again", retry_after_s=1.0
        )
    if version is not None and (status.folder is None or version not in status.folder.versions):
        return VersionNotFoundError(
            f"Request for unknown model: '{name}' version {version} is not found"
        )
    why = f": {status.last_error.message}" if status.last_error else ""
    return VersionNotFoundError(
        f"Request for unknown model: '{name}' has no available versions{why}"
        if version is None
        else f"Request for unknown model: '{name}' version {version} is not at ready state{why}"
    )


def _will_be_back(newest: Generation) -> bool:
    """It served and its worker died: the planner starts another, after a pause at the longest."""
    return isinstance(newest.error, WorkerDiedError) and newest.ready_at is not None


def of_folder(folder: ModelFolder) -> RepositoryError:
    """To a load: there is something in the folder that cannot even be tried."""
    if not folder.errors:
        return LoadFailedError(f"'{folder.name}' has no version that could be loaded")
    problem = folder.errors[0]
    return KINDS.get(problem.rule, LoadFailedError)(str(problem))


def of_generation(gen: Generation, error: BaseException) -> RepositoryError:
    """To a load: the generation that it caused ended with `error`."""
    if isinstance(error, RepositoryError):
        return error
    found = LoadFailedError(f"{gen.spec.model} version {gen.spec.version}: {text_of(error)}")
    found.__cause__ = error
    return found
