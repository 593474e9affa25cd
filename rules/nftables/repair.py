"""From what was read to what is wanted: the elements of one transaction."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rules.forwarding import Delta, ForwardingTable, difference
from rules.nftables.decode import Reading
from rules.nftables.elements import Batch
from rules.nftables.model import Model


class Plan(NamedTuple):
    """A change of elements, and the model as it is after it."""

    batch: Batch
    model: Model
    delta: Delta


def plan_repair(reading: Reading, wanted: ForwardingTable, now: float) -> Plan:
    """The elements that make what was read into `wanted`, its damage repaired.

    It uses up the reading: its model is the plan's.

    Args:
        reading: of the kernel as it is now.
        wanted: the table that the kernel is to hold.
        now: monotonic seconds.
    """
    delta = difference(reading.table, wanted)
    unsound = {frontend: wanted.routes[frontend] for frontend in reading.model.unsound() if frontend in wanted.routes}
    if unsound:
        delta = msgspec.structs.replace(delta, changed={**unsound, **delta.changed})
    batch = reading.repair
    if delta:
        batch.merge(reading.model.plan(delta, now))
    return Plan(batch, reading.model, delta)
