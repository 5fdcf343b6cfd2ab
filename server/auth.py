"""Who may call what. Deny by default: a path that no row of the table opens needs the admin scope.

Rules: the check runs in the outermost layer, on the very path that the router then matches
(`server.app` normalises it once, before both). Keys are compared in constant time against all of
them, whatever was found already. No key file: everything is open, which `settings.check_bind`
allows on loopback only, and there to programs, not to web pages (`server.origin`). A key file that
cannot be read any more keeps the keys that were; one that cannot be read at the start is an error.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from repository.errors import ConfigError
from repository.folder.read_yaml import MAX_SIZE, read_mapping
from server.errors import ForbiddenError, UnauthorizedError
from server.origin import check_origin

log = logging.getLogger("modeldepot.auth")

LOOK_S = 1.0  # the key file is looked at no more often than this
KEY_LONGEST = 512  # characters; a longer key is not even hashed
Headers = Iterable[tuple[bytes, bytes]]


class Scope(enum.StrEnum):
    INFERENCE = "inference"
    ADMIN = "admin"
    METRICS = "metrics"


class _Row(NamedTuple):
    """`path` exactly, or everything below it where it ends in "/" (the root is only itself)."""

    methods: frozenset[str]
    path: str
    scope: Scope | None  # None: open to everyone


_READ = frozenset({"GET", "HEAD"})
_WRITE = frozenset({"POST"})

TABLE: tuple[_Row, ...] = (
    _Row(_READ, "/", None),
    _Row(_READ, "/health", None),
    _Row(_READ, "/docs", None),
    _Row(_READ, "/docs/", None),
    _Row(_READ, "/openapi.json", None),
    _Row(_READ, "/v2/health/live", None),
    _Row(_READ, "/v2/health/ready", None),
    _Row(_READ, "/metrics", Scope.METRICS),
    _Row(_READ, "/v1/devices", Scope.METRICS),  # the machine's figures, as /metrics has them
    _Row(_READ, "/v2", Scope.INFERENCE),
    _Row(_READ, "/v2/models/", Scope.INFERENCE),
    _Row(_READ, "/v2/logging", Scope.METRICS),
    _Row(_READ, "/v2/trace/setting", Scope.METRICS),
    _Row(_READ | _WRITE, "/v2/systemsharedmemory/", Scope.INFERENCE),
    _Row(_READ | _WRITE, "/v2/cudasharedmemory/", Scope.INFERENCE),
    _Row(_READ, "/v1/models", Scope.INFERENCE),
    _Row(_READ, "/v1/models/", Scope.INFERENCE),
    _Row(_READ, "/v1/events", Scope.INFERENCE),
    _Row(_READ, "/v1/gpu/", Scope.INFERENCE),
    _Row(_READ, "/models", Scope.INFERENCE),
    _Row(_READ, "/models/", Scope.INFERENCE),
    _Row(_READ, "/adapters", Scope.INFERENCE),
    _Row(_READ, "/adapters/", Scope.INFERENCE),
    _Row(_READ, "/device/", Scope.INFERENCE),
    _Row(_WRITE, "/v2/repository/index", Scope.INFERENCE),
    _Row(_WRITE, "/v1/completions", Scope.INFERENCE),
    _Row(_WRITE, "/v1/chat/completions", Scope.INFERENCE),
    _Row(_WRITE, "/v1/embeddings", Scope.INFERENCE),
)
INFER = ("/v2/models/", "/infer")
_ASKS = ("/infer", "/generate", "/generate_stream")


def scope_of(method: str, path: str) -> Scope | None:
    """What a call needs; None is open. `path` is decoded and normalised, as the router sees it."""
    if method in _WRITE and path.startswith(INFER[0]) and path.endswith(_ASKS):
        return Scope.INFERENCE
    for row in TABLE:
        if method in row.methods and (
            path == row.path
            or (row.path.endswith("/") and row.path != "/" and path.startswith(row.path))
        ):
            return row.scope
    return Scope.ADMIN


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sha256`: the key's hash in lower-case hex; the key itself is stored nowhere."""

    name: str
    sha256: str
    scopes: frozenset[Scope]


class _Held(NamedTuple):
    """A key as the hot path wants it: its hash as bytes, and all that it may (admin spelled out)."""

    digest: bytes
    key: Key
    may: tuple[Scope, ...]

    @classmethod
    def of(cls, key: Key) -> _Held:
        may = tuple(Scope) if Scope.ADMIN in key.scopes else tuple(key.scopes)
        return cls(bytes.fromhex(key.sha256), key, may)


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key]


NOBODY = "API key missing; send 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
UNKNOWN = "API key not known"


