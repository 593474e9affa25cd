"""Which addresses of a node answer node ports (TRF-20, TRF-21)."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from rules.explanation import listed
from rules.forwarding import Address, Family, NodeFacts, Prefix, format_address

LOOPBACK = bytes([127, 0, 0, 1])
_LOOPBACK = {Family.IPV4: Prefix(bytes([127, 0, 0, 0]), 8), Family.IPV6: Prefix(bytes(15) + b"\x01", 128)}


def answers_node_ports(facts: NodeFacts, address: Address, local_addresses: AbstractSet[Address]) -> bool:
    """Whether node ports answer at an address (TRF-20, TRF-21)."""
    loopback = is_loopback(address)
    if loopback and facts.loopback_node_ports and len(address) == 4:
        # A proxy listens at single addresses: of this network at the one that programs use.
        return not facts.relayed or address == LOOPBACK
    if facts.node_port_addresses is not None:
        return address in facts.node_port_addresses
    return not loopback and address in local_addresses


def is_loopback(address: Address) -> bool:
    return any(address in network for network in _LOOPBACK.values())


def node_port_words(facts: NodeFacts) -> str:
    """Which addresses answer node ports."""
    if facts.node_port_addresses is None:
        return "they answer on every address of the node but loopback"
    if not facts.node_port_addresses:
        return "no address of this node does"
    shown = listed(format_address(each) for each in sorted(facts.node_port_addresses))
    return f"they answer on {shown} only"
