"""The text that iptables-save prints and iptables-restore takes, as far as our own chains need it.

A rule is held as iptables-save 1.8.9 prints it (`rules.iptables.spelling` brings others' output to that), without the
comment: so that what is encoded and what is read back are compared as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.iptables.spelling import respell

PREFIX = "SLUICE-"
"""Chains whose names begin so are ours, and no others; save those of mode ipvs."""
IPVS_PREFIX = f"{PREFIX}IPVS-"
"""Of mode ipvs: its dataplane's, which reads and writes them by the same means."""
NAT = "nat"
FILTER = "filter"
MANGLE = "mangle"
TABLES = (FILTER, NAT)
"""The tables that we write, in the order in which they are committed, which is kube-proxy's.  Rules of the filter table
see only what was not translated: they may stand before their time."""

_MAX_COMMENT = 255
_COMMENT = re.compile(r' -m comment --comment (?:"((?:[^"\\]|\\.)*)"|(\S*))')
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


class TextError(Exception):
    """What iptables-save printed is not what it prints; the message says where."""


class Rule(NamedTuple):
    """One rule of ours: what it asks for and does, in iptables-save's words, and its comment."""

    text: str
    comment: str = ""

    def line(self, chain: str) -> str:
        """The rule as iptables-restore takes it, at the end of a chain."""
        return f"-A {chain} {self.text}{self.comment and f' -m comment --comment {quote(self.comment)}'}"


Rules = tuple[Rule, ...]
Ruleset = dict[str, dict[str, Rules]]
"""Our chains, by table and name."""


class Jump(NamedTuple):
    """A rule in a chain that is not ours, which leads to one of ours."""

    table: str
    chain: str
    rule: Rule


class Saved(NamedTuple):
    """What there is of ours."""

    chains: Ruleset
    jumps: tuple[Jump, ...]

    def __bool__(self) -> bool:
        return bool(self.jumps) or any(self.chains.values())


def quote(comment: str) -> str:
    """A comment as an argument: one line, no longer than the kernel has room for."""
    short = _UNPRINTABLE.sub("?", comment).encode()[:_MAX_COMMENT].decode(errors="ignore")
    return '"' + short.replace("\\", "\\\\").replace('"', '\\"') + '"'


def parse_rule(text: str) -> Rule:
    """A rule as it stands behind `-A CHAIN `."""
    bare, comment = split_comment(text)
    return Rule(respell(bare), comment)


def split_comment(text: str) -> tuple[str, str]:
    """A rule as it was printed, without its comment; and the comment."""
    spaced = " " + text
    found = _COMMENT.search(spaced)
    if found is None:
        return text, ""
    quoted, bare = found.groups()
    comment = quoted if quoted is not None else bare
    if "\\" in comment and quoted is not None:
        comment = re.sub(r"\\(.)", r"\1", quoted)
    return (spaced[: found.start()] + spaced[found.end() :])[1:], comment


def parse(text: str, prefix: str = PREFIX, tables: Iterable[str] = TABLES) -> Saved:
    """What is ours in the output of iptables-save; foreign chains and rules are passed over.

    Args:
        text: the output.
        prefix: how the names of our chains begin, `PREFIX` or `IPVS_PREFIX`.
        tables: where they are.

    Raises:
        TextError: a line of ours makes no sense, or the output ends within a table.
    """
    own = re.escape(prefix) + (f"(?!{IPVS_PREFIX.removeprefix(PREFIX)})" if prefix == PREFIX else "")
    declared, ruled = re.compile(f":({own}\\S*)"), re.compile(f"-A ({own}\\S*) (.*)")
    jump = re.compile(f"-A (\\S+) (.*-[jg] {own}.*)")
    chains: dict[str, dict[str, list[Rule]]] = {table: {} for table in tables}
    jumps: list[Jump] = []
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("*"):
            table = line[1:]
        elif line == "COMMIT":
            table = ""
        elif table not in chains:
            continue
        elif hit := declared.match(line):
            chains[table].setdefault(hit[1], [])
        elif hit := ruled.match(line):
            if hit[1] not in chains[table]:
                raise TextError(f"line {number}: a rule of {hit[1]}, which was not declared")
            chains[table][hit[1]].append(parse_rule(hit[2]))
        elif (hit := jump.match(line)) and not hit[1].startswith(PREFIX):
            jumps.append(Jump(table, hit[1], parse_rule(hit[2])))
    if table:
        raise TextError(f"the table {table} has no end")
    return Saved(
        {table: {name: tuple(rules) for name, rules in each.items()} for table, each in chains.items()}, tuple(jumps)
    )


Changes = Mapping[str, Mapping[str, Rules | None]]
"""What becomes of our chains, by table and name; None: they are to go."""


def restore_lines(
    changes: Changes,
    *,
    jumps: Iterable[Jump] = (),
    stale_jumps: Iterable[Jump] = (),
    tables: Iterable[str] = TABLES,
) -> Iterator[str]:
    """The input of iptables-restore --noflush that makes these changes.

    Chains are declared in the order of their names: iptables-nft keeps them in a sorted list, and looks for the place
    of each from its beginning.

    Args:
        changes: chains to write or to remove.
        jumps: rules to put at the beginnings of chains that are not ours.
        stale_jumps: rules to take out of such chains.
        tables: the tables in question, in the order in which they are committed.
    """
    added, stale = list(jumps), list(stale_jumps)
    for table in tables:
        chains = changes.get(table, {})
        new, old = [jump for jump in added if jump.table == table], [jump for jump in stale if jump.table == table]
        if not (chains or new or old):
            continue
        yield f"*{table}"
        for name in sorted(chains):
            yield f":{name} - [0:0]"
        for name, rules in chains.items():
            for rule in rules or ():
                yield rule.line(name)
        for jump in old:
            yield "-D" + jump.rule.line(jump.chain)[2:]
        for jump in new:
            yield "-I" + jump.rule.line(jump.chain)[2:]
        for name, rules in chains.items():
            if rules is None:
                yield f"-X {name}"
        yield "COMMIT"
