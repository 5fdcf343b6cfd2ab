"""What a command's exit code means, and the one map from what went wrong to that code.

Everything that a person may do about it is said here too. Imports click only: it is on the way of
`modeldepot --help`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

FAILED = 1
USAGE = 2
NOT_FOUND = 3
AUTH = 4
TIMEOUT = 5
UNREACHABLE = 6
FINDINGS = 7
INTERRUPTED = 130

_OF_STATUS = {401: AUTH, 403: AUTH, 404: NOT_FOUND, 408: TIMEOUT, 504: TIMEOUT}
_OF_CODE = {"timeout": TIMEOUT, "load_timeout": TIMEOUT}  # a word of the answer says more
_HINTS = {
    401: "give --api-key or set MODELDEPOT_API_KEY (`modeldepot keys new` makes a key)",
    403: "this needs a key with another scope: ask for one, or make it with `modeldepot keys new`",
    404: "`modeldepot status` lists the models of this server",
    409: "`modeldepot status MODEL` shows how it stands",
    429: "try again a little later",
    503: "try again a little later",
}
_HINTS_OF_CODE = {  # what the status has more than one reason for
    "no_room": "see `modeldepot devices`, and `modeldepot load MODEL --dry-run`",
}


class Failure(click.ClickException):
    """Ends the command: the message and the hint go to stderr, the code to the shell."""

    def __init__(self, message: str, exit_code: int = FAILED, hint: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from here too
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {self.message}", file=file, err=True)
        if self.hint:
            click.echo(f"  {self.hint}", file=file, err=True)


def failure_of(status: int, text: str, code: str = "") -> Failure:
    """From a server's answer that is not a 2xx. `code` is the answer's own word for it."""
    exit_code = _OF_CODE.get(code) or _OF_STATUS.get(status, FAILED)
    hint = _HINTS_OF_CODE.get(code) or _HINTS.get(status, "")
    return Failure(text or f"the server answered {status}", exit_code, hint)


@contextmanager
def http_errors(url: str) -> Iterator[None]:
    """Turns what httpx raises inside into a Failure."""
    import httpx

    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise Failure(
            f"'{url}' is no address of a server: {error}",
            USAGE,
            "it looks like http://127.0.0.1:8000 (--url, MODELDEPOT_URL)",
        ) from error
    except httpx.ConnectTimeout as error:
        raise unreachable(url, "it does not answer") from error
    except httpx.TimeoutException as error:
        raise Failure(
            f"no answer from {url} in time; what was asked for may still go on there",
            TIMEOUT,
            "give it longer with --timeout, or look with `modeldepot status`",
        ) from error
    except httpx.TransportError as error:
        raise unreachable(url, str(error) or type(error).__name__) from error


def unreachable(url: str, why: str) -> Failure:
    return Failure(
        f"cannot reach {url}: {why}",
        UNREACHABLE,
        "is the server running? `modeldepot serve REPO` starts one, --url names another",
    )


@contextmanager
def our_errors() -> Iterator[None]:
    """Turns what the repository's own code raises in this process into a Failure."""
    from repository.errors import ConfigError, RejectedError, RepositoryError

    try:
        yield
    except ConfigError as error:
        hint = error.hint if error.hint not in str(error) else ""
        raise Failure(str(error), USAGE, hint) from error
    except RejectedError as error:
        raise Failure(str(error), USAGE) from error
    except RepositoryError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"{error.filename or 'the file'}: {error.strerror or error}") from error
