"""Every operation of every face, in the order of the document."""

from __future__ import annotations

from server.openapi import aphrodite, djl, itself, marqo, memory, native, openai, v2
from server.openapi.operation import Operation

OPERATIONS: tuple[Operation, ...] = (
    *native.OPERATIONS,
    *memory.OPERATIONS,
    *native.DEVICES,
    *v2.OPERATIONS,
    *openai.OPERATIONS,
    *aphrodite.OPERATIONS,
    *marqo.OPERATIONS,
    *djl.OPERATIONS,
    *itself.OPERATIONS,
)
