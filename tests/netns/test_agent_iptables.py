"""The agent in iptables mode, with both kinds of programs: what only this mode has, and changes of mode.

It has a world of its own, as these tests flush rules and end agents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from proxy.demo.world import World
from proxy.modes import IPTABLES
from rules.forwarding import Family
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
