"""All adapters of one model: registered → host memory → device slots. The one thing a backend holds.

Every Linear or Conv1D that an adapter changes gets room for `slots` adapters beside slot 0, which is
the model itself, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repository.adapters.orders import AdapterOrder, AdapterReport, Residence
from repository.backends.lora.host_memory import HostMemory
from repository.backends.lora.layers import SlottedLayers
from repository.backends.lora.matching import ModelLayers
from repository.backends.lora.reading import HostCopy, bytes_of, examine, read
from repository.backends.lora.table import SlotTable
from repository.config import Adapters as AdaptersConfig
from repository.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    NoAdapterSlotError,
    RepositoryError,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Known:
    """`key`: its name and its files; the same name with other files is another adapter."""

    order: AdapterOrder
    rank: int
    bytes: int

    @property
    def key(self) -> str:
        return f"{self.order.name}\n{self.order.fingerprint}"


class LoraAdapters:
    """`model`: a torch.nn.Module in its place (device, dtype) already; its layers get their slots when
    the first adapter that changes them is added. All calls come from one thread.

        slot = lora.take(name)           # for as long as a sequence runs, or a batch
        lora.rows([slot, 0, other])      # before each forward: the slot of each row of the batch
        model(...)
        lora.give(slot)
    """

    def __init__(self, model: torch.nn.Module, config: AdaptersConfig) -> None:
        self._config = config
        self._model = ModelLayers(model)
        self._layers = SlottedLayers(self._model, config.slots, config.max_rank)
        self._known: dict[str, _Known] = {}
        self._table = SlotTable(config.slots)
        self._host = HostMemory(config.host_memory)
        # Pinned ones that found every slot in use. The next slot that is given back is theirs.
        self._waiting: dict[str, HostCopy] = {}

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        """As `abilities.Adapts`."""
        if not orders:
            reports = map(self._report, self._known.values())
            return [report for report in reports if report.residence != "registered"]
        return [self._follow(order) for order in orders]

    def check(self, name: str) -> None:
        """Raises AdapterNotFoundError. "" is always there."""
        if name and name not in self._known:
            raise AdapterNotFoundError(f"The adapter {name} has not been registered")

    def take(self, name: str) -> int | None:
        """The slot of an adapter, loaded into one if need be; it stays there until it was given back
        as often as it was taken. "" is slot 0. None: every slot is in use now, try again later.

        Raises AdapterNotFoundError, AdapterRefusedError (its files changed), NoAdapterSlotError
        (all slots are pinned: waiting will not help).
        """
        if not name:
            return 0
        self.check(name)
        known = self._known[name]
        slot = self._table.find(known.key)
        if slot is None:
            slot = self._bring(known)
        if slot is not None:
            self._table.take(slot)
        return slot

    def give(self, slot: int) -> None:
        """Raises ValueError for a slot that was not taken."""
        if slot and self._table.give(slot):
            self._seat_waiting()

    @contextmanager
    def taken(self, names: Iterable[str]) -> Iterator[dict[str, int]]:
        """Slots of as many of the adapters as there is room for now (of at least one), for the length
        of the block. Raises as `take`, and NoAdapterSlotError if there is room for none."""
        slots: dict[str, int] = {}
        wanted = tuple(dict.fromkeys(names))
        try:
            for name in wanted:
                slot = self.take(name)
                if slot is not None:
                    slots[name] = slot
            if not slots:
                raise NoAdapterSlotError(f"no slot is free for adapter '{wanted[0]}'; ask again")
            yield slots
        finally:
            for slot in slots.values():
                self.give(slot)

    def rows(self, slots: Sequence[int], *, rows_first: bool = True) -> None:
        """Which slot each row of the next forward belongs to. All 0: the wrapped layers do what they
        did before, at no cost.

        `rows_first`: the wrapped layers are known to be given [rows, ..., in] or [rows * any, in]. If
        not (a model may turn its axes, or lay two inputs behind each other), and the slots differ,
        the forward raises RowsUnclearError where shapes leave a doubt."""
        self._layers.rows(slots, rows_first=rows_first)

    @property
    def device_bytes(self) -> int:
        """Of the slots of all wrapped layers."""
        return self._layers.bytes

    @property
    def host_bytes(self) -> int:
        unkept = (copy for key, copy in self._waiting.items() if key not in self._host)
        return self._host.bytes + sum(copy.bytes for copy in unkept)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it has in memory: slots, and what is kept for them."""
        yield from self._layers.tensors()
        for copy in (*self._host.copies(), *self._waiting.values()):
            for pair in copy.parts.values():
                yield from pair

    def _follow(self, order: AdapterOrder) -> AdapterReport:
        try:
            if order.remove:
                self._remove(order.name)
                return AdapterReport(order.name)
            return self._report(self._add(order))
        except RepositoryError as error:
            return AdapterReport(order.name, error=str(error))

    def _add(self, order: AdapterOrder) -> _Known:
        """Nothing is changed where it raises."""
        self._check_pins(order)
        before = self._known.get(order.name)
        if before is not None and before.order.fingerprint == order.fingerprint:
            known = _Known(order, before.rank, before.bytes)
            copy = self._wanted_copy(known)
        else:
            found = examine(order, self._model)
            if found.facts.rank > self._config.max_rank:
                raise AdapterRefusedError(
                    f"its rank is {found.facts.rank}, the slots of this model hold up to "
                    f"{self._config.max_rank}: raise adapters.max_rank in the model's config"
                )
            known = _Known(order, found.facts.rank, bytes_of(found.ranks, self._model))
            copy = self._wanted_copy(known)
            self._layers.add(found.ranks)
            if before is not None:
                self._forget(before)
        self._known[order.name] = known
        if copy is not None:
            self._host.keep(known.key, copy)
        self._pin(known, copy)
        return known

    def _check_pins(self, order: AdapterOrder) -> None:
        if not self._config.enabled or not self._config.slots:
            raise AdapterRefusedError(
                "adapters are switched off for this model: see adapters.enabled and adapters.slots "
                "in its config"
            )
        if not order.pin:
            return
        others = [n for n, k in self._known.items() if k.order.pin and n != order.name]
        if len(others) >= self._config.slots:
            raise NoAdapterSlotError(
                f"all {self._config.slots} slots of this model are pinned ({', '.join(others[:5])}): "
                "unpin one, or raise adapters.slots in its config"
            )

    def _wanted_copy(self, known: _Known) -> HostCopy | None:
        """What preload and pin ask for, read now, while it can still be refused."""
        order = known.order
        if not order.preload and (not order.pin or self._table.find(known.key) is not None):
            return None
        return self._host.get(known.key) or read(order, self._model)

    def _pin(self, known: _Known, copy: HostCopy | None) -> None:
        slot = self._table.find(known.key)
        if slot is not None:
            self._table.pin(slot, known.order.pin)
        elif known.order.pin and copy is not None:
            self._waiting[known.key] = copy
        if not known.order.pin:
            self._waiting.pop(known.key, None)
        self._seat_waiting()

    def _seat_waiting(self) -> None:
        for key, copy in list(self._waiting.items()):
            slot = self._table.free()
            if slot is None:
                return
            self._seat(slot, key, copy)
            self._table.pin(slot, True)
            del self._waiting[key]

    def _bring(self, known: _Known) -> int | None:
        """Into a slot, or None: all are in use now."""
        slot = self._table.free()
        if slot is None:
            if self._table.pinned == len(self._table):
                raise NoAdapterSlotError(
                    f"The adapter {known.order.name} cannot be used: all {len(self._table)} slots of "
                    "this model are pinned; unpin one, or raise adapters.slots in its config"
                )
            return None
        copy = self._host.get(known.key)
        if copy is None:
            try:
                copy = read(known.order, self._model)
            except AdapterRefusedError as error:
                raise AdapterRefusedError(f"The adapter {known.order.name}: {error}") from error
            self._host.keep(known.key, copy)
        self._seat(slot, known.key, copy)
        return slot

    def _seat(self, slot: int, key: str, copy: HostCopy) -> None:
        self._layers.fill(slot, copy)
        self._table.put(slot, key)

    def _remove(self, name: str) -> None:
        """Of one that is not known: nothing."""
        known = self._known.pop(name, None)
        if known is not None:
            self._forget(known)
            self._seat_waiting()

    def _forget(self, known: _Known) -> None:
        """Whoever runs on it keeps its slot."""
        self._table.drop(known.key)
        self._host.drop(known.key)
        self._waiting.pop(known.key, None)

    def _report(self, known: _Known) -> AdapterReport:
        residence: Residence = "registered"
        if self._table.find(known.key) is not None:
            residence = "device"
        elif known.key in self._host or known.key in self._waiting:
            residence = "host"
        return AdapterReport(
            known.order.name, residence=residence, rank=known.rank, bytes=known.bytes
        )
