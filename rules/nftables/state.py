"""What the kernel holds of one family's table: its static part, and the elements of its sets.

One dump is consistent, several are not: compare `NetfilterSocket.generation()` before the first and after the last,
and read again if it changed.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from typing import NamedTuple

from rules.forwarding import Family
from rules.netlink.errors import NetlinkError
from rules.netlink.transaction import NetfilterSocket
from rules.nftables.layout import TABLE, Layout
from rules.nftables.messages import Element, decode_elements, get_elements
from rules.nftables.objects import (
    ANONYMOUS,
    ChainSpec,
    RuleSpec,
    SetSpec,
    TableSpec,
    decode_chain,
    decode_rule,
    decode_set,
    decode_table,
    get_table,
    list_chains,
    list_rules,
    list_sets,
)
from rules.nftables.sets import PICK

_DUMP_TRIES = 20


class StaticState(NamedTuple):
    """A table as it is, without the elements that Services have."""

    family: Family
    table: TableSpec
    sets: dict[str, SetSpec]
    """Named sets; those that a rule brings with it belong to the rule."""
    chains: dict[str, ChainSpec]
    picks: tuple[Element, ...]
    """The elements of the map `pick`."""


def state_of(layout: Layout) -> StaticState:
    """The state of a table that has just been made from `layout`."""
    return StaticState(
        family=layout.family,
        table=layout.table,
        sets={each.name: each for each in layout.sets},
        chains={each.name: each for each in layout.chains},
        picks=layout.picks,
    )


def read_static(socket: NetfilterSocket, family: Family) -> StaticState | None:
    """The static part of our table; None: there is no such table.

    Raises:
        NetlinkError: the kernel refused, or the table vanished meanwhile.
        DecodeError: the kernel's answer makes no sense.
    """
    try:
        table = decode_table(socket.request(get_table(family, TABLE)))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    sets = {
        spec.name: spec
        for owner, spec in map(decode_set, socket.dump(list_sets(family, TABLE)))
        if owner == TABLE and not spec.flags & ANONYMOUS
    }
    # The kernel lists chains of all tables, whatever was asked for.
    chains = {spec.name: spec for owner, spec in map(decode_chain, socket.dump(list_chains(family))) if owner == TABLE}
    rules: defaultdict[str, list[RuleSpec]] = defaultdict(list)
    for owner, listed in map(decode_rule, socket.dump(list_rules(family, TABLE))):
        if owner == TABLE:
            rules[listed.chain].append(listed.rule)
    return StaticState(
        family=family,
        table=table,
        sets=sets,
        chains={name: chain._replace(rules=tuple(rules[name])) for name, chain in chains.items()},
        picks=tuple(read_elements(socket, family, PICK)) if PICK in sets else (),
    )


def read_elements(socket: NetfilterSocket, family: Family, name: str) -> list[Element]:
    """All elements of one of our sets or maps, in no order.

    A hash table that still grows in the background, as it does for a while after many elements were added, changes
    its order between two parts of a dump: the kernel then tells some elements twice and as many not at all, and says
    nothing.  So a dump with a key told twice is taken again.

    Raises:
        NetlinkError: the kernel refused (ENOENT: no such set), or the set never held still.
        DecodeError: the kernel's answer makes no sense.
    """
    request = get_elements(family, TABLE, name)
    for _ in range(_DUMP_TRIES):
        elements = decode_elements(socket.dump(request))
        count = len(elements)
        # Mostly keys alone tell; where an interval ends and the next one begins, they don't.
        if len({each.key for each in elements}) == count or len({(each.key, each.flags) for each in elements}) == count:
            return elements
    raise NetlinkError(errno.EINTR, f"the elements of {name} changed places again and again while they were read")
