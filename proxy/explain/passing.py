"""What rules of others do with packets that go through Services.  Pure.

A rule is held as the conditions that can be judged from here: addresses, ports, interfaces, the state of a connection.
Anything else (marks, sets, limits) is a condition that only a packet shows.  So there are three answers to whether a
rule meets a packet: yes, no, and None for `perhaps`; and a chain that drops a packet does so surely or perhaps.

The packet is the first of a connection, or an answer.  Where the first one is judged behind destination NAT, its
destination is the backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from rules.forwarding import Address, Family, Prefix, Protocol, family_of, parse_prefix

What = Literal[
    "family", "source", "destination", "protocol", "source port", "port", "in", "out", "state", "translated", "other"
]
Action = Literal["accept", "drop", "reject", "jump", "goto", "return", "next", "perhaps"]
"""`next`: the rule ends nothing.  `perhaps`: what it does depends on more than can be seen here."""

Stage = Literal["untracked", "tracked", "translated"]
"""How far a packet is when a chain meets it: before connection tracking, behind it, behind destination NAT."""

_DEEP, _LONG = 32, 20_000
"""Chains within chains, and rules for one packet, behind which nothing is surely so."""
_MOST_NAMED = 4
_OF_PROXIES = ("SLUICE-", "KUBE-")
_NOT_OF_PROXIES = ("KUBE-ROUTER-", "KUBE-POD-FW-", "KUBE-NWPLCY-")
"""kube-router's network policies, which k3s has as well."""
_FORWARD = "-FORWARD"
OUR_FORWARD = "SLUICE-FORWARD"
"""The chain by which mode iptables accepts what it masquerades, whatever the policy of FORWARD."""


class Condition(msgspec.Struct, frozen=True, gc=False):
    """What a rule asks of a packet; one of the values must be met."""

    what: What
    values: tuple[str, ...] = ()
    """Prefixes, `80` or `80-90`, `tcp`, `eth0` or `veth*`, states; for `other` the name of what is asked."""
    inverse: bool = False

    def __str__(self) -> str:
        more = len(self.values) - _MOST_NAMED
        values = [*self.values[:_MOST_NAMED], *([f"{more} more"] if more > 0 else [])]
        return f"{'not ' if self.inverse else ''}{self.what} {' or '.join(values)}".rstrip()


class ForeignRule(msgspec.Struct, frozen=True, gc=False):
    """A rule of somebody else."""

    number: int
    """In nftables its handle, in legacy iptables its place in the chain, from 1."""
    action: Action
    conditions: tuple[Condition, ...] = ()
    target: str = ""
    """The chain to jump or go to."""

    @property
    def understood(self) -> bool:
        """Whether nothing but a packet's addresses, ports and interfaces matter."""
        return all(each.what != "other" for each in self.conditions)

    @property
    def words(self) -> str:
        """Its conditions."""
        return ", ".join(map(str, self.conditions)) or "whatever comes"


class Passing(NamedTuple):
    """A packet on its way to a backend, or to a client."""

    destination: Address
    protocol: Protocol
    port: int
    source: Address | None = None
    """None: not known; so for interfaces that are empty."""
    incoming: str = ""
    outgoing: str = ""
    masqueraded: bool | None = None
    """Whether it bears the mark for that; None: not known, or it depends on the client."""
    stage: Stage = "translated"
    answers: bool = False
    """Whether it is an answer: the port is that which it comes from then, and the connection is established."""


class Hit(NamedTuple):
    """Something that drops a packet."""

    chain: str
    rule: ForeignRule | None
    """None: the policy."""
    sure: bool


Chains = Mapping[str, Sequence[ForeignRule]]
"""The chains of one table."""


def conditions_of(base: str, chains: Chains) -> frozenset[Condition]:
    """Whatever rules ask that can be reached from a base chain: packets that meet them alike fare alike."""
    return frozenset(condition for rule in _reached(base, chains) for condition in rule.conditions)


def may_drop(base: str, chains: Chains) -> bool:
    """Whether any rule that can be reached drops at all."""
    return any(rule.action in ("drop", "reject") for rule in _reached(base, chains))


def dropped_by(base: str, chains: Chains, packet: Passing, *, policy_drops: bool) -> tuple[Hit, ...]:
    """What drops a packet in a base chain: one thing surely, or several perhaps, in the order that it meets them."""
    walk = _Walk(chains, packet)
    ended = walk.through(base, sure=True, depth=0)
    if policy_drops and not ended:
        walk.hits.append(Hit(base, None, walk.sure))
    return tuple(walk.hits)


