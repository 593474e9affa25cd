"""The agent killed at any moment: what it leaves is whole, the next one goes on, and no connection is lost.

It has a world of its own, as these tests end agents and flush rulesets.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from proxy.demo.probes import Probe, Server
from proxy.demo.world import World
from rules.forwarding import ForwardingTable
from rules.netlink.attributes import messages
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import eventually, nft
from tests.scenarios.schema import CLUSTER, Manifest, manifests

pytestmark = pytest.mark.xdist_group("crash")

KILLS = 20
STATES = 3
SEED = 4
_NETLINK_NETFILTER = 12
_NFTABLES = 10
_NFTABLES_GROUP = 1 << 6

SYNCED = b" operations="
STABLE, CHANGING, ECHO, MOVING = (f"10.96.1.{number}" for number in (1, 2, 3, 4))


@pytest.fixture(scope="module")
def crash_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-crash") as world:
        world.probes.open([Server("p1", "TCP", "", 8080)])
        yield world


@pytest.fixture
def crash_agent(crash_world: World, mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(crash_world, tmp_path_factory.mktemp("crash"), mode)
    yield agent
    agent.kill()
    nft(crash_world, "flush", "ruleset")


def service(
    name: str, address: str, *endpoints: str, port: int = 80, target: int = 8080, **spec: Any
) -> list[Manifest]:
    metadata = {"name": name, "namespace": "default"}
    labels = {"kubernetes.io/service-name": name}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": "ClusterIP",
                "clusterIP": address,
                "clusterIPs": [address],
                "ipFamilies": ["IPv4"],
                "ports": [{"port": port, "protocol": "TCP", "targetPort": target}],
                **spec,
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata | {"labels": labels},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [each], "nodeName": "node1"} for each in endpoints],
            "ports": [{"name": "", "port": target, "protocol": "TCP"}],
        },
    ]


def states(count: int) -> list[list[Manifest]]:
    """What a cluster holds at different times: one Service stays, of the others some come, go and change."""
    randomly = random.Random(SEED)
    found = []
    for number in range(count):
        objects = [*manifests(CLUSTER), *service("stable", STABLE, "10.244.1.11")]
        objects += service("echo", ECHO, "10.244.1.11", target=8090)
        # At some time its endpoint is another, and at some it has none: who is connected stays so.
        objects += service("changing", CHANGING, *(["10.244.1.11"], ["10.244.1.12"], [])[number % 3])
        for each in range(150):
            if randomly.random() < 0.7:
                endpoints = [f"10.244.9.{randomly.randrange(1, 250)}" for _ in range(randomly.randrange(4))]
                affinity = {"sessionAffinity": "ClientIP"} if randomly.random() < 0.1 else {}
                objects += service(f"s{each}", f"10.96.2.{each}", *dict.fromkeys(endpoints), **affinity)
        found.append(objects)
    return found


def held(agent: Agent) -> list[ForwardingTable]:
    """The tables in the kernel, without the harness's own Service."""
    found = []
    for family in agent.families:
        table = agent.read(family)
        assert table is not None, f"there is no table of {family.label}"
        routes = {key: route for key, route in table.routes.items() if not route.label.endswith("/marker")}
        found.append(msgspec.structs.replace(table, routes=routes))
    return found


def from_nothing(agent: Agent, objects: list[Manifest]) -> list[ForwardingTable]:
    """What an agent makes of objects where there was nothing."""
    agent.configure({})
    agent.apply(objects)
    return held(agent)


class Connections:
    """TCP connections that stay open; whoever they lead to sends back what it gets."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ends = selectors.DefaultSelector()
        self._clients: list[socket.socket] = []
        self._stop, stopped = socket.socketpair()
        self._ends.register(stopped, selectors.EVENT_READ)
        self._listen = world.namespaces["p1"].inside(lambda: socket.create_server(("10.244.1.11", 8090)))
        self._ends.register(self._listen, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._echo, name="echo")
        self._thread.start()

    def _echo(self) -> None:
        while True:
            for ready, _ in self._ends.select():
                end = ready.fileobj
                assert isinstance(end, socket.socket)
                if end is self._listen:
                    accepted, _ = self._listen.accept()
                    self._ends.register(accepted, selectors.EVENT_READ)
                    continue
                data = end.recv(4096)
                if not data:
                    if end.family == socket.AF_UNIX:
                        return
                    self._ends.unregister(end)
                    end.close()
                    continue
                end.sendall(data)

    def open(self, address: str, port: int, count: int = 3) -> None:
        for _ in range(count):
            connect = lambda: socket.create_connection((address, port), timeout=DEADLINE)  # noqa: E731 - one line of it
            self._clients.append(self._world.namespaces["p3"].inside(connect))

    def alive(self) -> int:
        """How many still carry bytes both ways."""
        return sum(map(_answers, self._clients))

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._stop.close()
        self._thread.join()
        for key in list(self._ends.get_map().values()):
            key.fileobj.close()
        self._ends.close()


def _answers(client: socket.socket) -> bool:
    try:
        client.sendall(b"still there?")
        return client.recv(100) == b"still there?"
    except OSError:
        return False


class Listener:
    """Counts the nftables messages that the kernel tells everybody in node1, whoever caused them."""

    def __init__(self, world: World) -> None:
        def inside() -> socket.socket:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)

        self._socket = world.namespaces["node1"].inside(inside)
        self._socket.bind((0, _NFTABLES_GROUP))
        self._socket.setblocking(False)

    def take(self) -> int:
        """How many since the last call."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                count += sum(message.kind >> 8 == _NFTABLES for message in messages(self._socket.recv(1 << 16)))
        return count

    def close(self) -> None:
        self._socket.close()


