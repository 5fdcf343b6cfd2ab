"""What few inference requests ask for beside tensors: shared memory, classes, compressed bodies.

    inflate → fetch → check → (the model) → finish → squeeze

Each stage works on what the plain ones (`server.call`) made, and none is entered by a request that does
not ask for it. Whatever is large is done by a thread, a few at a time, so that nobody else waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import msgspec

from repository.errors import InferenceFailedError, InvalidRequestError
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse
from repository.tensors import Buffer, Tensor
from server.codecs import squeeze, v2_binary
from server.codecs.squeeze import Wish
from server.codecs.v2_binary import Encoded
from server.codecs.v2_plan import Extras, Place, Plan
from server.intake import check_size
from server.triton.classes import check_classes, classified
from server.triton.shm import Region, Regions

AT_ONCE = 2  # threads; more would only take the cores from the models
SMALL = 16 * 1024  # bytes that are done sooner than given to a thread
LARGE_COPY = 1 << 20  # bytes that are copied in less time than it takes to ask a thread twice

P = ParamSpec("P")
T = TypeVar("T")


class Aside:
    """Work beside the loop."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._turn = asyncio.Semaphore(at_once)

    async def do(self, small: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`small`: here and now."""
        if small:
            return work(*args, **kwargs)
        async with self._turn:
            return await asyncio.to_thread(work, *args, **kwargs)


# the request --------------------------------------------------------------------------------------


async def inflate(aside: Aside, body: Buffer, most: int) -> memoryview:
    """Raises as `squeeze.inflated`. A small body may become a large one, so it is never done here."""
    return memoryview(await aside.do(False, squeeze.inflated, body, most))


async def fetch(aside: Aside, regions: Regions, plan: Plan, most: int) -> Plan:
    """With the bytes of the inputs that lie in shared memory. Raises PayloadTooLargeError where they
    are more than `most`, and what `Regions.find` and `Region.read` raise."""
    extras = plan.extras
    assert extras is not None
    found = {at: (regions.find(place.region), place) for at, place in extras.taken.items()}
    size = sum(place.size for _, place in found.values())
    check_size(size, most)
    data = await aside.do(size <= LARGE_COPY, _read, list(found.values()))
    pieces = list(plan.pieces)
    for at, part in zip(found, data, strict=True):
        pieces[at] = pieces[at]._replace(data=part)
    return plan._replace(pieces=tuple(pieces))


def _read(places: list[tuple[Region, Place]]) -> list[bytes]:
    return [region.read(place.offset, place.size) for region, place in places]


Given = dict[str, tuple[Region, Place]]


def check(regions: Regions, extras: Extras, gen: Generation) -> Given:
    """Where outputs go, before the model is asked. Raises what can be known by then."""
    if extras.classes and gen.signature is not None:
        datatypes = {spec.name: spec.datatype for spec in gen.signature.outputs}
        for name in extras.classes:
            check_classes(datatypes.get(name, ""))
    found: Given = {}
    for name, place in extras.given.items():
        region = regions.find(place.region)
        region.check(place.offset, place.size)
        found[name] = region, place
    return found


def raw_request(gen: Generation, body: memoryview) -> InferRequest:
    """A body without a header. Raises InvalidTensorError."""
    loaded = gen.loaded
    if loaded is None:
        raise InferenceFailedError(f"model '{gen.spec.model}' serves without having said how")
    inputs = loaded.inputs if gen.signature is None else gen.signature.inputs
    batched = loaded.max_batch_size > 0
    return v2_binary.raw_request(inputs, body, gen.spec.model, batched=batched)


# the answer ---------------------------------------------------------------------------------------


async def finish(
    aside: Aside, extras: Extras, given: Given, response: InferResponse, gen: Generation
) -> InferResponse:
    """With classes in place of the outputs that they were asked of; what goes to shared memory is
    written. Raises InvalidRequestError."""
    size = sum(len(t.data) for t in response.outputs)
    return await aside.do(size <= SMALL, _finish, extras, given, response, gen)


def _finish(
    extras: Extras, given: Given, response: InferResponse, gen: Generation
) -> InferResponse:
    for tensor in response.outputs:
        if tensor.name in given:
            _check_room(tensor, given[tensor.name][1])
    for tensor in response.outputs:
        if tensor.name in given:
            region, place = given[tensor.name]
            region.write(place.offset, tensor.data)
    if not extras.classes:
        return response
    batched = gen.loaded is not None and gen.loaded.max_batch_size > 0
    outputs = [
        tensor
        if tensor.name not in extras.classes
        else classified(
            tensor,
            extras.classes[tensor.name],
            gen.spec.labels.get(tensor.name, ()),
            batched=batched,
        )
        for tensor in response.outputs
    ]
    return msgspec.structs.replace(response, outputs=outputs, form=None)


def _check_room(tensor: Tensor, place: Place) -> None:
    needed = len(tensor.data)
    if needed > place.size:
        raise InvalidRequestError(
            f"shared memory size specified with the request for output '{tensor.name}' ({place.size} "
            f"bytes) should be at least {needed} bytes to hold the results"
        )


def pays(wish: Wish, plan: Plan, response: InferResponse) -> bool:
    """Whether an answer is worth compressing, as far as its tensors tell."""
    if wish.text and plan.rest_binary and not plan.outputs:
        return False  # all of it is binary
    given = plan.extras.given if plan.extras is not None else {}
    size = sum(
        len(t.data)
        for t in response.outputs
        if (not plan.outputs or t.name in plan.outputs)
        and t.name not in given
        and not (wish.text and plan.wants_binary(t.name))
    )
    return size >= wish.least


async def squeezed(aside: Aside, encoded: Encoded, wish: Wish) -> Encoded:
    """Compressed, unless it would be longer so and may be plain."""
    data = await aside.do(encoded.total <= SMALL, squeeze.deflated, encoded.buffers, wish.coding)
    if len(data) >= encoded.total and wish.least:
        return encoded
    return Encoded(encoded.header_length, [data], len(data), wish.coding)
