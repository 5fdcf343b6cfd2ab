"""Why a model cannot be used, told as KServe V2's clients know it from Triton.

The texts are the repository's own; here it is only decided what kind of refusal they make.
"""

from __future__ import annotations

from repository.errors import (
    InvalidNameError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
    VersionNotFoundError,
    WorkerDiedError,
)
from repository.lifecycle.status import ModelStatus
from repository.names import check_name
from repository.repository import Repository

RETRY_S = 1.0


def in_v2_words(
    models: Repository, model: str, version: int | None, error: RepositoryError
) -> RepositoryError:
    """What to tell instead of `error`, which a lease on this model was refused with.

    A name that could never be one: InvalidNameError (400). A model whose worker has just died is on
    its way back: ModelNotReadyError (503, retry). A version that exists and does not serve: the same,
    without a promise. A model that does not serve at all: not found (404), as Triton has it.
    """
    if isinstance(error, ModelNotFoundError):
        return _nameless(model) or error
    if not isinstance(error, VersionNotFoundError):
        return error
    try:
        status = models.status(model)
    except ModelNotFoundError:
        return error
    if _coming_back(status, version):
        return ModelNotReadyError(str(error), retry_after_s=RETRY_S)
    if version is not None and version in _known(status):
        return ModelNotReadyError(str(error))
    return error


def _nameless(model: str) -> InvalidNameError | None:
    try:
        check_name(model)
    except InvalidNameError as refusal:
        return refusal
    return None


def _coming_back(status: ModelStatus, version: int | None) -> bool:
    """It served and its worker died: it is started again without anybody asking."""
    if not status.wanted:
        return False
    newest = next((g for g in status.generations if version in (None, g.spec.version)), None)
    return (
        newest is not None
        and newest.ready_at is not None
        and isinstance(newest.error, WorkerDiedError)
    )


def _known(status: ModelStatus) -> set[int]:
    folder = set(status.folder.versions) if status.folder is not None else set()
    return folder | {g.spec.version for g in status.generations}
