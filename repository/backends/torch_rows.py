"""One batch whose rows name LoRA adapters: as one run where their slots suffice, and where it is plain
which row is which in what its layers are given; else as several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from repository.backends import torch_io
from repository.backends.lora.adapters import LoraAdapters
from repository.backends.lora.slots import RowsUnclearError
from repository.errors import InferenceFailedError, InvalidTensorError

Inputs = Mapping[str, torch.Tensor]


def in_parts(
    forward: Callable[[Inputs], Any],
    inputs: Inputs,
    adapters: Sequence[str],
    lora: LoraAdapters,
    *,
    batched: bool,
) -> Any:
    """What `forward` returns; `adapters`: of each row ("": none). Not batched: one for all.

    Raises AdapterNotFoundError, AdapterRefusedError, NoAdapterSlotError, InvalidTensorError.
    """
    for name in dict.fromkeys(adapters):
        lora.check(name)
    if not batched:
        if len(set(adapters)) > 1:
            raise InvalidTensorError(
                f"the request names {len(set(adapters))} adapters; without batching "
                "(max_batch_size 0) it may name one"
            )
        with lora.taken([adapters[0]]) as slots:
            return _run(forward, inputs, [slots[adapters[0]]], lora)
    left = list(range(len(adapters)))
    done: list[tuple[list[int], Any]] = []
    mixed = True
    while left:
        wanted = left if mixed else [row for row in left if adapters[row] == adapters[left[0]]]
        with lora.taken(adapters[row] for row in wanted) as slots:
            part = [row for row in wanted if adapters[row] in slots]
            chosen = [slots[adapters[row]] for row in part]
            try:
                answer = _run(forward, _some(inputs, part, len(adapters)), chosen, lora)
            except RowsUnclearError:
                mixed = False
                continue
        if len(part) == len(adapters):
            return answer
        done.append((part, answer))
        left = [row for row in left if row not in set(part)]
    return _joined(done, len(adapters))


def _some(inputs: Inputs, part: Sequence[int], rows: int) -> Inputs:
    if len(part) == rows:
        return inputs
    some = torch.tensor(part)
    return {name: t.index_select(0, some.to(t.device)) for name, t in inputs.items()}


def _run(
    forward: Callable[[Inputs], Any], inputs: Inputs, slots: list[int], lora: LoraAdapters
) -> Any:
    lora.rows(slots, rows_first=False)
    with torch.inference_mode():
        return forward(inputs)


def _joined(parts: Sequence[tuple[list[int], Any]], rows: int) -> dict[str, torch.Tensor] | Any:
    """The parts' answers as one: each row where it was."""
    place = torch.tensor([row for part, _ in parts for row in part]).argsort()
    _, first = parts[0]
    if isinstance(first, torch.Tensor):
        return _whole([answer for _, answer in parts], place, rows)
    if isinstance(first, tuple | list) and not hasattr(first, "_fields"):
        columns = zip(*(answer for _, answer in parts), strict=True)
        return [_whole(list(column), place, rows) for column in columns]
    answers = [torch_io.named(answer, ()) for _, answer in parts]
    return {name: _whole([answer[name] for answer in answers], place, rows) for name in answers[0]}


def _whole(values: Sequence[Any], place: torch.Tensor, rows: int) -> torch.Tensor:
    if not all(isinstance(v, torch.Tensor) and v.dim() for v in values):
        raise InferenceFailedError(
            "the batch had to run in parts, one after the other, and forward() returned something "
            "without a batch axis"
        )
    whole = torch.cat(list(values))
    if whole.shape[0] != rows:
        raise InferenceFailedError(
            f"forward() returned {whole.shape[0]} rows for a batch of {rows}"
        )
    return whole.index_select(0, place.to(whole.device))
