"""What a caller is told who cannot have a model: the error that fits what is known of it."""

from __future__ import annotations

from repository.errors import (
    CapacityError,
    ComposingModelError,
    FilesChangedError,
    IncompleteFilesError,
    LoadFailedError,
    ModelNotReadyError,
    NoDiskError,
    RepositoryError,
    SupersededError,
    UntrustedCodeError,
    VersionNotFoundError,
    WorkerDiedError,
    retold,
)
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.lifecycle.status import ModelStatus, text_of
from repository.snapshot import ModelFolder

KINDS = {"trust": UntrustedCodeError, "incomplete": IncompleteFilesError}
LEAVING = frozenset({State.DRAINING, State.UNLOADING})


def not_serving(name: str, version: int | None, status: ModelStatus) -> RepositoryError:
    """To a request; in Triton's words, which its clients look for. `name` as the request had it.

    What is on its way (loading, leaving, or its worker has just died), or finds no room on the disk:
    ModelNotReadyError, come again; then it serves, or the answer is final. What sleeps, or a version
    that exists and does not serve: the same without a promise. One that does not exist, or a model of
    which nothing serves: VersionNotFoundError.
    """
    gens = [g for g in status.generations if version in (None, g.spec.version)]
    if any(g.state in RISING for g in gens):
        return ModelNotReadyError(f"model '{name}' is still loading", retry_after_s=1.0)
    if status.wanted and gens and _will_be_back(gens[0]):
        return ModelNotReadyError(
            f"the worker of model '{name}' died; it is being started again", retry_after_s=1.0
        )
    if any(g.sleeps for g in gens):
        return ModelNotReadyError(f"model '{name}' sleeps; wake it, or load it")
    if any(g.state in LEAVING for g in gens):
        return ModelNotReadyError(f"model '{name}' is being unloaded", retry_after_s=1.0)
    if gens and isinstance(gens[0].error, NoDiskError):
        text = f"model '{name}' cannot be loaded now: {gens[0].error}"
        return ModelNotReadyError(text, retry_after_s=2.0)
    refused = f"Request for unknown model: '{name}'"
    why = _why(gens, status)
    if version is None:
        return VersionNotFoundError(f"{refused} has no available versions{why}")
    if gens or (status.folder is not None and version in status.folder.versions):
        return ModelNotReadyError(f"{refused} version {version} is not at ready state{why}")
    return VersionNotFoundError(f"{refused} version {version} is not found")


def _why(gens: list[Generation], status: ModelStatus) -> str:
    if status.last_error is None:
        return ""
    message = status.last_error.message
    if gens and isinstance(
        gens[0].error, WorkerDiedError
    ):  # the client cannot mend it by asking again
        message = f"{message.removesuffix('; ask again')}; mend the model, or load it by hand"
    return f": {message}"


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
    if isinstance(error, FilesChangedError):
        return SupersededError(f"the load of '{gen.spec.model}' was overtaken: {error}")
    cause = error.__cause__
    if isinstance(error, ComposingModelError) and isinstance(cause, CapacityError):
        return retold(cause, str(error))  # with its numbers
    if isinstance(error, RepositoryError):
        return error
    found = LoadFailedError(f"{gen.spec.model} version {gen.spec.version}: {text_of(error)}")
    found.__cause__ = error
    return found
