"""What packets look like where an outcome does not say enough: refusals, and translated packets at the pod."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

from proxy.demo.probes import Outcome, Probe
from tests.netns.agent import Agent
from tests.netns.runner import backends
from tests.netns.scapy_probes import capture
from tests.scenarios.schema import CLUSTER, DIRECTORY, load, manifests


@pytest.fixture
def applied(agent: Agent):
    """Applies the objects of a scenario, without its probes."""
    base = manifests(CLUSTER)
    agent.configure({})

    def apply(name: str) -> None:
        objects = load(DIRECTORY / f"{name}.yaml").objects
        agent.world.probes.open(backends(objects))
        agent.apply([*base, *objects])

    yield apply
    agent.world.probes.shut()
    agent.expect_empty(base)


def one(agent: Agent, host: str, address: str, port: int, protocol: str = "TCP") -> Outcome:
    [[outcome]] = agent.world.probes.probe(Probe(host=host, address=address, port=port, protocol=protocol))
    return outcome


def test_a_refusal_quotes_the_clients_packet_and_is_port_unreachable(applied, agent):
    applied("no-endpoints")
    for protocol, layer in (("TCP", TCP), ("UDP", UDP)):
        port = 80 if protocol == "TCP" else 53
        with capture(agent.world, "p3") as seen:
            assert one(agent, "p3", "10.96.0.41", port, protocol).refused
            packet = seen.until(ICMP, type=3, code=3)
        assert packet[IP].src == "192.168.50.11"
        quoted = IP(bytes(packet[ICMP].payload))
        assert (quoted.src, quoted.dst, quoted[layer].dport) == ("10.244.1.13", "10.96.0.41", port)


def test_an_ipv6_refusal_is_port_unreachable(applied, agent):
    if not agent.world.ipv6:
        pytest.skip("the kernel is without IPv6")
    applied("no-endpoints")
    with capture(agent.world, "c") as seen:
        assert one(agent, "c", "2001:db8:113::30", 80).refused
        packet = seen.until(ICMPv6DestUnreach, code=4)
    quoted = IPv6(bytes(packet[ICMPv6DestUnreach].payload))
    assert (quoted.src, quoted.dst) == ("fd00:50::100", "2001:db8:113::30")


def test_the_syn_reaches_the_pod_with_the_backends_address_and_the_clients_port(applied, agent):
    """TRF-8, TRF-12."""
    applied("hairpin")
    with capture(agent.world, "p1") as seen:
        outcome = one(agent, "p2", "10.96.0.41", 80)
        packet = seen.until(TCP, dport=8080, sport=outcome.local[1])
    assert packet[TCP].flags == "S"
    assert (packet[IP].src, packet[IP].dst) == ("10.244.1.12", "10.244.1.11")


def test_a_masqueraded_syn_has_the_nodes_address_and_another_port(applied, agent):
    """TRF-5, TRF-9."""
    applied("external-policy-cluster")
    arrivals = []
    with capture(agent.world, "p1") as seen:
        while not arrivals:
            outcome = one(agent, "c", "203.0.113.30", 80)
            if outcome.host == "p1":
                arrivals.append(seen.until(TCP, dport=8080, flags="S"))
    assert arrivals[0][IP].src == "192.168.50.11"
    assert arrivals[0][TCP].sport == outcome.peer[1]
