"""What mode ipvs holds, object by object, for people; and whom each serves.  Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from rules.dataplane import RawItem
from rules.forwarding import Address, Backend, Family, ForwardingTable, Frontend, format_address
from rules.ipvs import sets
from rules.ipvs.decode import Reading, element_words, server_words
from rules.ipvs.device import NAME
from rules.ipvs.kernel import Found
from rules.ipvs.marks import Scheme, scheme
from rules.ipvs.messages import PERSISTENT, Key
from rules.netlink.ipset import Element


def frontends_of(
    what: Key | Element | Address, table: ForwardingTable, owners: Mapping[int, Frontend], marks: Scheme
) -> tuple[Frontend, ...]:
    """For whom something of ours is in the kernel; empty where that is nobody's alone."""
    if isinstance(what, bytes):
        return tuple(frontend for frontend in table.routes if frontend.address == what)
    if isinstance(what, Key) and what.mark:
        owner = owners.get(marks.number(what.mark))
        return () if owner is None else (owner,)
    by_port = isinstance(what, Element) and what.length and not what.other
    frontend = Frontend(b"" if by_port else what.address, what.protocol, what.port)  # type: ignore[arg-type]
    return (frontend,) if frontend in table.routes else ()


def raw_items(family: Family, found: Found, reading: Reading) -> Iterator[RawItem]:
    table = reading.table
    marks = scheme(table.node.mark)
    owners = {number: frontend for (frontend, _), number in reading.numbers.items()}
    tenants = _tenants(table.routes)

    def serves(what: Key | Element) -> tuple[Frontend, ...]:
        return frontends_of(what, table, owners, marks)

    for jump in found.saved.jumps:
        yield RawItem(0, f"{jump.table} {jump.chain}: {jump.rule.text}")
    for name, chains in found.saved.chains.items():
        yield RawItem(0, f"table {name}")
        for chain, rules in sorted(chains.items()):
            yield RawItem(1, f"chain {chain}")
            yield from (RawItem(2, rule.text) for rule in rules)
    for which, elements in found.state.elements.items():
        spec = sets.spec(family, which)
        yield RawItem(0, f"set {spec.name} {spec.type.value}")
        for element, extra in sorted(elements.items()):
            carried = f" skbmark {extra.mark:#x}/{extra.mask:#x}" if spec.marks else ""
            comment = f' comment "{extra.comment}"' if extra.comment else ""
            yield RawItem(1, f"{element_words(element)}{carried}{comment}", serves(element))
    for key in sorted(found.state.servers):
        held = found.servers[key]
        server = held.server
        kept = f" persistent {server.timeout}" if server.flags & PERSISTENT else ""
        yield RawItem(0, f"virtual server {server_words(key)} {server.scheduler}{kept}", serves(key))
        for target, real in sorted(held.reals.items()):
            words = f"{Backend(*target)} weight {real.weight}, {real.active} active, {real.inactive} inactive"
            yield RawItem(1, words, serves(key))
    yield RawItem(0, f"device {NAME}")
    for address in sorted(found.state.addresses):
        yield RawItem(1, format_address(address), tuple(tenants.get(address, ())))


def _tenants(frontends: Iterable[Frontend]) -> Mapping[Address, list[Frontend]]:
    """Which frontends have an address."""
    found = defaultdict[Address, list[Frontend]](list)
    for each in frontends:
        found[each.address].append(each)
    return found
