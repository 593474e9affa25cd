"""From routes to rules: what stands in the leaves of the trees, and in chains of a frontend's own.  Pure.

A plain frontend is some rules in its leaf: one that marks by its kind and carries the label, and one per backend, each
drawn with the chance that leaves all backends the same (TRF-3).  Anything else has chains of its own, `SLUICE-LB-…` for
a load balancer address:

    SLUICE-LB-X         with source ranges: who is admitted goes on to -P, others fall through, untranslated
    SLUICE-LB-X-P       by policy: mark and pick; or, under policy Local, by source to -A or to the local list
    SLUICE-LB-X-A       policy Local: the list of local pods and of the node (TRF-4)
    SLUICE-LB-X-L000    a part of a long list; of the other one, -A000

Affinity is a list of `recent` per backend and service port, so that the frontends of a service port share it (TRF-24).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    Frontend,
    Kind,
    NodeFacts,
    Refusal,
    Route,
    format_address,
)
from rules.iptables.layout import HAIRPIN, KINDS, MARK, REFUSE, SOURCE_IS_LOCAL, detect, network
from rules.iptables.spelling import CERTAIN, chance_words
from rules.iptables.text import PREFIX, Rule, Rules
from rules.iptables.tree import PROTOCOL_NAMES, short_hash

INLINE = 8
"""Backends that a frontend may have without chains of its own."""
PART = 32
"""Backends that a list may have in one chain; of more, each part has a chain."""

KIND_LETTERS = {Kind.CLUSTER_IP: "CI", Kind.EXTERNAL_IP: "EI", Kind.LOAD_BALANCER: "LB", Kind.NODE_PORT: "NP"}
REFUSAL_LETTERS = "FW"
POLICY, EVERYWHERE, HERE = "-P", "-A", "-L"

UNTRANSLATED = Rule("-j ACCEPT")
"""Ends the way of a connection that no backend is for: it must not come to a node port of the same number."""

_MASKS = {Family.IPV4: "255.255.255.255", Family.IPV6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}


class Placed(NamedTuple):
    """What one frontend has in one table."""

    leaf: Rules = ()
    """Its rules in the leaf of the tree."""
    chains: tuple[tuple[str, Rules], ...] = ()
    """Chains of its own."""


class Chance(NamedTuple):
    """How often a rule matches, as the kernel holds it."""

    value: int

    @classmethod
    def one_of(cls, count: int) -> Chance:
        return cls((2 * CERTAIN + count) // (2 * count))

    def match(self) -> str:
        """The match with a blank behind; nothing when it always matches."""
        if self.value == CERTAIN:
            return ""
        return f"-m statistic --mode random --probability {chance_words(self.value)} "


@lru_cache(maxsize=1024)
def _even_chance(count: int) -> str:
    """The match that chooses the first of so many that are as likely as each other."""
    return Chance.one_of(count).match()


def chain_base(frontend: Frontend, letters: str) -> str:
    """The name of a frontend's own chain."""
    return f"{PREFIX}{letters}-{short_hash(str(frontend), 13)}"


def frontend_match(frontend: Frontend, family: Family) -> str:
    """What goes to a frontend; with a blank behind."""
    name = PROTOCOL_NAMES[frontend.protocol]
    destination = f"-d {format_address(frontend.address)}/{family.address_bytes * 8} " if frontend.address else ""
    return f"{destination}-p {name} -m {name} --dport {frontend.port} "


def nat_weight(route: Route) -> int:
    """How many rules a route has in its leaf of the nat table."""
    if not route.backends:
        return 0
    return 1 if has_chains(route) else 1 + len(route.backends)


def has_chains(route: Route) -> bool:
    """Whether a route's frontend has chains of its own in the nat table."""
    return bool(route.policy_local or route.affinity or route.source_ranges or len(route.backends) > INLINE)


def affinity_key(frontend: Frontend, route: Route) -> str:
    """What the remembered clients of a service port are kept under, for however long that is."""
    return short_hash(f"{route.label or frontend} {frontend.protocol.name}", 16)


