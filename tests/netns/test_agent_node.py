"""The own Node as a running agent sees it through an API server, and the events that it writes there.

It has a world of its own, as one network namespace holds one agent.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.demo.world import World
from rules.forwarding import Family, ForwardingTable, SourcePrefix, parse_prefix
from tests.netns.agent import DEADLINE, Agent
from tests.netns.api_feed import ApiFeed
from tests.netns.asking import answering, eventually, get
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, key_of, load, manifests, merge

# One world and one server for all of them.
pytestmark = pytest.mark.xdist_group("agent-node")

NODE = "Node/node1"
HEALTH_CHECK = 32010


@pytest.fixture(scope="module")
def node_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-node") as world:
        yield world


@pytest.fixture(scope="module")
def feed(node_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiFeed]:
    with ApiFeed(node_world, tmp_path_factory.mktemp("node-api")) as feed:
        yield feed


@pytest.fixture(scope="module")
def node_agent(
    node_world: World, feed: ApiFeed, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    agent = Agent(node_world, tmp_path_factory.mktemp("node-agent"), mode, feed)
    yield agent
    agent.sweep()


@pytest.fixture
def objects(node_agent: Agent) -> Iterator[dict[str, Manifest]]:
    """The cluster and the Service of `external-policy-local`, synced by an agent in its first configuration."""
    found = {
        key_of(each): each for each in [*manifests(CLUSTER), *load(DIRECTORY / "external-policy-local.yaml").objects]
    }
    node_agent.publish(found.values())
    node_agent.configure({"nodePortAddresses": ["primary"]})
    node_agent.world.probes.open(backends(found.values()))
    node_agent.apply(found.values())
    yield found
    node_agent.world.probes.shut()


def becomes(agent: Agent, objects: dict[str, Manifest], change: Manifest) -> None:
    """The own Node is another now, and the agent has seen that."""
    objects[NODE] = merge(objects[NODE], change)
    agent.apply(objects.values())


def health(world: World, path: str) -> tuple[int, Any]:
    reply = get(world, "node1", "127.0.0.1", 10256, path)
    assert reply is not None
    return reply.status, json.loads(reply.body)


def table(agent: Agent) -> ForwardingTable:
    found = agent.read(Family.IPV4)
    assert found is not None
    return found


def test_a_node_that_is_about_to_go_gets_no_new_load_and_the_agent_stays_alive(node_world, node_agent, objects):
    """NOD-8, HC-4, HC-5: other taints don't matter, and the taint may go again."""
    assert health(node_world, "/healthz")[0] == 200
    for taints, status in (
        ([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}], 503),
        ([{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}], 200),
        ([{"key": "ToBeDeletedByClusterAutoscaler", "value": "1", "effect": "PreferNoSchedule"}], 503),
        ([], 200),
    ):
        becomes(node_agent, objects, {"spec": {"taints": taints}})
        eventually(lambda status=status: health(node_world, "/healthz")[0] == status, f"{status} with {taints}")
        body = health(node_world, "/healthz")[1]
        assert (body["nodeEligible"], body["healthy"]) == (status == 200, True)
        assert health(node_world, "/livez")[0] == 200
    assert answering(node_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}


def test_other_addresses_of_the_node_answer_node_ports_at_once(node_world, node_agent, objects):
    """NOD-7, NOD-11, CFG-31."""

    def answer_node_ports(agent: Agent) -> set[str] | None:
        found = table(agent).node.node_port_addresses
        return None if found is None else {socket.inet_ntoa(each) for each in found}

    assert answer_node_ports(node_agent) == {"192.168.50.11"}
    assert answering(node_world, "c", "192.168.50.11", 30001) == {"p1"}
    becomes(
        node_agent,
        objects,
        {"status": {"addresses": [{"type": "InternalIP", "address": "192.168.51.11"}]}},
    )
    eventually(lambda: answer_node_ports(node_agent) == {"192.168.51.11"}, "the other address")
    assert answering(node_world, "c", "192.168.51.11", 30001) == {"p1"}
    assert answering(node_world, "c", "192.168.50.11", 30001, count=1) != {"p1"}
    assert node_agent.pid