class _Walk:
    """One packet's way through the chains of a table."""

    def __init__(self, chains: Chains, packet: Passing) -> None:
        self._chains = chains
        self._packet = packet
        self._met = 0
        self.hits: list[Hit] = []
        self.sure = True
        """Whether nothing that was met may have ended the way already."""

    def through(self, chain: str, *, sure: bool, depth: int) -> bool:
        """Whether the way surely ends in a chain, or below it; `sure`: whether the packet surely comes here."""
        if _is_of_a_proxy(chain):
            # A proxy's chain accepts answers, and of first packets those alone that it masquerades (IPT-15); what its
            # other chains drop, the tables of Services say.
            accepts = self._packet.answers or self._packet.masqueraded
            if not chain.endswith(_FORWARD) or accepts is False:
                return False
            ends = sure and accepts is True
            self.sure = self.sure and ends
            return ends
        for rule in self._chains.get(chain, ()):
            self._met += 1
            if depth > _DEEP or self._met > _LONG:
                self.sure = False
                return False
            met = _all(holds(each, self._packet) for each in rule.conditions)
            if met is False:
                continue
            if self._ends(chain, rule, surely=met is True and sure, depth=depth):
                return True
            if rule.action in ("return", "goto"):
                if met is True:
                    return False
                sure = False  # whether what follows is met at all
        return False

    def _ends(self, chain: str, rule: ForeignRule, *, surely: bool, depth: int) -> bool:
        """Whether the way surely ends with a rule; `surely`: whether the packet surely meets it."""
        match rule.action:
            case "drop" | "reject":
                self.hits.append(Hit(chain, rule, surely and self.sure))
            case "jump" | "goto":
                return self.through(rule.target, sure=surely, depth=depth + 1)
            case "return" | "next":
                return False
        ends = surely and rule.action != "perhaps"
        self.sure = self.sure and ends
        return ends


def holds(condition: Condition, packet: Passing) -> bool | None:
    """Whether a packet meets a condition; None: that cannot be told."""
    met = _meets(condition, packet)
    return met if met is None else met != condition.inverse


def _meets(condition: Condition, packet: Passing) -> bool | None:  # noqa: PLR0911  # a line for each of them
    values = condition.values
    match condition.what:
        case "family":
            return family_of(packet.destination).label in values
        case "destination":
            return _within(packet.destination, values)
        case "source":
            return None if packet.source is None else _within(packet.source, values)
        case "protocol":
            return packet.protocol.name.lower() in values
        case "port" | "source port":
            known = packet.answers == (condition.what == "source port")
            return any(_covers(each, packet.port) for each in values) if known else None
        case "in" | "out":
            name = packet.incoming if condition.what == "in" else packet.outgoing
            return None if not name else any(fnmatchcase(name, each) for each in values)
        case "state":
            return None if packet.stage == "untracked" else ("established" if packet.answers else "new") in values
        case "translated":
            return packet.stage == "translated"
        case _:
            return None


def _within(address: Address, networks: Iterable[str]) -> bool:
    return any(len(each.address) == len(address) and address in each for each in map(_prefix, networks))


@lru_cache(maxsize=4096)
def _prefix(text: str) -> Prefix:
    return parse_prefix(text)


def _covers(ports: str, port: int) -> bool:
    first, _, last = ports.partition("-")
    return int(first) <= port <= int(last or first)


def _all(answers: Iterable[bool | None]) -> bool | None:
    perhaps = False
    for each in answers:
        if each is False:
            return False
        perhaps = perhaps or each is None
    return None if perhaps else True


def _is_of_a_proxy(chain: str) -> bool:
    return chain.startswith(_OF_PROXIES) and not chain.startswith(_NOT_OF_PROXIES)


def _reached(base: str, chains: Chains) -> Iterator[ForeignRule]:
    seen, waiting = {base}, [base]
    while waiting:
        for rule in chains.get(waiting.pop(), ()):
            yield rule
            if rule.target and rule.target not in seen and not _is_of_a_proxy(rule.target):
                seen.add(rule.target)
                waiting.append(rule.target)


FAMILY_NAMES = {2: Family.IPV4.label, 10: Family.IPV6.label}
"""By the kernel's numbers."""
