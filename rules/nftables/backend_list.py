"""A numbered list of backends as the kernel holds it: its indexes, its slots, and how it takes other content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rules.forwarding import Backend, Frontend, Protocol
from rules.nftables import names
from rules.nftables.elements import (
    ENDPOINT_MAPS,
    MAX_COUNT,
    Placed,
    affinity_element,
    backend_data,
    index_key,
    pack_reference,
)
from rules.nftables.messages import Element


class Content(NamedTuple):
    """What two users of a list must agree on to share it."""

    label: str
    protocol: Protocol
    affinity: int
    backends: frozenset[Backend]


class Use(NamedTuple):
    """One user of a list: a frontend, and whether it is its list of policy Local."""

    frontend: Frontend
    local: bool


class BackendList:
    """A numbered list of backends, as the kernel holds it."""

    __slots__ = ("content", "next_slot", "number", "order", "slots", "sound", "uses")

    def __init__(self, number: int, content: Content, order: list[Backend], slots: dict[Backend, int] | None) -> None:
        self.number = number
        self.content = content
        self.order = order
        """Index → backend: first those of the content, in any order; behind them the surplus."""
        self.slots = slots
        """Backend → slot, of a list with affinity; None without."""
        self.next_slot = max(slots.values(), default=-1) + 1 if slots else 0
        self.uses: set[Use] = set()
        self.sound = True
        """False: what the kernel holds is not what a list of this content has, and it must not be used again.  The
        repair that found it so deletes its elements: an unsound list has none here."""

    @property
    def reference(self) -> bytes:
        """The scratch value that leads to the list."""
        return pack_reference(self.number, len(self.content.backends))

    @property
    def index_set(self) -> str:
        """The map in which the elements stand that belong to indexes."""
        return ENDPOINT_MAPS[self.content.protocol] if self.slots is None else names.MEMBERS

    def index_element(self, index: int, backend: Backend) -> Placed:
        """The element that stands at an index."""
        key = index_key(self.number, index)
        data = backend_data(backend) if self.slots is None else pack_reference(self.number, self.slots[backend])
        return Placed(self.index_set, Element(key, data))

    def slot_element(self, backend: Backend) -> Placed:
        """The element of a backend's slot."""
        assert self.slots is not None
        return Placed(names.SLOTS, Element(pack_reference(self.number, self.slots[backend]), backend_data(backend)))

    def elements(self) -> Iterator[Placed]:
        """All elements of the list, the surplus included."""
        for index, backend in enumerate(self.order):
            yield self.index_element(index, backend)
        if self.slots is not None:
            for backend in self.slots:
                yield self.slot_element(backend)
            yield affinity_element(self.number, self.content.affinity)

    @property
    def size(self) -> int:
        """How many elements the list has."""
        return len(self.order) + (len(self.slots) + 1 if self.slots is not None else 0)

    def free_slot(self) -> int:
        """A slot that no backend has, and that was given up as long ago as can be arranged."""
        assert self.slots is not None
        taken = set(self.slots.values())
        while self.next_slot & MAX_COUNT in taken:
            self.next_slot += 1
        slot = self.next_slot & MAX_COUNT
        self.next_slot += 1
        return slot

    def can_become(self, content: Content) -> bool:
        """Whether the list can be rewritten in place to hold other content."""
        old = self.content
        return self.sound and old.protocol is content.protocol and bool(old.affinity) == bool(content.affinity)


def reorder(order: list[Backend], live: int, wanted: frozenset[Backend]) -> tuple[list[Backend], int]:
    """The new order of a list whose first `live` backends were its content, and how many of it are the content.

    Backends that stay keep their index where they can; a new one takes the index of one that goes; holes are filled
    from the end.  Behind the content, indexes that the kernel has stay, and point at backends that live.
    """
    present = set(order[:live]) & wanted
    fresh = [backend for backend in wanted if backend not in present]
    holes = [index for index in range(live) if order[index] not in wanted]
    result = list(order)
    while holes and fresh:
        result[holes.pop(0)] = fresh.pop()
    for index, backend in enumerate(fresh, live):
        result[index : index + 1] = [backend]
    count = len(wanted)
    if holes:
        movable = [index for index in range(count, live) if order[index] in wanted]
        for hole, index in zip([hole for hole in holes if hole < count], movable, strict=True):
            result[hole] = order[index]
    stand_in = result[0]
    for index in range(count, len(result)):
        if result[index] not in wanted:
            result[index] = stand_in
    return result, count
