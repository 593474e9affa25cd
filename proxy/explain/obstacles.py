"""What keeps packets from the backends that rules give them: others' rules, and routes that are missing.  Pure.

Packets that meet all conditions of a table's rules alike fare alike, so one of each sort is led through the rules:
ten thousand Services cost about as much as ten.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from proxy.explain.passing import Chains, Condition, ForeignRule, Passing, conditions_of, dropped_by, holds, may_drop
from proxy.explain.surroundings import ForeignChain, Surroundings
from rules.forwarding import Address, Backend, Protocol, Route, format_address, parse_prefix

MOST_WAYS = 4096
"""How many backends' routes are asked for one by one."""
_MOST_MET = 2_000_000
"""Conditions and their values that are judged in one base chain at most: about a second's work."""
_MOST_NAMED = 3


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """Something of others that drops, or may drop, what goes through Services."""

    base: ForeignChain
    """The base chain that leads there."""
    chain: str
    rule: ForeignRule | None
    """None: the base chain's policy."""
    surely: tuple[Passing, ...]
    perhaps: tuple[Passing, ...]

    @property
    def place(self) -> str:
        """What it is."""
        if self.rule is None:
            return f"the policy of the chain {self.chain} in the table {self.base.place}"
        return f"rule {self.rule.number} of the chain {self.chain} in the table {self.base.place}"

    @property
    def does(self) -> str:
        """What it does with packets."""
        return "refuses" if self.rule is not None and self.rule.action == "reject" else "drops"

    @property
    def remedy(self) -> str:
        """What in that place lets through what goes through Services, and nothing else."""
        packets = self.surely or self.perhaps
        by_iptables = self.base.legacy or (self.base.table == "filter" and self.base.name.isupper())
        if packets and packets[0].stage != "translated":
            protocol, port = packets[0].protocol.name.lower(), packets[0].port
            return f"-p {protocol} --dport {port} -j ACCEPT" if by_iptables else f"{protocol} dport {port} accept"
        return "-m conntrack --ctstate DNAT,ESTABLISHED -j ACCEPT" if by_iptables else "ct status dnat accept"

    @property
    def listing(self) -> str:
        """The command that shows it."""
        shown = self.base._replace(name=self.chain)
        if self.rule is None:
            return shown.listing
        return f"{shown.listing} -v" if shown.legacy else shown.listing.replace("nft ", "nft -a ", 1)


class Judged(NamedTuple):
    """What was found, and how much was looked at."""

    obstacles: tuple[Obstacle, ...]
    left_out: int
    """Packets that were not judged, as there are too many rules."""