def test_other_pod_cidrs_end_the_agent_and_the_next_one_goes_by_them(node_world, node_agent, objects):
    """NOD-5, NOD-6, CFG-40, CFG-51: the rules stay meanwhile."""
    node_agent.configure({"detectLocalMode": "NodeCIDR"})
    node_agent.apply(objects.values())
    assert table(node_agent).node.detector == SourcePrefix(parse_prefix("10.244.1.0/24"))
    process = node_agent._process
    assert process is not None
    before = table(node_agent)
    objects[NODE] = merge(objects[NODE], {"spec": {"podCIDR": "10.244.3.0/24", "podCIDRs": ["10.244.3.0/24"]}})
    node_agent.publish(objects.values())
    assert process.wait(timeout=DEADLINE) == 1
    assert "podCIDRs changed" in node_agent.tail()
    after = table(node_agent)
    assert after.node == before.node
    assert answering(node_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}
    node_agent.start()
    node_agent.wait()
    assert table(node_agent).node.detector == SourcePrefix(parse_prefix("10.244.3.0/24"))
    node_agent.stop()


def test_events_reach_the_server_and_a_taken_port_stops_nothing(node_world, node_agent, feed, objects):
    """CFG-56, HC-21: the port is tried again by the next sync once it is free."""

    def recorded(reason: str) -> list[dict[str, Any]]:
        return [
            each for each in feed.call(lambda: list(feed.server.store.objects("events"))) if each["reason"] == reason
        ]

    eventually(lambda: recorded("Starting"), "the event of the start")
    assert recorded("Starting")[-1]["regarding"] == {"kind": "Node", "name": "node1", "uid": "node1"}

    def take() -> socket.socket:
        taken = socket.create_server(("0.0.0.0", HEALTH_CHECK))
        taken.listen()
        return taken

    taken = node_world.namespaces["node1"].inside(take)
    try:
        objects["Service/default/web"] = merge(
            objects["Service/default/web"], {"spec": {"healthCheckNodePort": HEALTH_CHECK}}
        )
        node_agent.apply(objects.values())
        eventually(lambda: recorded("FailedToStartServiceHealthcheck"), "the event of the Service")
        [event] = recorded("FailedToStartServiceHealthcheck")
        assert event["regarding"]["name"] == "web"
        assert event["note"].startswith(
            f'node node1 failed to start healthcheck "default/web" on port {HEALTH_CHECK}: '
        )
        assert answering(node_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}
    finally:
        taken.close()
    node_agent.apply(objects.values())
    eventually(lambda: get(node_world, "c", "192.168.50.11", HEALTH_CHECK) is not None, "the health-check node port")


@pytest.mark.parametrize(
    ("address", "server", "reason"),
    [
        ("healthzBindAddress", "health", "FailedToStartProxierHealthcheck"),
        ("metricsBindAddress", "metrics", "FailedToStartMetricServer"),
    ],
)
def test_a_server_that_cannot_listen_ends_the_agent_where_that_is_wanted(address, server, reason, node_agent, request):
    """CFG-55, HC-8, HTTP-3: with the event, and otherwise it is tried again while rules are served."""
    objects, feed, tmp_path = map(request.getfixturevalue, ("objects", "feed", "tmp_path"))
    node_world = node_agent.world
    taken = node_world.namespaces["node1"].inside(lambda: socket.create_server(("127.0.0.1", 10999)))
    try:
        node_agent.configure({address: "127.0.0.1:10999"})
        node_agent.apply(objects.values())
        assert f"cannot serve {server} on 127.0.0.1:10999" in node_agent.log.read_text()
        node_agent.stop()
        file = tmp_path / "config.yaml"
        config = merge(node_agent._config or {}, {"bindAddressHardFail": True})
        file.write_text(json.dumps(config))
        command = [each if not each.endswith("config.yaml") else str(file) for each in node_agent.command()]
        output = tmp_path / "log"
        with output.open("wb") as log:
            process = node_world.start("node1", command, stdout=log, stderr=subprocess.STDOUT)
            assert process.wait(timeout=DEADLINE) == 1
        assert f"cannot serve {server} on 127.0.0.1:10999" in output.read_text().splitlines()[-1]
        found = feed.call(lambda: list(feed.server.store.objects("events")))
        assert reason in {each["reason"] for each in found}
    finally:
        taken.close()
