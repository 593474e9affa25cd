"""What iptables-save and ip6tables-save print, as far as kube-proxy's chains go.

A file may hold both families, counters (`-c`), and tables of others; it may be cut off.  A text is cut into tables, and
a table into its chains.  Rules are made out where somebody asks for them: ten thousand Services have 140,000, of which
most stand in chains that can be read as a whole (`iptables_chains`).  A rule is held as its options, so that neither
the order in which a version prints them nor implied matches (`-m tcp`) matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from rules.forwarding import Family
from rules.iptables.spelling import respell
from rules.iptables.text import FILTER, NAT, TABLES, split_comment

PREFIX = "KUBE-"

_COUNTERS = r"\[\d+:\d+\] "
"""What iptables-save -c prints before a rule."""
RULE = rf"\n(?:{_COUNTERS})?-A \S+"
"""How a rule begins in a chain's text, for patterns of whole chains."""
COMMENT = r'(?: -m comment --comment "[^"\\\n]*")?'
"""A comment in which nothing is escaped, for these; rules of many endpoints have none (IPT-25)."""

_BEGIN = r"\n[^\S\n]*"
_HEAD = re.compile(rf"{_BEGIN}(?:\*(?P<table>.*)|(?P<end>COMMIT)[^\S\n]*(?=\n|\Z)|#(?P<note>.*))")
_DECLARED = re.compile(rf"{_BEGIN}:({PREFIX}\S*)")
_APPENDED = rf"{_BEGIN}(?:{_COUNTERS})?-A "
_CHAIN = re.compile(rf"({_APPENDED}(\S*).*+(?:{_APPENDED}\2(?!\S).*+)*+)")
"""Rules of one chain that stand together, and its name."""
_COUNTED = re.compile(_COUNTERS)
_SIX = re.compile(r" (?:-[sd] [0-9a-f]*:[0-9a-f:.]*/|--to-destination \[|--reject-with icmp6-)")
_FOUR = re.compile(r" (?:-[sd] \d+\.\d+\.\d+\.\d+|--to-destination \d+\.|--reject-with icmp-)")

_UNUSUAL = re.compile(
    r"-p \d|/\d+\.|[mM][aA][rR][kK] -|-m (?:conntrack|state |addrtype|recent)"
    r"|--(?:source|src|sport|state|dest|dst |in-|out-|proto|match|jump|goto)"
)
"""What versions of iptables-save spell in several ways; in the many rules of Services there is nothing of it."""

_USUAL = re.compile(
    r"-A KUBE-\S+(?P<matches>(?: (?P<not>! )?-s (?P<source>[0-9a-f:.]+(?:/\d{1,3})?))?"
    r"(?: -d (?P<to>[0-9a-f:.]+(?:/\d{1,3})?))?(?: -p (?P<protocol>[a-z]+))?)"
    r'(?: -m comment --comment "(?P<comment>[^"\\]*)")?(?P<rest>(?: -m (?:tcp|udp|sctp))?(?: --dport (?P<port>\d+))?'
    r"(?: -m statistic --mode random --probability (?P<chance>[\d.]+))?"
    r" -j (?P<target>[A-Z][-0-9A-Z]*)(?: --to-destination (?P<backend>[][0-9a-f:.]+))?)"
)
"""Nearly all rules of Services, as versions of today print them."""

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


class Chains(Mapping[str, Sequence[SavedRule]]):
    """Chains of one table, by name."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts` are of chains as they were printed, with the end of a line before each rule."""
        self._texts = texts
        self._rules: dict[str, Sequence[SavedRule]] = {}

    def text(self, name: str) -> str:
        """A chain as it was printed; empty if it has no rules, or is not there."""
        return self._texts.get(name, "")

    def __getitem__(self, name: str) -> Sequence[SavedRule]:
        rules = self._rules.get(name)
        if rules is None:
            rules = self._rules[name] = rules_of(self._texts[name])
        return rules

    def __contains__(self, name: object) -> bool:
        return name in self._texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


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
            each.chains.setdefault(table, Chains({}))
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


def rules_of(text: str) -> list[SavedRule]:
    """The rules in a chain's text."""
    return [rule for line in text.split("\n") if (rule := _rule(line.strip())) is not None]


def _rule(line: str) -> SavedRule | None:
    if line.startswith("["):
        line = _COUNTED.sub("", line, count=1)
    if not line.startswith("-A "):
        return None
    return _usual(line) or _any(line)


def _any(line: str) -> SavedRule:
    """A rule that is read word by word."""
    words, comment = split_comment(line[3:].partition(" ")[2])
    if _UNUSUAL.search(words):
        words = respell(words)
    return SavedRule(options_of(words), comment, words)


def _usual(line: str) -> SavedRule | None:
    """A rule that is one of the usual ones; None: it is to be read word by word."""
    hit = _USUAL.fullmatch(line)
    if hit is None:
        return None
    matches, negation, source, to, protocol, comment, rest, port, chance, target, backend = hit.groups()
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
    return SavedRule(options, comment or "", f"{matches}{rest}"[1:])


# --- tables ----------------------------------------------------------------------------------------------------


def _blocks(text: str) -> Iterator[_Block]:
    text = f"\n{text}"
    heading: Family | None = None
    table: str | None = None
    family, begin = heading, 0
    for hit in _HEAD.finditer(text):
        if (note := hit["note"]) is not None:
            if "Generated by " in note:
                heading = Family.IPV6 if "ip6tables" in note else Family.IPV4
            continue
        if table is not None:
            yield _block(table, family, text[begin : hit.start()], complete=hit["end"] is not None)
        table = None if hit["end"] else hit["table"].strip()
        family, begin = heading, hit.end()
    if table is not None:
        yield _block(table, family, text[begin:], complete=False)


def _block(table: str, family: Family | None, body: str, *, complete: bool) -> _Block:
    if table not in TABLES or PREFIX not in body:
        return _Block(table, family, Chains({}), complete)
    texts: dict[str, str] = dict.fromkeys(_DECLARED.findall(body), "")
    apart: dict[str, list[str]] = {}
    for text, name in _CHAIN.findall(body):
        kept = text
        if not name.startswith(PREFIX):
            kept = "".join(f"\n{line}" for line in text.split("\n") if PREFIX in line and _leads_there(line))
        if texts.get(name):
            apart.setdefault(name, [texts[name]]).append(kept)
        elif kept:
            texts[name] = kept
    texts |= {name: "".join(pieces) for name, pieces in apart.items()}
    return _Block(table, family or _family_of(body), Chains(texts), complete)


def _leads_there(line: str) -> bool:
    """Whether a rule leads to a chain of kube-proxy's."""
    return any(rule.target.startswith(PREFIX) for rule in rules_of(line))


def _family_of(body: str) -> Family | None:
    """The family by the first addresses in rules, where no heading tells it."""
    for line in body.split("\n"):
        if PREFIX not in line or "-A " not in line:
            continue
        for family, addresses in ((Family.IPV6, _SIX), (Family.IPV4, _FOUR)):
            if addresses.search(line):
                return family
    return None
