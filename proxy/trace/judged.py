"""Which decision it was, where a rule of the proxy ended a packet: by the chain that the rule stands in.  Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from proxy.trace.packets import SLUICE, Place, Whose
from rules.explanation import Dropped, Outcome, Rejected, Why
from rules.forwarding import Refusal
from rules.iptables import layout
from rules.iptables.encode import REFUSAL_LETTERS, is_refusal
from rules.iptables.text import PREFIX
from rules.nftables.chains import (
    GUARD_LOOPBACK,
    REFUSE_CLUSTER_IPS,
    REFUSE_FRONTENDS,
    REFUSE_NODE_PORTS,
    SOURCE_RANGES,
)
from rules.nftables.layout import TABLE

_OF_CHAIN = {
    SOURCE_RANGES: Why.SOURCE_RANGES,
    REFUSE_FRONTENDS: Why.NO_LOCAL_ENDPOINTS,
    REFUSE_NODE_PORTS: Why.NO_LOCAL_ENDPOINTS,
    REFUSE_CLUSTER_IPS: Why.UNALLOCATED,
    GUARD_LOOPBACK: Why.LOOPBACK,
    layout.GUARD: Why.LOOPBACK,
    layout.REFUSE_CLUSTER_IPS: Why.UNALLOCATED,
}
_REFUSED = {
    Why.NO_LOCAL_ENDPOINTS: Why.NO_ENDPOINTS,
    Why.UNALLOCATED: Why.CLOSED_PORT,
}
"""What a rule of the same chain that tells the client is about."""
_OWN_CHAIN = f"{PREFIX}{REFUSAL_LETTERS}-"
"""How the chain of a frontend that refuses and has source ranges begins: what it drops itself is not in them."""
_TREES = {
    layout.REFUSALS: Why.SOURCE_RANGES,
    layout.NODE_PORT_REFUSALS: Why.SOURCE_RANGES,
    layout.CLUSTER_IPS: Why.UNALLOCATED,
}
"""What a leaf of a tree drops; refusals have chains of their own."""


class Judge(NamedTuple):
    """Says what a rule that ended a packet decided."""

    rejects: Callable[[Place], bool]
    """Whether a rule of the proxy refuses by ICMP, rather than drops."""
    whose: Whose = SLUICE

    def outcome(self, place: Place, said: Outcome) -> Rejected | Dropped | None:
        """What a rule decided, beside what the table says of such a packet; None: it is none of the proxy that refuses.

        Of another proxy's rules the table says what they are about: their chains are not looked at one by one.
        """
        if self.whose is not SLUICE:
            return self._of_another(place, said) if self.whose.has(place.table, place.chain) else None
        why = _why(place)
        if why is None:
            return None
        refusal = is_refusal(place.chain)
        if refusal is not None:
            rejected = refusal[0] is Refusal.REJECT
        elif place.legacy:
            rejected = place.target == Refusal.REJECT.name
        else:
            rejected = self.rejects(place)
        return Rejected(_REFUSED.get(why, Why.NO_ENDPOINTS)) if rejected else Dropped(why)

    def _of_another(self, place: Place, said: Outcome) -> Rejected | Dropped:
        if place.target == Refusal.REJECT.name or (not place.legacy and self.rejects(place)):
            return said if isinstance(said, Rejected) else Rejected(Why.NO_ENDPOINTS)
        return said if isinstance(said, Dropped) else Dropped(Why.NO_LOCAL_ENDPOINTS)


def _why(place: Place) -> Why | None:
    """What a rule of a chain of ours that drops is about."""
    chain = place.chain
    if place.table == TABLE or chain in _OF_CHAIN:
        return _OF_CHAIN.get(chain)
    if is_refusal(chain) is not None:
        return Why.NO_LOCAL_ENDPOINTS
    if chain.startswith(_OWN_CHAIN):
        return Why.SOURCE_RANGES
    # A tree's chain is its root, or the root, a dash and a place in it.
    return next((why for root, why in _TREES.items() if chain == root or chain.startswith(f"{root}-")), None)
