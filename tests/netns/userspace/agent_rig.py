"""The rig for an agent in userspace mode: a world of its own, as these tests end agents and workers."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from proxy import agent_socket
from proxy.demo.world import World
from proxy.userspace import supervisor
from proxy.userspace.control import Connection, Stats, StatsAnswer
from rules.diff import compare
from rules.forwarding import parse_address
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import eventually

T = TypeVar("T")

ECHO = """
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
Server(("10.244.1.12", 8090), Handler).serve_forever()
"""


class Hasty(Agent):
    """An agent that gives connections a second to end, where they have to."""

    def command(self) -> list[str]:
        own = {"apiVersion": "sluice.internal/v1alpha1", "kind": "SluiceConfiguration", "userspace": {"drain": "1s"}}
        with (self._directory / "config.yaml").open("ab") as file:
            file.write(b"\n---\n" + msgspec.json.encode(own))
        return super().command()


def inside(world: World, call: Callable[[], T], host: str = "node1") -> T:
    return world.namespaces[host].inside(call)


def workers(world: World) -> dict[int, int]:
    """The processes of the workers, by index."""

    def pids() -> dict[int, int]:
        found = {}
        for index in supervisor.running():
            with contextlib.suppress(OSError), contextlib.closing(Connection(index)) as connection:
                found[index] = connection.welcome.pid
        return found

    return inside(world, pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def sound(agent: Agent) -> bool:
    """Whether the kernel holds what the agent wants, in both families."""
    for family in agent.families:
        wanted, head = agent_socket.table(family, str(agent.run_directory))
        if compare(wanted, agent.read(family), head.capabilities):
            return False
    return True


class Echo:
    """Connections to a Service whose backend echoes.

    They are made through a frontend of the load balancer kind, at an address that has a route of its own.
    """

    address = "203.0.113.60"

    def __init__(self) -> None:
        self.clients: list[socket.socket] = []

    def connect(self) -> bool:
        """Make one more; whether there are eight."""
        client = socket.socket()
        client.settimeout(DEADLINE)
        self.clients.append(client)
        try:
            client.connect((self.address, 80))
            client.sendall(b"begin\n")
            begun = client.recv(100) == b"begin\n"
        except OSError:
            begun = False
        if not begun:  # the echo doesn't listen yet
            self.clients.pop().close()
        return len(self.clients) == 8

    def alive(self) -> int:
        """How many of them still carry bytes both ways."""
        return sum(map(self._carries, self.clients))

    @staticmethod
    def _carries(client: socket.socket) -> bool:
        try:
            client.sendall(b"still there?\n")
            return client.recv(100) == b"still there?\n"
        except OSError:
            return False


@contextlib.contextmanager
def echoing(world: World) -> Iterator[Echo]:
    """Eight connections from p3 to the echo, which end with the block."""
    server = world.start("p2", [sys.executable, "-c", ECHO])
    found = Echo()
    eventually(lambda: inside(world, found.connect, "p3"), "eight connections to the echo")
    try:
        yield found
    finally:
        for client in found.clients:
            client.close()
        server.kill()
        server.wait()


def flows_to(world: World, address: str) -> dict[int, int]:
    """How many open connections to an address each worker has, by its index."""

    def count() -> dict[int, int]:
        found = {}
        for index in supervisor.running():
            with contextlib.closing(Connection(index)) as connection:
                answer = connection.ask(Stats())
                assert isinstance(answer, StatsAnswer)
                mine = [each.open for each in answer.frontends if each.frontend.address == parse_address(address)]
                found[index] = sum(mine)
        return found

    return inside(world, count)


def echo_objects() -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "echo", "namespace": "default"},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.6.60", "clusterIPs": ["10.96.6.60"],
                     "ipFamilies": ["IPv4"], "ports": [{"port": 80, "protocol": "TCP"}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.60"}]}},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "echo-4", "namespace": "default", "labels": {"kubernetes.io/service-name": "echo"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.244.1.12"], "nodeName": "node1"}],
            "ports": [{"name": "", "port": 8090, "protocol": "TCP"}],
        },
    ]  # fmt: skip


def troubles(agent: Agent) -> str:
    found = agent_socket.troubles(str(agent.run_directory))
    return "; ".join(f"{each.subject}: {each.reason}" for each in found if each.origin.startswith("kernel"))


def workers_answering(world: World) -> int:
    def count() -> int:
        found = 0
        for index in supervisor.running():
            with contextlib.suppress(OSError), contextlib.closing(Connection(index, timeout=0.5)):
                found += 1
        return found

    return inside(world, count)
