"""All that a request or an answer says but its bytes: names, datatypes, shapes, sizes, parameters.

Clients send the same header thousands of times. It is read once into a Form, and whatever can be
concluded from it is concluded once: whether a model takes it, how many rows it has, who may share a
batch with it, how it is written for a worker or a client.

Rule: a form never changes, and two equal headers may have two forms: being the same object proves
that all but the bytes is equal, being another proves nothing. A BYTES tensor has a size here like
any other, but where its elements end is known only from its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from repository.tensors import DATATYPES, Buffer, Shape, Tensor

Group: TypeAlias = tuple[Any, ...]
OF_THE_QUEUE = ("priority", "timeout")  # parameters that say nothing to a model
MOST_RESIZED = 64  # row counts of one form that are remembered
_FIXED = frozenset(name for name, known in DATATYPES.items() if known.size)


class Blank(NamedTuple):
    """A tensor without its bytes. `size`: how many they are."""

    name: str
    datatype: str
    shape: Shape
    size: int


class Form:
    """`outputs`: names asked for (empty: all, and always for an answer). `parameters` are read only.

    rows      the common first axis of all tensors, None where there is none
    group     forms of equal groups may share a batch; None where `rows` is None
    fixed     no tensor is BYTES: the sizes are all there is to know
    wire      how a host writes it for its worker, once it has (the host's own)
    reply     how a face writes it for clients, once it has (the face's own)
    key       what a cache of answers knows it by, once it has been asked (the cache's own)
    """

    __slots__ = (
        "_resized", "blanks", "fixed", "group", "key", "outputs", "parameters", "reply", "rows", "wire"
    )  # fmt: skip

    def __init__(
        self,
        blanks: Iterable[Blank],
        outputs: tuple[str, ...] = (),
        parameters: dict[str, Any] | None = None,
    ) -> None:
        self.blanks = tuple(blanks)
        self.outputs = outputs
        self.parameters: dict[str, Any] = parameters or {}
        self.fixed = all(b.datatype in _FIXED for b in self.blanks)
        axes = {blank.shape[:1] for blank in self.blanks}
        self.rows: int | None = None
        self.group: Group | None = None
        if len(axes) == 1 and () not in axes:
            self.rows = self.blanks[0].shape[0]
            parts = [(blank.name, blank.datatype, blank.shape[1:]) for blank in self.blanks]
            told = {k: v for k, v in self.parameters.items() if k not in OF_THE_QUEUE}
            self.group = (parts, outputs, told)
        self.wire: Any = None
        self.reply: Any = None
        self.key: bytes | None = None
        self._resized: dict[int, Form] = {}

    def resized(self, rows: int) -> Form:
        """The same with another number of rows. Only where it is `fixed`, and `rows` is known and
        not 0."""
        if rows == self.rows:
            return self
        found = self._resized.get(rows)
        if found is None:
            mine = self.rows
            assert self.fixed and mine, "nobody knows the size of a row"
            found = Form(
                [
                    Blank(b.name, b.datatype, (rows, *b.shape[1:]), b.size // mine * rows)
                    for b in self.blanks
                ],
                self.outputs,
                self.parameters,
            )
            if len(self._resized) < MOST_RESIZED:
                self._resized[rows] = found
                found._resized = self._resized
                self._resized.setdefault(mine, self)
        return found

    def tensors(self, data: Sequence[Buffer]) -> list[Tensor]:
        """With the bytes put in, one buffer for each."""
        if len(data) == len(self.blanks) == 1:  # most are, and they take half the time so
            name, datatype, shape, _ = self.blanks[0]
            return [Tensor(name, datatype, shape, data[0])]
        return [
            Tensor(name, datatype, shape, part)
            for (name, datatype, shape, _), part in zip(self.blanks, data, strict=True)
        ]


def form_of(
    tensors: Sequence[Tensor],
    outputs: tuple[str, ...] = (),
    parameters: dict[str, Any] | None = None,
) -> Form:
    """Of tensors whole, or in several pieces: data that is a list of buffers."""
    blanks = [Blank(t.name, t.datatype, t.shape, _size(t.data)) for t in tensors]
    return Form(blanks, outputs, parameters)


def _size(data: Buffer | list[Buffer]) -> int:
    return sum(map(len, data)) if isinstance(data, list) else len(data)
