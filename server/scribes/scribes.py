"""Large JSON, read and written by processes beside the server's own: the *scribes*.

Reading 64 MiB of numbers takes a second, in which the event loop would answer nobody. A scribe is a
child that knows the codecs and nothing else; it does with a large body or answer just what
`v2_plan.plan_of` and `v2_binary.encode` do with a small one, down to the words of the errors:

    plan = await scribes.plan_of(text) if len(text) >= LARGE_JSON else plan_of(text)
    encoded = (
        await scribes.encode(plan, response, model, version)
        if writes_large(plan, response)
        else encode(plan, response, model, version)
    )

Bytes travel in shared memory, copied by a thread, so that the loop is held for less than by a small
request.
"""

from __future__ import annotations

from repository.forms import Blank
from repository.messages import InferResponse
from repository.tensors import Buffer
from server.codecs.v2_binary import Encoded
from server.codecs.v2_plan import Plan
from server.scribes import sheets
from server.scribes.pool import Pool
from server.scribes.sheets import ToldAnswer

LARGE_JSON = 64 * 1024  # bytes of JSON from which a scribe reads it
LARGE_ANSWER = 64 * 1024  # bytes of tensors, to be written as JSON, from which a scribe writes it


def writes_large(plan: Plan, response: InferResponse) -> bool:
    """Whether a scribe should write this answer."""
    sizes = [len(t.data) for t in response.outputs if _becomes_json(plan, t.name)]
    return sum(sizes) >= LARGE_ANSWER


def _becomes_json(plan: Plan, output: str) -> bool:
    return not plan.wants_binary(output) and (not plan.outputs or output in plan.outputs)


class Scribes:
    """No process is started before it is needed; `close` ends them."""

    def __init__(self, pool: Pool | None = None) -> None:
        self.pool = pool or Pool()

    async def plan_of(self, text: Buffer) -> Plan:
        """As `v2_plan.plan_of`, with the same errors. `text` (JSON alone, nothing behind it) must
        stay as it is until this returns. The data of the plan's pieces are read-only views of memory
        of their own, which goes when the last of them goes.

        Also raises QueueFullError where too much is waiting, and WorkerDiedError where a scribe died
        or took too long. InvalidRequestError too for a request that says more than MOST_TOLD bytes
        besides its data.
        """
        kind, sheet = await self.pool.ask(sheets.READ, b"", [text], len(text))
        if kind != sheets.PLAN:
            raise _error(kind, sheet)
        told = sheets.read_plan(sheet.told)
        sizes = [piece.brought for piece in told.pieces if piece.brought >= 0]
        return sheets.plan_of(told, sheet.parts(sizes))

    async def encode(
        self, plan: Plan, response: InferResponse, model: str, version: int
    ) -> Encoded:
        """As `v2_binary.encode`, with the same errors and those of `plan_of`. The tensors must stay
        as they are until this returns. The JSON is one read-only view of memory of its own."""
        outputs = response.outputs
        told = sheets.tell(
            ToldAnswer(
                sheets.told_of(plan._replace(pieces=())),
                [Blank(t.name, t.datatype, t.shape, len(t.data)) for t in outputs],
                response.parameters,
                model,
                version,
            )
        )
        data: list[Buffer | int] = [
            t.data if _becomes_json(plan, t.name) else len(t.data) for t in outputs
        ]
        size = sum(len(part) for part in data if not isinstance(part, int))
        kind, sheet = await self.pool.ask(sheets.WRITE, told, data, size)
        if kind != sheets.JSON:
            raise _error(kind, sheet)
        header = sheet.rest
        by_name = {t.name: t for t in outputs}
        asked = [by_name[name] for name in plan.outputs] if plan.outputs else outputs
        blobs = [t.data for t in asked if plan.wants_binary(t.name) and len(t.data)]
        total = len(header) + sum(len(blob) for blob in blobs)
        return Encoded(len(header) if blobs else None, [header, *blobs], total)

    async def close(self) -> None:
        """What waits or is worked on fails with WorkerDiedError, and so does what is asked later."""
        await self.pool.close()


def _error(kind: str, sheet: sheets.Sheet) -> Exception:
    told = sheets.read_error(sheet.told)
    return sheets.ERRORS[told.kind](told.text)
