"""What docs/compatibility.md says of programs that set the policy of the chain FORWARD, as Docker and ufw do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.demo.probes import Probe
from proxy.demo.world import World
from tests.netns.agent import Agent
from tests.netns.asking import said
from tests.netns.runner import DROP, backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, load, manifests

pytestmark = pytest.mark.xdist_group("deploy-neighbours")


@pytest.fixture(scope="module")
def world(root: None) -> Iterator[World]:
    with World(prefix="sluice-forward") as world:
        yield world


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def served(request, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent with a load balancer under policy Cluster."""
    objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-cluster.yaml").objects
    agent = Agent(world, tmp_path_factory.mktemp("agent"), request.param)
    agent.publish(objects)
    agent.configure({})
    agent.wait()
    world.probes.open(backends(objects))
    yield agent
    world.probes.shut()
    agent.expect_empty(manifests(CLUSTER))
    agent.stop()


@pytest.fixture
def docker(world: World) -> Iterator[None]:
    """FORWARD as Docker leaves it, with its own chain in front."""
    said(world, "iptables-nft", "-N", "DOCKER-USER")
    said(world, "iptables-nft", "-A", "FORWARD", "-j", "DOCKER-USER")
    said(world, "iptables-nft", "-P", "FORWARD", "DROP")
    yield
    said(world, "iptables-nft", "-P", "FORWARD", "ACCEPT")
    said(world, "iptables-nft", "-D", "FORWARD", "-j", "DOCKER-USER")
    said(world, "iptables-nft", "-F", "DOCKER-USER")
    said(world, "iptables-nft", "-X", "DOCKER-USER")


def outcome(world: World, host: str, address: str) -> set[str]:
    probe = Probe(host=host, address=address, port=80, count=20, timeout=DROP)
    return {each.host or each.kind for each in world.probes.probe(probe)[0]}


def test_a_forward_policy_of_drop_drops_what_docker_does_not_know(served, docker, world):
    """The node's own connections are not forwarded; of others mode iptables accepts what it masquerades (IPT-15)."""
    through = {"p1", "q1"}
    assert outcome(world, "node1", "203.0.113.30") == through
    assert outcome(world, "c", "203.0.113.30") == (through if served.mode == "iptables" else {"silent"})
    assert outcome(world, "p3", "10.96.0.41") == {"silent"}


def test_one_rule_lets_through_what_was_translated(served, docker, world):
    """The rule that docs/compatibility.md names."""
    said(world, "iptables-nft", "-A", "DOCKER-USER", "-m", "conntrack", "--ctstate", "DNAT,ESTABLISHED", "-j", "ACCEPT")
    for host, address in (("node1", "203.0.113.30"), ("c", "203.0.113.30"), ("p3", "10.96.0.41")):
        assert outcome(world, host, address) == {"p1", "q1"}
