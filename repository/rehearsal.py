"""What a new generation does before it may serve: warm-up requests, then golden checks.

Warm-up pays for what the first request would pay for (allocations, kernel selection), once in each
slot. Where the config says nothing, one request of zeros is tried (of a model that generates: one
short text; that embeds: one word) and its failure only noted; a warm-up that the config asks for must
succeed. Every check must agree (see `repository.checks`); they are tensors, so a model that only
generates has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np

from repository.checks import Check, compare, find_checks, read_check
from repository.config import WarmupRequest
from repository.errors import (
    CheckFailedError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
    RepositoryError,
    WorkerDiedError,
)
from repository.generate import GenerateRequest, Piece, Sampling
from repository.hosts.base import Host
from repository.messages import InferRequest, InferResponse, Loaded
from repository.names import shown
from repository.responding import Responses
from repository.signature import Signature
from repository.spec import ModelSpec
from repository.tensors import Tensor
from repository.warmup import request_of

# Backends that run code: what zeros would do there, nobody knows.
DOES_AS_IT_LIKES = frozenset({"python", "triton_python", "ensemble"})


async def rehearse(host: Host, spec: ModelSpec, loaded: Loaded) -> str:
    """A note for the story: "warm-up of 1 request; 3 checks agree".

    Raises LoadFailedError for a warm-up of the config that fails, CheckFailedError for a check that
    disagrees or cannot be read, WorkerDiedError.
    """
    signature = Signature(spec.model, loaded, spec.config)
    warm = await _warm_up(host, spec, signature, loaded)
    if not loaded.inputs and "generate" in loaded.abilities:
        return f"{warm}; no checks"
    if not spec.config.checks.enabled:
        return f"{warm}; checks are switched off"
    files = await asyncio.to_thread(find_checks, spec)
    datatypes = {part.name: part.datatype for part in (*signature.inputs, *signature.outputs)}
    for file in files:
        check = await asyncio.to_thread(read_check, spec, file, datatypes)
        await _run(host, spec, loaded, signature, check)
    agree = f"{_many(len(files), 'check')} agree{'s' if len(files) == 1 else ''}"
    return f"{warm}; {agree if files else 'no checks'}"


async def _run(
    host: Host, spec: ModelSpec, loaded: Loaded, signature: Signature, check: Check
) -> None:
    request = InferRequest(check.inputs, tuple(tensor.name for tensor in check.outputs))
    try:
        signature.accept(request)
        response = await _answer(host, loaded, request)
    except InvalidTensorError as error:
        raise CheckFailedError(f"{check.file}: the model refuses it: {error}") from error
    except InferenceFailedError as error:
        raise CheckFailedError(f"{check.file}: the model failed: {error}") from error
    limits = spec.config.checks
    await asyncio.to_thread(compare, check, response.outputs, atol=limits.atol, rtol=limits.rtol)


async def _answer(
    host: Host, loaded: Loaded, request: InferRequest, at: int | None = None
) -> InferResponse:
    """The first that it answers; one without outputs if it never does. Returns when it has ended."""
    if "ask" not in loaded.abilities:
        return await host.infer(request)
    answers = Responses(request)
    taken = host.ask([answers], at)
    try:
        found = [answer async for answer in answers]
        await taken
    finally:
        answers.close()
    return found[0] if found else InferResponse([])


# warm-up ------------------------------------------------------------------------------------------


async def _warm_up(host: Host, spec: ModelSpec, signature: Signature, loaded: Loaded) -> str:
    send = partial(_way_of(loaded), host, spec, signature, loaded)
    asked = spec.config.warmup
    if asked is None:
        return await _try_one(spec, signature, loaded, send)
    sent = 0
    for number, kind in enumerate(asked, 1):
        try:
            sent += await send(kind)
        except WorkerDiedError:
            raise
        except RepositoryError as error:
            which = f"{number} ('{shown(kind.name)}')" if kind.name else number
            raise LoadFailedError(f"warm-up {which} of the config failed: {error}") from error
    return f"warm-up of {_many(sent, 'request')}" if sent else "no warm-up"


Way = Callable[[Host, ModelSpec, Signature, Loaded, WarmupRequest], Awaitable[int]]


def _way_of(loaded: Loaded) -> Way:
    if "generate" in loaded.abilities:
        return _write
    return _embed if "embed" in loaded.abilities else _send


async def _try_one(
    spec: ModelSpec,
    signature: Signature,
    loaded: Loaded,
    send: Callable[[WarmupRequest], Awaitable[int]],
) -> str:
    inputs = signature.required
    what = "zeros"
    if {"generate", "embed"} & set(loaded.abilities):
        what = "a text"
    elif (
        spec.backend in DOES_AS_IT_LIKES or not inputs or any(i.datatype == "BYTES" for i in inputs)
    ):
        return "no warm-up"
    try:
        sent = await send(WarmupRequest())
    except WorkerDiedError:
        raise
    except RepositoryError as error:
        return f"a warm-up with {what} failed, which is only noted ({error})"
    return f"warm-up of {_many(sent, 'request')}"


async def _write(
    host: Host, spec: ModelSpec, signature: Signature, loaded: Loaded, kind: WarmupRequest
) -> int:
    """Two tokens for each sequence of the batch, in every slot, after a prompt of `size` words."""
    request = GenerateRequest(
        text=_text(kind), sampling=Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    )
    at_once = max(1, host.slots) * kind.batch_size
    for _ in range(kind.count):
        await asyncio.gather(*[host.generate(request, _ignore) for _ in range(at_once)])
    return kind.count * at_once


async def _embed(
    host: Host, spec: ModelSpec, signature: Signature, loaded: Loaded, kind: WarmupRequest
) -> int:
    texts = np.full((kind.batch_size,), _text(kind).encode(), object)
    request = InferRequest([Tensor.of("text", texts)])
    return await _repeat(host, signature, loaded, request, kind.count)


def _text(kind: WarmupRequest) -> str:
    return " ".join(["warm"] * kind.size)


def _ignore(piece: Piece) -> None:
    pass


async def _send(
    host: Host, spec: ModelSpec, signature: Signature, loaded: Loaded, kind: WarmupRequest
) -> int:
    if not signature.inputs:
        raise InvalidTensorError("nobody says what the inputs are; declare them (inputs:)")
    most = loaded.max_batch_size
    request = await asyncio.to_thread(request_of, spec.folder, signature, most, kind)
    return await _repeat(host, signature, loaded, request, kind.count)


async def _repeat(
    host: Host, signature: Signature, loaded: Loaded, request: InferRequest, count: int
) -> int:
    """How many were sent: `count` to every slot, as the slots do not share what is warmed."""
    signature.accept(request)
    slots = max(1, host.slots)
    for _ in range(count):
        await asyncio.gather(*[_answer(host, loaded, request, at) for at in range(slots)])
    return count * slots


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
