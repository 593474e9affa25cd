"""Traffic of Services counted by a real kernel: what dump, metrics and the agent say is what was sent."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import agent_socket, cli
from rules.forwarding import Family
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.counters import EndedFlows
from tests.netns.isolation import own_network_namespace
from tests.netns.test_verify import Agent

pytestmark = pytest.mark.netns

ACCOUNTING = Path("/proc/sys/net/netfilter/nf_conntrack_acct")
CLUSTER_IP, POD, OTHER_POD = "10.96.0.1", "10.244.1.5", "10.244.1.6"
NODE_PORT = 30080


def objects() -> list[dict[str, Any]]:
    def service(name: str, ip: str, /, **port: Any) -> dict[str, Any]:
        metadata = {"name": name, "namespace": "default"}
        spec = {"clusterIP": ip, "type": "NodePort" if "nodePort" in port else "ClusterIP", "ports": [port]}
        return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}

    def pods(name: str, protocol: str, port: int, *addresses: str) -> dict[str, Any]:
        labels = {"kubernetes.io/service-name": name}
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"{name}-1", "namespace": "default", "labels": labels},
            "addressType": "IPv4",
            "ports": [{"name": "p", "port": port, "protocol": protocol}],
            "endpoints": [{"addresses": [each]} for each in addresses],
        }

    return [
        service("web", CLUSTER_IP, name="p", port=80, nodePort=NODE_PORT),
        pods("web", "TCP", 8080, POD),
        service("dns", "10.96.0.2", name="p", port=53, protocol="UDP"),
        pods("dns", "UDP", 5353, OTHER_POD),
        service("quiet", "10.96.0.3", name="p", port=80),
        pods("quiet", "TCP", 8080, POD),
    ]


def manifests(directory: Path) -> Path:
    path = directory / "objects.json"
    path.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": objects()}))
    return path


def node_with_pods() -> None:
    """Addresses of a node and of two pods, all of them here."""
    commands = (
        "ip link set lo up",
        "ip link add eth0 type veth peer name eth1",
        "ip link set eth1 up",
        "ip link set eth0 up",
        f"ip address add 192.0.2.1/24 dev eth0 nodad; ip address add {POD}/32 dev eth0",
        f"ip address add {OTHER_POD}/32 dev eth0; ip route add 10.96.0.0/16 via 192.0.2.2",
    )
    subprocess.run("; ".join(commands).replace(" nodad", ""), shell=True, check=True)


@pytest.fixture
def proxy_mode() -> str:
    return "nftables"


@pytest.fixture
def counting(root: None, tmp_path: Path, proxy_mode: str) -> Iterator[Agent]:
    with own_network_namespace():
        node_with_pods()
        more = ["--traffic-counters", f"--proxy-mode={proxy_mode}"]
        agent = Agent(tmp_path, "report", manifests(tmp_path), more)
        try:
            yield agent
        finally:
            agent.stop()


class Server:
    """A pod that answers each connection with so many bytes, or each datagram with itself."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.held: list[socket.socket] = []
        self.listener = socket.create_server((POD, 8080))
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind((OTHER_POD, 5353))
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self._connections, self._datagrams)]
        for thread in self.threads:
            thread.start()

    def _connections(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.held.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(b"x" * self.answer)

    def _datagrams(self) -> None:
        while True:
            try:
                data, client = self.datagrams.recvfrom(2000)
            except OSError:
                return
            if client is None:
                return  # it was shut down
            self.datagrams.sendto(data, client)

    def close(self) -> None:
        for each in (self.listener, self.datagrams):
            # A close alone does not wake the thread that waits for it.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self.threads:
            thread.join(10)
        for each in self.held:
            each.close()


@pytest.fixture
def server(counting: Agent) -> Iterator[Server]:
    server = Server(20_000)
    yield server
    server.close()


def connect(port: int = 80, host: str = CLUSTER_IP) -> socket.socket:
    """A connection whose answer was read."""
    connection = socket.create_connection((host, port), timeout=20)
    got = 0
    while got < 20_000:
        got += len(connection.recv(65536))
    return connection


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def forget_flows() -> None:
    """Have connection tracking forget all: every entry tells its end."""
    with Conntrack(Family.IPV4) as table:
        for protocol in (6, 17):
            table.delete(list(table.flows(protocol)))


def metrics_page() -> str:
    with urllib.request.urlopen("http://127.0.0.1:10249/metrics", timeout=20) as answer:
        return str(answer.read().decode())


def totals(agent: Agent) -> dict[str, Any]:
    _, rows = agent_socket.counters(agent.run_directory)
    found: dict[str, Any] = {}
    for row in rows:
        found[row.service] = found[row.service] + row.traffic if row.service in found else row.traffic
    return found


@pytest.mark.parametrize("proxy_mode", ["nftables", "iptables"])
def test_connections_packets_and_bytes_are_those_that_passed(
    counting: Agent, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ACCOUNTING.read_text().strip() == "1", "the agent has the kernel count"
    held = connect()
    for _ in range(3):
        reset(connect())
    reset(connect(NODE_PORT, "192.0.2.1"))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(5):
        client.sendto(b"y" * 72, ("10.96.0.2", 53))
        client.recv(2000)
    client.close()
    forget_flows()
    counting.until(lambda: getattr(totals(counting).get("default/web:p"), "connections", 0) == 5)
    counting.until(lambda: "default/dns:p" in totals(counting))
    found = totals(counting)
    assert set(found) == {"default/web:p", "default/dns:p"}, "what has had no traffic has no row"
    # Each datagram has 72 bytes, and 28 of headers.
    dns = found["default/dns:p"]
    assert (dns.connections, dns.packets_in, dns.bytes_in, dns.packets_out, dns.bytes_out) == (1, 5, 500, 5, 500)
    web = found["default/web:p"]
    assert web.bytes_out >= 5 * 20_000
    assert web.bytes_out < 5 * 20_000 + 60 * web.packets_out + 1
    assert web.packets_in >= 5 * 3

    here = f"--run-directory={counting.run_directory}"
    assert cli.main(["dump", "--counters", here]) == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split()[:4] == ["SERVICE", "PROTOCOL", "OPEN", "CONNECTIONS"]
    assert [line.split()[:4] for line in lines] == [
        ["default/dns:p", "UDP", "0", "1"],
        ["default/web:p", "TCP", "0", "5"],
    ]
    assert cli.main(["dump", "--counters", "-o", "json", here]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counters"]["by"] == "agent"
    routes = {(each["service"], each["kind"]): each["traffic"] for table in told["tables"] for each in table["routes"]}
    assert routes["default/web:p", "ClusterIP"]["backends"][f"{POD}:8080"]["connections"] == 4
    assert routes["default/web:p", "NodePort"]["connections"] == 1
    assert routes["default/quiet:p", "ClusterIP"]["connections"] == 0
    assert cli.main(["dump", "--counters", "-o", "wide", "--service", "web", here]) == 0
    assert f"{POD}:8080" in capsys.readouterr().out

    metrics = metrics_page()
    labels = 'ip_family="IPv4",protocol="UDP",service_port="default/dns:p"'
    assert f"sluice_service_connections_total{{{labels}}} 1.0" in metrics
    assert re.search(r'sluice_service_bytes_total\{direction="to_backend",[^}]*dns:p"\} 500.0', metrics)
    assert "sluice_service_traffic_losses_total 0.0" in metrics
    held.close()


def test_open_flows_count_while_they_are_open_and_without_an_agent(
    counting: Agent, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    held = connect()
    counting.stop()
    here = f"--run-directory={counting.run_directory}"
    assert cli.main(["dump", "--counters", "-o", "json", here]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["counters"]["by"] == "open flows"
    assert "no agent runs: this is of the flows that are open" in captured.err
    [route] = [each for each in told["tables"][0]["routes"] if each["traffic"]["open"]]
    assert (route["service"], route["traffic"]["connections"]) == ("default/web:p", 1)
    assert route["traffic"]["bytesOut"] > 20_000
    held.close()


@pytest.mark.parametrize("proxy_mode", ["userspace"])
def test_mode_userspace_tells_what_its_workers_relayed(
    counting: Agent, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        connect().close()
        counting.until(lambda: getattr(totals(counting).get("default/web:p"), "bytes_out", 0) == 20_000)
        assert totals(counting)["default/web:p"].connections == 1
        assert cli.main(["dump", "--counters", f"--run-directory={counting.run_directory}"]) == 0
        assert "default/web:p" in capsys.readouterr().out
    finally:
        counting.stop()
        server.close()  # else the workers wait for its connection
        assert counting.verb("cleanup").returncode == 0


def test_only_translated_flows_are_told_to_have_ended(root: None) -> None:
    """The kernel's own filter drops the others, so that they cost nothing."""
    with own_network_namespace():
        node_with_pods()
        rules = f"""table ip t {{
            chain o {{ type nat hook output priority -100;
                ip daddr {CLUSTER_IP} tcp dport 80 dnat to {POD}:8080
            }}
            chain f {{ type filter hook output priority 0;
                ct state new accept
            }}
        }}"""
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
        server = Server(20_000)
        try:
            with EndedFlows() as ended:
                connect(8080, POD).close()
                reset(connect())
                forget_flows()
                flows = ended.take()
                assert [each.port for each in flows] == [80]
                assert ended.lost == 0
                connect(8080, POD).close()
                forget_flows()
                assert ended.take() == []
        finally:
            server.close()


def test_counters_are_off_unless_asked_for(root: None, tmp_path: Path) -> None:
    with own_network_namespace():
        node_with_pods()
        agent = Agent(tmp_path, "report", manifests(tmp_path))
        try:
            assert ACCOUNTING.read_text().strip() == "0"
            report, rows = agent_socket.counters(agent.run_directory)
            assert (report.on, rows) == (False, [])
            metrics = metrics_page()
            assert "sluice_service_" not in metrics
        finally:
            agent.stop()
