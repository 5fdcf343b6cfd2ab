"""How much of each device may be handed out: what the operator says, what it has, what stays free.

Budgets hold for reservations. What others than this server use is measured later (`measuring`).
"""

from __future__ import annotations

from collections.abc import Iterable

from repository.devices.inventory import DeviceInfo, budgets
from repository.lifecycle.ledger import MemoryLedger, margin_of
from repository.lifecycle.placement import HOST
from repository.reports import Options

HOST_TIER = 0.1  # of host memory, for models that sleep, where nobody says


def ledgers(infos: Iterable[DeviceInfo], options: Options) -> dict[str, MemoryLedger]:
    """Of each device, and of the host tier beside them. Raises ConfigError for a budget of a device that
    is not there."""
    found = list(infos)
    total = {info.device: info.total for info in found}
    tier = options.host_tier
    if tier is None:
        tier = int(total.get("cpu", 0) * HOST_TIER)
    books = {
        d: MemoryLedger(d, n, total=total.get(d), margin=margin_of(d, total.get(d)))
        for d, n in budgets(found, options.memory_budget).items()
    }
    return books | {HOST: MemoryLedger(HOST, tier)}
