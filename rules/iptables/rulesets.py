"""Chains and jumps of ours as they are and as they should be: what has to change, and what is wrong in words.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rules.iptables.text import Changes, Jump, Ruleset


def changed_chains(there: Ruleset, needed: Ruleset) -> Changes:
    """The chains that have to be written or removed, in the tables of `needed`."""
    changes: Changes = {
        table: {
            **dict.fromkeys(there[table].keys() - chains.keys()),
            **{name: rules for name, rules in chains.items() if there[table].get(name) != rules},
        }
        for table, chains in needed.items()
    }
    return changes


def changed_jumps(there: Sequence[Jump], needed: Sequence[Jump]) -> tuple[list[Jump], list[Jump]]:
    """The jumps that have to be added, and those to be removed, of which some may be there more than once."""
    kept = set()
    stale = []
    for jump in there:
        if jump in needed and jump not in kept:
            kept.add(jump)
        else:
            stale.append(jump)
    return [jump for jump in needed if jump not in kept], stale


def damage(there: Ruleset, needed: Ruleset) -> Iterator[str]:
    """Where chains are not what they should be, one sentence each; comments aside."""
    for table, wanted in needed.items():
        held = there[table]
        for name in held:
            if name not in wanted:
                yield f"chain {name} of table {table} serves nothing"
        for name, rules in wanted.items():
            if name not in held:
                yield f"chain {name} of table {table} is missing"
            elif rules != held[name] and [rule.text for rule in rules] != [rule.text for rule in held[name]]:
                yield f"chain {name} of table {table} has other rules than it needs"


def jump_damage(there: Sequence[Jump], needed: Sequence[Jump]) -> Iterator[str]:
    """Likewise of jumps."""
    wanted = [(jump.table, jump.chain, jump.rule.text) for jump in needed]
    held = Counter((jump.table, jump.chain, jump.rule.text) for jump in there)
    for table, chain, text in wanted:
        if (table, chain, text) not in held:
            yield f"{chain} of table {table} lacks {text}"
    for (table, chain, text), times in held.items():
        if (table, chain, text) not in wanted:
            yield f"{chain} of table {table} has {text}, which is not needed"
        elif times > 1:
            yield f"{chain} of table {table} has {text} more than once"
