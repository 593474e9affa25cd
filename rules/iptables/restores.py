"""What an iptables-restore is given: the chains that differ, as text, and for whom each line stands.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rules.forwarding import Frontend
from rules.iptables.layout import JUMPS
from rules.iptables.model import Model
from rules.iptables.rulesets import changed_chains, changed_jumps
from rules.iptables.text import TABLES, Changes, Jump, Ruleset, Saved, restore_lines


class Restore(NamedTuple):
    """The input of one iptables-restore."""

    lines: list[str]
    operations: int
    """Rules written and chains removed."""
    written: Mapping[str, int]
    """Rules written, by table."""

    def __bool__(self) -> bool:
        return bool(self.lines)

    @property
    def text(self) -> str:
        return "\n".join([*self.lines, ""])


def restore(changes: Changes, jumps: Iterable[Jump] = (), stale: Iterable[Jump] = ()) -> Restore:
    """What makes changes of chains, adds jumps to chains that are not ours, and removes stale ones."""
    jumps, stale = list(jumps), list(stale)
    lines = list(restore_lines(changes, jumps=jumps, stale_jumps=stale))
    operations = len(jumps) + len(stale)
    operations += sum(len(rules or (None,)) for chains in changes.values() for rules in chains.values())
    written = Counter(jump.table for jump in jumps)
    for table, chains in changes.items():
        written[table] += sum(len(rules or ()) for rules in chains.values())
    return Restore(lines, operations, written)


def from_saved(saved: Saved, chains: Ruleset) -> Restore:
    """What makes a kernel that holds `saved` hold these chains, and lead to them."""
    return restore(changed_chains(saved.chains, chains), *changed_jumps(saved.jumps, JUMPS))


def removal(saved: Saved) -> Restore:
    """What removes all that is ours."""
    gone: Changes = {table: dict.fromkeys(saved.chains[table]) for table in TABLES}
    return restore(gone, (), saved.jumps)


def owners(step: Restore, model: Model, line: int | None) -> frozenset[Frontend]:
    """The frontends for which a line of the input was written, counted from 1; none where that cannot be told."""
    if line is None or not 0 < line <= len(step.lines):
        return frozenset()
    text = step.lines[line - 1]
    if not text.startswith("-A "):
        return frozenset()
    return model.owners(text[3:].partition(" ")[0], text)


class Tally:
    """How many rules of ours each table holds, kept up to date by changes (IPT-28)."""

    def __init__(self, chains: Ruleset) -> None:
        self._chains = {table: {name: len(rules) for name, rules in chains[table].items()} for table in TABLES}
        jumps = Counter(jump.table for jump in JUMPS)
        self._rules = {table: sum(self._chains[table].values()) + jumps[table] for table in TABLES}

    def change(self, changes: Changes) -> None:
        """Chains were written or removed."""
        for table, chains in changes.items():
            held = self._chains[table]
            for name, rules in chains.items():
                self._rules[table] -= held.pop(name, 0)
                if rules is not None:
                    held[name] = len(rules)
                    self._rules[table] += len(rules)

    def rules(self) -> dict[str, int]:
        """As of now, the jumps to us among them."""
        return dict(self._rules)
