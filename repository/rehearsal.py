"""What a new generation does before it may serve: warm-up requests, then golden checks.

Warm-up pays for what the first request would pay for (allocations, kernel selection), once in each
slot. Where the config says nothing, one request of zeros is tried (of a model that generates: one
short text; that embeds: one word) and its failure only noted; a warm-up that the config asks for must
succeed. Every check must agree (see `repository.checks`); they are tensors, so a model that only
generates has none.
"""

from __future__ import annotations

import asyncio
import math
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
from repository.messages import InferRequest, Loaded, TensorSpec
from repository.signature import Signature
from repository.sizes import human
from repository.spec import ModelSpec
from repository.tensors import DATATYPES, LENGTH, Array, Datatype, Shape, Tensor

LARGEST_INPUT = 1 << 30  # bytes of one warm-up tensor


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
        await _run(host, spec, signature, check)
    agree = f"{_many(len(files), 'check')} agree{'s' if len(files) == 1 else ''}"
    return f"{warm}; {agree if files else 'no checks'}"


async def _run(host: Host, spec: ModelSpec, signature: Signature, check: Check) -> None:
    request = InferRequest(check.inputs, tuple(tensor.name for tensor in check.outputs))
    try:
        signature.accept(request)
        response = await host.infer(request)
    except InvalidTensorError as error:
        raise CheckFailedError(f"{check.file}: the model refuses it: {error}") from error
    except InferenceFailedError as error:
        raise CheckFailedError(f"{check.file}: the model failed: {error}") from error
    limits = spec.config.checks
    await asyncio.to_thread(compare, check, response.outputs, atol=limits.atol, rtol=limits.rtol)


# warm-up ------------------------------------------------------------------------------------------


async def _warm_up(host: Host, spec: ModelSpec, signature: Signature, loaded: Loaded) -> str:
    send = partial(_way_of(loaded), host, signature, loaded.max_batch_size)
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
            raise LoadFailedError(f"warm-up {number} of the config failed: {error}") from error
    return f"warm-up of {_many(sent, 'request')}" if sent else "no warm-up"


def _way_of(loaded: Loaded) -> Callable[[Host, Signature, int, WarmupRequest], Awaitable[int]]:
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
    elif spec.backend == "python" or not inputs or any(i.datatype == "BYTES" for i in inputs):
        return "no warm-up"
    try:
        sent = await send(WarmupRequest())
    except WorkerDiedError:
        raise
    except RepositoryError as error:
        return f"a warm-up with {what} failed, which is only noted ({error})"
    return f"warm-up of {_many(sent, 'request')}"


async def _write(host: Host, signature: Signature, most: int, kind: WarmupRequest) -> int:
    """Two tokens for each sequence of the batch, in every slot, after a prompt of `size` words."""
    request = GenerateRequest(
        text=_text(kind), sampling=Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    )
    at_once = max(1, host.slots) * kind.batch_size
    for _ in range(kind.count):
        await asyncio.gather(*[host.generate(request, _ignore) for _ in range(at_once)])
    return kind.count * at_once


async def _embed(host: Host, signature: Signature, most: int, kind: WarmupRequest) -> int:
    texts = np.full((kind.batch_size,), _text(kind).encode(), object)
    return await _repeat(host, signature, InferRequest([Tensor.of("text", texts)]), kind.count)


def _text(kind: WarmupRequest) -> str:
    return " ".join(["warm"] * kind.size)


def _ignore(piece: Piece) -> None:
    pass


async def _send(host: Host, signature: Signature, most: int, kind: WarmupRequest) -> int:
    if not signature.inputs:
        raise InvalidTensorError("nobody says what the inputs are; declare them (inputs:)")
    request = await asyncio.to_thread(_request, signature, most, kind)
    return await _repeat(host, signature, request, kind.count)


async def _repeat(host: Host, signature: Signature, request: InferRequest, count: int) -> int:
    """How many were sent: `count` to every slot, as the slots do not share what is warmed."""
    signature.accept(request)
    slots = max(1, host.slots)
    for _ in range(count):
        await asyncio.gather(*[host.infer(request) for _ in range(slots)])
    return count * slots


def _request(signature: Signature, most: int, kind: WarmupRequest) -> InferRequest:
    rng = np.random.default_rng(0)  # the same at every load
    return InferRequest([_input(part, most, kind, rng) for part in signature.required])


def _input(part: TensorSpec, most: int, kind: WarmupRequest, rng: np.random.Generator) -> Tensor:
    dims = [kind.size if dim == -1 else dim for dim in part.shape]
    if most and dims:
        dims[0] = kind.batch_size
    shape = tuple(dims)
    known = DATATYPES[part.datatype]
    size = math.prod(shape) * (known.size or LENGTH.size)
    if not 0 <= size <= LARGEST_INPUT:
        raise InvalidTensorError(
            f"input '{part.name}' would have shape {list(shape)}, {human(size)}; a warm-up input "
            f"may have {human(LARGEST_INPUT)}"
        )
    return Tensor.of(part.name, _values(known, shape, kind, rng), part.datatype)


def _values(known: Datatype, shape: Shape, kind: WarmupRequest, rng: np.random.Generator) -> Array:
    """Random floats are normal; integers small, as they often are places in a table."""
    if kind.data == "zero":
        return (
            np.full(shape, b"", object) if known.name == "BYTES" else np.zeros(shape, known.dtype)
        )
    if known.name == "BYTES":
        return np.full(shape, b"warm", object)
    if known.name == "BF16":
        bits = rng.standard_normal(shape, np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16)
    if known.dtype.kind == "f":
        return rng.standard_normal(shape, np.float32).astype(known.dtype)
    return rng.integers(0, 2 if known.name == "BOOL" else 10, shape).astype(known.dtype)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
