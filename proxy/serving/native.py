"""Native histograms: buckets that grow by a fixed factor, and are kept only where something was observed (MET-32).

The form is Prometheus': with schema s a bucket ends at each power of 2^(2^-s), so that a value's bucket follows from
the value.  kube-proxy asks for a factor of 1.1 at most, which is schema 3, and for 160 buckets at most; when there are
more, pairs of them become one and the schema is one less, as a scraper expects.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

from prometheus_client import Histogram

SCHEMA = 3
MOST = 160
ZERO = 2.0**-128
"""What is smaller than this counts as zero."""


class Span(NamedTuple):
    """Buckets in a row."""

    offset: int
    """From the end of the span before; of the first one, from bucket 0."""
    length: int


class Sparse:
    """What was observed, of values that are not negative."""

    def __init__(self) -> None:
        self.schema = SCHEMA
        self.zeros = 0
        self.counts: dict[int, int] = {}
        """By bucket; bucket i holds what is above 2^((i-1) 2^-s) and not above 2^(i 2^-s)."""

    def add(self, value: float) -> None:
        """Count a value; one that is no number goes by."""
        if value <= ZERO:
            self.zeros += 1
        elif value < math.inf:
            index = bucket(value, self.schema)
            self.counts[index] = self.counts.get(index, 0) + 1
            if len(self.counts) > MOST:
                self._halve()

    def _halve(self) -> None:
        counts, self.counts = self.counts, {}
        self.schema -= 1
        for index, count in counts.items():
            wider = (index + 1) // 2  # both that end there, and the one below
            self.counts[wider] = self.counts.get(wider, 0) + count

    def spans(self) -> list[Span]:
        """The buckets that hold something, in rows."""
        found: list[Span] = []
        end = 0
        for index in sorted(self.counts):
            if found and index == end:
                found[-1] = found[-1]._replace(length=found[-1].length + 1)
            else:
                found.append(Span(index - end, 1))
            end = index + 1
        return found

    def deltas(self) -> Iterator[int]:
        """Their counts, each as the difference to the one before."""
        before = 0
        for index in sorted(self.counts):
            yield self.counts[index] - before
            before = self.counts[index]


def bucket(value: float, schema: int) -> int:
    """The bucket of a value above zero; exact at powers of two, where buckets end in every schema."""
    fraction, exponent = math.frexp(value)  # value = fraction x 2^exponent, and fraction is in [0.5, 1)
    if schema <= 0:
        index = exponent - 1 if fraction == 0.5 else exponent
        return -(-index >> -schema)
    steps = 1 << schema
    ends = [2.0 ** (step / steps - 1) for step in range(steps)]
    return bisect_left(ends, fraction) + (exponent - 1) * steps


class NativeHistogram(Histogram):
    """A histogram that is both: with the buckets that it is given, and native."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.native = Sparse()
        self.children: dict[tuple[str, ...], NativeHistogram] = {}
        """By the values of their labels."""

    def labels(self, *values: Any, **named: Any) -> NativeHistogram:
        child = super().labels(*values, **named)
        self.children[tuple(map(str, values))] = child
        return child

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        super().observe(amount, exemplar)
        self.native.add(amount)
