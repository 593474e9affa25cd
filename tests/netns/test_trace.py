"""`sluice trace` on a node with real connections: what it says is what the probes saw, and it leaves nothing.

In the mode of SLUICE_TEST_MODE, and with SLUICE_IPTABLES=legacy or nft by that kind of iptables.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.demo.probes import Probe
from proxy.demo.world import World
from rules.forwarding import Family
from rules.netlink.transaction import NetfilterSocket
from rules.nftables.trace import SAMPLE, Wanted, decode_events, listen, trace_table
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import dropped, eventually, nft, said
from tests.netns.isolation import own_network_namespace
from tests.netns.runner import ANSWER, backends
from tests.scenarios.schema import CLUSTER, Manifest, manifests

CLUSTER_IP, NODE_PORT, BALANCER, EMPTY = "10.96.6.11", 30061, "203.0.113.61", "10.96.6.12"
EMPTY_PORT, CLUSTER_IP6 = 30062, "fd00:10:96::611"
BACKENDS = ("10.244.1.11", "10.244.2.11")


def service(name: str, **spec: Any) -> Manifest:
    whole = {"ipFamilies": ["IPv4"], "ports": [{"port": 80}], **spec, "clusterIPs": [spec["clusterIP"]]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": whole}


def objects() -> list[Manifest]:
    seen = service(
        "seen",
        type="LoadBalancer",
        clusterIP=CLUSTER_IP,
        ports=[{"port": 80, "nodePort": NODE_PORT}],
        loadBalancerSourceRanges=["192.0.2.0/24"],
    )
    slices = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "seen-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "seen"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 80}],
        "endpoints": [{"addresses": [each]} for each in BACKENDS],
    }
    names = service(
        "names",
        clusterIP=CLUSTER_IP6,
        ipFamilies=["IPv6"],
        ports=[{"port": 53, "protocol": "UDP"}],
    )
    names_slice = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "names-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "names"}},
        "addressType": "IPv6",
        "ports": [{"name": "", "port": 53, "protocol": "UDP"}],
        "endpoints": [{"addresses": ["fd00:244:1::12"]}],
    }
    empty = service("empty", type="NodePort", clusterIP=EMPTY, ports=[{"port": 80, "nodePort": EMPTY_PORT}])
    balanced = {**seen, "status": {"loadBalancer": {"ingress": [{"ip": BALANCER}]}}}
    return [*manifests(CLUSTER), balanced, slices, names, names_slice, empty]


@pytest.fixture
def node(agent: Agent, mode: str) -> Iterator[World]:
    """A world whose node1 serves `seen` and `empty`; without any Service in the end."""
    agent.configure({})
    agent.world.probes.open(backends(objects()))
    agent.apply(objects())
    yield agent.world
    agent.world.probes.shut()
    agent.expect_empty(manifests(CLUSTER))


class Trace:
    """A running `sluice trace -o json` on node1."""

    def __init__(self, world: World, directory: Path, *arguments: str) -> None:
        self._output, self._errors = directory / "trace.out", directory / "trace.err"
        command = [sys.executable, "-m", "proxy", "trace", "-o", "json", "--seconds", str(DEADLINE), *arguments]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = world.start("node1", command, stdout=output, stderr=errors)
        eventually(lambda: "at work" in self._errors.read_text(), "the trace")

    def packets(self) -> list[dict[str, Any]]:
        """What it has printed when it has ended by itself."""
        try:
            assert self.process.wait(timeout=2 * DEADLINE) == 0, self._errors.read_text()
        except subprocess.TimeoutExpired as error:
            lines = self._output.read_text().count("\n")
            error.add_note(f"{lines} packets were told; {self._errors.read_text()}")
            raise
        return [json.loads(line) for line in self._output.read_text().splitlines()]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=DEADLINE)


LOGGERS = ("net.netfilter.nf_log.2", "net.netfilter.nf_log.10")
RULES = pytest.mark.skipif(os.environ.get("SLUICE_TEST_MODE") == "userspace", reason="there are no rules")
LEGACY = os.environ.get("SLUICE_IPTABLES") == "legacy"


def chain_of(mode: str, in_nftables: str, in_iptables: str) -> str:
    """How the rule that ended a packet is called."""
    if mode == "nftables":
        return f"of chain {in_nftables} of table ip sluice"
    return f"of chain {in_iptables} of {'legacy ' if LEGACY else ''}table ip filter"


def left(world: World) -> list[str]:
    """What there is of traces in node1's kernel."""
    loggers = said(world, "sysctl", "-n", *LOGGERS).split()
    return [*(each for each in nft(world, "list", "tables").splitlines() if "trace" in each), *loggers]