def encode_nat(family: Family, facts: NodeFacts, frontend: Frontend, route: Route, key: str | None = None) -> Placed:
    """What a frontend has in the nat table.

    Args:
        family: of the table.
        facts: the node's.
        frontend: where it is.
        route: of the frontend.
        key: what affinity is kept under, if not the frontend's own.

    Raises:
        ValueError: the facts cannot be said.
    """
    if not route.backends:
        return Placed()
    match = frontend_match(frontend, family)
    lists = _Lists(family, frontend, route, key)
    if not has_chains(route):
        kind = Rule(f"{match}-j {KINDS[route.kind]}", route.label)
        return Placed((kind, *lists.rules(match, route.backends, "")))
    base = chain_base(frontend, KIND_LETTERS[route.kind])
    rules: list[Rule] = []
    policy = base
    if route.source_ranges:
        policy = base + POLICY
        admitted = (Rule(f"{network('-s', each)}-g {policy}") for each in route.source_ranges)
        lists.chains.append((base, (*admitted, UNTRANSLATED)))
    own = f"-p {PROTOCOL_NAMES[frontend.protocol]} "
    if route.local_backends is None:
        rules.append(Rule(f"-j {KINDS[route.kind]}"))
        rules += lists.rules(own, route.backends, base + HERE)
    else:
        everywhere = base + EVERYWHERE
        if facts.detector is not None:
            rules.append(Rule(f"{detect(facts.detector)}-g {everywhere}"))
        rules.append(Rule(f"{SOURCE_IS_LOCAL} -j {MARK}"))
        rules.append(Rule(f"{SOURCE_IS_LOCAL} -g {everywhere}"))
        rules += lists.rules(own, route.local_backends, base + HERE) or [UNTRANSLATED]
        lists.chains.append((everywhere, tuple(lists.rules(own, route.backends, everywhere))))
    lists.chains.append((policy, tuple(rules)))
    return Placed((Rule(f"{match}-g {base}", route.label),), tuple(lists.chains))


class _Lists:
    """Writes the lists of one route."""

    def __init__(self, family: Family, frontend: Frontend, route: Route, key: str | None) -> None:
        self.chains: list[tuple[str, Rules]] = []
        self._family = family
        self._timeout = route.affinity
        self._key = key or (affinity_key(frontend, route) if route.affinity else "")

    def rules(self, match: str, backends: frozenset[Backend], parts: str) -> list[Rule]:
        """The rules that pick one of `backends`; a long list goes into chains that are called `parts` and a number."""
        ordered = sorted(backends)
        rules = [Rule(f"{match}{self._remembered(each)}{translate(each)}") for each in ordered if self._timeout]
        size = max(PART, math.isqrt(len(ordered)) + 1)
        if len(ordered) <= size:
            return [*rules, *self._drawn(match, ordered)]
        for number, start in enumerate(range(0, len(ordered), size)):
            part = ordered[start : start + size]
            left = len(ordered) - start
            name = f"{parts}{number:03d}"
            chance = Chance((2 * CERTAIN * len(part) + left) // (2 * left)).match()
            rules.append(Rule(f"{match}{chance}-g {name}"))
            self.chains.append((name, tuple(self._drawn(match, part))))
        return rules

    def _drawn(self, match: str, backends: Sequence[Backend]) -> Iterator[Rule]:
        left = len(backends)
        for index, backend in enumerate(backends):
            remember = self._remember(backend) if self._timeout else ""
            yield Rule(f"{match}{_even_chance(left - index)}{remember}{translate(backend)}")

    def _remembered(self, backend: Backend) -> str:
        return f"-m recent --update --seconds {self._timeout} --reap {self._recent(backend)}"

    def _remember(self, backend: Backend) -> str:
        return f"-m recent --set {self._recent(backend)}"

    def _recent(self, backend: Backend) -> str:
        return f"--name {recent_name(self._key, backend)} --mask {_MASKS[self._family]} --rsource "


def recent_name(key: str, backend: Backend) -> str:
    """The list of clients that a backend is to keep."""
    return f"{PREFIX}{key}-{short_hash(str(backend), 13)}"


def translate(backend: Backend) -> str:
    return f"-j DNAT --to-destination {backend}"


def filter_weight(route: Route) -> int:
    """How many rules a route has in its leaf of the filter table."""
    return 1 if route.refusal is not None or route.source_ranges else 0


def encode_filter(family: Family, frontend: Frontend, route: Route) -> Placed:
    """What a frontend has in the filter table: refusals (SEL-11) and the end of source ranges (TRF-17).

    What is translated never comes there, so that everybody who does is refused or not admitted.
    """
    match = frontend_match(frontend, family)
    if route.refusal is None:
        return Placed((Rule(f"{match}-j DROP", route.label),)) if route.source_ranges else Placed()
    refuse = f"-g {REFUSE[route.refusal, route.kind]}"
    if not route.source_ranges:
        return Placed((Rule(f"{match}{refuse}", route.label),))
    name = chain_base(frontend, REFUSAL_LETTERS)
    admitted = tuple(Rule(f"{network('-s', each)}{refuse}") for each in route.source_ranges)
    return Placed((Rule(f"{match}-g {name}", route.label),), ((name, (*admitted, Rule("-j DROP"))),))


def hairpin_rule(endpoint: Endpoint, family: Family) -> Rule:
    """What masquerades an endpoint that reaches itself (TRF-7)."""
    own = f"{format_address(endpoint.address)}/{family.address_bytes * 8}"
    name = PROTOCOL_NAMES[endpoint.protocol]
    return Rule(f"-s {own} -d {own} -p {name} -m {name} --dport {endpoint.port} -j {HAIRPIN}")


def is_refusal(chain: str) -> tuple[Refusal, Kind] | None:
    """What a chain that refuses refuses, by its name."""
    return _REFUSALS.get(chain)


_REFUSALS = {chain: pair for pair, chain in REFUSE.items()}
