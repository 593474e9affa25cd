"""Stale flows: what the kernel deletes when it is asked, and what a client with a long-lived socket sees of it."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

from rules.forwarding import Backend, Endpoint, Family, Protocol, parse_address
from rules.netlink.attributes import CREATE, EXCLUSIVE, attribute, be32, nested, u8
from rules.netlink.conntrack import ANSWERED, DESTINATION_NAT, SOURCE_NAT, Flow, Match
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.counters import measure
from rules.netlink.transaction import NetfilterSocket, netfilter_message
from tests.netns.agent import Agent
from tests.netns.asking import eventually, nft
from tests.netns.isolation import own_network_namespace
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, Manifest, manifests

UDP, TCP, SCTP = Protocol.UDP, Protocol.TCP, Protocol.SCTP

CONFIRMED = 1 << 3

# --- the kernel ----------------------------------------------------------------------------------------------


def one_way(kind: int, protocol: Protocol, source: Backend, destination: Backend) -> bytes:
    kinds = (1, 2) if len(source.address) == 4 else (3, 4)
    addresses = zip(kinds, (source.address, destination.address), strict=True)
    ports = zip((2, 3), (source.port.to_bytes(2), destination.port.to_bytes(2)), strict=True)
    parts = (attribute(*each) for each in addresses), (attribute(*each) for each in ports)
    return nested(kind, nested(1, *parts[0]), nested(2, u8(1, protocol), *parts[1]))


def nat(kind: int, backend: Backend) -> bytes:
    port = backend.port.to_bytes(2)
    kinds = (1, 2) if len(backend.address) == 4 else (4, 5)
    addresses = (attribute(each, backend.address) for each in kinds)
    return nested(kind, *addresses, nested(3, attribute(1, port), attribute(2, port)))


def make(client: Endpoint, to: Backend, backend: Backend | None, *, answered: bool = False, zone: int = 0) -> bytes:
    """A request for an entry, as a packet of a client would have made it."""
    protocol = client.protocol
    source = Backend(client.address, client.port)
    payload = one_way(1, protocol, source, to) + one_way(2, protocol, to, source)
    payload += be32(7, 600) + be32(3, CONFIRMED | ANSWERED * answered)
    if zone:
        payload += attribute(18, zone.to_bytes(2))
    if protocol is TCP:
        payload += nested(4, nested(1, u8(1, 1)))
    if backend is not None:
        payload += nat(13, backend)
    family = socket.AF_INET if len(client.address) == 4 else socket.AF_INET6
    return netfilter_message(0, CREATE | EXCLUSIVE, family, payload, 1)


NAT_TABLES = "".join(
    f"table {family} t {{ chain c {{ type nat hook prerouting priority 0; }}; }}\n" for family in ("ip", "ip6")
)


@pytest.fixture
def insert(root: None) -> Iterator[Callable[..., None]]:
    """Makes entries in a network namespace of the test's own."""
    with own_network_namespace():
        subprocess.run(["nft", "-f", "-"], input=NAT_TABLES, text=True, check=True)
        with NetfilterSocket() as netfilter:

            def insert(*requests: bytes) -> None:
                assert not netfilter.perform_each(requests)

            yield insert


PLAN = {
    Family.IPV4: ("10.1.0.9", "10.96.0.10", "10.96.0.11", ("10.244.0.1", "10.244.0.2"), "192.168.50.11"),
    Family.IPV6: ("fd00:1::9", "fd00:10:96::a", "fd00:10:96::b", ("fd00:244::1", "fd00:244::2"), "fd00:50::11"),
}
NODE_PORT = 30053


class Entries:
    """The same flows in either family: to a Service, to a node port, and to what is none of ours."""

    def __init__(self, family: Family, insert: Callable[..., None]) -> None:
        self.family = family
        client, service, other, pods, node = PLAN[family]
        self.service, self.other, self.node = (parse_address(text) for text in (service, other, node))
        self.pods = [Backend(parse_address(text), 5353) for text in pods]
        self._client = parse_address(client)
        self._ports = iter(range(1000, 65536))
        targets = [Backend(self.service, 53), Backend(self.service, 54), Backend(self.other, 53)]
        targets.append(Backend(self.node, NODE_PORT))
        insert(
            *(
                make(self.client(protocol), target, backend)
                for protocol in (UDP, TCP, SCTP)
                for target in targets
                for backend in (*self.pods, None)
            )
        )

    def client(self, protocol: Protocol) -> Endpoint:
        return Endpoint(self._client, protocol, next(self._ports))

    def match(self, port: int = 53, **fields: object) -> Match:
        return Match(self.family, UDP, b"" if port == NODE_PORT else self.service, port)._replace(**fields)


