"""From what iptables-save printed back to a table.  Pure.

The rules of leaves and of frontends' own chains are read one by one, wherever they stand; then the chains that the
found table makes are compared with those that are there.  What differs is damage: a leaf in the wrong place, a chance
that is not the one that its list needs, a rule more or less.  So nothing is overlooked, and what is said about packets
rests on rules alone: without comments the same routes are read, unlabelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from socket import inet_pton
from typing import NamedTuple

import msgspec

from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    Prefix,
    Protocol,
    Refusal,
    Route,
    check_route,
    merge_prefixes,
    parse_prefix,
)
from rules.iptables import layout, rulesets
from rules.iptables.encode import EVERYWHERE, HERE, KIND_LETTERS, POLICY, REFUSAL_LETTERS, chain_base, is_refusal
from rules.iptables.layout import JUMPS, KINDS, Options
from rules.iptables.model import Model
from rules.iptables.text import FILTER, NAT, PREFIX, Rule, Rules, Ruleset, Saved

_FRONTEND = (
    r"(?:-d (?P<address>\S+)/(?:32|128) )?-p (?P<protocol>tcp|udp|sctp) -m (?P=protocol) --dport (?P<port>\d{1,5}) "
)
_LEAF = re.compile(rf"{_FRONTEND}(?P<rest>.*)")
_SELF = re.compile(rf"-s (?P<source>\S+)/(?:32|128) {_FRONTEND}-j {layout.HAIRPIN}")
_HEALTH_CHECK = re.compile(r"-p tcp -m tcp --dport (\d{1,5}) -j ACCEPT")
_DNAT = re.compile(r".*-j DNAT --to-destination \[?([^\s\]]+)\]?:(\d{1,5})")
_RECENT = re.compile(rf".*-m recent --update --seconds (\d{{1,10}}) --reap --name {PREFIX}([A-Z2-7]+)-")
_GOTO = re.compile(r"(?:.* )?-g (\S+)")
_SOURCE = re.compile(r"(?:-s (\S+) )?-g (\S+)")
_KIND_OF = {chain: kind for kind, chain in KINDS.items()}
_KIND_OF_LETTERS = {letters: kind for kind, letters in KIND_LETTERS.items()}


class Reading(NamedTuple):
    """What a kernel holds."""

    table: ForwardingTable
    options: Options


class _Found:
    """What the rules say about one frontend, as far as it was found."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.label = ""
        self.backends: set[Backend] = set()
        self.local: set[Backend] | None = None
        self.refusal: Refusal | None = None
        self.affinity = 0
        self.key = ""
        self.ranges: list[Prefix] = []

    def route(self) -> Route | None:
        if self.kind is None:
            return None
        return Route(
            kind=self.kind,
            backends=frozenset(self.backends),
            local_backends=None if self.local is None else frozenset(self.local),
            refusal=self.refusal,
            affinity=self.affinity,
            source_ranges=merge_prefixes(self.ranges),
            label=self.label,
        )


def decode(saved: Saved, family: Family) -> Reading | None:
    """The table that rules make; None: nothing of ours is there."""
    if not saved:
        return None
    found = _Decoder(saved.chains, family)
    facts = msgspec.structs.replace(
        layout.read_facts(saved.chains, family), health_check_ports=frozenset(found.health_check_ports())
    )
    options = layout.read_options(saved.chains)
    damage: set[str] = set()
    routes: dict[Frontend, Route] = {}
    keys: dict[Frontend, str] = {}
    for frontend, parts in found.frontends().items():
        route = parts.route()
        fault = "nothing says what kind it is" if route is None else check_route(family, frontend, route)
        if route is None or fault:
            damage.add(f"the rules for {frontend} make no sense: {fault}")
            continue
        routes[frontend] = route
        if parts.key and not route.label:
            keys[frontend] = parts.key
    table = ForwardingTable(family=family, node=facts, routes=routes, hairpins=frozenset(found.hairpins()))
    try:
        expected = Model(table, options, keys).chains()
    except ValueError as error:
        damage.add(f"the static rules make no sense: {error}")
    else:
        damage.update(rulesets.damage(saved.chains, expected))
    damage.update(rulesets.jump_damage(saved.jumps, JUMPS))
    return Reading(
        ForwardingTable(family=family, node=facts, routes=routes, hairpins=table.hairpins, damage=frozenset(damage)),
        options,
    )


