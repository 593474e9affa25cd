"""Clients of bad will at the health server and at a health-check node port: syncs and health answers go on.

What it costs is measured by bench/health.py; here it is shown that nothing stops, whatever is offered.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.demo.world import World
from rules.forwarding import Family
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import answering, eventually, get
from tests.netns.runner import backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, load, manifests, merge

# One world and one agent for all of them.
pytestmark = pytest.mark.xdist_group("health-flood")

NODE = "192.168.50.11"
HEALTH, CHECK = 10256, 32000
RATE = 10_000


@pytest.fixture(scope="module")
def flood_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-flood") as world:
        yield world


@pytest.fixture(scope="module")
def flood_agent(flood_world: World, mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(flood_world, tmp_path_factory.mktemp("flood"), mode)
    yield agent
    agent.stop()


@pytest.fixture
def served(flood_agent: Agent, flood_world: World) -> Iterator[Agent]:
    """An agent with a health-check node port."""
    flood_agent.configure({})
    flood_world.probes.open(backends([*objects("10.244.1.11"), *objects("10.244.1.12")]))
    flood_agent.apply(objects("10.244.1.11"))
    eventually(lambda: asked(flood_world, CHECK) is not None, "the health-check node port")
    yield flood_agent
    flood_world.probes.shut()


def objects(endpoint: str) -> list[Manifest]:
    """The cluster, and a load balancer with a health check and one endpoint."""
    changes = {
        "web": {"spec": {"healthCheckNodePort": CHECK}},
        "web-4": {"endpoints": [{"addresses": [endpoint], "nodeName": "node1"}]},
    }
    found = manifests(CLUSTER) + load(DIRECTORY / "external-policy-local.yaml").objects
    return [merge(each, changes.get(each["metadata"]["name"], {})) for each in found]


def asked(world: World, port: int) -> int | None:
    """The status of an answer to an honest probe; None: it got none."""
    path = "/healthz" if port == HEALTH else "/"
    with contextlib.suppress(OSError):
        reply = get(world, "c", NODE, port, path)
        return None if reply is None else reply.status
    return None


def goes_on(world: World, agent: Agent) -> None:
    """See that syncs are done, and honest probes answered, meanwhile."""
    for endpoint, host in (("10.244.1.12", "p2"), ("10.244.1.11", "p1")):
        agent.apply(objects(endpoint))
        assert answering(world, "p3", "10.96.0.41", 80, count=4) == {host}
    for port in (HEALTH, CHECK):
        eventually(lambda port=port: asked(world, port) == 200, f"an answer at {port}")


@contextlib.contextmanager
def offered(world: World, port: int) -> Iterator[None]:
    """10,000 connections a second from outside, for as long as the block runs."""
    command = [sys.executable, "-m", "bench.health", "--offer", str(RATE), "--to", f"{NODE}:{port}"]
    process = world.start("c", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert select.select([process.stdout], [], [], DEADLINE)[0], "the flood did not begin"
        process.stdout.readline()
        yield
        assert process.poll() is None, "the flood ended early"
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def hanging(world: World, port: int, count: int, said: bytes) -> Iterator[list[socket.socket]]:
    """So many connections from outside, each of which has said so much, for as long as the block runs."""
    sockets: list[socket.socket] = []

    def connect() -> None:
        for _ in range(count):
            sock = socket.socket()
            sockets.append(sock)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect((NODE, port))
            # Those that the kernel does not let in yet say nothing.
            with contextlib.suppress(OSError):
                sock.send(said)

    try:
        world.namespaces["c"].inside(connect)
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Room for the sockets of thousands of clients."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(20_000, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("port", [HEALTH, CHECK])
def test_ten_thousand_connections_a_second_stop_no_sync_and_no_answer(port, served, flood_world):
    """HC-1, HC-20."""
    with offered(flood_world, port):
        goes_on(flood_world, served)


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nX-Long: " + b"x" * 6000, b"POST / HTTP/1.1\r\n\r\n"],
    ids=["silent", "half a request", "a long header without end", "asked and never read"],
)
def test_five_thousand_connections_stop_no_sync_and_no_answer(said, served, flood_world):
    with hanging(flood_world, HEALTH, 5000, said):
        goes_on(flood_world, served)


def test_clients_that_talk_for_ever_a_byte_at_a_time_stop_no_sync_and_no_answer(served, flood_world):
    with hanging(flood_world, CHECK, 500, b"GET / HTTP/1.1\r\nX: ") as sockets:
        for _ in range(10):
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.send(b"x")
        goes_on(flood_world, served)


def test_headers_beyond_all_measure_are_refused(served, flood_world):
    def inside() -> bytes:
        with socket.create_connection((NODE, HEALTH), timeout=DEADLINE) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 1_000_000)
            return sock.recv(100)

    with contextlib.suppress(ConnectionError):  # it may be put out before it reads why
        assert b" 431 " in flood_world.namespaces["c"].inside(inside)
    goes_on(flood_world, served)


def test_the_agents_descriptors_stay_few(served, flood_world):
    """However many connect, the agent holds as many connections as it decides."""
    with hanging(flood_world, HEALTH, 3000, b"GET /"):
        eventually(lambda: asked(flood_world, HEALTH) == 200, "an answer")
        assert len(list(Path(f"/proc/{served.pid}/fd").iterdir())) < 400
    assert served.read(Family.IPV4) is not None
