"""A traced packet in words and as data: what was seen, beside what the rules say of such a packet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import msgspec

from proxy.explain.text import WIDTH, sentence
from proxy.trace.judged import Judge
from proxy.trace.packets import SLUICE, Place, Traced, Whose
from rules.explain import explain
from rules.explanation import (
    Explanation,
    Origin,
    Outcome,
    Packet,
    Reaches,
    Share,
    Untouched,
    Why,
    name_of,
    verdict,
)
from rules.forwarding import Address, Backend, Family, ForwardingTable, format_host
from rules.netlink.headers import Headers

_FAMILIES = {1: "inet", Family.IPV4.af: "ip", Family.IPV6.af: "ip6"}


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One packet, and what is known about it."""

    traced: Traced
    explanation: Explanation
    """By the table that the kernel held when the trace began."""
    outcome: Outcome | None
    """What was seen; None: rules of others dropped it, no worker found it a backend, or no end was told."""
    interfaces: tuple[str, str]
    """By which it came in and left; empty where it did not."""
    whose: Whose = SLUICE
    """The proxy whose rules are followed."""

    @property
    def expected(self) -> bool:
        """Whether what was seen is what the table says; nothing can be said of what rules of others dropped."""
        seen, said = self.outcome, self.explanation.outcome
        if seen is None:
            return True
        if isinstance(seen, Reaches) and isinstance(said, Reaches):
            [share] = seen.shares
            # The node's own, masqueraded to the very address that it had: nothing but the port can tell, by chance.
            own = self.explanation.origin is Origin.NODE
            same = own and self.traced.before.source == self.traced.after.source
            return any(
                each.backend == share.backend and (same or each.masqueraded == share.masqueraded)
                for each in said.shares
            )
        return type(seen) is type(said)


class Witness(NamedTuple):
    """The node on which packets were seen."""

    interface: Callable[[int], str]
    """The name of the interface with an index."""
    way_back: Callable[[Address], str]
    """By which interface answers to an address leave: by that packets of it came, where nobody has seen them come."""
    judge: Judge


def tell(
    traced: Traced,
    table: ForwardingTable,
    local_addresses: AbstractSet[Address],
    seen_by: Witness,
) -> Told:
    """What is known about a packet."""
    before = traced.before
    incoming = seen_by.interface(traced.input) if traced.input else ""
    # What goes to the node's own address of a Service has that for its source too, whether an interface has it or not.
    own = before.source == before.destination
    packet = Packet(
        destination=before.destination,
        protocol=before.protocol,
        port=before.port,
        source=before.source,
        interface=incoming or ("" if own or before.source in local_addresses else seen_by.way_back(before.source)),
        origin=Origin.NODE if own else None,
    )
    explanation = explain(table, packet, local_addresses)
    return Told(
        traced=traced,
        explanation=explanation,
        outcome=_outcome(traced, explanation, seen_by.judge),
        interfaces=(incoming, seen_by.interface(traced.output) if traced.output else ""),
        whose=seen_by.judge.whose,
    )


def _outcome(traced: Traced, explanation: Explanation, judge: Judge) -> Outcome | None:
    if traced.dropped is not None:
        return judge.outcome(traced.dropped, explanation.outcome)
    if not traced.arrived:
        return None
    if not traced.translated:
        return Untouched(Why.NO_FRONTEND)
    backend = Backend(traced.after.destination, traced.after.port)
    return Reaches((Share(backend=backend, probability=1.0, masqueraded=traced.masqueraded),), 0)


def _by(place: Place) -> str:
    family = _FAMILIES.get(place.family, f"family {place.family}")
    what = f"rule {place.handle}" if place.handle else "the policy"
    kind = "legacy table" if place.legacy else "table"
    return f"{what} of chain {place.chain} of {kind} {family} {place.table}"


def _listing(place: Place) -> str:
    """The command that shows a rule."""
    family = _FAMILIES.get(place.family, "")
    if place.legacy:
        program = "ip6tables-legacy" if family == "ip6" else "iptables-legacy"
        return f"{program} -t {place.table} -nvL {place.chain} --line-numbers"
    return f"nft -a list chain {family} {place.table} {place.chain}" if family else ""


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
        words = f"  {number:>2}. {sentence(step.words)}"
        yield f"{words:<{WIDTH}}  [{step.clause}]"
    if traced.chains:
        yield f"  Chains: {', '.join(traced.chains)}"
    source, destination = _ends(traced.after)
    yield f"  Seen last: {source} -> {destination}{f', out by {outgoing}' if outgoing else ''}"
    yield from (f"  {sentence(note)}" for note in traced.notes)
    yield f"  {_conclusion(told)}"
    if traced.dropped is not None and (command := _listing(traced.dropped)):
        yield f"    {command}"
    if not told.expected:
        yield f"  ! The rules as they were when the trace began say: it {verdict(explanation.outcome)}."


def _conclusion(told: Told) -> str:
    traced = told.traced
    if traced.dropped is not None:
        own = told.whose.has(traced.dropped.table, traced.dropped.chain)
        whose = "is dropped" if own else f"is dropped, not by {told.whose.name} but"
        what = verdict(told.outcome) if told.outcome is not None else whose
        return f"The connection {what} by {_by(traced.dropped)}."
    if traced.failed:
        return f"The connection is given up by the worker: {traced.failed}."
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
    elif traced.dropped is not None:
        is_, why = "dropped", "others"
    else:
        is_, why = ("failed", traced.failed) if traced.failed else ("unseen", None)
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
        "notes": list(traced.notes),
        "steps": [{"kind": step.kind.value, "words": step.words, "clause": step.clause} for step in explanation.steps],
    }
