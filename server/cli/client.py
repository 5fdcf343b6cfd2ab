"""A server as the commands see it: its calls as methods, its errors as Failures.

Wire: the native face for models, KServe V2 for inference, server-sent events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from repository.errors import RejectedError
from repository.events import Event
from repository.names import check_name
from server.cli.exits import (
    NOT_FOUND,
    TIMEOUT,
    UNREACHABLE,
    USAGE,
    Failure,
    failure_of,
    http_errors,
)

READ_S = 10.0  # an answer that needs no work
WORK_S = 900.0  # a load or an unload: the server has a limit of its own
SILENCE_S = 60.0  # an event stream says something every 15 s
AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between two tries to come back to a stream


@dataclass(frozen=True, slots=True)
class Server:
    """Which one, and who asks. `timeout_s`: None is READ_S or WORK_S, by what is asked."""

    url: str
    api_key: str | None = None
    timeout_s: float | None = None


class Client:
    """Used with `async with`. Every method raises Failure."""

    def __init__(self, server: Server) -> None:
        self.server = server
        headers = {"user-agent": "modeldepot"}
        if server.api_key:
            if not server.api_key.isascii() or not server.api_key.isprintable():
                raise Failure("the API key holds characters that no key has", USAGE)
            headers["authorization"] = f"Bearer {server.api_key}"
        with http_errors(server.url):
            self._http = httpx.AsyncClient(
                base_url=server.url, headers=headers, timeout=self._timeout(READ_S)
            )

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    def _timeout(self, default_s: float) -> httpx.Timeout:
        limit_s = self.server.timeout_s or default_s
        return httpx.Timeout(limit_s, connect=min(limit_s, 5.0))

    # calls --------------------------------------------------------------------------------------

    async def overview(self) -> dict[str, Any]:
        """{"loaded", "loading_status", "repository", ...}"""
        return await self._json("GET", "/v1/models/status")

    async def model(self, name: str) -> dict[str, Any]:
        return await self._json("GET", f"/v1/models/{path_of(name)}")

    async def models(self) -> list[dict[str, Any]]:
        """All of them in full, by name. One that leaves meanwhile is left out."""
        names = (await self.overview())["loading_status"]
        slots = asyncio.Semaphore(16)

        async def one(name: str) -> dict[str, Any] | None:
            async with slots:
                try:
                    return await self.model(name)
                except Failure as failure:
                    if failure.exit_code == NOT_FOUND:
                        return None
                    raise

        found = await asyncio.gather(*[one(name) for name in sorted(names)])
        return [model for model in found if model is not None]

    async def load(self, name: str, *, force: bool = False) -> dict[str, Any]:
        body = {"model_name": checked(name), "force_reload": force}
        return await self._json("POST", "/v1/models/load", body, limit_s=WORK_S)

    async def dry_run(self, name: str) -> dict[str, Any]:
        body = {"model_name": checked(name), "dry_run": True}
        return await self._json("POST", "/v1/models/load", body)

    async def unload(self, name: str) -> dict[str, Any]:
        body = {"model_name": checked(name)}
        return await self._json("POST", "/v1/models/unload", body, limit_s=WORK_S)

    async def unload_all(self) -> dict[str, Any]:
        return await self._json("POST", "/v1/models/unload-all", limit_s=WORK_S)

    async def sleep(self, name: str) -> dict[str, Any]:
        body = {"model_name": checked(name)}
        return await self._json("POST", "/v1/models/sleep", body, limit_s=WORK_S)

    async def wake(self, name: str) -> dict[str, Any]:
        body = {"model_name": checked(name)}
        return await self._json("POST", "/v1/models/wake", body, limit_s=WORK_S)

    async def pin(self, name: str, *, pinned: bool) -> dict[str, Any]:
        body = {"model_name": checked(name), "pinned": pinned}
        return await self._json("POST", "/v1/models/pin", body)

    async def devices(self) -> dict[str, Any]:
        return await self._json("GET", "/v1/devices")

    async def metadata(self, name: str, version: int | None) -> dict[str, Any]:
        return await self._json("GET", v2_path(name, version))

    async def infer(
        self, name: str, version: int | None, body: bytes, headers: Mapping[str, str]
    ) -> httpx.Response:
        path = f"{v2_path(name, version)}/infer"
        return await self._ask("POST", path, content=body, headers=headers, limit_s=WORK_S)

    async def _json(
        self, method: str, path: str, body: Any = None, *, limit_s: float = READ_S
    ) -> dict[str, Any]:
        answer = await self._ask(method, path, json=body, limit_s=limit_s)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._stranger(answer)
        return found

    async def _ask(self, method: str, path: str, *, limit_s: float, **rest: Any) -> httpx.Response:
        with http_errors(self.server.url):
            answer = await self._http.request(method, path, timeout=self._timeout(limit_s), **rest)
        if answer.is_success:
            return answer
        raise self._failure(answer)

    def _failure(self, answer: httpx.Response) -> Failure:
        """The native face says {"error": {"message", "code"}}, V2 {"error": "text"}."""
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            return self._stranger(answer)
        if isinstance(error, dict):
            return failure_of(
                answer.status_code, str(error.get("message", "")), str(error.get("code", ""))
            )
        return failure_of(answer.status_code, str(error))

    def _stranger(self, answer: httpx.Response) -> Failure:
        return Failure(
            f"{self.server.url} answered {answer.status_code} in a way that no Model Depot does",
            UNREACHABLE,
            "does --url (MODELDEPOT_URL) name the right server and port?",
        )

    # events -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def stream(
        self, *, model: str = "", after: int | None = None
    ) -> AsyncGenerator[AsyncIterator[Event]]:
        """One stream, until it ends. Once the block is entered nothing is missed any more."""
        headers = {"accept": "text/event-stream"}
        if after is not None:
            headers["last-event-id"] = str(after)
        limits = httpx.Timeout(SILENCE_S, connect=5.0)
        with http_errors(self.server.url):
            async with self._http.stream(
                "GET",
                "/v1/events",
                params={"model": model} if model else {},
                headers=headers,
                timeout=limits,
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise self._failure(answer)
                yield _events(answer.aiter_bytes())

    async def follow(
        self, *, model: str = "", lost: Callable[[Failure | None], None] = lambda _: None
    ) -> AsyncIterator[Event]:
        """For ever: comes back to the stream where it broke off. `lost` is told each time it does.
        The first connection must succeed."""
        last: int | None = None
        was_there, tries = False, 0
        while True:
            broken: Failure | None = None
            try:
                async with self.stream(model=model, after=last) as events:
                    was_there, tries = True, 0
                    async for event in events:
                        last = event.id
                        yield event
            except Failure as failure:
                if not was_there or failure.exit_code not in (UNREACHABLE, TIMEOUT):
                    raise
                broken = failure
            if tries == 0:
                lost(broken)
            await asyncio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
            tries += 1


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Server-sent events, as far as this server uses them: `data` is one line of JSON that holds id
    and kind too. What cannot be read is skipped: a newer server may say more. (httpx's own lines
    end at every character that Unicode calls a line's end, also inside a text.)"""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            field, _, value = line.partition(b":")
            if field != b"data":
                continue
            try:
                yield msgspec.json.decode(value, type=Event)
            except msgspec.MsgspecError:
                continue


def checked(name: str) -> str:
    try:
        return check_name(name)
    except RejectedError as error:
        raise Failure(str(error), USAGE) from error


def path_of(name: str) -> str:
    return quote(checked(name), safe="/")


def v2_path(name: str, version: int | None) -> str:
    path = f"/v2/models/{path_of(name)}"
    return path if version is None else f"{path}/versions/{version}"
