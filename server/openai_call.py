"""One OpenAI request: what the text and the embeddings faces share (`server.streamed` has the rest).

A model's name may name an adapter too; errors are shown in OpenAI's words.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from litestar.types import Receive, Scope, Send

from repository.errors import (
    AdapterNotFoundError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
)
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State
from repository.repository import Repository
from server import errors, streamed
from server.call import Door
from server.intake import adapter_of

__all__ = ["OpenAICall", "answered", "check_ability"]


class OpenAICall(streamed.StreamedCall):
    protocol = "openai"

    def __init__(self, door: Door, scope: Scope, send: Send) -> None:
        super().__init__(door, scope, send)
        self.adapter = ""  # that the model's name brought

    async def hold(self, name: str, ability: str, receive: Receive) -> Generation:
        """The generation that serves the model of that name, leased until `end`. `adapter` is set
        where the name names one. Waits for nothing but a model that loads on demand. Raises
        InvalidRequestError for a model without the ability, ClientGoneError."""
        if not name:
            raise InvalidRequestError("'model' is empty; GET /v1/models lists the models")
        model, self.adapter = _resolved(self.door.models, name)
        gen = await self.lease(model, None, receive)
        check_ability(self.door.models, gen, ability)
        return gen

    def adapters(self, said: tuple[str, ...] | None, rows: int) -> tuple[str, ...]:
        """Of each row ("": none): the later wins of the model's name, the body, `?adapter=`, and the
        header that SageMaker's clients send."""
        named = adapter_of(self._scope.get("query_string", b""), self._scope["headers"])
        found = said if named is None else (named,) * rows
        if found is None:
            return (self.adapter,) * rows
        self.adapter = ""  # if one is not found now, the model's name is not to blame
        return found

    def failed(self, error: Exception) -> bytes:
        return super().failed(self._meant(error))

    async def refuse(self, error: Exception) -> None:
        await super().refuse(self._meant(error))

    def shown(self, error: Exception) -> tuple[int, bytes]:
        return errors.status_of(error), errors.encode(errors.body_openai(error))

    def _meant(self, error: Exception) -> Exception:
        if isinstance(error, AdapterNotFoundError) and self.adapter:
            return ModelNotFoundError(str(error))  # it was part of the model's name
        return error


async def answered(
    door: Door,
    scope: Scope,
    receive: Receive,
    send: Send,
    work: Callable[[OpenAICall, Receive], Awaitable[bool]],
) -> None:
    """As `streamed.answered`."""
    await streamed.answered(OpenAICall(door, scope, send), receive, work)


def _resolved(models: Repository, name: str) -> tuple[str, str]:
    """A model and an adapter of it. What cannot be a name is the name of nothing."""
    try:
        return models.resolve(name)
    except InvalidNameError as error:
        raise ModelNotFoundError(f"{error}; GET /v1/models lists the models") from error


def check_ability(models: Repository, gen: Generation, ability: str) -> None:
    """Raises InvalidRequestError, naming the models that would do."""
    loaded = gen.loaded
    if loaded is not None and ability in loaded.abilities:
        return
    name = gen.spec.model
    if ability == "chat" and loaded is not None and "generate" in loaded.abilities:
        raise InvalidRequestError(
            f"model '{name}' has no chat template; use /v1/completions, or put a chat_template "
            "into its tokenizer_config.json"
        )
    able = [
        status.name
        for status in models.statuses()
        for other in status.generations
        if other.state is State.READY and other.loaded and ability in other.loaded.abilities
    ]
    does = {"embed": "embed texts", "generate": "generate text"}.get(ability, "chat")
    others = ", ".join(dict.fromkeys(able[:10])) or "none"
    raise InvalidRequestError(f"model '{name}' does not {does}; models that do: {others}")
