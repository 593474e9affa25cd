"""What a change of the own Node leads to: NOD-3, NOD-5 to NOD-9, HC-5."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy import agent, own_node
from proxy.config.settings import Settings
from proxy.sources.base import Resource
from rules.forwarding import Family, SourcePrefix, parse_address, parse_prefix
from tests.builders import NODE, OTHER, at, backends, endpoint, endpoint_slice, node, service
from tests.fakes.memory_dataplane import FlakyMemory
from tests.fakes.polling import eventually

ZONE = "topology.kubernetes.io/zone"
DEADLINE = 20.0
V4 = Family.IPV4


class ExitedError(Exception):
    """The process would have ended."""


@pytest.fixture
def ended(monkeypatch):
    """Codes with which the process would have ended."""
    codes = []

    def end(code):
        codes.append(code)
        raise ExitedError

    monkeypatch.setattr("os._exit", end)
    return codes


class Running:
    """An agent whose kernel is a variable, on a node that is what tests say."""

    def __init__(self, **settings):
        self.dataplane = FlakyMemory(V4)
        self.agent = agent._Agent(Settings(min_sync_period=0.001, **settings), NODE, [self.dataplane], [])
        self.state = self.agent._state
        self.state.on_change = self.agent._on_change
        self.agent._on_interfaces({"eth0": (parse_address("192.168.0.2"), parse_address("10.0.0.2"))})
        self.desired = self.agent._desired

    def is_node(self, value):
        """The Node is this now."""
        self.state.set(Resource.NODES, value)

    def has(self, *objects):
        """These are all Services and slices."""
        for resource, kind in ((Resource.SERVICES, "Service"), (Resource.SLICES, "EndpointSlice")):
            self.state.replace(resource, [each for each in objects if type(each).__name__ == kind])

    def health(self):
        health = self.agent._health
        return health.healthz().status, health.livez().status

    def changes(self):
        """The frontends that the next sync would write again, and what becomes of the node's facts."""
        asyncio.run(self.desired.refresh())
        delta = self.desired.take_delta(V4)
        return {*delta.changed, *delta.removed}, delta.node


def zoned(zone, **more):
    return node(labels={ZONE: zone} if zone else {}, addresses={"InternalIP": ["192.168.0.2"]}, **more)


def test_nod_9_another_zone_writes_the_services_that_it_concerns_and_no_others():
    running = Running(mode="nftables")
    zones = [endpoint("10.0.1.1", OTHER, zones=["a"]), endpoint("10.0.1.2", OTHER, zones=["b"])]
    running.has(
        service("zoned", cluster_ip="172.30.0.41"),
        endpoint_slice(zones, name="zoned-1", owner="zoned"),
        service("plain", cluster_ip="172.30.0.42"),
        endpoint_slice([endpoint("10.0.1.3")], name="plain-1", owner="plain"),
    )
    running.is_node(zoned("a"))
    running.changes()
    table = running.desired.table(V4)
    assert table.routes[at("172.30.0.41:80")].backends == backends("10.0.1.1")
    running.is_node(zoned("b"))
    assert running.changes() == ({at("172.30.0.41:80")}, None)
    assert running.desired.table(V4).routes[at("172.30.0.41:80")].backends == backends("10.0.1.2")
    running.is_node(zoned(""))
    assert running.changes() == ({at("172.30.0.41:80")}, None)
    assert running.desired.table(V4).routes[at("172.30.0.41:80")].backends == backends("10.0.1.1", "10.0.1.2")


def test_nod_9_other_labels_write_nothing():
    running = Running(mode="nftables")
    running.has(service(), endpoint_slice([endpoint("10.0.1.1")]))
    running.is_node(zoned("a"))
    running.changes()
    running.is_node(node(labels={ZONE: "a", "x": "y"}, addresses={"InternalIP": ["192.168.0.2"]}))
    assert running.changes() == (set(), None)


def test_nod_7_another_address_acts_at_once_on_node_ports_and_source_ranges():
    running = Running(mode="nftables", node_port_addresses=("primary",))
    running.has(
        service(
            type="LoadBalancer",
            vips=["1.2.3.4"],
            ports=[{"port": 80, "nodePort": 3001}],
            loadBalancerSourceRanges=["10.0.0.0/24"],
        ),
        endpoint_slice([endpoint("10.0.1.1")]),
    )
    running.is_node(node(addresses={"InternalIP": ["192.168.0.2"]}))
    running.changes()
    assert running.desired.facts(V4).node_port_addresses == {parse_address("192.168.0.2")}
    # TRF-31: the node may reach a VIP whose source ranges hold its own address.
    running.is_node(node(addresses={"InternalIP": ["10.0.0.2"]}))
    changed, facts = running.changes()
    assert facts.node_port_addresses == {parse_address("10.0.0.2")}
    assert changed <= {at("1.2.3.4:80")}


def test_nod_7_a_node_that_loses_its_addresses_keeps_those_that_it_had():
    running = Running(mode="nftables")
    running.has(service(), endpoint_slice([endpoint("10.0.1.1")]))
    running.is_node(node(addresses={"InternalIP": ["192.168.0.2"]}))
    running.changes()
    running.is_node(node())
    running.changes()
    # As in kube-proxy, which reads them at its start alone: `primary` without an address would be all of them (CFG-31).
    assert running.desired.facts(V4).node_port_addresses == {parse_address("192.168.0.2")}
    assert at("172.30.0.41:80") in running.desired.table(V4).routes


