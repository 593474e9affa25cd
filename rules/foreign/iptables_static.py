"""What kube-proxy's modes with iptables rules have in common: the mark, the way out, the jumps from the kernel's own
chains (IPT-1, IPT-6, IPT-7, IPT-15, IPVS-13, IPVS-15).  Pure.

Each function says what is wrong by calling `complain` with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rules.foreign.iptables_chains import MARK_MASQ
from rules.foreign.saved import PREFIX, Chains, Options, SavedRule
from rules.forwarding import NodeFacts
from rules.iptables.text import FILTER, NAT

POSTROUTING = "KUBE-POSTROUTING"
FORWARD = "KUBE-FORWARD"

Complain = Callable[[str], None]

_XMARK = re.compile(r"(0x[0-9a-f]{1,8})(?:/(0x[0-9a-f]{1,8}))?")
_NEW = {"--ctstate": "NEW"}


class Jump(NamedTuple):
    """A rule in one of the kernel's own chains, which leads to one of kube-proxy's (IPT-1)."""

    table: str
    chain: str
    to: str
    new: bool = False
    """Whether the rule asks for new connections, and for nothing else."""
    since: bool = False
    """Whether older versions have neither the rule nor the chain."""


def strange(chain: str, rule: SavedRule) -> str:
    """The sentence about a rule that no version of kube-proxy writes."""
    return f"{chain} has a rule that is not understood: {rule.text}"


def mark_of(nat: Chains, complain: Complain, before: Sequence[Options] = ()) -> int:
    """The bit of the mark, checked against the rules that act on it; `before`: rules that stand before those."""
    rules = nat.get(MARK_MASQ, [])
    mark = 0
    if len(rules) == 1 and rules[0].options.keys() == {"-j", "--set-xmark"}:
        hit = _XMARK.fullmatch(rules[0].options["--set-xmark"])
        mark = int(hit[1], 16) if hit is not None and hit[1] == hit[2] else 0
    elif len(rules) == 1 and rules[0].options.keys() == {"-j", "--or-mark"}:
        hit = _XMARK.fullmatch(rules[0].options["--or-mark"])
        mark = int(hit[1], 16) if hit is not None else 0
    if not mark or rules[0].target != "MARK":
        complain(f"{MARK_MASQ} does not set a mark")
        return NodeFacts().mark
    bit, there = f"{mark:#x}", [dict(rule.options) for rule in nat.get(POSTROUTING, ())]
    for each in there:
        each.pop("--random-fully", None)
    if before and there[: len(before)] == list(before):
        del there[: len(before)]
    unmarked = {"!--mark": f"{bit}/{bit}", "-j": "RETURN"}
    clear = ({"-j": "MARK", "--set-xmark": f"{bit}/0x0"}, {"-j": "MARK", "--xor-mark": bit})
    masquerade = {"-j": "MASQUERADE"}
    if there != [{"--mark": f"{bit}/{bit}", **masquerade}] and not any(
        there == [unmarked, each, masquerade] for each in clear
    ):
        complain(f"{POSTROUTING} does not masquerade what is marked with {bit}, and that alone")
    return mark


def check_jumps(jumps: Iterable[Jump], nat: Chains, filters: Chains, complain: Complain) -> None:
    """Whether the kernel's own chains lead to kube-proxy's."""
    there = {
        (table, chain, rule.target): rule.options
        for table, chains in ((NAT, nat), (FILTER, filters))
        for chain in chains
        if not chain.startswith(PREFIX)
        for rule in chains[chain]
    }
    for jump in jumps:
        chains = nat if jump.table == NAT else filters
        if jump.since and jump.to not in chains:
            continue
        found = there.get((jump.table, jump.chain, jump.to))
        if found is None:
            complain(f"{jump.chain} of table {jump.table} has no rule that leads to {jump.to}")
        elif found != {**(_NEW if jump.new else {}), "-j": jump.to}:
            complain(f"{jump.chain} of table {jump.table} leads to {jump.to} under other conditions")


def check_forward(filters: Chains, mark: int, complain: Complain) -> None:
    """KUBE-FORWARD (IPT-15)."""
    for rule in filters.get(FORWARD, ()):
        if rule.target not in {"ACCEPT", "DROP"}:
            complain(strange(FORWARD, rule))
    marked = {"--mark": f"{mark:#x}/{mark:#x}", "-j": "ACCEPT"}
    answers = {"--ctstate": "RELATED,ESTABLISHED", "-j": "ACCEPT"}
    accepted = [rule.options for rule in filters.get(FORWARD, ())]
    for wanted, what in ((marked, "what is marked for masquerade"), (answers, "answers")):
        if not any(options.items() >= wanted.items() for options in accepted):
            complain(f"{FORWARD} does not accept {what}")
