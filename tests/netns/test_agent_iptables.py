"""The agent in iptables mode, with both kinds of programs: what only this mode has, and changes of mode.

It has a world of its own, as these tests flush rules and end agents.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from proxy.demo.probes import Probe
from proxy.demo.world import World
from proxy.modes import IPTABLES
from rules.forwarding import Family
from rules.iptables.programs import BACKENDS, available
from tests.netns.agent import Agent
from tests.netns.asking import answering, eventually, nft
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, load, manifests

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


def run(world: World, program: str, *arguments: str) -> str:
    """What a program says on node1."""
    done = world.namespaces["node1"].inside(
        lambda: subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    run(own_world, f"iptables-{programs}", *FLUSHES[flush])
    assert serving.read(Family.IPV4) != before
    eventually(lambda: serving.read(Family.IPV4) == before, f"the repair of: {flush}")
    assert serves(own_world)


def test_a_forward_policy_that_drops_lets_services_through(serving: Agent, own_world: World, programs: str) -> None:
    """TRF-28: what is marked for masquerading, and what is established."""
    run(own_world, f"iptables-{programs}", "-P", "FORWARD", "DROP")
    try:
        objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-cluster.yaml").objects
        own_world.probes.open(backends(objects))
        serving.apply(objects)
        assert answering(own_world, "c", "203.0.113.30", 80) == {"p1", "q1"}
    finally:
        run(own_world, f"iptables-{programs}", "-P", "FORWARD", "ACCEPT")


def test_packets_that_conntrack_cannot_place_are_dropped_unless_it_is_liberal(
    serving: Agent, own_world: World, programs: str
) -> None:
    """TRF-29."""
    listing = run(own_world, f"iptables-{programs}", "-S", "SLUICE-FORWARD")
    assert "-m conntrack --ctstate INVALID -j DROP" in listing
    liberal = "net.netfilter.nf_conntrack_tcp_be_liberal"
    run(own_world, "sysctl", "-qw", f"{liberal}=1")
    try:
        serving.stop()
        serving.start()
        serving.apply(served())
        assert "INVALID" not in run(own_world, f"iptables-{programs}", "-S", "SLUICE-FORWARD")
    finally:
        run(own_world, "sysctl", "-qw", f"{liberal}=0")
        serving.stop()
        serving.start()


def test_modes_change_places_and_no_connection_fails(
    serving: Agent, own_world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Agent(own_world, tmp_path_factory.mktemp("nftables"), "nftables")
    own_world.probes.start("pod", Probe(host="p3", address="10.96.0.41", port=80), 0.005)
    own_world.probes.start("outside", Probe(host="c", address="203.0.113.30", port=80), 0.005)
    try:
        serving.stop()
        other.configure({})
        other.apply(served())
        eventually(lambda: serving.read(Family.IPV4) is None, "the end of iptables' rules")
        other.stop()
        serving.start()
        serving.apply(served())
        eventually(lambda: "sluice" not in nft(own_world, "list", "tables"), "the end of nftables' table")
    finally:
        other.stop()
        outcomes = own_world.probes.stop("pod") + own_world.probes.stop("outside")
    assert outcomes
    assert {outcome.kind for outcome in outcomes} == {"answered"}