@pytest.mark.parametrize("then", [["10.244.2.0/24"], ["10.244.1.0/24", "fd00::/64"], []])
def test_nod_6_other_pod_cidrs_end_the_process(then, ended):
    running = Running(detect_local_mode="NodeCIDR")
    running.is_node(node())
    running.is_node(node(pod_cidrs=["10.244.1.0/24"]))
    running.is_node(node(pod_cidrs=["10.244.1.0/24"], labels={"x": "y"}))
    assert ended == []
    with pytest.raises(ExitedError):
        running.is_node(node(pod_cidrs=then))
    assert ended == [1]


def test_nod_6_in_other_modes_nobody_minds(ended):
    running = Running()
    for cidr in ("10.244.1.0/24", "10.244.2.0/24"):
        running.is_node(node(pod_cidrs=[cidr]))
    assert ended == []


def test_nod_5_detection_rests_on_the_pod_cidrs():
    running = Running(detect_local_mode="NodeCIDR")
    running.is_node(node(pod_cidrs=["10.244.1.0/24"]))
    running.changes()
    assert running.desired.facts(V4).detector == SourcePrefix(parse_prefix("10.244.1.0/24"))


def test_nod_8_hc_5_a_node_that_is_about_to_go_gets_no_new_load_and_stays_alive():
    running = Running()
    assert running.health() == (503, 200)  # never seen
    running.is_node(node())
    assert running.health() == (200, 200)
    running.is_node(node(taints=["ToBeDeletedByClusterAutoscaler"]))
    assert running.health() == (503, 200)
    assert json.loads(running.agent._health.healthz().body)["healthy"] is True
    running.is_node(node(taints=["node.kubernetes.io/unschedulable"]))
    assert running.health() == (200, 200)
    running.is_node(node(deleted=True))
    assert running.health() == (503, 200)


def test_nod_8_of_a_deleted_node_the_last_form_counts():
    running = Running()
    running.is_node(node())
    running.state.delete(Resource.NODES, node().key)
    assert running.health() == (200, 200)
    running.is_node(node(name="another", taints=["ToBeDeletedByClusterAutoscaler"]))
    assert running.health() == (200, 200)


def test_without_a_cluster_and_a_node_the_node_is_eligible():
    running = Running(manifests="/somewhere")
    running.has()
    assert running.health() == (200, 200)
    running.is_node(node(taints=["ToBeDeletedByClusterAutoscaler"]))
    assert running.health() == (503, 200)


# --- the start -------------------------------------------------------------------------------------------------


def waiting(running, monkeypatch, **patience):
    """A wait for the node, with less patience."""
    for name, seconds in patience.items():
        monkeypatch.setattr(own_node, name, seconds)
    return running.agent._own_node.wait()


def test_nod_2_nothing_is_said_before_nodes_have_been_listed(monkeypatch):
    async def test():
        running = Running()
        task = asyncio.create_task(waiting(running, monkeypatch, NODE_PATIENCE=0.001))
        running.is_node(node(addresses={"InternalIP": ["192.168.0.2"]}))
        await asyncio.sleep(0.05)
        assert not task.done()
        running.state.replace(Resource.NODES, [node(addresses={"InternalIP": ["192.168.0.2"]})])
        async with asyncio.timeout(DEADLINE):
            await task

    asyncio.run(test())


def test_nod_3_a_node_without_addresses_is_waited_for_and_then_not(monkeypatch, capsys):
    async def test():
        running = Running()
        running.state.replace(Resource.NODES, [])
        async with asyncio.timeout(DEADLINE):
            await waiting(running, monkeypatch, NODE_PATIENCE=0.01)

    asyncio.run(test())
    shown = capsys.readouterr()
    assert "timed out waiting for the Node and its addresses" in shown.out + shown.err


def test_nod_5_without_pod_cidrs_the_agent_ends(monkeypatch):
    async def test():
        running = Running(detect_local_mode="NodeCIDR")
        running.state.replace(Resource.NODES, [node(addresses={"InternalIP": ["192.168.0.2"]})])
        with pytest.raises(agent.FatalError, match=f'timeout waiting for PodCIDR allocation on node "{NODE}"'):
            await waiting(running, monkeypatch, POD_CIDR_PATIENCE=0.01)

    asyncio.run(test())


def test_nod_5_pod_cidrs_that_come_later_are_waited_for(monkeypatch):
    async def test():
        running = Running(detect_local_mode="NodeCIDR")
        first = node(addresses={"InternalIP": ["192.168.0.2"]})
        running.state.replace(Resource.NODES, [first])
        task = asyncio.create_task(waiting(running, monkeypatch))
        await asyncio.sleep(0)
        assert not task.done()
        running.is_node(node(addresses={"InternalIP": ["192.168.0.2"]}, pod_cidrs=["10.244.1.0/24"]))
        await eventually(task.done, seconds=DEADLINE)
        await task

    asyncio.run(test())