def obstacles(bases: Iterable[tuple[ForeignChain, Chains]], packets: Sequence[Passing]) -> Judged:
    """What of others stands in these packets' way, in the order in which they meet it.

    Args:
        bases: the base chains that they come to, with the chains of their tables.
        packets: as these chains meet them.
    """
    found: list[Obstacle] = []
    left_out = 0
    for base, chains in bases:
        if not (base.drops or may_drop(base.name, chains)):
            continue
        alike = _sorts(conditions_of(base.name, chains), packets)
        hits: dict[tuple[str, ForeignRule | None], tuple[list[Passing], list[Passing]]] = {}
        size = sum(1 + len(one.values) for rules in chains.values() for rule in rules for one in rule.conditions)
        most = max(_MOST_MET // (size or 1), 1)
        left_out = max(left_out, sum(map(len, alike[most:])))
        for each in alike[:most]:
            for hit in dropped_by(base.name, chains, each[0], policy_drops=base.drops):
                hits.setdefault((hit.chain, hit.rule), ([], []))[not hit.sure].extend(each)
        for (chain, rule), (surely, perhaps) in hits.items():
            found.append(Obstacle(base=base, chain=chain, rule=rule, surely=tuple(surely), perhaps=tuple(perhaps)))
    return Judged(tuple(found), left_out)


def _sorts(conditions: Iterable[Condition], packets: Sequence[Passing]) -> list[list[Passing]]:
    """Packets that meet all conditions alike, those of which there are most first.

    Networks are looked up and not tried one by one: there are many, and tens of thousands of backends.
    """
    networks: dict[int, dict[int, list[int]]] = {}
    rest: list[Condition] = []
    for number, condition in enumerate(conditions):
        if condition.what != "destination":
            rest.append(condition)
            continue
        for address, length in map(parse_prefix, condition.values):
            key = _network(address, length)
            networks.setdefault(length, {}).setdefault(key, []).append(number)
    answers: dict[tuple[object, ...], tuple[bool | None, ...]] = {}
    sorts: dict[tuple[object, ...], list[Passing]] = {}
    for each in packets:
        by_rest = each[1:]
        if (told := answers.get(by_rest)) is None:
            told = answers[by_rest] = tuple([holds(condition, each) for condition in rest])
        met = [
            number for length, known in networks.items() for number in known.get(_network(each.destination, length), ())
        ]
        sorts.setdefault((each.masqueraded, told, *met), []).append(each)
    return sorted(sorts.values(), key=len, reverse=True)


def _network(address: Address, length: int) -> int:
    """A number for a network, which no network of another length or family has among those of this length."""
    bits = len(address) * 8
    return (1 << bits | int.from_bytes(address)) >> max(bits - length, 0)


def passing(backend: Backend, protocol: Protocol, node: Surroundings, *, masqueraded: bool | None) -> Passing:
    """The packet that goes to a backend, whoever sends it."""
    way = node.ways.get(backend.address)
    outgoing = way.interface if way is not None else ""
    return Passing(backend.address, protocol, backend.port, outgoing=outgoing, masqueraded=masqueraded)


def unheard(backends: Iterable[Backend], protocol: Protocol, node: Surroundings) -> list[Backend]:
    """Those with an address of the node at which no process of it listens; none where that is not known."""
    if not node.listening or protocol is Protocol.SCTP:
        return []
    return [
        each for each in backends if each.address in node.addresses and (protocol.name, each.port) not in node.listening
    ]


def unheard_words(backends: Iterable[Backend], protocol: Protocol) -> str:
    """That nobody listens."""
    return (
        f"no process of this node listens at {some(backends)}/{protocol.name}, which is the node itself (hostNetwork)"
    )


def listeners_command(protocol: Protocol, port: int) -> str:
    """What shows who listens at a port."""
    return f"ss -{'lntp' if protocol is Protocol.TCP else 'lnup'} 'sport = :{port}'"


def lost_ways(addresses: Iterable[Address], node: Surroundings, here: Collection[Address]) -> dict[Address, str]:
    """The backends that the node does not reach, and why.

    Args:
        addresses: of backends.
        node: with the ways to them.
        here: those of pods on this node, by their EndpointSlices.
    """
    found: dict[Address, str] = {}
    for each in addresses:
        if (why := node.unreachable.get(each)) is not None:
            found[each] = why
        elif each in here and (way := node.ways.get(each)) is not None and way.gateway is not None:
            router = format_address(way.gateway)
            found[each] = (
                f"the EndpointSlice says that it is on this node, and the node hands it to the router {router}"
            )
    return found


def backends_of(routes: Iterable[Route]) -> list[Address]:
    """The backends whose routes are to be asked; of very many, one of each network of 256 addresses (IPv6: a /64)."""
    found = sorted({backend.address for route in routes for backend in route.backends})
    if len(found) <= MOST_WAYS:
        return found
    by_network: dict[bytes, Address] = {}
    for each in found:
        by_network.setdefault(each[:3] if len(each) == 4 else each[:8], each)
    return list(by_network.values())[:MOST_WAYS]


def some(names: Iterable[object]) -> str:
    """The first few of many."""
    texts = list(dict.fromkeys(map(str, names)))
    more = len(texts) - _MOST_NAMED
    return f"{', '.join(texts[:_MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"


def backends_in(packets: Iterable[Passing]) -> str:
    """Where packets go, in words."""
    return some(Backend(each.destination, each.port) for each in packets)
