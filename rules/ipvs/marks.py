"""The packet marks by which virtual servers are found: how they are made, and told from everybody else's.

A virtual server by mark is found by the whole mark of a packet.  So a mark of ours says three things at once: that it
is ours (a tag of seven bits), whether the connection is masqueraded whoever made it (one bit), and which server is
meant (a number).  The bit that remembers the need to masquerade (`NodeFacts.mark`) is in none of them, whichever bit
it is: packets get it from iptables, after IPVS has sent them on.

Our marks live on first packets only, and between the mangle table's first hook and its last.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from rules.forwarding import Frontend

ALL_BITS = 0xFFFFFFFF

_TAG = 0x2D << 24
_TAG_BITS = 0x7F << 24
_ALWAYS = 1 << 23
_MOST = (1 << 23) - 1


class Role(enum.Enum):
    """Whom a virtual server by mark is for."""

    EVERYBODY = "everybody"
    """All clients of a node port under policy Cluster."""
    OUTSIDE = "outside"
    """Those of a node port under policy Local who are neither local pods nor the node."""
    INSIDE = "inside"
    """Local pods and the node, at any frontend under policy Local (TRF-4)."""


Owner = tuple[Frontend, Role]


class Scheme(NamedTuple):
    """Marks that leave one bit alone."""

    masquerade: int
    """That bit, as a mask."""

    def mark(self, number: int, role: Role) -> int:
        """The mark of a server, by its number from 1."""
        if not 0 < number <= _MOST:
            raise ValueError(f"there are no more than {_MOST} marks")
        return self._spread(_TAG | (_ALWAYS if role is Role.EVERYBODY else 0) | number)

    @property
    def drop(self) -> int:
        """The mark of packets that are dropped."""
        return self._spread(_TAG)

    @property
    def tag(self) -> int:
        """What our marks have in the bits of `tag_bits`."""
        return self._spread(_TAG)

    @property
    def tag_bits(self) -> int:
        return self._spread(_TAG_BITS)

    @property
    def always(self) -> int:
        """The bit of those that are masqueraded whoever made them."""
        return self._spread(_ALWAYS)

    def is_ours(self, mark: int) -> bool:
        return mark & self.tag_bits == self.tag and not mark & self.masquerade

    def number(self, mark: int) -> int:
        """The number in a mark of ours; 0 in the one of packets that are dropped."""
        low = self.masquerade - 1
        return (mark & low | mark >> 1 & ~low) & _MOST

    def _spread(self, value: int) -> int:
        """31 bits as the 32 of a mark, around the one that is left alone."""
        low = self.masquerade - 1
        return value & low | (value & ~low) << 1


def scheme(masquerade: int) -> Scheme:
    """The marks beside a bit that remembers the need to masquerade.

    Raises:
        ValueError: it is not one bit.
    """
    if not 0 < masquerade <= ALL_BITS or masquerade.bit_count() != 1:
        raise ValueError(f"{masquerade:#x} is no mask of one bit of the packet mark")
    return Scheme(masquerade)


class Numbers:
    """Which number is whose.  A number that was given back is given out again, the lowest first."""

    def __init__(self, held: Mapping[Owner, int], used: Iterable[int] = ()) -> None:
        """Of owners that have one already, and numbers that are somebody else's."""
        self._numbers = dict(held)
        taken = {*held.values(), *used}
        self._next = max(taken, default=0) + 1
        self._free = [number for number in range(1, self._next) if number not in taken] if taken else []

    def __getitem__(self, owner: Owner) -> int:
        """The number of an owner, who is given one if it has none."""
        number = self._numbers.get(owner)
        if number is None:
            number = heapq.heappop(self._free) if self._free else self._next
            self._next = max(self._next, number + 1)
            self._numbers[owner] = number
        return number

    def keep(self, owners: Container[Owner]) -> None:
        """Have all others give back what they have."""
        for owner in [each for each in self._numbers if each not in owners]:
            self.give_back(owner)

    def give_back(self, owner: Owner) -> None:
        """An owner needs its number no longer, and nothing in the kernel has it."""
        number = self._numbers.pop(owner, None)
        if number is not None:
            heapq.heappush(self._free, number)
