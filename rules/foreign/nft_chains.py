"""The chains that kube-proxy's nftables mode makes for one Service: lists, entries, endpoints (NFT-7 to NFT-11).  Pure.

A chain is read once, whichever elements lead to it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from socket import inet_pton
from typing import NamedTuple

import msgspec

from rules.foreign.gathering import NODE, Condition, Conditions, Picks, parse_port
from rules.foreign.nft_model import NftTable
from rules.forwarding import (
    Backend,
    Detector,
    Endpoint,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Prefix,
    Protocol,
    SourcePrefix,
    parse_prefix,
)

SERVICE, LOCAL, EXTERNAL, FIREWALL, ENDPOINT = "service-", "local-", "external-", "firewall-", "endpoint-"
OWN = (SERVICE, LOCAL, FIREWALL, ENDPOINT)
"""Chains of one Service that nothing but other rules needs; `external-` may stand there unused (SVC-8)."""
MARK_CHAIN = "mark-for-masquerade"
"""What older versions jump to, where newer ones set the mark themselves."""

_SOURCE = r"(?:(?:ip6? saddr|iifname) (?:!= )?\S+)"
_MARK = rf"(?:meta mark set meta mark \| (?P<mark>0x[0-9a-f]{{1,8}})|jump {MARK_CHAIN})"
_STEP = re.compile(rf"(?:(?P<source>{_SOURCE}|fib saddr type local) )?(?:{_MARK}|goto (?P<to>\S+))")
_HEAD = re.compile(
    r"ip6? daddr (?P<address>\S+) (?P<protocol>tcp|udp|sctp) dport (?P<port>\d{1,5}) "
    rf"(?:(?P<source>{_SOURCE}) )?{_MARK}"
)
_STICKY = re.compile(r"ip6? saddr @(\S+) goto (\S+)")
_MAP = re.compile(
    r"meta l4proto (tcp|udp|sctp) dnat(?: ip6?)?(?: addr \. port)? to numgen random mod (\d{1,6}) map \{ (.*) \}"
)
_VMAP = re.compile(r"numgen random mod (\d{1,6}) vmap \{ (.*) \}")
_DNAT = re.compile(r"meta l4proto (tcp|udp|sctp) dnat(?: ip6?)? to \[?([^\s\]]+?)\]?:(\d{1,5})")
_UPDATE = re.compile(r"update @(\S+) \{ ip6? saddr \}")
_SELF = re.compile(rf"ip6? saddr (\S+) jump {MARK_CHAIN}")
_RANGES = re.compile(r"ip6? saddr != (?:\{ (.*) \}|(\S+)) drop")


class Way(NamedTuple):
    """A rule of an entry that marks a connection, or leads it on."""

    conditions: Conditions
    mark: int
    """The mark that it sets, if it says so itself."""
    to: str | None
    """A list's chain, or None for the mark."""


class Head(NamedTuple):
    """A rule at the head of a list, which marks the connections of one ClusterIP."""

    frontend: Frontend
    conditions: Conditions


class List(msgspec.Struct):
    """A chain that picks a backend."""

    heads: list[Head]
    picks: Picks


class _Served(NamedTuple):
    endpoint: Endpoint
    affinity: str
    """The set that remembers its clients; empty without affinity."""


def source_condition(text: str, address_bytes: int) -> Condition:
    """On which sources `ip saddr != 10.244.0.0/16`, `iifname cali*` and the like depend (TRF-10).

    Raises:
        ValueError: the network is none, or of another family.
    """
    if text == "fib saddr type local":
        return NODE
    what, _, value = text.removeprefix("ip6 ").removeprefix("ip ").partition(" ")
    inside = not value.startswith("!= ")
    value = value.removeprefix("!= ")
    if what == "iifname":
        prefix: Detector = InputInterface(value)
        if value.endswith("*"):
            prefix = InputInterfacePrefix(value[:-1].removesuffix("\\"))
        return Condition(prefix, inside)
    network = parse_prefix(value)
    if len(network.address) != address_bytes:
        raise ValueError(text)
    return Condition(SourcePrefix(network), inside)