@contextlib.contextmanager
def traced(world: World, directory: Path, *arguments: str) -> Iterator[Trace]:
    before = left(world)
    trace = Trace(world, directory, *arguments)
    try:
        yield trace
    finally:
        trace.end()
    eventually(lambda: left(world) == before, "the end of all that traces take")


@contextlib.contextmanager
def table(world: World, name: str, rules: str) -> Iterator[None]:
    """A table of somebody else."""
    nft(world, rules)
    try:
        yield
    finally:
        nft(world, "delete", "table", *name.split())


def connect(world: World, host: str, address: str, port: int, protocol: str = "TCP") -> Any:
    probe = Probe(host=host, address=address, port=port, protocol=protocol, timeout=ANSWER)
    [[outcome]] = world.probes.probe(probe)
    return outcome


@pytest.fixture
def lines_of_legacy_iptables(node: World) -> Iterator[None]:
    """Twenty rules of legacy iptables that every packet meets, so that the kernel tells of twenty lines more."""
    rules = ["-p", "tcp", "-m", "comment", "--comment", "met"]
    for _ in range(20):
        said(node, "iptables-legacy", "-A", "FORWARD", *rules)
    yield
    for _ in range(20):
        said(node, "iptables-legacy", "-D", "FORWARD", *rules)


@RULES
@pytest.mark.usefixtures("lines_of_legacy_iptables")
def test_what_comes_faster_than_it_is_read_is_told_to_be_missing(node, mode, tmp_path):
    """Nothing is read while the process stands still, and the kernel tells of a thousand packets and many rules."""
    if mode == "ipvs":
        pytest.skip("connection tracking tells of each connection once, which the socket has room for")
    rules = "counter; " * 100
    noise = f"table ip noise {{ chain c {{ type filter hook prerouting priority 0; {rules} }}; }}"
    with table(node, "ip noise", noise), traced(node, tmp_path, "-n", "1000", "--service", "default/seen") as trace:
        os.kill(trace.process.pid, signal.SIGSTOP)
        probe = Probe(host="p3", address=CLUSTER_IP, port=80, count=1000, timeout=ANSWER)
        node.probes.probe(probe)
        os.kill(trace.process.pid, signal.SIGCONT)
        os.kill(trace.process.pid, signal.SIGINT)
        seen = trace.packets()
        errors = (tmp_path / "trace.err").read_text()
    assert 0 < len(seen) < 1000
    assert "sluice trace: the kernel told more than could be read: packets are missing\n" in errors
    # Of those that are told of wholly nothing is guessed: what became of the others is open.
    assert {each["outcome"]["is"] for each in seen} <= {"reaches", "unseen"}
    whole = [each for each in seen if each["outcome"]["is"] == "reaches"]
    assert whole
    assert {each["outcome"]["backend"] for each in whole} <= {f"{each}:80" for each in BACKENDS}