class Gate:
    """The keys, and the one question. Asked on the event loop; costs a few microseconds.

    `refused` is told of every refusal, for a counter; it must not raise.
    """

    def __init__(
        self,
        path: Path | None,
        refused: Callable[[Scope], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        local: bool = False,
    ) -> None:
        """`local`: without keys, only this machine may ask. Raises ConfigError for a key file that
        cannot be used."""
        self._path = path
        self._local = local and path is None
        self._refused = refused
        self._clock = clock
        self._keys: tuple[_Held, ...] = ()
        self._stamp: tuple[int, ...] | None = None
        self._look_at = clock() + LOOK_S
        self._epoch = 0
        if path is not None:
            self._stamp = _stamp_of(path)
            self._keys = tuple(map(_Held.of, read_keys(path)))
            log.info("keys=%d read", len(self._keys))

    @property
    def open(self) -> bool:
        return self._path is None

    def epoch(self) -> int:
        """As long as this is the same, so is what `check` says of the same headers."""
        if self._path is not None and self._clock() >= self._look_at:
            self._look_again()
        return self._epoch

    def check(self, headers: Headers, need: Scope | None) -> Key | None:
        """Returns if the call may go on, with its key if one was asked for. `need`: see `scope_of`.

        Raises UnauthorizedError (who are you?), ForbiddenError (you may not).
        """
        if self._path is None or need is None:
            if self._local and need is not None:
                check_origin(headers)
            return None
        found = self._who(headers)
        if not isinstance(found, str):
            if need in found.may:
                return found.key
            self._refused(need)
            raise ForbiddenError(f"key '{found.key.name}' lacks the scope '{need}'")
        self._refused(need)
        raise UnauthorizedError(found)

    def knows(self, headers: Headers) -> bool:
        """Whether they show a key that there is, whatever it may do; or keys are not asked for."""
        return self._path is None or not isinstance(self._who(headers), str)

    def _who(self, headers: Headers) -> _Held | str:
        """The key that was sent, or in words why there is none."""
        if self._clock() >= self._look_at:
            self._look_again()
        sent = sent_key(headers)
        if sent is None:
            return NOBODY
        if len(sent) > KEY_LONGEST:
            return UNKNOWN
        digest, same = hashlib.sha256(sent).digest(), hmac.compare_digest
        match: _Held | None = None
        for held in self._keys:
            if same(digest, held.digest):
                match = held
        return match or UNKNOWN

    def _look_again(self) -> None:
        self._look_at = self._clock() + LOOK_S
        path = self._path
        if path is None:
            return
        stamp = _stamp_of(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = tuple(map(_Held.of, read_keys(path)))
        except ConfigError as error:
            log.error("the key file cannot be used, the keys it held before stay valid: %s", error)
        else:
            self._epoch += 1
            log.info("keys=%d read again", len(self._keys))


def sent_key(headers: Headers) -> bytes | None:
    """Header names are lower case (ASGI). `Authorization` wins over `x-api-key`."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer" and (rest := rest.strip()):
                return rest
        elif name == b"x-api-key" and value.strip():
            found = value.strip()
    return found


def read_keys(path: Path) -> tuple[Key, ...]:
    """Raises ConfigError, naming the file and what is wrong, never a hash."""
    try:
        # Neither a pipe in its place nor an endless file may hold up the server that looks again.
        with open(path, "rb", opener=_unhurried) as file:
            raw = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", where=path.name) from error
    found = read_mapping(raw, path.name).values
    try:
        keys = msgspec.convert(found, _KeyFile).keys
    except msgspec.ValidationError as error:
        raise ConfigError(
            f'{error}; it should look like keys: [{{name: ci, sha256: "...", scopes: [admin]}}]',
            where=path.name,
        ) from error
    names: set[str] = set()
    for key in keys:
        if len(key.sha256) != 64 or set(key.sha256) - set("0123456789abcdefABCDEF"):
            raise ConfigError(
                f"key '{key.name}': sha256 must be 64 hexadecimal digits", where=path.name
            )
        if key.name in names or not key.name:
            raise ConfigError(f"key name '{key.name}' is empty or used twice", where=path.name)
        if not key.scopes:
            raise ConfigError(f"key '{key.name}' has no scopes", where=path.name)
        names.add(key.name)
    return tuple(msgspec.structs.replace(key, sha256=key.sha256.lower()) for key in keys)


def _unhurried(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def new_key(name: str, scopes: Iterable[Scope]) -> tuple[str, str]:
    """A fresh key, to be shown once, and the line to add under `keys:` in the key file."""
    key = "md_" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    words = ", ".join(sorted(scopes))
    # JSON is YAML: a name with a colon or quote in it stays one text.
    quoted = msgspec.json.encode(name).decode()
    return key, f'  - {{name: {quoted}, sha256: "{digest}", scopes: [{words}]}}'
