"""Mode ipvs binds addresses of load balancers to a device of the node's: who asks the wire for one of them.

It needs a kernel with IPVS, such as the one of `make test-vm`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.demo.world import World
from tests.netns.agent import Agent
from tests.netns.runner import ANSWER
from tests.netns.streams import objects
from tests.netns.test_upgrade import without_ipvs

BALANCER, OWN = "203.0.113.31", "192.168.50.11"
"""A load balancer's address, which the node holds on the dummy device, and the node's own on the wire."""
CLIENT = "192.168.50.100"

_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_TYPE, _IPV4_TYPE = 0x0806, 0x0800
_ASKS, _ANSWERS = 1, 2
_EVERYBODY = b"\xff" * 6


@pytest.fixture
def agent(root: None, tmp_path: Path) -> Iterator[Agent]:
    """An agent in mode ipvs, in a world of its own."""
    with World(prefix="sluice-arp") as world:
        if obstacle := world.namespaces["node1"].inside(without_ipvs):
            pytest.skip(obstacle)
        agent = Agent(world, tmp_path, "ipvs")
        try:
            yield agent
        finally:
            agent.sweep()


def answered(world: World, *addresses: str) -> set[str]:
    """For which addresses node1 answers ARP requests of the client, asked for in this order; the last is its own.

    The wire keeps the order: what it has not answered by the time it answers the last, it never answers.  Another host
    of the segment takes every address of nobody for its own, and answers too.
    """

    def inside() -> set[str]:
        told: set[tuple[str, bytes]] = set()
        by: bytes | None = None
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ARP_TYPE)) as wire:
            wire.settimeout(ANSWER)
            wire.bind(("eth0", _ARP_TYPE))
            own = wire.getsockname()[4]
            for address in addresses:
                asked = (own, socket.inet_aton(CLIENT), bytes(6), socket.inet_aton(address))
                wire.send(_ETHERNET.pack(_EVERYBODY, own, _ARP_TYPE) + _ARP.pack(1, _IPV4_TYPE, 6, 4, _ASKS, *asked))
            while by is None:
                frame = wire.recv(4096)
                *_, operation, hardware, sender, _, _ = _ARP.unpack_from(frame, _ETHERNET.size)
                if operation == _ANSWERS:
                    told.add((socket.inet_ntoa(sender), hardware))
                    by = hardware if (addresses[-1], hardware) in told else None
        return {address for address, hardware in told if hardware == by}

    return world.namespaces["c"].inside(inside)


def test_strict_arp_leaves_requests_for_the_addresses_of_services_unanswered(agent: Agent) -> None:
    """IPVS-3: a load balancer that speaks ARP for its addresses, such as MetalLB's, needs it."""
    agent.configure({})
    agent.apply(objects())
    assert answered(agent.world, BALANCER, OWN) == {BALANCER, OWN}
    agent.configure({"ipvs": {"strictARP": True}})
    agent.apply(objects())
    assert answered(agent.world, BALANCER, OWN) == {OWN}