def test_killed_at_any_moment_the_next_agent_ends_with_the_wanted_table_and_no_connection_is_lost(
    crash_agent: Agent, crash_world: World
) -> None:
    randomly = random.Random(SEED)
    several = states(STATES)
    expected = []
    for objects in several:
        expected.append(from_nothing(crash_agent, objects))
        crash_agent.kill()
        nft(crash_world, "flush", "ruleset")
    assert len({len(tables[0].routes) for tables in expected}) > 1, "the states are alike"

    with contextlib.closing(Connections(crash_world)) as connections:
        crash_agent.configure({})
        crash_agent.apply([*several[0], *service("moving", MOVING, "10.244.1.11", target=8090)])
        connections.open(ECHO, 80)
        connections.open(MOVING, 80)
        # A Service that goes leaves its connections alone.
        crash_agent.apply(several[0])
        crash_world.probes.start("crash", Probe(host="p3", address=STABLE, port=80), 0.005)
        moments = {"changes": 0, "start": 0}
        for number in range(KILLS):
            if number % 2:
                moments["start"] += 1
                crash_agent.publish(several[randomly.randrange(STATES)])
                crash_agent.start()
                time.sleep(randomly.uniform(0.2, 0.9))
            else:
                moments["changes"] += 1
                if number:
                    crash_agent.start()
                    crash_agent.wait()
                for _ in range(randomly.randrange(1, 6)):
                    crash_agent.publish(several[randomly.randrange(STATES)])
                    time.sleep(randomly.uniform(0.0, 0.03))
            crash_agent.kill()
            for family in crash_agent.families:
                table = crash_agent.read(family)
                assert table is not None
                assert not table.damage, f"kill {number} left half a table"
            assert connections.alive() == 6, f"kill {number} cost connections"
            if number % 4 == 3:
                last = randomly.randrange(STATES)
                crash_agent.publish(several[last])
                crash_agent.start()
                crash_agent.wait()
                assert held(crash_agent) == expected[last], f"after kill {number}"
                crash_agent.kill()
        outcomes = crash_world.probes.stop("crash")
    assert {outcome.host or str(outcome) for outcome in outcomes} == {"p1"}
    assert len(outcomes) > 100
    assert moments == {"changes": KILLS // 2, "start": KILLS // 2}


def test_a_restart_with_nothing_changed_writes_nothing_as_others_see_it(crash_agent: Agent, crash_world: World) -> None:
    """NFT-22."""
    objects = states(1)[0]
    crash_agent.configure({})
    crash_agent.apply(objects)
    with contextlib.closing(Listener(crash_world)) as listener:
        for end in (crash_agent.kill, crash_agent.stop):
            end()
            read = crash_agent.log.stat().st_size
            crash_agent.start()
            eventually(lambda read=read: synced(crash_agent, read) >= len(crash_agent.families), "the first syncs")
            assert listener.take() == 0
        crash_agent.apply(objects[:-2])
        assert listener.take() > 0, "the listener hears nothing at all"


def synced(agent: Agent, position: int) -> int:
    """How many syncs the log tells of behind a position."""
    return agent.log.read_bytes()[position:].count(SYNCED)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_who_waits_takes_over_at_once_and_nobody_notices(
    crash_agent: Agent, crash_world: World, end: signal.Signals, tmp_path: Any
) -> None:
    """DESIGN 4.11."""
    objects = states(1)[0]
    crash_agent.configure({})
    crash_agent.apply(objects)
    log = tmp_path / "second.log"
    with log.open("wb") as output:
        second = crash_world.start("node1", [*crash_agent.command(), "--takeover"], stdout=output, stderr=output)
    try:
        eventually(lambda: b"waiting" in log.read_bytes(), "the second agent's waiting")
        crash_world.probes.start("takeover", Probe(host="p3", address=STABLE, port=80), 0.005)
        with contextlib.closing(Listener(crash_world)) as listener:
            first = crash_agent._process
            assert first is not None
            first.send_signal(end)
            first.wait(timeout=DEADLINE)
            eventually(lambda: log.read_bytes().count(SYNCED) >= len(crash_agent.families), "the second agent's syncs")
            assert listener.take() == 0
            # From now on it is the agent.
            crash_agent._process = second
            crash_agent.apply(objects[:-2])
            assert listener.take() > 0
        outcomes = crash_world.probes.stop("takeover")
        assert {outcome.host or str(outcome) for outcome in outcomes} == {"p1"}
    finally:
        second.kill()
        second.wait()


def test_two_that_wait_take_over_one_after_the_other(crash_agent: Agent, crash_world: World, tmp_path: Any) -> None:
    crash_agent.configure({})
    crash_agent.apply(states(1)[0])
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    waiting: list[subprocess.Popen[Any]] = []
    try:
        for log in logs:
            with log.open("wb") as output:
                command = [*crash_agent.command(), "--takeover"]
                waiting.append(crash_world.start("node1", command, stdout=output, stderr=output))
        eventually(lambda: all(b"waiting" in log.read_bytes() for log in logs), "their waiting")
        crash_agent.kill()
        eventually(lambda: sum(SYNCED in log.read_bytes() for log in logs) == 1, "one that takes over")
        took = next(number for number, log in enumerate(logs) if SYNCED in log.read_bytes())
        assert all(process.poll() is None for process in waiting)
        waiting[took].kill()
        eventually(lambda: SYNCED in logs[1 - took].read_bytes(), "the other one")
    finally:
        for process in waiting:
            process.kill()
            process.wait()
