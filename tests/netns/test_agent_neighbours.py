"""The agent's rules beside those of other programs on the node, and beside traffic that is nobody's Service."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP

from proxy.demo.probes import Probe
from proxy.demo.world import World
from rules.forwarding import ForwardingTable
from tests.netns.agent import Agent
from tests.netns.asking import answering, eventually, nft
from tests.netns.runner import DROP, backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, load, manifests

NEIGHBOUR = """
add table inet neighbour
add counter inet neighbour kept
add counter inet neighbour other
add chain inet neighbour before { type filter hook prerouting priority mangle; }
add rule inet neighbour before ip saddr 192.168.50.100 meta mark set 0x80000001
add chain inet neighbour output { type route hook output priority mangle; }
add rule inet neighbour output ip daddr 203.0.113.30 meta mark set 0x80000001
add chain inet neighbour after { type filter hook postrouting priority 300; }
add rule inet neighbour after ip daddr 10.244.0.0/16 tcp dport 8080 meta mark 0x80000001 counter name kept
add rule inet neighbour after ip daddr 10.244.0.0/16 tcp dport 8080 meta mark != 0x80000001 counter name other
"""


@pytest.fixture
def served(agent: Agent) -> Iterator[Agent]:
    """The agent of this worker, with a load balancer under policy Cluster."""
    objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-cluster.yaml").objects
    agent.configure({})
    agent.world.probes.open(backends(objects))
    agent.apply(objects)
    yield agent
    agent.world.probes.shut()
    agent.expect_empty(manifests(CLUSTER))


def tables(agent: Agent) -> list[ForwardingTable | None]:
    return [agent.read(family) for family in agent.families]


def packets(world: World, counter: str) -> int:
    found = json.loads(nft(world, "-j", "list", "counter", "inet", "neighbour", counter))["nftables"]
    [count] = [each["counter"]["packets"] for each in found if "counter" in each]
    return int(count)


@pytest.mark.parametrize("client", ["c", "node1"])
def test_the_mark_bits_of_other_programs_come_through_a_masquerade(client, served, world):
    """TRF-9: what postrouting sees behind us is the mark that was there before, our own bit gone."""
    for line in NEIGHBOUR.strip().splitlines():
        nft(world, line)
    try:
        assert answering(world, client, "203.0.113.30", 80) == {"p1", "q1"}
        assert packets(world, "kept") > 0
        assert packets(world, "other") == 0
    finally:
        nft(world, "delete table inet neighbour")


def test_with_another_bit_of_ours_bit_14_is_for_others_to_use(served, world):
    """TRF-9: with masqueradeBit 3, a neighbour's mark of 0x4000 is no wish to be masqueraded; with 14, it is one."""
    nft(world, "add table inet neighbour")
    try:
        nft(world, "add chain inet neighbour before { type filter hook prerouting priority mangle; }")
        nft(world, "add rule inet neighbour before ip saddr 10.244.1.13 meta mark set 0x4000")
        [outcomes] = world.probes.probe(Probe(host="p3", address="10.96.0.41", port=80, count=12))
        assert {outcome.peer[0] for outcome in outcomes} == {"192.168.50.11"}
        served.configure({"nftables": {"masqueradeBit": 3}, "iptables": {"masqueradeBit": 3}})
        served.wait()
        eventually(lambda: all(table is not None and table.node.mark == 8 for table in tables(served)), "the bit")
        [outcomes] = world.probes.probe(Probe(host="p3", address="10.96.0.41", port=80, count=12))
        assert {outcome.peer for outcome in outcomes} == {outcome.local for outcome in outcomes}
    finally:
        nft(world, "delete table inet neighbour")


def test_a_neighbours_drop_is_not_overridden(served, world):
    """NFT-13, NFT-26: there is no accept rule of ours that would let anything through."""
    nft(world, "add table inet neighbour")
    try:
        nft(world, "add chain inet neighbour forward { type filter hook forward priority 10; policy drop; }")
        nft(world, "add rule inet neighbour forward ct state established accept")
        nft(world, "add rule inet neighbour forward ip daddr 10.244.1.11 accept")
        nft(world, "add rule inet neighbour forward ip daddr 10.244.2.11 reject with icmp host-prohibited")
        assert answering(world, "c", "203.0.113.30", 80) == {"p1", "ICMP 3/10 from 203.0.113.30"}
    finally:
        nft(world, "delete table inet neighbour")


def ping(world: World, address: str) -> list[tuple[str, int]]:
    """Who answers echo requests of p3, and with which ICMP type."""

    def inside() -> list[tuple[str, int]]:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(DROP)
            sock.sendto(bytes(ICMP(id=4711, seq=1) / b"sluice"), (address, 0))
            found: list[tuple[str, int]] = []
            while not found:
                try:
                    packet = IP(sock.recv(65536))
                except TimeoutError:
                    break
                if packet[ICMP].type != 8:
                    found.append((packet.src, packet[ICMP].type))
            return found

    return world.namespaces["p3"].inside(inside)


def test_a_ping_is_not_translated(served, world, mode):
    """TRF-30: a load balancer address is left to its owner, and a ClusterIP answers no echo."""
    assert ping(world, "10.244.1.11") == [("10.244.1.11", 0)]
    assert ping(world, "203.0.113.30") == [("203.0.113.30", 0)], "the router behind the node owns the address"
    if mode == "nftables":
        assert ping(world, "10.96.0.41") in ([], [("192.168.50.11", 3)])
    else:
        assert ping(world, "10.96.0.41") == [("10.96.0.41", 0)], "it goes where routes lead it: to upstream (CID-2)"