def prefixes_of(texts: Iterable[str], address_bytes: int) -> tuple[Prefix, ...]:
    """Networks from single addresses, prefixes and `FROM-TO` as nft prints them.

    Raises:
        ValueError: one is none of these, or of another family.
    """
    found: list[Prefix] = []
    for text in texts:
        first, dash, last = text.strip().partition("-")
        if dash:
            ends = ipaddress.ip_address(first), ipaddress.ip_address(last)
            networks = ipaddress.summarize_address_range(*ends)
            try:
                found += (Prefix(each.network_address.packed, each.prefixlen) for each in networks)
            except TypeError:
                raise ValueError(text) from None
        else:
            found.append(parse_prefix(first))
    if any(len(each.address) != address_bytes for each in found):
        raise ValueError("a network of the other family")
    return tuple(found)


class ServiceChains:
    """The chains of Services, read as they are asked for."""

    def __init__(self, table: NftTable, complain: Callable[[str], None]) -> None:
        self._table = table
        self._family = table.family
        self._complain = complain
        self._lists: dict[str, List | None] = {}
        self._entries: dict[str, list[Way] | None] = {}
        self._served: dict[str, _Served | None] = {}
        self._firewalls: dict[str, tuple[Prefix, ...] | None] = {}
        self.hairpins: set[Endpoint] = set()
        """Those that older versions mark in endpoints' own chains."""

    @property
    def unserved(self) -> list[str]:
        """Chains with rules to which nobody was led."""
        asked = self._lists.keys() | self._served.keys() | self._firewalls.keys()
        return sorted(
            name
            for name, chain in self._table.chains.items()
            if name.startswith(OWN) and "/" in name and chain.rules and name not in asked
        )

    def ways(self, name: str) -> list[Way] | None:
        """What an entry does; None: it is not there."""
        if name not in self._entries:
            chain = self._table.chains.get(name)
            self._entries[name] = (
                None if chain is None else [way for rule in chain.rules if (way := self._way(name, rule)) is not None]
            )
        return self._entries[name]

    def ranges(self, name: str) -> tuple[Prefix, ...] | None:
        """The sources that a firewall's chain lets through; None: that cannot be told."""
        if name not in self._firewalls:
            self._firewalls[name] = self._read_ranges(name)
        return self._firewalls[name]

    def picks_of(self, name: str) -> List | None:
        """What a list picks from; None: it is not there."""
        if name not in self._lists:
            chain = self._table.chains.get(name)
            self._lists[name] = None if chain is None else self._read_list(name, chain.rules)
        return self._lists[name]

    def _strange(self, name: str, rule: str) -> None:
        self._complain(f"chain {name} has a rule that is not understood: {rule}")

    def _way(self, name: str, rule: str) -> Way | None:
        hit = _STEP.fullmatch(rule)
        conditions = None if hit is None else self._conditions(hit["source"])
        if hit is None or conditions is None:
            self._strange(name, rule)
            return None
        return Way(conditions, int(hit["mark"] or "0", 16), hit["to"])

    def _conditions(self, source: str | None) -> Conditions | None:
        """Of a rule with this match on the source; None: it is not understood."""
        try:
            return (source_condition(source, self._family.address_bytes),) if source else ()
        except ValueError:
            return None

    def _read_ranges(self, name: str) -> tuple[Prefix, ...] | None:
        chain = self._table.chains.get(name)
        hit = _RANGES.fullmatch(chain.rules[0]) if chain is not None and len(chain.rules) == 1 else None
        if hit is not None:
            try:
                return prefixes_of((hit[1] or hit[2]).split(","), self._family.address_bytes)
            except ValueError:
                pass
        self._complain(f"chain {name} does not say whom it lets through")
        return None

    # --- lists ---------------------------------------------------------------------------------------------------

    def _read_list(self, name: str, rules: list[str]) -> List:
        heads: list[Head] = []
        endpoints: list[Endpoint] = []
        sticky: dict[str, str] = {}
        picked: list[str] = []
        ended = False
        for rule in rules:
            if ended:
                self._strange(name, rule)
            elif (hit := _STICKY.fullmatch(rule)) is not None:
                sticky[hit[2]] = hit[1]
            elif (hit := _MAP.fullmatch(rule)) is not None:
                endpoints = self._read_map(name, Protocol[hit[1].upper()], int(hit[2]), hit[3])
                ended = True
            elif (hit := _VMAP.fullmatch(rule)) is not None:
                picked = self._read_vmap(name, int(hit[1]), hit[2])
                endpoints = [served.endpoint for each in picked if (served := self._endpoint(each)) is not None]
                ended = True
            elif (head := self._head(rule)) is not None:
                heads.append(head)
            else:
                self._strange(name, rule)
        if not ended:
            self._complain(f"chain {name} picks no backend")
        if len(set(endpoints)) < len(endpoints):
            self._complain(f"chain {name} has an endpoint more than once, and so does not share its connections evenly")
        backends = frozenset(Backend(each.address, each.port) for each in endpoints)
        affinity = self._affinity(name, sticky, picked) if sticky else 0
        return List(heads, Picks(backends, affinity, frozenset(each.protocol for each in endpoints)))

    def _head(self, rule: str) -> Head | None:
        hit = _HEAD.fullmatch(rule)
        if hit is None:
            return None
        conditions = self._conditions(hit["source"])
        endpoint = self._endpoint_of(hit["address"], Protocol[hit["protocol"].upper()], hit["port"])
        return None if conditions is None or endpoint is None else Head(Frontend(*endpoint), conditions)

    def _read_map(self, name: str, protocol: Protocol, count: int, text: str) -> list[Endpoint]:
        endpoints = []
        keys = []
        for pair in text.split(", "):
            key, _, value = pair.partition(" : ")
            host, _, port = value.partition(" . ")
            keys.append(key)
            if (endpoint := self._endpoint_of(host, protocol, port)) is not None:
                endpoints.append(endpoint)
            else:
                self._complain(f"chain {name} has a backend that is not understood: {pair}")
        self._check_balance(name, count, keys)
        return endpoints

    def _read_vmap(self, name: str, count: int, text: str) -> list[str]:
        pairs = [pair.partition(" : goto ") for pair in text.split(", ")]
        self._check_balance(name, count, [key for key, _, _ in pairs])
        for _, _, target in pairs:
            if self._endpoint(target) is None:
                self._complain(f"chain {name} leads to {target}, which leads nowhere")
        return [target for _, _, target in pairs]

    def _check_balance(self, name: str, count: int, keys: list[str]) -> None:
        """Whether every number that is drawn has a backend of its own (TRF-3)."""
        if sorted(keys) != sorted(map(str, range(min(count, len(keys) + 1)))):
            self._complain(
                f"chain {name} does not share its connections evenly: it draws one of {count}, "
                f"and has backends for {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            )

    def _affinity(self, name: str, sticky: dict[str, str], picked: list[str]) -> int:
        if sticky.keys() != set(picked):
            self._complain(f"chain {name} does not remember the clients of all its endpoints")
        timeouts = set()
        for target, remembered in sticky.items():
            served = self._endpoint(target)
            if served is not None and served.affinity != remembered:
                self._complain(f"chain {name} asks for clients of {target} where they are not remembered")
            found = self._table.sets.get(remembered)
            timeouts.add(found.timeout if found is not None else 0)
        if len(timeouts) > 1 or 0 in timeouts:
            self._complain(f"chain {name} remembers clients for different times, or for ever")
        return max(timeouts)

    # --- endpoints -----------------------------------------------------------------------------------------------

    def _endpoint(self, name: str) -> _Served | None:
        if name not in self._served:
            chain = self._table.chains.get(name)
            self._served[name] = None if chain is None else self._read_endpoint(name, chain.rules)
        return self._served[name]

    def _read_endpoint(self, name: str, rules: list[str]) -> _Served | None:
        endpoint: Endpoint | None = None
        affinity = marked = ""
        for rule in rules:
            if endpoint is not None:
                self._strange(name, rule)
            elif (hit := _UPDATE.fullmatch(rule)) is not None:
                affinity = hit[1]
            elif (hit := _SELF.fullmatch(rule)) is not None:
                marked = hit[1]
            elif (hit := _DNAT.fullmatch(rule)) is not None:
                endpoint = self._endpoint_of(hit[2], Protocol[hit[1].upper()], hit[3])
            else:
                self._strange(name, rule)
        if endpoint is None:
            return None
        if marked:
            if self._endpoint_of(marked, endpoint.protocol, str(endpoint.port)) == endpoint:
                self.hairpins.add(endpoint)
            else:
                self._complain(f"chain {name} masquerades the connections of others than its endpoint")
        return _Served(endpoint, affinity)

    def _endpoint_of(self, host: str, protocol: Protocol, port: str) -> Endpoint | None:
        try:
            return Endpoint(inet_pton(self._family.af, host), protocol, parse_port(port))
        except (OSError, ValueError):
            return None
