"""Which flows are stale, and how the kernel is asked to delete them.

Theory of operation
-------------------
An entry of connection tracking keeps a flow at the backend that it was given, whatever becomes of that backend.  For
TCP that is right: a connection ends by itself, and its client learns of it (drain).  A UDP client that keeps its socket
goes on sending into the void.  So, once rules are in place, flows are deleted (CT-3, CT-4)

* to a backend that serves a frontend no longer: it is gone, it stopped serving, or the frontend itself is gone;
* to a frontend that no backend was chosen for, as it was new to the node or had none, and now has one.

Serving is not selected: an endpoint that terminates and still serves keeps its flows, as does one that another node or
zone should use (CT-2).  So what is looked at are not routes but, per frontend, all endpoints that serve (`Serving`).

A Service may ask the same for its TCP connections as long as nobody has answered them; those that were are left alone.

A change of few frontends becomes a few matches, each of them one request (`matches_of`).  A change of many, a start,
and a repair of the rules look at every flow of the protocol instead (`is_stale`), which costs what the table holds.

Node ports are matched by port alone, whatever address was connected to.  A flow that passes through the node to the
same port of somebody else is untranslated, so it is deleted at most when the node port is new, and never if its source
was rewritten: it would get another port, and its far end would not know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rules.forwarding import Backend, Family, Frontend, Protocol
from rules.netlink.conntrack import ANSWERED, DESTINATION_NAT, SOURCE_NAT, Flow, Match

Serving = frozenset[Backend]
"""The endpoints that serve a frontend, whether new connections are given to them or not."""

MOST_MATCHES = 16
"""Matches of one change: for each the kernel walks its whole table, and for that many it is as well read once."""


class Change(NamedTuple):
    """What became of one frontend."""

    lost: Serving
    """Those that serve it no longer."""
    serving: Serving
    """Those that do; none if the frontend is gone."""
    gained: bool = False
    """Whether nobody served it before."""


def change(before: Serving | None, after: Serving | None) -> Change:
    """What leads from one to the other; None: the frontend is not there, or its flows are left alone."""
    old, new = before or frozenset(), after or frozenset()
    return Change(old - new, new, gained=bool(new and not old))


def compose(first: Change, second: Change) -> Change:
    """Two changes of a frontend, both of which became rules.

    What one brought and the other took was used in between.
    """
    lost = (first.lost | second.lost) - second.serving
    return Change(lost, second.serving, gained=bool(second.serving) and (first.gained or second.gained))


def matches_of(family: Family, changes: Mapping[Frontend, Change]) -> list[Match] | None:
    """The stale flows of these changes as matches, or None when they would be too many."""
    matches: list[Match] = []
    for frontend, each in changes.items():
        at = Match(family, frontend.protocol, frontend.address, frontend.port)
        # TCP connections that were answered are left to drain.
        unanswered = ANSWERED if frontend.protocol is Protocol.TCP else 0
        if each.lost and not each.serving and frontend.address:
            matches.append(at._replace(status=DESTINATION_NAT, mask=DESTINATION_NAT | unanswered))
        else:
            # By port alone, "translated" would take in flows of other frontends with the same port.
            matches += (at._replace(backend=backend, mask=unanswered) for backend in each.lost)
        if each.gained:
            through = 0 if frontend.address else SOURCE_NAT
            matches.append(at._replace(mask=DESTINATION_NAT | through | unanswered))
        if len(matches) > MOST_MATCHES:
            return None
    return matches


def is_stale(flow: Flow, serving: Mapping[Frontend, Serving]) -> bool:
    """Whether a flow has to go, by all frontends whose flows are looked after.

    Frontends that nobody serves must be among them: flows to backends that they had are stale.
    """
    key = (flow.destination, flow.protocol, flow.port)
    backends = serving.get(key)  # type: ignore[call-overload]  # a frontend is such a tuple, and equal to it
    node_port = backends is None
    if node_port:
        backends = serving.get((b"", flow.protocol, flow.port))  # type: ignore[call-overload]  # likewise
        if backends is None:
            return False
    if flow.protocol == Protocol.TCP and flow.status & ANSWERED:
        return False
    if flow.translated:
        # As a plain tuple, which is equal to the backend: this is asked of every flow of a node.
        return (flow.reply_source, flow.reply_source_port) not in backends
    return bool(backends) and not (node_port and flow.masqueraded)