class _Decoder:
    """Reads the rules of Services, wherever they stand."""

    def __init__(self, chains: Ruleset, family: Family) -> None:
        self._chains = chains
        self._family = family
        self._frontends: dict[Frontend, _Found] = {}

    def frontends(self) -> Mapping[Frontend, _Found]:
        for frontend, rest, rule in self._leaves(NAT, layout.BY_ADDRESS, layout.BY_NODE_PORT):
            self._read_nat(frontend, rest, rule)
        for frontend, rest, rule in self._leaves(FILTER, layout.REFUSALS, layout.NODE_PORT_REFUSALS):
            self._read_filter(frontend, rest, rule)
        return self._frontends

    def hairpins(self) -> Iterator[Endpoint]:
        for rule in self._tree_rules(NAT, layout.HAIRPINS):
            hit = _SELF.fullmatch(rule.text)
            if hit is not None and hit["source"] == hit["address"] and (frontend := self._frontend(hit)) is not None:
                yield Endpoint(*frontend)

    def health_check_ports(self) -> Iterator[int]:
        for rule in self._tree_rules(FILTER, layout.HEALTH_CHECKS):
            hit = _HEALTH_CHECK.fullmatch(rule.text)
            if hit is not None and 0 < int(hit[1]) < 65536:
                yield int(hit[1])

    def _tree_rules(self, table: str, root: str) -> Iterator[Rule]:
        for name, rules in self._chains[table].items():
            if name == root or name.startswith(f"{root}-"):
                yield from rules

    def _leaves(self, table: str, by_address: str, by_port: str) -> Iterator[tuple[Frontend, str, Rule]]:
        for root in (by_address, by_port):
            ways = f"-g {root}-"
            for rule in self._tree_rules(table, root):
                hit = _LEAF.fullmatch(rule.text)
                if hit is None or hit["rest"].startswith(ways):
                    continue
                frontend = self._frontend(hit)
                if frontend is not None and frontend.is_node_port == (root == by_port):
                    yield frontend, hit["rest"], rule

    def _frontend(self, hit: re.Match[str]) -> Frontend | None:
        address = b""
        if hit["address"] is not None:
            try:
                address = inet_pton(self._family.af, hit["address"])
            except (OSError, ValueError):
                return None
        port = int(hit["port"])
        return Frontend(address, Protocol[hit["protocol"].upper()], port) if 0 < port < 65536 else None

    def _of(self, frontend: Frontend, rule: Rule) -> _Found:
        found = self._frontends.get(frontend)
        if found is None:
            found = self._frontends[frontend] = _Found()
        if rule.comment and not found.label:
            found.label = rule.comment
        return found

    # --- the nat table -------------------------------------------------------------------------------------------

    def _read_nat(self, frontend: Frontend, rest: str, rule: Rule) -> None:
        found = self._of(frontend, rule)
        backend = self._backend(rest)
        if backend is not None:
            found.backends.add(backend)
        elif rest[3:] in _KIND_OF and rest.startswith("-j "):
            found.kind = _KIND_OF[rest[3:]]
        elif rest.startswith(f"-g {PREFIX}"):
            kind = _KIND_OF_LETTERS.get(rest[len(PREFIX) + 3 :].partition("-")[0])
            if kind is not None and rest[3:] == chain_base(frontend, KIND_LETTERS[kind]):
                found.kind = kind
                self._read_own(rest[3:], found)

    def _read_own(self, base: str, found: _Found) -> None:
        policy = base
        chain = self._rules(NAT, base)
        if base + POLICY in self._chains[NAT]:
            policy = base + POLICY
            found.ranges += self._sources(chain, policy)
            chain = self._rules(NAT, policy)
        here = set(self._list(chain, base + HERE, found))
        everywhere = base + EVERYWHERE
        if everywhere in self._chains[NAT]:
            found.local = here
            found.backends |= set(self._list(self._rules(NAT, everywhere), everywhere, found))
        else:
            found.backends |= here

    def _list(self, rules: Rules, parts: str, found: _Found) -> Iterator[Backend]:
        """The backends of a list; `parts` is how the chains of its parts are called, up to a number."""
        for rule in rules:
            if hit := _RECENT.match(rule.text):
                found.affinity, found.key = int(hit[1]), hit[2]
                continue
            backend = self._backend(rule.text)
            if backend is not None:
                yield backend
            elif (hit := _GOTO.fullmatch(rule.text)) and hit[1].removeprefix(parts).isdecimal():
                yield from self._list(self._rules(NAT, hit[1]), "-", found)

    def _backend(self, text: str) -> Backend | None:
        hit = _DNAT.fullmatch(text)
        if hit is None:
            return None
        try:
            address = inet_pton(self._family.af, hit[1])
        except (OSError, ValueError):
            return None
        port = int(hit[2])
        return Backend(address, port) if 0 < port < 65536 else None

    def _rules(self, table: str, chain: str) -> Rules:
        return self._chains[table].get(chain, ())

    def _sources(self, rules: Rules, target: str) -> Iterator[Prefix]:
        """The networks that rules lead from to a chain."""
        for rule in rules:
            hit = _SOURCE.fullmatch(rule.text)
            if hit is None or hit[2] != target:
                continue
            try:
                prefix = Prefix(bytes(self._family.address_bytes), 0) if hit[1] is None else parse_prefix(hit[1])
            except ValueError:
                continue
            if len(prefix.address) == self._family.address_bytes:
                yield prefix

    # --- the filter table ----------------------------------------------------------------------------------------

    def _read_filter(self, frontend: Frontend, rest: str, rule: Rule) -> None:
        found = self._of(frontend, rule)
        if rest == f"-g {chain_base(frontend, REFUSAL_LETTERS)}":
            for own in self._rules(FILTER, rest[3:]):
                hit = _SOURCE.fullmatch(own.text)
                if hit is not None and self._refuse(found, hit[2]) and not found.backends:
                    found.ranges += self._sources((own,), hit[2])
        elif rest.startswith("-g "):
            self._refuse(found, rest[3:])

    @staticmethod
    def _refuse(found: _Found, chain: str) -> bool:
        refused = is_refusal(chain)
        if refused is None:
            return False
        found.refusal, kind = refused
        found.kind = found.kind or kind
        return True
