"""The agent fed by an API server: the widest scenarios again, and what happens when the server is away.

It has a world of its own, as one network namespace holds one agent.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.demo.world import World
from rules.forwarding import Family, ForwardingTable
from tests.netns.agent import Agent
from tests.netns.api_feed import ApiFeed
from tests.netns.asking import answering, dropped, eventually
from tests.netns.runner import backends, run
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, Patch, Step, after, key_of, load, manifests

# One world and one server for all of them.
pytestmark = pytest.mark.xdist_group("agent-api")

WIDEST = (
    "cluster-ip",
    "external-policy-cluster",
    "external-policy-local",
    "hairpin",
    "internal-policy",
    "masquerade-base",
    "ports",
    "services-skipped",
    "slices",
    "source-ranges",
    "terminating-policy-local",
)


@pytest.fixture(scope="module")
def api_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-api") as world:
        yield world


@pytest.fixture(scope="module")
def feed(api_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiFeed]:
    with ApiFeed(api_world, tmp_path_factory.mktemp("api")) as feed:
        yield feed


@pytest.fixture(scope="module")
def api_agent(api_world: World, feed: ApiFeed, mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(api_world, tmp_path_factory.mktemp("api-agent"), mode, feed)
    agent.publish(manifests(CLUSTER))
    agent.configure({})
    agent.wait()
    # ServiceCIDRs are no part of what a first sync waits for.
    eventually(lambda: (table := agent.read(Family.IPV4)) is not None and bool(table.node.service_cidrs))
    yield agent
    agent.stop()


@pytest.fixture
def objects(api_agent: Agent) -> Iterator[dict[str, Manifest]]:
    """The cluster and the Services of two scenarios; the cluster alone remains."""
    cluster = {key_of(each): each for each in manifests(CLUSTER)}
    scenarios = [load(DIRECTORY / f"{name}.yaml") for name in ("external-policy-local", "topology-zones")]
    added = {key_of(each): each for scenario in scenarios for each in scenario.objects}
    api_agent.configure({})
    yield cluster | added
    api_agent.world.probes.shut()
    api_agent.expect_empty(cluster.values())


def held(agent: Agent) -> list[ForwardingTable | None]:
    return [agent.read(family) for family in agent.families]


@pytest.mark.parametrize("name", WIDEST)
def test_scenario_through_the_api(name: str, api_agent: Agent) -> None:
    """SVC-1, EPS-1: what selectors of lists and watches hide never arrives; labels that come and go do."""
    run(load(DIRECTORY / f"{name}.yaml"), api_agent)


def test_rules_stay_while_the_server_is_away_and_changes_arrive_when_it_is_back(api_world, api_agent, feed, objects):
    api_agent.world.probes.open(backends(objects.values()))
    api_agent.apply(objects.values())
    before = held(api_agent)
    feed.go_away()
    try:
        assert answering(api_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}
        moved = {"endpoints": [{"addresses": ["10.244.1.12"], "nodeName": "node1"}]}
        step = Step(
            patch=[Patch(object="EndpointSlice/default/web-4", merge=moved)], delete=["Service/default/internal-local"]
        )
        changed = after(objects, step)
        api_agent.world.probes.open(backends(changed.values()))
        api_agent.publish(changed.values())
        assert held(api_agent) == before
        assert answering(api_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}
        assert answering(api_world, "p3", "10.96.2.3", 80) == {"p1", "p2"}
    finally:
        feed.come_back()
    api_agent.wait()
    assert answering(api_world, "p3", "10.96.0.41", 80) == {"p2"}
    assert answering(api_world, "c", "203.0.113.30", 80) == {"p2"}
    assert dropped(api_world, "p3", "10.96.2.3", 80)


def test_the_rules_stay_when_the_agent_starts_while_the_server_is_away(api_world, api_agent, feed, objects):
    """SYN-1: nothing is written before Services and slices have been listed."""
    api_agent.world.probes.open(backends(objects.values()))
    api_agent.apply(objects.values())
    before = held(api_agent)
    feed.go_away()
    try:
        api_agent.stop()
        api_agent.start()
        eventually(lambda: "in trouble" in api_agent.log.read_text().rpartition("starting ")[2])
        assert held(api_agent) == before
        assert answering(api_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}
    finally:
        feed.come_back()
    api_agent.apply(objects.values())
    assert answering(api_world, "p3", "10.96.0.41", 80) == {"p1", "q1"}


def test_a_new_zone_of_the_own_node_changes_the_selection(api_world, api_agent, feed, objects):
    """NOD-2, NOD-9: only the Node of the own name is followed; the zone of another one changes nothing."""
    api_agent.world.probes.open(backends(objects.values()))
    api_agent.apply(objects.values())
    assert answering(api_world, "p3", "10.96.2.1", 80) == {"p1", "q2"}
    for node, zone, expected in (
        ("node2", "zb", {"p1", "q2"}),
        ("node1", "zb", {"p2"}),
        ("node1", "zx", {"p1", "p2", "q1", "q2"}),
        ("node1", "za", {"p1", "q2"}),
    ):
        value = objects[f"Node/{node}"]
        labels = {**value["metadata"]["labels"], "topology.kubernetes.io/zone": zone}
        objects[f"Node/{node}"] = {**value, "metadata": {**value["metadata"], "labels": labels}}
        api_agent.apply(objects.values())
        eventually(lambda expected=expected: answering(api_world, "p3", "10.96.2.1", 80) == expected)
    assert {request.query.get("fieldSelector") for request in feed.server.requests if request.resource == "nodes"} == {
        "metadata.name=node1"
    }


def test_a_slices_port_without_a_name_or_a_number_is_passed_over(api_world, api_agent, objects):
    """EPS-6: of an API server's slices; in manifests a missing name is the empty one, as the API would make it."""
    objects["Service/default/bare"] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "bare", "namespace": "default"},
        "spec": {
            "clusterIP": "10.96.4.9",
            "clusterIPs": ["10.96.4.9"],
            "ipFamilies": ["IPv4"],
            "ports": [{"port": 80}],
        },
    }
    for name, address, port in (
        ("nameless", "10.244.1.11", {"port": 80}),
        ("numberless", "10.244.1.12", {"name": ""}),
        ("whole", "10.244.2.11", {"name": "", "port": 80}),
    ):
        objects[f"EndpointSlice/default/{name}"] = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "bare"}},
            "addressType": "IPv4",
            "ports": [port],
            "endpoints": [{"addresses": [address]}],
        }
    api_agent.world.probes.open(backends(objects.values()))
    api_agent.apply(objects.values())
    assert answering(api_world, "p3", "10.96.4.9", 80) == {"q1"}
