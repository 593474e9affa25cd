"""How many packets have met the two static rules whose packets kube-proxy counts with nfacct (IPT-31, MET-10, MET-11).

The rules count by themselves, as all do; a rule that is written again counts from nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rules.iptables.layout import COUNT_LOOPBACK, DROP_INVALID, FORWARD, OUTPUT
from rules.iptables.programs import Programs

_COUNTED = re.compile(r" -c (\d+) \d+")


class Packets(NamedTuple):
    """Packets since the rules were written."""

    invalid: int = 0
    """Dropped, as connection tracking could make nothing of them."""
    loopback: int = 0
    """First ones of connections to a node port at a loopback address."""

    def since(self, before: Packets) -> Packets:
        """What has come since an earlier reading; rules that count less now have been written again."""
        return Packets(*(now - then if now >= then else now for now, then in zip(self, before, strict=True)))


def packets(programs: Programs) -> Packets:
    """What the rules of a family have counted; nothing where they are not there.

    Raises:
        DataplaneError: they could not be read.
    """
    invalid, loopback = (
        _of(programs, chain, rule) for chain, rule in ((FORWARD, DROP_INVALID), (OUTPUT, COUNT_LOOPBACK))
    )
    return Packets(invalid, loopback)


def _of(programs: Programs, chain: str, rule: str) -> int:
    for line in programs.listed(chain).splitlines():
        counted = _COUNTED.search(line)
        if counted and _COUNTED.sub("", line) == f"-A {chain} {rule}":
            return int(counted[1])
    return 0
