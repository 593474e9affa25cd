"""A traced packet in words and as data: what was seen, beside what the rules say of such a packet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from proxy.explain.text import WIDTH
from proxy.trace.packets import Place, Traced
from rules.explain import explain
from rules.explanation import (
    Dropped,
    Explanation,
    Outcome,
    Packet,
    Reaches,
    Rejected,
    Share,
    Untouched,
    Why,
    name_of,
    verdict,
)
from rules.forwarding import Address, Backend, Family, ForwardingTable, format_host
from rules.nftables.chains import (
    GUARD_LOOPBACK,
    REFUSE_CLUSTER_IPS,
    REFUSE_FRONTENDS,
    REFUSE_NODE_PORTS,
    SOURCE_RANGES,
)
from rules.nftables.layout import TABLE
from rules.nftables.trace import Headers

_DROPS = {
    SOURCE_RANGES: Why.SOURCE_RANGES,
    REFUSE_FRONTENDS: Why.NO_LOCAL_ENDPOINTS,
    REFUSE_NODE_PORTS: Why.NO_LOCAL_ENDPOINTS,
    REFUSE_CLUSTER_IPS: Why.UNALLOCATED,
    GUARD_LOOPBACK: Why.LOOPBACK,
}
_REJECTS = {REFUSE_CLUSTER_IPS: Why.CLOSED_PORT}
_FAMILIES = {1: "inet", Family.IPV4.af: "ip", Family.IPV6.af: "ip6"}


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One packet, and what is known about it."""

    traced: Traced
    explanation: Explanation
    """By the table that the kernel held when the trace began."""
    outcome: Outcome | None
    """What was seen; None: rules of others dropped it, or no end was told."""
    interfaces: tuple[str, str]
    """By which it came in and left; empty where it did not."""

    @property
    def expected(self) -> bool:
        """Whether what was seen is what the table says; nothing can be said of what rules of others dropped."""
        seen, said = self.outcome, self.explanation.outcome
        if seen is None:
            return True
        if isinstance(seen, Reaches) and isinstance(said, Reaches):
            [share] = seen.shares
            return any((each.backend, each.masqueraded) == (share.backend, share.masqueraded) for each in said.shares)
        return type(seen) is type(said)


def tell(
    traced: Traced,
    table: ForwardingTable,
    local_addresses: AbstractSet[Address],
    interface: Callable[[int], str],
    rejects: Callable[[Place], bool],
) -> Told:
    """What is known about a packet; `rejects` says of a rule of ours that drops whether it is by a refusal."""
    before = traced.before
    incoming = interface(traced.input) if traced.input else ""
    packet = Packet(
        destination=before.destination,
        protocol=before.protocol,
        port=before.port,
        source=before.source,
        interface=incoming,
    )
    return Told(
        traced=traced,
        explanation=explain(table, packet, local_addresses),
        outcome=_outcome(traced, rejects),
        interfaces=(incoming, interface(traced.output) if traced.output else ""),
    )


def _outcome(traced: Traced, rejects: Callable[[Place], bool]) -> Outcome | None:
    place = traced.dropped
    if place is not None:
        if place.table != TABLE or place.chain not in _DROPS:
            return None
        if rejects(place):
            return Rejected(_REJECTS.get(place.chain, Why.NO_ENDPOINTS))
        return Dropped(_DROPS[place.chain])
    if not traced.arrived:
        return None
    if not traced.translated:
        return Untouched(Why.NO_FRONTEND)
    backend = Backend(traced.after.destination, traced.after.port)
    return Reaches((Share(backend=backend, probability=1.0, masqueraded=traced.masqueraded),), 0)


def _by(place: Place) -> str:
    family = _FAMILIES.get(place.family, f"family {place.family}")
    what = f"rule {place.handle}" if place.handle else "the policy"
    return f"{what} of chain {place.chain} of table {family} {place.table}"


def _ends(headers: Headers) -> tuple[str, str]:
    source = f"{format_host(headers.source)}:{headers.source_port}"
    return source, f"{format_host(headers.destination)}:{headers.port}"


def lines(told: Told) -> Iterator[str]:
    """A packet, for people."""
    traced, explanation = told.traced, told.explanation
    source, destination = _ends(traced.before)
    label = name_of(explanation.route) if explanation.route is not None else "no Service"
    incoming, outgoing = told.interfaces
    yield f"{label}  {source} -> {destination}/{traced.before.protocol.name}{f', in by {incoming}' if incoming else ''}"
    for number, step in enumerate(explanation.steps, 1):
        words = f"  {number:>2}. {step.words[:1].upper()}{step.words[1:]}"
        yield f"{words:<{WIDTH}}  [{step.clause}]"
    if traced.chains:
        yield f"  Chains: {', '.join(traced.chains)}"
    source, destination = _ends(traced.after)
    yield f"  Seen last: {source} -> {destination}{f', out by {outgoing}' if outgoing else ''}"
    yield f"  {_conclusion(told)}"
    if not told.expected:
        yield f"  ! The rules as they were when the trace began say: it {verdict(explanation.outcome)}."


def _conclusion(told: Told) -> str:
    traced = told.traced
    if traced.dropped is not None:
        what = verdict(told.outcome) if told.outcome is not None else "is dropped, not by sluice but"
        return f"The connection {what} by {_by(traced.dropped)}."
    if told.outcome is None:
        return (
            "It was not seen leaving the node or reaching a socket: there may be no route, or rules of others ate it."
        )
    return f"The connection {verdict(told.outcome)}."


def to_data(told: Told) -> dict[str, Any]:
    """A packet, for programs."""
    traced, explanation, outcome = told.traced, told.explanation, told.outcome
    share = outcome.shares[0] if isinstance(outcome, Reaches) else None
    if outcome is not None:
        is_, why = msgspec.to_builtins(outcome)["is"], None if isinstance(outcome, Reaches) else outcome.why.value
    else:
        is_, why = ("dropped", "others") if traced.dropped is not None else ("unseen", None)
    return {
        "service": explanation.route.label if explanation.route is not None else "",
        "frontend": str(explanation.frontend) if explanation.frontend is not None else None,
        "protocol": traced.before.protocol.name,
        "before": dict(zip(("source", "destination"), _ends(traced.before), strict=True)),
        "after": dict(zip(("source", "destination"), _ends(traced.after), strict=True)),
        "in": told.interfaces[0],
        "out": told.interfaces[1],
        "outcome": {
            "is": is_,
            "why": why,
            "by": _by(traced.dropped) if traced.dropped is not None else None,
            "backend": str(share.backend) if share else None,
            "masqueraded": share.masqueraded if share else None,
        },
        "expected": told.expected,
        "chains": list(traced.chains),
        "steps": [{"kind": step.kind.value, "words": step.words, "clause": step.clause} for step in explanation.steps],
    }
