"""What iptables-save and ip6tables-save print, as far as kube-proxy's chains go.

A file may hold both families, counters (`-c`), and tables of others; it may be cut off.  A rule is held as its options,
so that neither the order in which a version prints them nor implied matches (`-m tcp`) matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from rules.forwarding import Family
from rules.iptables.spelling import respell
from rules.iptables.text import FILTER, NAT, TABLES, split_comment

PREFIX = "KUBE-"

_DECLARED = f":{PREFIX}"
_COUNTERS = re.compile(r"\[\d+:\d+\] ")
_SIX = re.compile(r" (?:-[sd] [0-9a-f]*:[0-9a-f:.]*/|--to-destination \[|--reject-with icmp6-)")
_FOUR = re.compile(r" (?:-[sd] \d+\.\d+\.\d+\.\d+|--to-destination \d+\.|--reject-with icmp-)")

_UNUSUAL = re.compile(
    r"-p \d|/\d+\.|[mM][aA][rR][kK] -|-m (?:conntrack|state |addrtype|recent)"
    r"|--(?:source|src|sport|state|dest|dst |in-|out-|proto|match|jump|goto)"
)
"""What versions of iptables-save spell in several ways; in the many rules of Services there is nothing of it."""

_USUAL = re.compile(
    r"-A (?P<name>KUBE-\S+)(?: (?P<not>! )?-s (?P<source>[0-9a-f:.]+(?:/\d{1,3})?))?"
    r"(?: -d (?P<to>[0-9a-f:.]+(?:/\d{1,3})?))?(?: -p (?P<protocol>[a-z]+))?"
    r' -m comment --comment "(?P<comment>[^"\\]*)"(?P<rest>(?: -m (?:tcp|udp|sctp))?(?: --dport (?P<port>\d+))?'
    r"(?: -m statistic --mode random --probability (?P<chance>[\d.]+))?"
    r" -j (?P<target>[A-Z][-0-9A-Z]*)(?: --to-destination (?P<backend>[][0-9a-f:.]+))?)"
)
"""Nearly all rules of Services, as versions of today print them; ten thousand Services have 140,000 of these."""

Options = dict[str, str]
"""What a rule asks for and does: options with their values, `!` before one that is negated; `-m` are left out."""


class SavedRule(NamedTuple):
    """One rule."""

    options: Options
    comment: str
    text: str
    """As it was printed, without the comment."""

    @property
    def target(self) -> str:
        return self.options.get("-j", "")


Chains = dict[str, list[SavedRule]]


class SavedFamily(msgspec.Struct):
    """The tables of one family."""

    family: Family
    chains: dict[str, Chains]
    """By table and name: chains whose names begin with `KUBE-`, with all rules, and of others those that lead there."""
    faults: list[str] = []


class _Block(NamedTuple):
    """A table as it stands in the text."""

    table: str
    family: Family | None
    """By its heading, else by the addresses in it."""
    chains: Chains
    complete: bool


def looks_saved(text: str) -> bool:
    """Whether a text is what iptables-save prints."""
    # Manifests may be long, and a search for a line's beginning stops at every letter.
    if not text.startswith("*") and "\n*" not in text:
        return False
    return re.search(r"^\*(?:nat|filter|mangle|raw|security)\s*$", text, re.MULTILINE) is not None


def split(text: str) -> list[SavedFamily]:
    """The tables in a text, by family; of a table that stands there twice the first."""
    found: dict[Family, SavedFamily] = {}
    last: Family | None = None
    blocks = list(_blocks(text))
    default = next((block.family for block in blocks if block.family is not None), Family.IPV4)
    for block in blocks:
        family = block.family or last or default
        if block.family is None and family in found and block.table in found[family].chains:
            # No heading and no address says so, but a table that comes again begins the other family.
            family = Family.IPV4 if family is Family.IPV6 else Family.IPV6
        last = family
        into = found.setdefault(family, SavedFamily(family, {}, []))
        if block.table in into.chains:
            into.faults.append(f"table {block.table} of {family.label} stands there twice: the first one is read")
            continue
        into.chains[block.table] = block.chains
        if not block.complete:
            into.faults.append(f"table {block.table} has no end: the text is cut off")
    for each in found.values():
        each.faults += (f"there is no table {table}" for table in TABLES if table not in each.chains)
        for table in (FILTER, NAT):
            each.chains.setdefault(table, {})
    return list(found.values())


def options_of(text: str) -> Options:
    """The options of a rule; one that is given twice has a `+` behind its second name."""
    options: Options = {}
    name = negation = ""
    match = False
    for word in text.split():
        if word == "!":
            negation, name = "!", ""
        elif word == "-m":
            match = True
        elif match:
            match = False
        elif word[0] == "-":
            name = negation + word
            while name in options:
                name += "+"
            options[name] = negation = ""
        elif name:
            options[name] = f"{options[name]} {word}" if options[name] else word
        else:
            options[word] = ""
    return options


def _usual(line: str) -> tuple[str, SavedRule] | None:
    """The chain and the rule of a line that is one of the usual ones; None: it is to be read word by word."""
    hit = _USUAL.fullmatch(line)
    if hit is None:
        return None
    name, negation, source, to, protocol, comment, rest, port, chance, target, backend = hit.groups()
    options = {"-j": target}
    if source is not None:
        options["-s" if negation is None else "!-s"] = source
    if to is not None:
        options["-d"] = to
    if protocol is not None:
        options["-p"] = protocol
    if port is not None:
        options["--dport"] = port
    if chance is not None:
        options["--mode"], options["--probability"] = "random", chance
    if backend is not None:
        options["--to-destination"] = backend
    # From behind the chain's name to the comment, and on from its end.
    words = line[hit.end("name") + 1 : hit.start("comment") - len(_COMMENTED)]
    return name, SavedRule(options, comment, f"{words}{rest}" if words else rest[1:])


_COMMENTED = ' -m comment --comment "'


def _blocks(text: str) -> Iterator[_Block]:
    heading: Family | None = None
    block: _Open | None = None
    for line in map(str.strip, text.split("\n")):
        if block is not None and line[:3] == "-A ":
            block.add(line)
        elif line.startswith("#"):
            if "Generated by " in line:
                heading = Family.IPV6 if "ip6tables" in line else Family.IPV4
        elif line.startswith("*") or line == "COMMIT":
            if block is not None:
                yield block.closed(complete=line == "COMMIT")
            block = None if line == "COMMIT" else _Open(line[1:].strip(), heading)
        elif block is not None:
            block.add(line)
    if block is not None:
        yield block.closed(complete=False)


class _Open:
    """A table of which the end has not come yet."""

    def __init__(self, table: str, heading: Family | None) -> None:
        self._table = table
        self._read = table in TABLES
        self._heading = heading
        self._seen: Family | None = None
        self.chains: Chains = {}

    def add(self, line: str) -> None:
        """Take a chain or a rule, if it has to do with kube-proxy."""
        if not self._read or PREFIX not in line:
            return
        if line[0] == "[":
            line = _COUNTERS.sub("", line, count=1)  # what iptables-save -c prints before a rule
        if not line.startswith("-A "):
            if line.startswith(_DECLARED):
                self.chains.setdefault(line[1:].partition(" ")[0], [])
            return
        if (usual := _usual(line)) is not None:
            name, rule = usual
            self.chains.setdefault(name, []).append(rule)
            self._see(rule.text)
            return
        name, _, rest = line[3:].partition(" ")
        words, comment = split_comment(rest)
        if _UNUSUAL.search(words):
            words = respell(words)
        options = options_of(words)
        if name.startswith(PREFIX) or options.get("-j", "").startswith(PREFIX):
            self.chains.setdefault(name, []).append(SavedRule(options, comment, words))
        self._see(rest)

    def _see(self, rest: str) -> None:
        """Tell the family by the addresses in a rule, where nothing told it yet."""
        if self._heading is None and self._seen is None:
            for family, addresses in ((Family.IPV6, _SIX), (Family.IPV4, _FOUR)):
                if self._seen is None and addresses.search(f" {rest}"):
                    self._seen = family

    def closed(self, *, complete: bool) -> _Block:
        return _Block(self._table, self._heading or self._seen, self.chains, complete)
