"""The agent's own life on a node: starts and ends of every kind, others who touch its rules, and what it serves.

It has a world of its own, as these tests end agents and flush rulesets.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from proxy.demo.probes import Probe
from proxy.demo.world import World
from rules.forwarding import ForwardingTable
from rules.iptables.programs import BACKENDS
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import answering, eventually, get, nft, said
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, load, manifests, merge

# One world and one agent for all of them.
pytestmark = pytest.mark.xdist_group("agent-lifecycle")

ON_NFTABLES = pytest.mark.skipif(
    os.environ.get("SLUICE_TEST_MODE", "nftables") != "nftables",
    reason="it damages nftables' objects; tests/netns/test_agent_iptables.py damages iptables' rules",
)
SYNCED = re.compile(r"synced .*family=(\S+) .*operations=(\d+)")


@pytest.fixture(scope="module")
def life_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-life") as world:
        yield world


@pytest.fixture(scope="module")
def life_agent(life_world: World, mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(life_world, tmp_path_factory.mktemp("life"), mode)
    yield agent
    agent.stop()


@pytest.fixture
def life(life_agent: Agent, life_world: World) -> Iterator[Agent]:
    """An agent that runs and has synced the Services of `external-policy-local`."""
    life_agent.configure({})
    objects = served()
    life_world.probes.open(backends(objects))
    life_agent.apply(objects)
    yield life_agent
    life_world.probes.shut()


def served(**changes: Manifest) -> list[Manifest]:
    """The cluster and the objects of a scenario; `changes` are merged into those of its objects that they name."""
    objects = manifests(CLUSTER) + load(DIRECTORY / "external-policy-local.yaml").objects
    return [merge(each, changes.get(each["metadata"]["name"].replace("-", "_"), {})) for each in objects]


def held(agent: Agent) -> list[ForwardingTable | None]:
    return [agent.read(family) for family in agent.families]


def serves(world: World) -> bool:
    """Whether the Service is there, for pods and for outsiders."""
    return answering(world, "p3", "10.96.0.41", 80) == {"p1", "q1"} and answering(world, "c", "203.0.113.30", 80) == {
        "p1"
    }


def listing(life: Agent) -> str:
    """The rules of node1 as other programs print them."""
    if life.mode == "nftables":
        # With -a, so that an object deleted and added again, which has another handle, is seen too.
        return nft(life.world, "-a", "list", "ruleset")
    programs = [f"{name}-{kind}-save" for kind in BACKENDS for name in ("iptables", "ip6tables")]
    lines = [line for program in programs for line in said(life.world, program).splitlines()]
    return "\n".join(line for line in lines if line.startswith("-A"))


def synced_since(agent: Agent, position: int) -> dict[str, list[int]]:
    """The operations of every sync that the log tells of behind a position, by family."""
    found: dict[str, list[int]] = {}
    for family, operations in SYNCED.findall(agent.log.read_text()[position:]):
        found.setdefault(family, []).append(int(operations))
    return found


# --- ends and starts -------------------------------------------------------------------------------------------


def test_the_rules_stay_and_work_when_the_agent_is_told_to_end(life, life_world):
    """CFG-51."""
    before = held(life)
    life.stop()
    assert held(life) == before
    assert serves(life_world)


def test_a_restart_with_nothing_changed_writes_nothing(life, life_world):
    """NFT-22."""
    before = listing(life)
    life.stop()
    position = len(life.log.read_text())
    life.start()
    eventually(lambda: len(synced_since(life, position)) == len(life.families), "the first sync of every family")
    assert all(operations == [0] for operations in synced_since(life, position).values())
    assert listing(life) == before


def test_no_connection_fails_while_the_agent_restarts(life, life_world):
    life_world.probes.start("restart", Probe(host="p3", address="10.96.0.41", port=80), 0.005)
    for _ in range(2):
        life.stop()
        life.start()
        life.apply(served())
    outcomes = life_world.probes.stop("restart")
    assert {outcome.host or str(outcome) for outcome in outcomes} == {"p1", "q1"}


def test_an_agent_that_was_killed_leaves_its_rules_and_the_next_one_goes_on(life, life_world):
    before = held(life)
    life.kill()
    assert held(life) == before
    assert serves(life_world)
    gone = {"endpoints": [{"addresses": ["10.244.1.11"], "nodeName": "node1"}]}
    life.publish(served(web_4=gone))
    life.start()
    life.wait()
    assert answering(life_world, "p3", "10.96.0.41", 80) == {"p1"}


def test_a_second_agent_says_who_holds_the_namespace_and_gives_up(life, life_world, tmp_path):
    """DESIGN 4.11."""
    before = held(life)
    output = tmp_path / "second.log"
    with output.open("wb") as log:
        second = life_world.start("node1", life.command(), stdout=log, stderr=subprocess.STDOUT)
        assert second.wait(timeout=DEADLINE) == 1
    assert f"process {life.pid}" in output.read_text()
    assert "--takeover" in output.read_text()
    assert held(life) == before


def test_a_second_agent_may_wait_for_the_end_of_the_first(life, life_world, tmp_path):
    output = tmp_path / "second.log"
    with output.open("wb") as log:
        second = life_world.start("node1", [*life.command(), "--takeover"], stdout=log, stderr=subprocess.STDOUT)
    eventually(lambda: "waiting" in output.read_text(), "the second agent's waiting")
    assert second.poll() is None
    life.stop()
    eventually(lambda: len(SYNCED.findall(output.read_text())) >= len(life.families), "the second agent's sync")
    assert serves(life_world)
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=DEADLINE) == 0


def test_a_configuration_that_cannot_work_ends_the_agent_with_a_line(life, life_world, tmp_path):
    """CFG-51: and the rules of the one before stay."""
    before = held(life)
    life.stop()
    output = tmp_path / "wrong.log"
    with output.open("wb") as log:
        command = [sys.executable, "-m", "proxy", "run", "--proxy-mode", "carrier-pigeon", "--manifests", str(tmp_path)]
        wrong = life_world.start("node1", command, stdout=log, stderr=subprocess.STDOUT)
        assert wrong.wait(timeout=DEADLINE) == 1
    assert "carrier-pigeon" in output.read_text()
    assert held(life) == before


# --- others who touch the rules ----------------------------------------------------------------------------------


@ON_NFTABLES
@pytest.mark.parametrize(
    "damage",
    [
        "flush ruleset",
        "delete table ip sluice",
        "flush table ip sluice",
        "flush map ip sluice endpoints-tcp",
        "delete element ip sluice cluster-ips { 10.96.0.41 }",
        "add element ip sluice cluster-ips { 10.96.0.42 }",
        "delete element ip sluice local-endpoint-pairs { 10.244.1.11 . 10.244.1.11 . tcp . 8080 }",
        "insert rule ip sluice services counter drop",
    ],
)
def test_what_another_process_does_to_the_rules_is_repaired_unasked(damage, life, life_world):
    """DESIGN 4.2."""
    before = held(life)
    position = len(life.log.read_text())
    nft(life_world, *damage.split())
    eventually(lambda: any(synced_since(life, position).get("IPv4", ())), f"the repair of: {damage}")
    eventually(lambda: held(life) == before, f"the repair of: {damage}")
    assert serves(life_world)


@ON_NFTABLES
def test_other_tables_are_left_alone(life, life_world):
    """NFT-2."""
    nft(life_world, "add", "table", "inet", "neighbour")
    nft(life_world, "add", "chain", "inet", "neighbour", "sluice")
    nft(life_world, "delete", "table", "ip", "sluice")
    eventually(lambda: serves(life_world), "the repair")
    life.stop()
    life.start()
    life.apply(served())
    assert "chain sluice" in nft(life_world, "list", "table", "inet", "neighbour")


def test_a_change_after_a_repair_is_applied(life, life_world):
    nft(life_world, "flush", "ruleset")
    moved = {"endpoints": [{"addresses": ["10.244.1.12"], "nodeName": "node1"}]}
    objects = served(web_4=moved)
    life_world.probes.open(backends(objects))
    life.apply(objects)
    assert answering(life_world, "p3", "10.96.0.41", 80) == {"p2"}
    assert answering(life_world, "c", "192.168.50.11", 30001) == {"p2"}


def test_a_new_address_of_the_node_answers_node_ports_at_once(life, life_world):
    """TRF-20, DESIGN 4.13."""
    life.configure({"nodePortAddresses": ["192.168.51.0/24"]})
    life.apply(served())

    def change(what: str) -> None:
        def inside() -> None:
            with IPRoute() as link:
                [index] = link.link_lookup(ifname="eth0")
                link.addr(what, index=index, address="192.168.51.77", prefixlen=32)

        life_world.namespaces["node1"].inside(inside)

    assert answering(life_world, "c", "192.168.51.77", 30001, count=1) != {"p1"}
    change("add")
    try:
        eventually(lambda: answering(life_world, "c", "192.168.51.77", 30001) == {"p1"}, "the new address")
        assert answering(life_world, "c", "192.168.51.11", 30001) == {"p1"}
    finally:
        change("delete")
    eventually(lambda: answering(life_world, "c", "192.168.51.77", 30001, count=1) != {"p1"}, "the address's end")
    assert answering(life_world, "c", "192.168.51.11", 30001) == {"p1"}


# --- what it serves -----------------------------------------------------------------------------------------------


def test_health_and_metrics_are_served(life, life_world):
    """HC-1, HC-4, HC-6, HTTP-1."""
    for host, path in (("node1", "/healthz"), ("c", "/healthz"), ("c", "/livez")):
        reply = get(life_world, host, "127.0.0.1" if host == "node1" else "192.168.50.11", 10256, path)
        assert reply is not None
        assert reply.status == 200
        body = json.loads(reply.body)
        assert body["healthy"] is True
        assert body["status"].keys() == {family.label for family in life.families}
    for path, expected in (("/healthz", "ok"), ("/proxyMode", life.mode)):
        assert get(life_world, "node1", "127.0.0.1", 10249, path)[:2] == (200, expected)
    metrics = get(life_world, "node1", "127.0.0.1", 10249, "/metrics")
    assert 'kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}' in metrics.body
    configz = json.loads(get(life_world, "node1", "127.0.0.1", 10249, "/configz").body)
    assert configz["kubeproxy.config.k8s.io"]["mode"] == life.mode
    assert get(life_world, "c", "192.168.50.11", 10249, "/metrics") is None


def health_check(world: World, port: int, host: str = "c", address: str = "192.168.50.11") -> tuple[int, int] | None:
    """Status and count of a health-check node port; None if nobody listens."""
    reply = get(world, host, address, port)
    if reply is None:
        return None
    body = json.loads(reply.body)
    assert body["service"] == {"namespace": "default", "name": "web"}
    assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == str(body["localEndpoints"])
    return reply.status, body["localEndpoints"]


def test_the_health_check_node_port_counts_local_ready_endpoints(life, life_world):
    """SVC-13, HC-20 to HC-23, TRF-27, B-158, B-160."""

    def local(*states: tuple[str, dict[str, bool]]) -> Manifest:
        ports = [{"name": "http", "port": 8080}, {"name": "more", "port": 8081}]
        found = [{"addresses": [address], "nodeName": "node1", "conditions": each} for address, each in states]
        remote = {"addresses": ["10.244.2.11"], "nodeName": "node2"}
        return {"ports": ports, "endpoints": [*found, remote]}

    ready, unready = {"ready": True}, {"ready": False}
    ending = {"ready": False, "serving": True, "terminating": True}
    addresses = [f"10.244.1.{number}" for number in (11, 12, 13)]
    asked = {"spec": {"healthCheckNodePort": 32000}}

    def becomes(expected: tuple[int, int] | None, port: int = 32000) -> None:
        eventually(lambda: health_check(life_world, port) == expected, f"{expected} at {port}")

    assert health_check(life_world, 32000) is None
    life.apply(served(web=asked, web_4=local(*((address, ready) for address in addresses), ("10.244.1.14", unready))))
    becomes((200, 3))
    assert health_check(life_world, 32000, "node1") == (200, 3)
    if life_world.ipv6:
        assert health_check(life_world, 32000, "c", "fd00:50::11") == (200, 1)
    objects = served(web=asked, web_4=local(*((address, ending) for address in addresses)))
    life_world.probes.open(backends(objects))
    life.apply(objects)
    becomes((503, 0))
    assert answering(life_world, "c", "203.0.113.30", 80) == {"p1", "p2", "p3"}, "they go on serving meanwhile"
    life.apply(served(web=asked, web_4=local(("10.244.1.11", ready), ("10.244.1.12", ending))))
    becomes((200, 1))

    life.apply(served(web=merge(asked, {"spec": {"healthCheckNodePort": 32001}})))
    becomes((200, 1), 32001)
    becomes(None)
    life.apply(served(web=merge(asked, {"spec": {"externalTrafficPolicy": "Cluster"}})))
    becomes(None, 32001)
    becomes(None)
    life.apply(served(web=asked))
    becomes((200, 1))
    life.apply(served(web=merge(asked, {"spec": {"type": "ClusterIP", "externalIPs": None}})))
    becomes(None)


def test_the_agent_ends_and_closes_what_it_served(life, life_world):
    life.stop()
    assert get(life_world, "node1", "127.0.0.1", 10256, "/healthz") is None
    assert serves(life_world)
