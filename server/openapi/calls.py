"""Every operation of every face, in the order of the document."""

from __future__ import annotations

from server.openapi import (
    aphrodite,
    djl,
    itself,
    marqo,
    memory,
    native,
    openai,
    v2,
    v2_more,
    v2_repository,
    v2_shm,
)
from server.openapi.operation import Operation

OPERATIONS: tuple[Operation, ...] = (
    *native.OPERATIONS,
    *memory.OPERATIONS,
    *native.DEVICES,
    *v2.OPERATIONS,
    *v2_more.OPERATIONS,
    *v2_repository.OPERATIONS,
    *v2_shm.OPERATIONS,
    *openai.OPERATIONS,
    *aphrodite.OPERATIONS,
    *marqo.OPERATIONS,
    *djl.OPERATIONS,
    *itself.OPERATIONS,
)
