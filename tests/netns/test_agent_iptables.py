"""The agent in iptables mode, with both kinds of programs: what only this mode has, and changes of mode.

It has a world of its own, as these tests flush rules and end agents.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from proxy.demo.world import World
from proxy.modes import IPTABLES, open_dataplane
from rules.forwarding import Family
from rules.iptables.dataplane import IptablesDataplane
from rules.iptables.packets import Packets
from rules.iptables.programs import BACKENDS, available
from tests.netns.agent import Agent
from tests.netns.asking import answering, dropped, eventually, get, said
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, load, manifests, merge

# One world for all of them.
pytestmark = pytest.mark.xdist_group("agent-iptables")

FLUSHES = {
    "iptables -t nat -F": ["-t", "nat", "-F"],
    "iptables -F": ["-F"],
    "our chains of the nat table": ["-t", "nat", "-F", "SLUICE-SERVICES"],
    "a jump": ["-t", "nat", "-D", "PREROUTING", "1"],
}


@pytest.fixture(scope="module")
def own_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-ipt") as world:
        yield world


@pytest.fixture(scope="module", params=BACKENDS)
def programs(request: pytest.FixtureRequest) -> str:
    if request.param not in available(Family.IPV4):
        pytest.skip(f"iptables-{request.param} is not installed")
    return str(request.param)


@pytest.fixture(scope="module")
def own_agent(own_world: World, programs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    before = os.environ.get(IPTABLES)
    os.environ[IPTABLES] = programs
    agent = Agent(own_world, tmp_path_factory.mktemp(f"iptables-{programs}"), "iptables")
    yield agent
    agent.stop()
    if before is None:
        del os.environ[IPTABLES]
    else:
        os.environ[IPTABLES] = before


@pytest.fixture
def serving(own_agent: Agent, own_world: World) -> Iterator[Agent]:
    """An agent that runs and has synced a load balancer under policy Local."""
    own_agent.configure({})
    objects = served()
    own_world.probes.open(backends(objects))
    own_agent.apply(objects)
    yield own_agent
    own_world.probes.shut()


def served() -> list[Manifest]:
    return manifests(CLUSTER) + load(DIRECTORY / "external-policy-local.yaml").objects


def serves(world: World) -> bool:
    return answering(world, "p3", "10.96.0.41", 80) == {"p1", "q1"} and answering(world, "c", "203.0.113.30", 80) == {
        "p1"
    }


@pytest.mark.parametrize("flush", FLUSHES)
def test_what_others_flush_is_written_again_unasked(
    flush: str, serving: Agent, own_world: World, programs: str
) -> None:
    before = serving.read(Family.IPV4)
    assert before is not None
    assert not before.damage
    said(own_world, f"iptables-{programs}", *FLUSHES[flush])
    assert serving.read(Family.IPV4) != before
    eventually(lambda: serving.read(Family.IPV4) == before, f"the repair of: {flush}")
    assert serves(own_world)


def test_a_forward_policy_that_drops_lets_services_through(serving: Agent, own_world: World, programs: str) -> None:
    """TRF-28: what is marked for masquerading, and what is established."""
    said(own_world, f"iptables-{programs}", "-P", "FORWARD", "DROP")
    try:
        objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-cluster.yaml").objects
        own_world.probes.open(backends(objects))
        serving.apply(objects)
        assert answering(own_world, "c", "203.0.113.30", 80) == {"p1", "q1"}
    finally:
        said(own_world, f"iptables-{programs}", "-P", "FORWARD", "ACCEPT")


def test_an_input_policy_that_drops_lets_health_checks_in(serving: Agent, own_world: World, programs: str) -> None:
    """TRF-27, IPT-19, B-55: from the Service's first sync to its end, with endpoints or without, and nothing else."""

    def answered() -> bool:
        return get(own_world, "c", "192.168.50.11", 32000) is not None

    asked = {"spec": {"healthCheckNodePort": 32000}}
    checked = [merge(each, asked if each["kind"] == "Service" else {}) for each in served()]
    said(own_world, f"iptables-{programs}", "-P", "INPUT", "DROP")
    try:
        assert dropped(own_world, "c", "192.168.50.11", 32000)
        serving.apply(checked)
        eventually(answered, "the health check's answer")
        assert dropped(own_world, "c", "192.168.50.11", 10256), "that the node is well is not let in, as in kube-proxy"
        serving.apply([each for each in checked if each["kind"] != "EndpointSlice"])
        table = serving.read(Family.IPV4)
        assert table is not None
        assert table.node.health_check_ports == {32000}
        eventually(answered, "the answer without endpoints")
        serving.apply(served())
        assert "32000" not in said(own_world, f"iptables-{programs}-save")
    finally:
        said(own_world, f"iptables-{programs}", "-P", "INPUT", "ACCEPT")


def test_met_10_11_what_is_dropped_as_invalid_and_what_is_let_in_at_loopback_is_counted(
    serving: Agent, own_world: World
) -> None:
    """IPT-31."""
    node = own_world.namespaces["node1"]

    def counted() -> Packets:
        def inside() -> Packets:
            dataplane = open_dataplane("iptables", Family.IPV4)
            assert isinstance(dataplane, IptablesDataplane)
            return dataplane.packets()

        return node.inside(inside)

    def nonsense() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
            # From port 1000 to 80, with all flags set: the beginning of nothing.
            sock.sendto(struct.pack("!HHIIBBHHH", 1000, 80, 1, 0, 5 << 4, 0x3F, 1024, 0, 0), ("10.244.1.11", 0))

    before = counted()
    assert answering(own_world, "node1", "127.0.0.1", 30001, count=5) <= {"p1", "q1"}
    assert answering(own_world, "node1", "192.168.50.11", 30001, count=3) <= {"p1", "q1"}
    said(own_world, "ip", "route", "add", "10.244.1.0/24", "via", "192.168.50.11", host="c")
    try:
        for _ in range(4):
            own_world.namespaces["c"].inside(nonsense)
    finally:
        said(own_world, "ip", "route", "del", "10.244.1.0/24", "via", "192.168.50.11", host="c")
    assert counted().since(before) == Packets(invalid=4, loopback=5)
    assert Packets(1, 7).since(Packets(5, 6)) == Packets(1, 1)  # the first rule was written again


def test_packets_that_conntrack_cannot_place_are_dropped_unless_it_is_liberal(
    serving: Agent, own_world: World, programs: str
) -> None:
    """TRF-29, IPT-15, B-153."""
    listing = said(own_world, f"iptables-{programs}", "-S", "SLUICE-FORWARD")
    assert "-m conntrack --ctstate INVALID -j DROP" in listing
    liberal = "net.netfilter.nf_conntrack_tcp_be_liberal"
    said(own_world, "sysctl", "-qw", f"{liberal}=1")
    try:
        serving.stop()
        serving.start()
        serving.apply(served())
        assert "INVALID" not in said(own_world, f"iptables-{programs}", "-S", "SLUICE-FORWARD")
    finally:
        said(own_world, "sysctl", "-qw", f"{liberal}=0")
        serving.stop()
        serving.start()
