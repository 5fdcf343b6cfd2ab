"""Everything this package can raise, as one tree.

RepositoryError
├── NotFoundError          no such thing                      (retrying will not help)
│   ├── ModelNotFoundError
│   └── VersionNotFoundError
├── RejectedError          the request or the folder is wrong (change it)
│   ├── InvalidNameError
│   ├── InvalidRequestError
│   ├── InvalidTensorError
│   ├── UnsupportedSourceError an address that nothing is fetched from
│   └── ConfigError            carries file and line
├── OutOfBoundsError       a path that the server may not read (name another, or allow its root)
├── ConflictError          right request, wrong state         (change the state)
│   ├── SupersededError
│   └── AlreadyThereError      a RejectedError too: not twice
├── DependencyError        what the request relies on cannot serve it (mend or name another)
│   ├── AdapterNotFoundError   not registered with this model
│   └── AdapterRefusedError    its files do not fit this model
├── CapacityError          it does not fit                    (free memory, or raise the budget)
│   ├── NoRoomError            carries the numbers
│   ├── NoAdapterSlotError     every device slot is pinned
│   ├── NoDiskError            the state folder has no room for a private copy
│   └── NotKeptError           the state folder cannot be written
├── UnavailableError       right request, wrong moment        (retry later)
│   ├── ModelNotReadyError
│   │   └── StillLoadingError  a request has waited for it as long as one may
│   ├── QueueFullError
│   ├── RequestTimeoutError    its own time limit passed while it waited
│   ├── DeviceSilentError      the driver of a device hangs
│   └── DrainingError
├── UnsupportedRequestError right request, but not to this model (ask for something else)
├── RequestCancelledError  who asked does not want it any more (nothing to do)
└── FailedError            we or the model broke              (read the story)
    ├── LoadFailedError
    │   ├── IncompleteFilesError
    │   ├── FilesChangedError
    │   ├── UntrustedCodeError
    │   ├── CheckFailedError
    │   ├── LoadTimeoutError
    │   └── ComposingModelError  of an ensemble: a model that it needs does not serve
    ├── InferenceFailedError
    └── WorkerDiedError        safe to retry

`code` is part of the public API: faces print it, clients branch on it. HTTP numbers are not here;
they live in `server.errors`, which maps the families. Texts carry no absolute path.
"""

from __future__ import annotations

import copy
from typing import ClassVar


class RepositoryError(Exception):
    code: ClassVar[str] = "repository_error"


class NotFoundError(RepositoryError):
    code = "not_found"


class RejectedError(RepositoryError):
    code = "rejected"


class ConflictError(RepositoryError):
    code = "conflict"


class DependencyError(RepositoryError):
    code = "dependency"


class CapacityError(RepositoryError):
    code = "capacity"


class UnavailableError(RepositoryError):
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnsupportedRequestError(RepositoryError):
    code = "unsupported"


class RequestCancelledError(RepositoryError):
    code = "cancelled"


class FailedError(RepositoryError):
    code = "failed"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class VersionNotFoundError(NotFoundError):
    code = "version_not_found"


class InvalidNameError(RejectedError):
    code = "invalid_name"


class InvalidRequestError(RejectedError):
    code = "invalid_request"


class InvalidTensorError(RejectedError):
    code = "invalid_tensor"


class UnsupportedSourceError(RejectedError):
    code = "unsupported_source"


class OutOfBoundsError(RepositoryError):
    code = "out_of_bounds"


class ConfigError(RejectedError):
    """A configuration that cannot be used. `where` is "config.yaml:12" (never an absolute path)."""

    code = "invalid_config"

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.where = where
        self.hint = hint


class SupersededError(ConflictError):
    code = "superseded"


class AlreadyThereError(ConflictError, RejectedError):
    code = "already_there"


class NoRoomError(CapacityError):
    """All sizes in bytes, of `device`. `residents` maps "model:version" to the bytes it holds, `asleep`
    those of them that sleep. `foreign`: what others than this server use of what we might have."""

    code = "no_room"

    def __init__(
        self,
        message: str,
        *,
        needed: int = 0,
        free: int = 0,
        device: str = "cpu",
        residents: dict[str, int] | None = None,
        pinned: list[str] | None = None,
        asleep: dict[str, int] | None = None,
        foreign: int = 0,
    ) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free
        self.device = device
        self.residents = residents or {}
        self.pinned = pinned or []
        self.asleep = asleep or {}
        self.foreign = foreign


class NoAdapterSlotError(CapacityError):
    code = "no_adapter_slot"


class NoDiskError(CapacityError):
    code = "no_disk"


class NotKeptError(CapacityError):
    """What was asked for cannot be remembered beyond a restart. The text says whether it was done."""

    code = "not_kept"


class AdapterNotFoundError(DependencyError):
    code = "adapter_not_found"


class AdapterRefusedError(DependencyError):
    code = "adapter_refused"


class ModelNotReadyError(UnavailableError):
    code = "model_not_ready"


class StillLoadingError(ModelNotReadyError):
    """The request has waited for its model to load as long as one may. The load goes on."""

    code = "still_loading"


class QueueFullError(UnavailableError):
    code = "queue_full"


class RequestTimeoutError(UnavailableError):
    """The time that a request may wait for its turn is over. It has not run."""

    code = "timeout"


class DeviceSilentError(UnavailableError):
    code = "device_silent"


class DrainingError(UnavailableError):
    code = "draining"


class LoadFailedError(FailedError):
    code = "load_failed"


class IncompleteFilesError(LoadFailedError):
    code = "incomplete_files"


class FilesChangedError(LoadFailedError):
    code = "files_changed"


class UntrustedCodeError(LoadFailedError):
    code = "untrusted_code"


class CheckFailedError(LoadFailedError):
    code = "check_failed"


class LoadTimeoutError(LoadFailedError):
    code = "load_timeout"


class ComposingModelError(LoadFailedError):
    """Of an ensemble. It loads by itself once that model is mended; `__cause__`: what that failed with,
    where it was tried."""

    code = "composing_model"


class InferenceFailedError(FailedError):
    code = "inference_failed"


class WorkerDiedError(FailedError):
    """The process that ran the model is gone. Nothing was answered twice: asking again is safe."""

    code = "worker_died"
    retry_after_s: float | None = 1.0


def retold(error: RepositoryError, text: str) -> RepositoryError:
    """The same error in other words; a copy."""
    mine = copy.copy(error)
    mine.args = (text,)
    mine.__cause__ = error.__cause__
    return mine


OUT_OF_MEMORY = ("out of memory", "outofmemory", "bad_alloc", "failed to allocate", "memoryerror")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Errors of workers come as text, and the frameworks agree on few words."""
    if error is None:
        return False
    text = f"{type(error).__name__}: {error}".lower()
    return any(words in text for words in OUT_OF_MEMORY)