def all_of(family: Family) -> set[Flow]:
    with Conntrack(family) as conntrack:
        return {flow._replace(rest=b"") for protocol in Protocol for flow in conntrack.flows(protocol)}


@pytest.fixture(params=["by match", "one by one"])
def conntrack_of(request: pytest.FixtureRequest) -> Callable[[Family], Conntrack]:
    """Opens connection tracking, and the same on a kernel that deletes nothing by a match."""

    def open_one(family: Family) -> Conntrack:
        conntrack = Conntrack(family)
        if request.param == "one by one":
            conntrack._deletes_by_match = False
        return conntrack

    return open_one


@pytest.mark.parametrize("family", Family)
def test_entries_are_read_as_they_were_made(family: Family, insert: Callable[..., None]) -> None:
    entries = Entries(family, insert)
    with Conntrack(family) as conntrack:
        flows = list(conntrack.flows(UDP))
    assert len(flows) == 12
    assert {(flow.destination, flow.port) for flow in flows} == {
        (entries.service, 53),
        (entries.service, 54),
        (entries.other, 53),
        (entries.node, NODE_PORT),
    }
    for flow in flows:
        assert flow.translated == bool(flow.status & DESTINATION_NAT) == (flow.backend in entries.pods)
        assert measure(flow).identity


@pytest.mark.parametrize("family", Family)
def test_a_match_deletes_exactly_what_matches(
    family: Family, insert: Callable[..., None], conntrack_of: Callable[[Family], Conntrack]
) -> None:
    entries = Entries(family, insert)
    first, _ = entries.pods
    dnat = DESTINATION_NAT
    with conntrack_of(family) as conntrack:
        for match, count in (
            (entries.match(backend=first), 1),
            (entries.match(status=dnat, mask=dnat), 1),
            (entries.match(mask=dnat), 1),
            (entries.match(), 0),
            (entries.match(NODE_PORT, backend=first), 1),
            (entries.match(NODE_PORT, mask=dnat | SOURCE_NAT), 1),
            (entries.match(54), 3),
        ):
            before = all_of(family)
            assert conntrack.delete_matching(match) == count, match
            gone = before - all_of(family)
            assert gone == {flow for flow in before if match.admits(flow)}
            assert len(gone) == count
    others = {flow for flow in all_of(family) if flow.protocol == UDP}
    assert len(others) == 3 + 1
    assert conntrack._deletes_by_match == (conntrack_of(family)._deletes_by_match), "this kernel's way was not used"


def test_only_connections_that_nobody_answered_match(
    insert: Callable[..., None], conntrack_of: Callable[[Family], Conntrack]
) -> None:
    entries = Entries(Family.IPV4, insert)
    for answered in (True, False):
        insert(make(entries.client(TCP), Backend(entries.service, 80), entries.pods[0], answered=answered))
    match = entries.match(80, protocol=TCP, backend=entries.pods[0], mask=ANSWERED)
    with conntrack_of(Family.IPV4) as conntrack:
        assert conntrack.delete_matching(match) == 1
        assert [flow.status & ANSWERED for flow in conntrack.flows(TCP) if flow.port == 80] == [ANSWERED]


def test_entries_of_another_zone_are_left_alone(
    insert: Callable[..., None], conntrack_of: Callable[[Family], Conntrack]
) -> None:
    entries = Entries(Family.IPV4, insert)
    insert(make(entries.client(UDP), Backend(entries.service, 55), entries.pods[0], zone=7))
    with conntrack_of(Family.IPV4) as conntrack:
        assert not [flow for flow in conntrack.flows(UDP) if flow.port == 55]
        assert conntrack.delete_matching(entries.match(55)) == 0
    count = subprocess.run(
        ["cat", "/proc/sys/net/netfilter/nf_conntrack_count"], capture_output=True, text=True, check=True
    )
    assert int(count.stdout) == 12 * 3 + 1


