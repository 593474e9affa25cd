"""What the elements of routes presuppose of the static part of the layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rules.forwarding import Route


class Needs(NamedTuple):
    """What elements presuppose of the static part: a chain per count, a set and a rule per timeout and length."""

    counts: frozenset[int]
    timeouts: frozenset[int]
    lengths: frozenset[int]

    def __or__(self, other: object) -> Needs:
        if not isinstance(other, Needs):
            return NotImplemented
        return Needs(self.counts | other.counts, self.timeouts | other.timeouts, self.lengths | other.lengths)

    def __le__(self, other: object) -> bool:
        if not isinstance(other, Needs):
            return NotImplemented
        return self.counts <= other.counts and self.timeouts <= other.timeouts and self.lengths <= other.lengths


def needs_of(routes: Iterable[Route]) -> Needs:
    """What these routes presuppose."""
    counts: set[int] = set()
    timeouts: set[int] = set()
    lengths: set[int] = set()
    for route in routes:
        counts.add(len(route.backends))
        if route.local_backends:
            counts.add(len(route.local_backends))
        if route.affinity:
            timeouts.add(route.affinity)
        lengths.update(prefix.length for prefix in route.source_ranges)
    return Needs(frozenset(counts - {0}), frozenset(timeouts), frozenset(lengths))
