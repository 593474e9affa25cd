"""What affinity remembers: more than a scenario can say, as one connection must be compared with another one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from proxy.demo.world import World
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import one_after_the_other
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, Manifest, manifests

CLUSTER_IP, NODE_PORT, LOAD_BALANCER = ("10.96.6.1", 80), ("192.168.50.11", 30001), ("203.0.113.31", 80)
BACKENDS = ("10.244.1.11", "10.244.1.12", "10.244.2.11", "10.244.2.12")
CLIENTS = ("p3", "p4", "c", "x")

Choices = dict[tuple[str, tuple[str, int]], str]


def sticky(*addresses: str, timeout: int = 10800, policy: str = "Cluster") -> list[Manifest]:
    """The cluster, a Service with affinity at every kind of frontend, and a Service that has nothing to do with it."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "sticky", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": policy,
            "clusterIP": CLUSTER_IP[0],
            "clusterIPs": [CLUSTER_IP[0]],
            "ipFamilies": ["IPv4"],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout}},
            "ports": [{"port": 80, "nodePort": NODE_PORT[1]}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER[0]}]}},
    }
    endpoints = [
        {"addresses": [address], "nodeName": "node1" if address.startswith("10.244.1.") else "node2"}
        for address in addresses
    ]
    return [*manifests(CLUSTER), service, slice_of("sticky", endpoints)]


def unrelated(*addresses: str) -> list[Manifest]:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "unrelated", "namespace": "default"},
        "spec": {
            "clusterIP": "10.96.6.2",
            "clusterIPs": ["10.96.6.2"],
            "ipFamilies": ["IPv4"],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "ports": [{"port": 80}],
        },
    }
    return [service, slice_of("unrelated", [{"addresses": [address]} for address in addresses])]


def slice_of(service: str, endpoints: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-1", "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 80}],
        "endpoints": endpoints,
    }


@pytest.fixture
def remembering(agent: Agent) -> Iterator[Agent]:
    """The agent of this worker with `sticky` applied; without any Service in the end."""
    objects = sticky(*BACKENDS)
    agent.configure({})
    agent.world.probes.open(backends(objects))
    agent.apply(objects)
    yield agent
    agent.world.probes.shut()
    agent.expect_empty(manifests(CLUSTER))


def choices(world: World, *frontends: tuple[str, int]) -> Choices:
    """Which backend each client has at each frontend."""
    found = {}
    for client in CLIENTS:
        for frontend in frontends:
            [found[client, frontend]] = one_after_the_other(world, client, *frontend, count=1)
    return found


def test_the_frontends_of_a_service_port_share_what_is_remembered(remembering, world):
    """TRF-24."""
    found = choices(world, CLUSTER_IP, NODE_PORT, LOAD_BALANCER)
    for client in CLIENTS:
        assert len({found[client, frontend] for frontend in (CLUSTER_IP, NODE_PORT, LOAD_BALANCER)}) == 1


def test_a_client_keeps_its_backend_whatever_else_changes(remembering, world):
    """TRF-26: another Service, other endpoints of its own, a restart and a crash of the agent."""
    before = choices(world, CLUSTER_IP, LOAD_BALANCER)
    own = sorted(BACKENDS)
    remembering.apply([*sticky(*own), *unrelated(*BACKENDS[:2])])
    assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before
    remembering.apply([*sticky(*own, "10.244.2.13", "10.244.1.1"), *unrelated(*BACKENDS)])
    assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before
    remembering.apply(sticky(*reversed(own)))
    assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before
    remembering.stop()
    assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before
    remembering.start()
    remembering.apply(sticky(*own))
    assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before
    remembering.kill()
    remembering.start()
    remembering.apply(sticky(*own))
    assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before


def test_a_client_keeps_its_backend_when_others_lose_theirs(remembering, world):
    """TRF-25."""
    before = choices(world, CLUSTER_IP)
    hosts = dict(zip(("p1", "p2", "q1", "q2"), BACKENDS, strict=True))
    gone = before["c", CLUSTER_IP]
    remembering.apply(sticky(*(address for host, address in hosts.items() if host != gone)))
    now = choices(world, CLUSTER_IP)
    for key, backend in before.items():
        assert now[key] == backend if backend != gone else now[key] != gone


def test_a_backend_that_comes_back_before_anybody_asked_has_its_clients_again_or_new_ones(remembering, world):
    """TRF-25: nobody is ever sent to an endpoint that is not there, nor is refused."""
    before = choices(world, CLUSTER_IP)
    remembering.apply(sticky("10.244.1.13"))
    remembering.apply(sticky(*BACKENDS))
    now = choices(world, CLUSTER_IP)
    assert now.keys() == before.keys()
    assert set(now.values()) <= {"p1", "p2", "q1", "q2"}


def test_what_is_remembered_ends_with_its_time(remembering, world):
    """TRF-24."""
    remembering.apply(sticky(*BACKENDS, timeout=1))
    before = choices(world, CLUSTER_IP)
    deadline = time.monotonic() + DEADLINE
    # With four clients and four backends, all choices are the same again once in 256 times.
    while (now := choices(world, CLUSTER_IP)) == before:
        assert time.monotonic() < deadline, "clients keep their backends for ever"
        time.sleep(1.1)  # the time is the kernel's, and each connection begins it anew
    assert now.keys() == before.keys()


def test_each_connection_begins_the_time_anew(remembering, world):
    """TRF-24."""
    remembering.apply(sticky(*BACKENDS, timeout=3))
    deadline = time.monotonic() + DEADLINE
    began = last = 0.0
    first = ""
    while time.monotonic() - began < 5 or not first:
        assert time.monotonic() < deadline, "the machine is too slow to connect within the time"
        asked = time.monotonic()
        [now] = one_after_the_other(world, "p3", *CLUSTER_IP, count=1)
        if asked - last > 2:
            began, first = time.monotonic(), now
        assert now == first, f"after {asked - began:.1f} s"
        last = asked
        time.sleep(0.25)  # the time is the kernel's


def test_a_client_keeps_its_backend_when_the_time_becomes_another(remembering, world):
    """TRF-24: how long is the Service's business, with whom is what was remembered."""
    before = choices(world, CLUSTER_IP, LOAD_BALANCER)
    for timeout in (600, 86400):
        remembering.apply(sticky(*BACKENDS, timeout=timeout))
        assert choices(world, CLUSTER_IP, LOAD_BALANCER) == before