def test_a_sweep_of_thousands_deletes_what_is_stale_and_no_other(insert: Callable[..., None]) -> None:
    entries = Entries(Family.IPV4, insert)
    first, second = entries.pods
    clients = [entries.client(UDP) for _ in range(6000)]
    insert(*(make(each, Backend(entries.service, 56), (first, second)[each.port % 2]) for each in clients))
    with Conntrack(Family.IPV4) as conntrack:
        stale = lambda flow: flow.port == 56 and flow.backend == first  # noqa: E731  # one line says it
        assert conntrack.sweep(Match(Family.IPV4, UDP), stale) == 3000
        left = list(conntrack.flows(UDP))
    assert len([flow for flow in left if flow.port == 56]) == 3000
    assert len(left) == 3000 + 12


def test_an_entry_that_took_anothers_place_is_not_deleted(insert: Callable[..., None]) -> None:
    entries = Entries(Family.IPV4, insert)
    client, target = entries.client(UDP), Backend(entries.service, 57)
    insert(make(client, target, entries.pods[0]))
    with Conntrack(Family.IPV4) as conntrack:
        [old] = [flow for flow in conntrack.flows(UDP) if flow.port == 57]
        assert conntrack.delete([old]) == 1
        # The kernel's number is made of the entry's place in memory too: let others have the place.
        insert(*(make(entries.client(UDP), target, None) for _ in range(64)))
        insert(make(client, target, entries.pods[1]))
        assert conntrack.delete([old]) == 0
        [new] = [flow for flow in conntrack.flows(UDP) if flow.port == 57 and flow.translated]
        assert new.backend == entries.pods[1]


# --- the agent -----------------------------------------------------------------------------------------------

CLUSTER_IP, NODE = "10.96.9.1", "192.168.50.11"
HOSTS = {"p1": "10.244.1.11", "p2": "10.244.1.12", "q1": "10.244.2.11"}
PORTS = (53, 8053, NODE_PORT)
CLUSTER_IP_6 = "fd00:10:96::9"
HOSTS_6 = {"p1": "fd00:244:1::11", "q1": "fd00:244:2::11"}


def dns6(*endpoints: str) -> list[Manifest]:
    """The same Service in IPv6."""
    objects = dns(*endpoints)
    service, endpoint_slice = objects[-2:]
    service["spec"] |= {"clusterIP": CLUSTER_IP_6, "clusterIPs": [CLUSTER_IP_6], "ipFamilies": ["IPv6"]}
    endpoint_slice["addressType"] = "IPv6"
    for host, each in zip(endpoints, endpoint_slice["endpoints"], strict=True):
        each["addresses"] = [HOSTS_6[host]]
    return objects


def dns(*endpoints: str, node_port: bool = True, **conditions: dict[str, bool]) -> list[Manifest]:
    """The cluster, and a UDP Service with endpoints on these hosts; `conditions` by host, ready unless said."""
    ports = [{"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5300}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "dns", "namespace": "default"},
        "spec": {
            "type": "NodePort" if node_port else "ClusterIP",
            "clusterIP": CLUSTER_IP,
            "clusterIPs": [CLUSTER_IP],
            "ipFamilies": ["IPv4"],
            "ports": [each | ({"nodePort": NODE_PORT} if node_port else {}) for each in ports],
        },
    }
    endpoint_slice = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "dns-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "dns"}},
        "addressType": "IPv4",
        "ports": [{"name": "dns", "port": 5300, "protocol": "UDP"}],
        "endpoints": [
            {
                "addresses": [HOSTS[host]],
                "nodeName": "node1" if host.startswith("p") else "node2",
                "conditions": conditions.get(host, {"ready": True, "serving": True, "terminating": False}),
            }
            for host in endpoints
        ],
    }
    return [*manifests(CLUSTER), service, endpoint_slice]


ENDING = {"ready": False, "serving": True, "terminating": True}
ENDED = {"ready": False, "serving": False, "terminating": True}


class Client:
    """One UDP socket, kept open, that asks again and again."""

    def __init__(self, agent: Agent, host: str, address: str, port: int) -> None:
        def connect() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            sock.settimeout(0.3)
            sock.connect((address, port))
            return sock

        self.socket = agent.world.namespaces[host].inside(connect)
        self.port = int(self.socket.getsockname()[1])

    def ask(self) -> str:
        """Who answers; `refused`, or `silence`."""
        try:
            self.socket.send(b"who\n")
            return str(json.loads(self.socket.recv(4096))["host"])
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"


