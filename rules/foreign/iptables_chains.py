"""The chains that kube-proxy's iptables mode makes for one Service: lists, entries, endpoints (IPT-4).  Pure.

A chain is read once, whichever frontends lead to it: what it does is a sequence of steps, and perhaps a list to pick
from at its end.  The chains of endpoints and the picks at the end of lists are most of all rules and nearly all alike:
where they are to the letter what kube-proxy of today prints, one pattern reads them as a whole.  Everything else is
read rule by rule, by what the rules ask for, which comes to the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from socket import inet_pton
from typing import NamedTuple

import msgspec

from rules.foreign.gathering import NODE, Condition, Conditions, Picks, parse_port
from rules.foreign.saved import COMMENT, RULE, Chains, Options, SavedRule, rules_of
from rules.forwarding import (
    Backend,
    Detector,
    Endpoint,
    Family,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Prefix,
    Protocol,
    SourcePrefix,
    parse_prefix,
)

MARK_MASQ = "KUBE-MARK-MASQ"
MARK_DROP = "KUBE-MARK-DROP"
"""The kubelet's: older versions send those there whom source ranges don't admit."""
SEP, SVC, SVL, EXT, XLB, FW = (f"KUBE-{name}-" for name in ("SEP", "SVC", "SVL", "EXT", "XLB", "FW"))
OWN = (SEP, SVC, SVL, EXT, XLB, FW)
"""Chains of one Service each; XLB is what EXT was called before 1.24."""
LOOPBACK = parse_prefix("127.0.0.0/8")

_PROTOCOLS = {each.name.lower(): each for each in Protocol}
_RECENT = frozenset({"--mask", "--rsource"})
_TOLERANCE = 2e-9
"""iptables keeps a probability as a 31-bit fraction, and kube-proxy prints ten decimals (IPT-21)."""
_USUAL_ENDPOINT = {
    family: re.compile(
        rf"{RULE} -s ([0-9a-f.:]+)/{family.address_bytes * 8}{COMMENT} -j {MARK_MASQ}"
        rf"{RULE} -p (tcp|udp|sctp){COMMENT} -m \2 -j DNAT --to-destination (?:\1|\[\1\]):([0-9]{{1,5}})"
    )
    for family in Family
}
"""A whole chain without affinity: address, protocol and port (IPT-17)."""
_USUAL_MARK = {
    family: re.compile(
        rf"{RULE}(?:( !)? -s ([0-9a-f.:/]+))? -d ([0-9a-f.:]+)/{family.address_bytes * 8} -p (tcp|udp|sctp){COMMENT}"
        rf" -m \4 --dport ([0-9]{{1,5}}) -j {MARK_MASQ}"
    )
    for family in Family
}
"""All that stands before the picks in the list of a ClusterIP: of which sources, and which frontend (IPT-11)."""
_USUAL_PICK = re.compile(
    rf"{RULE}{COMMENT}(?: -m statistic --mode random --probability ([0-9.]+))? -j ({SEP}[0-9A-Z]+)(?=\n|\Z)"
)
"""A rule that picks an endpoint, of a list without affinity: probability and chain (IPT-20)."""
_BACKEND = re.compile(r"\[?([^\s\]]+)\]?:(\d{1,5})")


class Way(NamedTuple):
    """A rule of an entry that marks a connection, or leads it on."""

    conditions: Conditions
    source: Prefix | None
    """A network that is admitted, in a chain of source ranges."""
    frontend: Frontend | None
    """The one that it is for; None: all that lead here."""
    to: str | None
    """A chain, or None for the mark."""


Pick = tuple[str, str]
"""A rule of a list: its probability as it was printed, empty where it takes all that gets there; and a chain."""


class Entry(msgspec.Struct):
    """What a chain of a Service does."""

    ways: list[Way] = []
    drops: bool = False
    """Whether it ends in a drop."""
    picks: Picks | None = None
    """What it picks from, if it does."""


class ServiceChains:
    """The chains of Services in the nat table, read as they are asked for."""

    def __init__(self, chains: Chains, family: Family, complain: Callable[[str], None]) -> None:
        self._chains = chains
        self._family = family
        self._af = family.af
        self._usual_endpoint = _USUAL_ENDPOINT[family]
        self._complain = complain
        self._usual_mark = _USUAL_MARK[family]
        self._sources: dict[tuple[str, bool], tuple[Conditions, Prefix | None]] = {}
        """Those that were read before: the same ones stand in the chains of all Services."""
        self._imbalances: dict[tuple[str, ...], str] = {}
        """What is wrong with chances: as many picks as they may be, they are the same in all lists of that length."""
        self._entries: dict[str, Entry | None] = {}
        self._served: dict[str, Endpoint | None] = {}
        """Endpoints by their chains."""
        self._recents: dict[str, str] = {}
        """By such a chain, the name of the list of clients that it keeps."""
        self.hairpins: set[Endpoint] = set()
        self.endpoints = 0
        """How many were picked, in all lists."""

    @property
    def unserved(self) -> list[str]:
        """Chains that nobody asked for."""
        others = set(self._chains).difference(self._entries, self._served)
        return sorted(name for name in others if name.startswith(OWN))

    def entry(self, name: str) -> Entry | None:
        """What a chain does; None: it is not there."""
        if name not in self._entries:
            self._entries[name] = self._read(name) if name in self._chains else None
        return self._entries[name]

    def frontend(self, options: Options, *, node_port: bool = False) -> Frontend | None:
        """The frontend that options ask for, which are taken out; None: none that makes sense."""
        text = "" if node_port else options.pop("-d", "")
        try:
            protocol = Protocol[options.pop("-p", "").upper()]
            port = parse_port(options.pop("--dport", ""))
            return Frontend(b"" if node_port else self._host(text), protocol, port)
        except (KeyError, ValueError, OSError):
            return None

    def conditions(self, options: Options) -> tuple[Conditions, Prefix | None]:
        """On whom a rule depends, by options that are taken out; and the network of sources that it admits, if any.

        Raises:
            ValueError: its network is none of this family.
        """
        for name, inside in (("-s", True), ("!-s", False)):
            if (text := options.pop(name, None)) is not None:
                return self._source(text, inside=inside)
        for name, inside in (("-i", True), ("!-i", False)):
            if (text := options.pop(name, None)) is not None:
                return (Condition(_interface(text), inside),), None
        if options.get("--src-type") == "LOCAL":
            del options["--src-type"]
            return (NODE,), None
        return (), None

    def _source(self, text: str, *, inside: bool) -> tuple[Conditions, Prefix | None]:
        known = self._sources.get((text, inside))
        if known is None:
            prefix = parse_prefix(text)
            if len(prefix.address) != self._family.address_bytes:
                raise ValueError(text)
            known = (Condition(SourcePrefix(prefix), inside),), prefix if inside else None
            self._sources[text, inside] = known
        return known

    def _host(self, text: str) -> bytes:
        address, _, length = text.partition("/")
        packed = inet_pton(self._af, address)
        if length and length != str(len(packed) * 8):
            raise ValueError(text)
        return packed

    # --- entries and lists ---------------------------------------------------------------------------------------

    def _read(self, name: str) -> Entry:
        entry = Entry([])
        before, usual = _usual_picks(self._chains.text(name))
        chances: list[Pick] = []
        clients: dict[str, str] = {}
        rules: Sequence[SavedRule] = ()
        if not usual:
            rules = self._chains[name]
        elif (mark := self._read_usual_mark(before)) is not None and name.startswith((SVC, SVL)):
            entry.ways.append(mark)
        else:
            rules = rules_of(before)
        for rule in rules:
            target = rule.target
            if target.startswith(SEP):
                self._read_pick(name, rule, chances, clients)
            elif (chances or clients) and rule.options and target != MARK_DROP:
                self._complain(f"{name} has a rule behind those that pick a backend: {rule.text}")
            elif target == MARK_DROP and len(rule.options) == 1:
                entry.drops = True
            elif rule.options and not self._read_way(name, rule, entry):
                self._complain(f"{name} has a rule that is not understood: {rule.text}")
        chances += usual
        if chances or clients or name.startswith((SVC, SVL)):
            entry.picks = self._picks(name, chances, clients)
        return entry

    def _read_way(self, name: str, rule: SavedRule, entry: Entry) -> bool:
        options = dict(rule.options)
        target = options.pop("-j", "")
        if target != MARK_MASQ and not target.startswith(OWN):
            return False
        frontend = None
        if "-d" in options:
            frontend = self.frontend(options)
            if frontend is None:
                return False
        try:
            conditions, source = self.conditions(options)
        except ValueError:
            return False
        if not name.startswith(FW):
            source = None
        elif source is not None:
            conditions = ()
        if options:
            return False
        entry.ways.append(Way(conditions, source, frontend, None if target == MARK_MASQ else target))
        return True

    def _read_usual_mark(self, text: str) -> Way | None:
        """The mark in a list as it usually is; None: it is not as usual, or it makes no sense."""
        hit = self._usual_mark.fullmatch(text)
        if hit is None:
            return None
        negation, source, address, protocol, port = hit.groups()
        try:
            conditions = () if source is None else self._source(source, inside=negation is None)[0]
            frontend = Frontend(inet_pton(self._af, address), _PROTOCOLS[protocol], parse_port(port))
        except (ValueError, OSError):
            return None
        return Way(conditions, None, frontend, None)

    def _read_pick(self, name: str, rule: SavedRule, chances: list[Pick], clients: dict[str, str]) -> None:
        options = dict(rule.options)
        target = options.pop("-j")
        if "--rcheck" in options:
            asked = {each: options.pop(each, "") for each in ("--rcheck", "--reap", "--seconds", "--name")}
            served = self._endpoint(target)
            recent = self._recents.get(target, "")
            understood = options.keys() <= _RECENT and asked["--seconds"].isdecimal() and len(asked["--seconds"]) < 10
            if understood and served is not None and not chances:
                if asked["--name"] != recent:
                    self._complain(f"{name} asks for clients of {target} where they are not remembered")
                clients[target] = asked["--seconds"]
                return
        elif not options:
            chances.append(("", target))
            return
        elif options.keys() == {"--mode", "--probability"} and options["--mode"] == "random":
            chances.append((options["--probability"] or "?", target))
            return
        self._complain(f"{name} has a rule that is not understood: {rule.text}")

    def _picks(self, name: str, chances: list[Pick], clients: dict[str, str]) -> Picks:
        served = [each for _, target in chances if (each := self._endpoint(target)) is not None]
        endpoints = set(served)
        backends = frozenset(Backend(address, port) for address, _, port in endpoints)
        if fault := self._imbalance(tuple(chance for chance, _ in chances)):
            self._complain(f"{name} does not share its connections evenly: {fault}")
        elif len(endpoints) < len(served):
            self._complain(f"{name} has an endpoint more than once, and so does not share its connections evenly")
        if len(served) < len(chances):
            for _, target in chances:
                if self._endpoint(target) is None:
                    self._complain(f"{name} leads to {target}, which leads nowhere")
        self.endpoints += len(endpoints)
        affinity = self._affinity(name, chances, clients) if clients else 0
        return Picks(backends, affinity, frozenset(protocol for _, protocol, _ in endpoints))

    def _affinity(self, name: str, chances: list[Pick], clients: dict[str, str]) -> int:
        if clients.keys() != {target for _, target in chances}:
            self._complain(f"{name} does not remember the clients of all its endpoints")
        timeouts = set(map(int, clients.values()))
        if len(timeouts) > 1:
            self._complain(f"{name} remembers clients for different times")
        return max(timeouts)

    def _imbalance(self, chances: tuple[str, ...]) -> str:
        fault = self._imbalances.get(chances)
        if fault is None:
            fault = self._imbalances[chances] = _imbalance(chances)
        return fault

    # --- endpoints -----------------------------------------------------------------------------------------------

    def _endpoint(self, name: str) -> Endpoint | None:
        if name not in self._served:
            endpoint = self._read_usual_endpoint(name)
            if endpoint is None and name in self._chains:
                endpoint = self._read_endpoint(name, self._chains[name])
            self._served[name] = endpoint
        return self._served[name]

    def _read_usual_endpoint(self, name: str) -> Endpoint | None:
        """The endpoint of a chain that looks as usual; None: it does not, or it makes no sense."""
        hit = self._usual_endpoint.fullmatch(self._chains.text(name))
        if hit is None:
            return None
        address, protocol, port = hit.groups()
        try:
            endpoint = Endpoint(inet_pton(self._af, address), _PROTOCOLS[protocol], parse_port(port))
        except (ValueError, OSError):
            return None
        self.hairpins.add(endpoint)
        return endpoint

    def _read_endpoint(self, name: str, rules: Sequence[SavedRule]) -> Endpoint | None:
        endpoint: Endpoint | None = None
        marked: set[bytes] = set()
        for rule in rules:
            options = dict(rule.options)
            target = options.pop("-j", "")
            if endpoint is None and target == MARK_MASQ and options.keys() == {"-s"}:
                try:
                    marked.add(self._host(options["-s"]))
                except (ValueError, OSError):
                    self._complain(f"{name} has a rule that is not understood: {rule.text}")
            elif endpoint is None and target == "DNAT" and (found := self._dnat(options)) is not None:
                endpoint, self._recents[name] = found
            elif rule.options:
                self._complain(f"{name} has a rule that is not understood: {rule.text}")
        if endpoint is None:
            return None
        if marked - {endpoint.address}:
            self._complain(f"{name} masquerades the connections of others than its endpoint")
        if endpoint.address in marked:
            self.hairpins.add(endpoint)
        else:
            self._complain(f"{name} does not masquerade the connections of its endpoint to itself")
        return endpoint

    def _dnat(self, options: Options) -> tuple[Endpoint, str] | None:
        """What a rule translates to, and the list in which it remembers clients."""
        hit = _BACKEND.fullmatch(options.pop("--to-destination", ""))
        recent = ""
        if "--set" in options:
            del options["--set"]
            recent = options.pop("--name", "")
            for each in _RECENT:
                options.pop(each, None)
        try:
            protocol = Protocol[options.pop("-p", "").upper()]
            if hit is None or options:
                return None
            return Endpoint(inet_pton(self._af, hit[1]), protocol, parse_port(hit[2])), recent
        except (KeyError, ValueError, OSError):
            return None


def _interface(text: str) -> Detector:
    return InputInterfacePrefix(text[:-1]) if text.endswith("+") else InputInterface(text)


def _usual_picks(text: str) -> tuple[str, list[Pick]]:
    """The picks that a list ends in, and its rules before them; no picks: they are not as usual, or not at its end."""
    first = _USUAL_PICK.search(text)
    if first is None:
        return text, []
    before, found = text[: first.start()], _USUAL_PICK.findall(text, first.start())
    if len(found) != text.count("\n", first.start()):
        return text, []
    return before, found


def _imbalance(chances: Sequence[str]) -> str:
    """What is wrong with the chances of a cascade, of which each is asked once those before it said no (TRF-3)."""
    left = len(chances)
    for number, text in enumerate(chances):
        wanted = 1 / (left - number)
        try:
            chance = float(text) if text else 1.0
        except ValueError:
            return f"{text} is no probability"
        if not text and number < left - 1:
            return f"nothing gets past the pick number {number + 1} of {left}"
        if not abs(chance - wanted) <= _TOLERANCE + wanted * 1e-6:
            return f"pick number {number + 1} of {left} takes {chance:.4f} of what gets there, and not {wanted:.4f}"
    return ""