def test_a_connection_through_a_cluster_ip_goes_where_the_trace_says(node, mode, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--service", "default/seen") as trace:
        outcome = connect(node, "p3", CLUSTER_IP, 80)
        [packet] = trace.packets()
    assert outcome.kind == "answered"
    backend = packet["outcome"]["backend"]
    assert backend == f"{ {'p1': BACKENDS[0], 'q1': BACKENDS[1]}[outcome.host] }:80"
    assert packet["outcome"] == {
        "is": "reaches", "why": None, "by": None, "backend": backend, "masqueraded": mode == "userspace"
    }  # fmt: skip
    own = f"{outcome.local[0]}:{outcome.local[1]}"
    assert packet["before"] == {"source": own, "destination": f"{CLUSTER_IP}:80"}
    assert packet["after"] == {"source": f"{outcome.peer[0]}:{outcome.peer[1]}", "destination": backend}
    assert (packet["service"].split(":")[0], packet["expected"]) == ("default/seen", True)
    where = {"nftables": {"services"}, "iptables": {"SLUICE-SERVICES", "SLUICE-S"}, "ipvs": set(), "userspace": set()}
    assert where[mode] <= set(packet["chains"])
    assert bool(packet["notes"]) == (mode == "userspace")


@RULES
def test_connection_tracking_tells_the_same_of_what_comes_through(node, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--by", "conntrack", "--service", "default/seen") as trace:
        assert connect(node, "p3", EMPTY, 80).refused
        outcome = connect(node, "c", "192.168.50.11", NODE_PORT)
        [packet] = trace.packets()
    backend = f"{ {'p1': BACKENDS[0], 'q1': BACKENDS[1]}[outcome.host] }:80"
    assert packet["outcome"]["backend"] == packet["after"]["destination"] == backend
    assert packet["after"]["source"] == f"{outcome.peer[0]}:{outcome.peer[1]}"
    assert packet["before"]["source"] == f"{outcome.local[0]}:{outcome.local[1]}"
    assert (packet["frontend"], packet["expected"]) == (f"*:{NODE_PORT}/TCP", True)


def test_a_node_port_masquerades(node, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--port", str(NODE_PORT)) as trace:
        outcome = connect(node, "c", "192.168.50.11", NODE_PORT)
        [packet] = trace.packets()
    assert (packet["frontend"], packet["expected"]) == (f"*:{NODE_PORT}/TCP", True)
    assert packet["outcome"]["masqueraded"] is True
    assert packet["after"]["source"] == f"{outcome.peer[0]}:{outcome.peer[1]}"
    assert packet["before"]["source"] == f"{outcome.local[0]}:{outcome.local[1]}"


@RULES
@pytest.mark.parametrize("host", ["p3", "node1"])
def test_a_refused_connection_names_the_rule(host, node, mode, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--service", "empty") as trace:
        assert connect(node, host, EMPTY, 80).refused
        [packet] = trace.packets()
    assert (packet["outcome"]["is"], packet["outcome"]["why"]) == ("rejected", "no-endpoints")
    assert chain_of(mode, "refuse-frontends", "SLUICE-REJECT-CLUSTER-IP") in packet["outcome"]["by"]
    assert packet["expected"]


@RULES
def test_a_connection_of_the_node_to_itself_is_followed_over_the_loopback_interface(node, mode, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--service", "empty") as trace:
        assert connect(node, "node1", "192.168.50.11", EMPTY_PORT).refused
        [packet] = trace.packets()
    assert (packet["outcome"]["is"], packet["frontend"]) == ("rejected", f"*:{EMPTY_PORT}/TCP")
    assert chain_of(mode, "refuse-node-ports", "SLUICE-REJECT-NODE-PORT") in packet["outcome"]["by"]
    ways = {"nat-output", "filter-input"} if mode == "nftables" else {"SLUICE-SERVICES", "SLUICE-INPUT"}
    assert ways <= set(packet["chains"])


def test_a_udp_flow_over_ipv6_is_one_packet(node, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--service", "default/names") as trace:
        outcome = connect(node, "p3", CLUSTER_IP6, 53, "UDP")
        [packet] = trace.packets()
    assert (outcome.kind, outcome.host) == ("answered", "p2")
    assert packet["before"]["destination"] == f"[{CLUSTER_IP6}]:53"
    assert packet["after"]["destination"] == packet["outcome"]["backend"] == "[fd00:244:1::12]:53"
    assert (packet["protocol"], packet["expected"]) == ("UDP", True)


@RULES
def test_a_source_outside_the_ranges_is_dropped(node, tmp_path):
    with traced(node, tmp_path, "-n", "1", "--address", BALANCER) as trace:
        assert dropped(node, "c", BALANCER, 80)
        [packet] = trace.packets()
    assert (packet["outcome"]["is"], packet["outcome"]["why"]) == ("dropped", "source-ranges")
    assert packet["expected"]


@RULES
def test_what_rules_of_others_drop_is_laid_at_their_door(node, tmp_path):
    nft(node, "table inet other { chain forward { type filter hook forward priority 10; tcp dport 80 drop; }; }")
    try:
        with traced(node, tmp_path, "-n", "1", "--service", "seen") as trace:
            assert dropped(node, "p3", CLUSTER_IP, 80)
            [packet] = trace.packets()
    finally:
        nft(node, "delete table inet other")
    assert (packet["outcome"]["is"], packet["outcome"]["why"]) == ("dropped", "others")
    assert "of chain forward of table inet other" in packet["outcome"]["by"]


@RULES
def test_what_legacy_iptables_drops_is_laid_at_the_door_of_its_rule(node, tmp_path):
    rule = ["FORWARD", "-p", "tcp", "--dport", "80", "-j", "DROP"]
    said(node, "iptables-legacy", "-I", *rule)
    try:
        with traced(node, tmp_path, "-n", "1", "--service", "seen") as trace:
            assert dropped(node, "p3", CLUSTER_IP, 80)
            [packet] = trace.packets()
    finally:
        said(node, "iptables-legacy", "-D", *rule)
    assert (packet["outcome"]["is"], packet["outcome"]["why"]) == ("dropped", "others")
    assert packet["outcome"]["by"] == "rule 1 of chain FORWARD of legacy table ip filter"
    assert packet["after"]["destination"] in {f"{each}:80" for each in BACKENDS}


def test_the_kernel_bounds_the_trace_and_other_connections_are_not_seen(node, tmp_path):
    with traced(node, tmp_path, "-n", "3", "--service", "seen", "--from", "10.244.1.13") as trace:
        for host in ("p4", "p3", "p4", "p3", "p3", "p3"):
            connect(node, host, CLUSTER_IP, 80)
        packets = trace.packets()
    assert [packet["before"]["source"].split(":")[0] for packet in packets] == ["10.244.1.13"] * 3


def test_the_kernel_traces_so_many_packets_and_no_more(root):
    with own_network_namespace(), NetfilterSocket() as owner, listen() as listener:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        owner.commit(trace_table(Family.IPV4, "sluice-trace-test", Wanted(None, port=9), 2))
        for port in (9, 10, 9, 9, 9):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", ("127.0.0.1", port))
        events = [event for datagram in listener.datagrams() for event in decode_events(datagram)]
        heard = [event for event in events if event.headers and event.chain == SAMPLE]
        assert [event.headers.port for event in heard if event.headers] == [9, 9]


@RULES
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_trace_that_is_killed(how, node, tmp_path):
    with traced(node, tmp_path) as trace:
        assert "sluice-trace" in nft(node, "list", "tables")
        assert "nftrace" in nft(node, "list", "ruleset")
        [own] = [each for each in nft(node, "list", "tables").splitlines() if "table ip sluice-trace" in each]
        if LEGACY:
            assert said(node, "sysctl", "-n", *LOGGERS).split() == ["nfnetlink_log"] * 2
        forbidden = node.namespaces["node1"].inside(
            lambda: subprocess.run(["nft", "delete", *own.split()], capture_output=True, check=False)
        )
        assert forbidden.returncode != 0
        os.kill(trace.process.pid, how)
        trace.process.wait(timeout=DEADLINE)
        eventually(lambda: "nftrace" not in nft(node, "list", "ruleset"), "the end of tracing")
        assert "sluice-trace" not in nft(node, "list", "tables")


def told_by(world: World, directory: Path, connections: int) -> list[dict[str, Any]]:
    with traced(world, directory, "-n", str(connections), "--service", "seen") as trace:
        for _ in range(connections):
            connect(world, "p3", CLUSTER_IP, 80)
        return trace.packets()


@pytest.mark.skipif(os.environ.get("SLUICE_TEST_MODE") != "userspace", reason="there are no workers")
def test_workers_tell_no_more_once_a_trace_was_killed_and_tell_the_next(node, tmp_path):
    with traced(node, tmp_path) as trace:
        os.kill(trace.process.pid, signal.SIGKILL)
        trace.process.wait(timeout=DEADLINE)
    packets = told_by(node, tmp_path, 4)
    assert len(packets) == 4
    assert {packet["outcome"]["is"] for packet in packets} == {"reaches"}


@pytest.mark.skipif(os.environ.get("SLUICE_TEST_MODE") != "userspace", reason="there are no workers")
def test_a_worker_tells_of_backends_that_it_could_not_reach(node, tmp_path):
    node.probes.shut()
    with traced(node, tmp_path, "-n", "1", "--service", "seen") as trace:
        connect(node, "p3", CLUSTER_IP, 80)
        [packet] = trace.packets()
    node.probes.open(backends(objects()))
    assert packet["outcome"]["is"] == "failed"
    assert sorted(packet["notes"]) == [f"{each}:80 could not be reached" for each in BACKENDS]


def test_without_rules_or_a_frontend_it_says_so(node):
    def told(host: str, *arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "proxy", "trace", "--seconds", "0.1", *arguments]
        done = node.namespaces[host].inside(
            lambda: subprocess.run(command, capture_output=True, text=True, check=False)
        )
        return done.returncode, done.stderr

    assert told("node1", "--service", "nobody") == (1, "sluice trace: no frontend is what was asked for\n")
    assert told("node1", "--address", "fd00::1", "--from", "10.0.0.1")[0] == 1
    code, errors = told("node2")
    assert code == 2
    assert errors.startswith("sluice trace: nothing of sluice is in the kernel of this network namespace")
    assert len(errors.splitlines()) == 1


def test_without_the_right_to_it_says_so(root):
    with own_network_namespace():
        command = [
            "setpriv",
            "--bounding-set=-net_admin",
            "--inh-caps=-net_admin",
            sys.executable,
            "-m",
            "proxy",
            "trace",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("sluice trace: ")
    assert "CAP_NET_ADMIN" in line