class Kitchen:
    """The agent with a UDP Service, clients of it, and node1's connection tracking."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.clients: list[Client] = []
        agent.world.probes.open(backends(dns(*HOSTS)))

    def apply(self, objects: Sequence[Manifest]) -> None:
        self.agent.apply(objects)

    def client(self, of: str = "", host: str = "p3", address: str = CLUSTER_IP, port: int = 53) -> Client:
        """A client whose flow went to a backend, if one is named, else to any."""
        while True:
            client = Client(self.agent, host, address, port)
            self.clients.append(client)
            answered = client.ask()
            assert answered in HOSTS, answered
            if of in ("", answered):
                return client

    def flows(self, protocol: Protocol = UDP) -> dict[int, Flow]:
        """node1's flows to the Service, by the client's port."""

        def read() -> dict[int, Flow]:
            found = {}
            for family in self.agent.families:
                with Conntrack(family) as conntrack:
                    found |= {flow.source_port: flow for flow in conntrack.flows(protocol) if flow.port in PORTS}
            return found

        return self.agent.world.namespaces["node1"].inside(read)

    def identity(self, client: Client) -> int | None:
        """The number of a client's entry in node1's kernel: another entry has another."""
        flow = self.flows().get(client.port)
        return measure(flow).identity if flow else None

    def until_gone(self, client: Client, before: int | None) -> None:
        eventually(lambda: self.identity(client) != before, "the stale flow is there still: its deletion")

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()
        self.agent.world.probes.shut()
        self.agent.expect_empty(manifests(CLUSTER))


@pytest.fixture
def kitchen(agent: Agent) -> Iterator[Kitchen]:
    agent.configure({})
    kitchen = Kitchen(agent)
    try:
        yield kitchen
    finally:
        kitchen.close()


WAYS = {
    "the ClusterIP from a pod": {},
    "the ClusterIP from the node": {"host": "node1"},
    "a node port from outside": {"host": "c", "address": NODE, "port": NODE_PORT},
    "a node port at another address": {"host": "c", "address": "192.168.51.11", "port": NODE_PORT},
}


@pytest.mark.parametrize("way", WAYS)
def test_CT_3_a_client_moves_on_when_its_endpoint_goes_and_others_stay(way: str, kitchen: Kitchen) -> None:
    if "another" in way:
        kitchen.agent.configure({"nodePortAddresses": ["0.0.0.0/0"]})
    kitchen.apply(dns("p1", "q1"))
    moving = kitchen.client(of="p1", **WAYS[way])  # type: ignore[arg-type]
    staying = kitchen.client(of="q1", **WAYS[way])  # type: ignore[arg-type]
    before, kept = kitchen.identity(moving), kitchen.identity(staying)
    assert before
    assert kept
    kitchen.apply(dns("q1"))
    kitchen.until_gone(moving, before)
    assert moving.ask() == "q1"
    assert staying.ask() == "q1"
    assert kitchen.identity(staying) == kept, "a flow to an endpoint that stays was deleted"


@pytest.mark.parametrize("address", [(CLUSTER_IP_6, 53), ("fd00:50::11", NODE_PORT)])
def test_CT_3_the_same_in_ipv6(address: tuple[str, int], kitchen: Kitchen) -> None:
    if not kitchen.agent.world.ipv6:
        pytest.skip("the kernel is without IPv6")
    host = "p3" if address[1] == 53 else "c"
    kitchen.apply(dns6("p1", "q1"))
    moving = kitchen.client("p1", host, *address)
    staying = kitchen.client("q1", host, *address)
    before, kept = kitchen.identity(moving), kitchen.identity(staying)
    kitchen.apply(dns6("q1"))
    kitchen.until_gone(moving, before)
    assert moving.ask() == "q1"
    assert kitchen.identity(staying) == kept, "a flow to an endpoint that stays was deleted"
    kitchen.apply(dns6())
    kitchen.until_gone(staying, kept)
    assert staying.ask() == "refused"


def test_a_service_without_endpoints_refuses_clients_that_it_had(kitchen: Kitchen) -> None:
    """Where kube-proxy leaves them sending into the void (CT-5)."""
    kitchen.apply(dns("p1"))
    clients = [kitchen.client(**way) for way in (WAYS["the ClusterIP from a pod"], WAYS["a node port from outside"])]  # type: ignore[arg-type]
    numbers = [kitchen.identity(each) for each in clients]
    kitchen.apply(dns())
    for client, before in zip(clients, numbers, strict=True):
        kitchen.until_gone(client, before)
        assert client.ask() == "refused"
    assert not kitchen.flows()
    kitchen.apply(dns("q1"))
    assert [client.ask() for client in clients] == ["q1", "q1"]


def test_a_service_that_is_deleted_takes_its_flows_along(kitchen: Kitchen) -> None:
    kitchen.apply(dns("p1"))
    for way in (WAYS["the ClusterIP from a pod"], WAYS["a node port from outside"]):
        kitchen.client(**way)  # type: ignore[arg-type]
    assert len(kitchen.flows()) == 2
    kitchen.apply(manifests(CLUSTER))
    eventually(lambda: not kitchen.flows(), "flows of the deleted Service are there still: their deletion")


def test_a_node_port_that_goes_takes_its_flows_along_and_no_others(kitchen: Kitchen) -> None:
    kitchen.apply(dns("p1"))
    inside = kitchen.client()
    outside = kitchen.client(**WAYS["a node port from outside"])  # type: ignore[arg-type]
    kept = kitchen.identity(inside)
    kitchen.apply(dns("p1", node_port=False))
    eventually(lambda: outside.port not in kitchen.flows(), "the node port's flow is there still: its deletion")
    assert kitchen.identity(inside) == kept


def test_CT_2_an_endpoint_that_terminates_keeps_its_flows_as_long_as_it_serves(kitchen: Kitchen) -> None:
    kitchen.apply(dns("p1", "p2", "q1"))
    ending, marker = kitchen.client(of="p1"), kitchen.client(of="p2")
    kept, before = kitchen.identity(ending), kitchen.identity(marker)
    kitchen.apply(dns("p1", "q1", p1=ENDING))
    # When the marker's flow is gone, the other one was passed over.
    kitchen.until_gone(marker, before)
    assert ending.ask() == "p1"
    assert kitchen.identity(ending) == kept
    # No route changes now.
    kitchen.apply(dns("p1", "q1", p1=ENDED))
    kitchen.until_gone(ending, kept)
    assert ending.ask() == "q1"


def test_CT_4_flows_from_before_a_service_was_there_come_to_it(kitchen: Kitchen) -> None:
    kitchen.agent.apply(manifests(CLUSTER))
    # Nobody answers there: the packets leave by the default route, and make entries that are not translated.
    address = "203.0.113.77"
    client = Client(kitchen.agent, "p3", address, 8053)
    kitchen.clients.append(client)
    eventually(lambda: client.ask() and client.port in kitchen.flows(), "an entry of before")
    flow = kitchen.flows()[client.port]
    assert not flow.translated
    objects = dns("p1")
    spec = objects[-2]["spec"]
    spec |= {"externalIPs": [address]}
    spec["ports"][0]["port"] = 8053
    kitchen.apply(objects)
    kitchen.until_gone(client, measure(flow).identity)
    assert client.ask() == "p1"


@pytest.mark.parametrize("after", ["fewer endpoints", "no Service"])
def test_CT_1_a_start_deletes_what_became_stale_while_no_agent_was_there(after: str, kitchen: Kitchen) -> None:
    kitchen.apply(dns("p1", "q1"))
    moving, staying = kitchen.client(of="p1"), kitchen.client(of="q1")
    before, kept = kitchen.identity(moving), kitchen.identity(staying)
    kitchen.agent.kill()
    kitchen.agent.publish(dns("q1") if after == "fewer endpoints" else manifests(CLUSTER))
    kitchen.agent.start()
    kitchen.agent.wait()
    if after == "no Service":
        eventually(lambda: not kitchen.flows(), "flows of the deleted Service are there still: their deletion")
        return
    kitchen.until_gone(moving, before)
    assert moving.ask() == "q1"
    assert kitchen.identity(staying) == kept


def test_flows_that_went_astray_while_rules_were_missing_are_brought_back(kitchen: Kitchen) -> None:
    kitchen.apply(dns("p1"))
    # Flows are tracked as long as anybody's rules ask for it.
    nft(kitchen.agent.world, "add table ip t; add chain ip t c { type filter hook prerouting priority 0; }")
    nft(kitchen.agent.world, "add rule ip t c ct state new")
    kitchen.agent.stop()
    nft(kitchen.agent.world, "delete", "table", "ip", "sluice")
    try:
        client = Client(kitchen.agent, "p3", CLUSTER_IP, 53)
        kitchen.clients.append(client)
        eventually(lambda: client.ask() and client.port in kitchen.flows(), "an entry without rules")
        assert not kitchen.flows()[client.port].translated
    finally:
        kitchen.agent.start()
        nft(kitchen.agent.world, "delete", "table", "ip", "t")
    eventually(lambda: client.ask() == "p1", "an answer")


@pytest.mark.parametrize("annotation", ["", "delete-unanswered"])
def test_tcp_drains_unless_the_service_asks_and_nobody_has_answered(annotation: str, kitchen: Kitchen) -> None:
    """An endpoint that is no host never answers."""

    def web(address: str) -> list[Manifest]:
        objects = dns(node_port=False)
        service, endpoint_slice = objects[-2:]
        service["metadata"]["annotations"] = {"sluice.internal/stale-tcp-flows": annotation} if annotation else {}
        service["spec"]["ports"].append({"name": "web", "port": 8053, "protocol": "TCP"})
        endpoint_slice["ports"].append({"name": "web", "port": 9999, "protocol": "TCP"})
        endpoint_slice["endpoints"] = [{"addresses": [address], "nodeName": "node1"}]
        return objects

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((CLUSTER_IP, 8053))
        return sock

    kitchen.apply(web("10.244.1.200"))
    marker = Client(kitchen.agent, "p3", CLUSTER_IP, 53)
    kitchen.clients.append(marker)
    assert marker.ask() == "silence"
    with kitchen.agent.world.namespaces["p3"].inside(connect) as sock:
        port = sock.getsockname()[1]
        eventually(lambda: port in kitchen.flows(TCP), "the connection's entry")
        before, stale = kitchen.flows(TCP)[port].backend, kitchen.identity(marker)
        kitchen.apply(web("10.244.1.201"))
        # A UDP flow to the same endpoint goes in the same round.
        kitchen.until_gone(marker, stale)
        if annotation:
            gone = "the deletion of a connection that nobody answered"
            eventually(lambda: (flow := kitchen.flows(TCP).get(port)) is None or flow.backend != before, gone)
        else:
            assert kitchen.flows(TCP)[port].backend == before


def test_sluice_conntrack_lists_flows_and_deletes_the_stale_ones(kitchen: Kitchen) -> None:
    def sluice(*arguments: str) -> dict[str, object]:
        directory = str(kitchen.agent.run_directory)
        command = [sys.executable, "-m", "proxy", "conntrack", "-o", "json", "--run-directory", directory, *arguments]
        run = functools.partial(subprocess.run, command, capture_output=True, text=True, check=False)
        done = kitchen.agent.world.namespaces["node1"].inside(run)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    kitchen.apply(dns("p1", "p2", "q1"))
    ending, gone = kitchen.client(of="p1"), kitchen.client(of="p2")
    outside = kitchen.client(of="q1", **WAYS["a node port from outside"])  # type: ignore[arg-type]
    kept = kitchen.identity(ending)
    kitchen.apply(dns("p1", "p2", "q1", p1=ENDING))
    listed = sluice()
    assert listed["judgedBy"] == "the agent"
    by_client = {each["client"]: each for each in listed["flows"]}  # type: ignore[attr-defined]
    assert by_client[f"10.244.1.13:{gone.port}"] == {
        "family": "IPv4",
        "service": "default/dns:dns",
        "protocol": "UDP",
        "client": f"10.244.1.13:{gone.port}",
        "frontend": f"{CLUSTER_IP}:53",
        "backend": "10.244.1.12:5300",
        "masqueraded": False,
        "answered": True,
        "stale": False,
        "draining": False,
    }
    assert by_client[f"192.168.50.100:{outside.port}"]["masqueraded"]
    assert not any(each["stale"] for each in by_client.values())
    # Without the agent the rules have to do, and they say nothing of endpoints that end.
    kitchen.agent.stop()
    assert sluice()["judgedBy"] == "the rules"
    deleted = sluice("--delete-stale")
    assert {each["backend"] for each in deleted["flows"]} == {"10.244.1.11:5300"}  # type: ignore[attr-defined]
    assert deleted["deleted"] == len(deleted["flows"])  # type: ignore[arg-type]
    assert kitchen.identity(ending) != kept
    assert kitchen.identity(gone)
    kitchen.agent.start()
    kitchen.agent.wait()
