"""The frontends that a packet nearly matched, and why they did not: what people look for when nothing did."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from rules.explanation import MATCHES, Packet, Step, StepKind, name_of
from rules.forwarding import Address, ForwardingTable, Frontend, Route, format_address
from rules.node_ports import answers_node_ports, is_loopback, node_port_words

MOST_NEAR_MISSES = 6
"""How many are told."""


def near_misses(
    table: ForwardingTable, packet: Packet, local_addresses: AbstractSet[Address]
) -> tuple[list[Step], bool]:
    """The nearest frontends first, and whether a node port matched but for the address.

    Near is what has the packet's address and another port or protocol.  A node port is near for its number, at an
    address of the node: elsewhere it would be an accident.
    """
    near: list[tuple[tuple[bool, int, Frontend], Step]] = []
    destination = packet.destination
    answers = answers_node_ports(table.node, destination, local_addresses)
    is_own = answers or destination in local_addresses or is_loopback(destination)
    for frontend, route in table.routes.items():
        if frontend.address not in (destination, b""):
            continue
        same_port, same_protocol = frontend.port == packet.port, frontend.protocol is packet.protocol
        if frontend.is_node_port and not (same_port and is_own):
            continue
        if same_port and same_protocol:
            if not frontend.is_node_port or answers:
                continue
            step = _uncovered(table, packet, frontend, route)
        elif same_port:
            if frontend.is_node_port and not answers:
                continue
            step = _other(frontend, route, f"the packet is {packet.protocol.name}")
        else:
            step = _other(frontend, route, f"the packet goes to port {packet.port}")
        near.append(((not same_port, abs(frontend.port - packet.port), frontend), step))
    near.sort(key=lambda item: item[0])
    steps = [step for _, step in near[:MOST_NEAR_MISSES]]
    return steps, any(step.kind is StepKind.NODE_PORT_ADDRESS for step in steps)


def _other(frontend: Frontend, route: Route, but: str) -> Step:
    shown = f"{frontend.port}/{frontend.protocol.name}" if frontend.is_node_port else str(frontend)
    words = f"{shown} is {MATCHES[route.kind][0]} of {name_of(route)}, but {but}"
    return Step(kind=StepKind.NEAR_MISS, words=words, clause="TRF-1", frontend=frontend, label=route.label)


def _uncovered(table: ForwardingTable, packet: Packet, frontend: Frontend, route: Route) -> Step:
    address = format_address(packet.destination)
    words = (
        f"{frontend.port}/{frontend.protocol.name} is a node port of {name_of(route)}, but {address} answers no node "
        f"ports: {node_port_words(table.node)}"
    )
    clause = "TRF-21" if is_loopback(packet.destination) else "TRF-20"
    return Step(kind=StepKind.NODE_PORT_ADDRESS, words=words, clause=clause, frontend=frontend, label=route.label)
