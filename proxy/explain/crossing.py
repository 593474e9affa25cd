"""By which hooks the first packet of a connection comes, and what chains see of it there.  Pure.

    from outside or a pod    ingress ─▶ prerouting ─▶ forward ─▶ egress, or input where the backend is the node itself
    from the node            output ─▶ egress; where the backend is the node itself, by loopback prerouting and input

Ingress sees the frontend, egress the backend, whatever carries the connection.  Destination NAT stands in the midst of
prerouting and output: chains before it see the frontend, those behind it the backend.  IPVS takes packets at the end of
input, so that others see the frontend there, and sends them on by output; what the node sends it takes in the midst of
output, where destination NAT stands.  It leaves no mark of translation.  A worker of mode userspace takes packets from
input as well, and makes a connection of the node's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from proxy.explain.passing import Chains, Passing, Stage
from proxy.explain.surroundings import HOOKS, ForeignChain, Hook, Surroundings
from rules.forwarding import Family, NodeFacts

Carried = Literal["translated", "bound", "relayed", "plain"]
"""By destination NAT, by IPVS, by a worker; `plain`: to the backend's own address."""

Bases = Mapping[tuple[Hook, Stage], tuple[tuple[ForeignChain, Chains], ...]]
"""Others' base chains with the chains of their tables, by where they stand."""


class Journey(NamedTuple):
    """One connection that gets one backend."""

    frontend: Passing
    """Its first packet as it is sent."""
    backend: Passing
    """The same once it goes to the backend."""
    carried: Carried
    by_node: bool
    """Whether the node itself sends it."""
    stays: bool
    """Whether the backend's address is the node's own."""


def carried_by(facts: NodeFacts) -> Carried:
    """What carries connections on a node."""
    if facts.relayed:
        return "relayed"
    return "bound" if facts.bound else "translated"


def bases_of(node: Surroundings, family: Family, hooks: Iterable[Hook] = HOOKS) -> Bases:
    """The base chains of others in the way of packets."""
    found: dict[tuple[Hook, Stage], list[tuple[ForeignChain, Chains]]] = {}
    for hook in hooks:
        for base, chains in node.base_chains(hook, family):
            found.setdefault((hook, base.stage), []).append((base, chains))
    return {place: tuple(each) for place, each in found.items()}


def met(hook: Hook, stage: Stage, journeys: Iterable[Journey]) -> Iterator[tuple[Journey, Passing]]:
    """Of these journeys those that come to chains which stand there, with what the chains see."""
    for journey in journeys:
        seen = _seen(hook, stage, journey)
        if seen is not None:
            yield journey, seen


def _seen(  # noqa: C901, PLR0911  # a line for each of them
    hook: Hook, stage: Stage, journey: Journey
) -> Passing | None:
    early: Stage = "untracked" if stage == "untracked" else "tracked"
    as_sent = journey.frontend._replace(stage=early)
    # As it goes on, where something has given it another destination.
    onwards = journey.backend._replace(stage="translated" if journey.carried == "translated" else early)
    if journey.carried in ("relayed", "plain"):
        onwards = as_sent
    to_itself = journey.stays or journey.carried == "relayed"
    now = onwards if stage == "translated" else as_sent
    match hook:
        case "ingress":
            return None if journey.by_node else as_sent._replace(outgoing="")
        case "egress":
            # Its source may be the node's by then; and a worker's own connection is a journey for itself.
            return None if to_itself else journey.backend._replace(source=None, stage=onwards.stage)
        case "prerouting" if journey.by_node:
            # It comes by loopback as it has become in output.
            return onwards._replace(incoming="lo", outgoing="") if to_itself else None
        case "prerouting":
            return (as_sent if journey.carried == "bound" else now)._replace(outgoing="")
        case "forward":
            return onwards if journey.carried == "translated" and not (journey.by_node or journey.stays) else None
        case "output" if journey.by_node:
            # The interface of output is that by which the frontend would be left for, and nobody knows it.
            return now._replace(incoming="", outgoing="")
        case "output":
            return onwards._replace(incoming="", outgoing="") if journey.carried == "bound" and not to_itself else None
        case "input" if journey.by_node:
            return onwards._replace(incoming="lo", outgoing="") if to_itself else None
        case "input":
            if journey.carried == "bound":
                return as_sent._replace(outgoing="")
            return now._replace(outgoing="") if to_itself else None
