"""The agent in userspace mode: workers that outlive it, die, grow old and are replaced; and what it lacks elsewhere.

It has a world of its own, as these tests end agents and workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from proxy import agent_socket
from proxy.demo.world import World
from proxy.userspace import supervisor
from proxy.userspace.anyip import PROTOCOL, read_routes
from proxy.userspace.control import Apply, Connection, Drain, Stop, Table, TableAnswer, control_name
from proxy.userspace.sockdiag import read_listeners
from rules.diff import compare
from rules.forwarding import Family, Frontend, Protocol, parse_address, parse_prefix
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import answering, eventually, nft, said
from tests.netns.streams import listen, objects, streaming
from tests.netns.test_agent_lifecycle import synced_since

# One world for all of them.
pytestmark = pytest.mark.xdist_group("agent-userspace")

T = TypeVar("T")
_PIDFD_GETFD = 438

OLD_WORKER = """
import sys
from proxy.userspace import control, worker
control.VERSION = 0
raise SystemExit(worker.main(["--index", sys.argv[1], "--workers", "1"]))
"""
"""A worker of a release whose protocol is another one."""

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


@pytest.fixture(scope="module")
def own_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-user") as world:
        yield world


@pytest.fixture(scope="module")
def own_agent(own_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(own_world, tmp_path_factory.mktemp("userspace"), "userspace")
    yield agent
    agent.sweep()


@pytest.fixture
def serving(own_agent: Agent, own_world: World) -> Iterator[Agent]:
    """An agent that runs and has synced Services of every kind."""
    own_agent.configure({})
    listen(own_world)
    own_agent.apply(objects())
    yield own_agent
    own_world.probes.shut()


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


@contextlib.contextmanager
def echo(world: World) -> Iterator[Callable[[], bool]]:
    """Connections to a Service whose backend echoes; the value tells whether all of them still carry bytes both ways.

    They are made through a frontend of the load balancer kind, at an address that has a route of its own.
    """
    server = world.start("p2", [sys.executable, "-c", ECHO])
    clients: list[socket.socket] = []

    def connect() -> bool:
        client = socket.socket()
        client.settimeout(DEADLINE)
        clients.append(client)
        try:
            client.connect(("203.0.113.60", 80))
            client.sendall(b"begin\n")
            begun = client.recv(100) == b"begin\n"
        except OSError:
            begun = False
        if not begun:  # the echo doesn't listen yet
            clients.pop().close()
        return len(clients) == 8

    eventually(lambda: inside(world, connect, "p3"), "eight connections to the echo")

    def carries() -> bool:
        for client in clients:
            try:
                client.sendall(b"still there?\n")
                if client.recv(100) != b"still there?\n":
                    return False
            except OSError:
                return False
        return True

    try:
        yield carries
    finally:
        for client in clients:
            client.close()
        server.kill()
        server.wait()


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


# --- the agent ends and starts -----------------------------------------------------------------------------------


def test_no_connection_is_lost_while_the_agent_restarts_and_nothing_is_written(
    serving: Agent, own_world: World
) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    assert before
    with echo(own_world) as carries, streaming(own_world) as streams:
        for _ in range(2):
            serving.stop()
            assert workers(own_world) == before
            position = len(serving.log.read_text())
            serving.start()
            eventually(lambda at=position: len(synced_since(serving, at)) == len(serving.families), "the first syncs")
            assert all(operations == [0] for operations in synced_since(serving, position).values())
        assert carries()
    assert not streams.wrong(), f"of {streams.made} connections"
    assert workers(own_world) == before


def test_no_connection_is_lost_when_the_agent_is_killed_and_the_next_one_goes_on(
    serving: Agent, own_world: World
) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    with echo(own_world) as carries, streaming(own_world) as streams:
        serving.kill()
        assert answering(own_world, "c", "203.0.113.31", 80) == {"p1", "q1"}
        assert carries()
        serving.publish(objects())  # without the echo: who is connected stays so
        serving.start()
        serving.wait()
        assert carries()
    assert not streams.wrong(), f"of {streams.made} connections"
    assert workers(own_world) == before
    eventually(lambda: sound(serving), "the end of what lingers")


def test_workers_belong_to_nobody(serving: Agent, own_world: World) -> None:
    for pid in workers(own_world).values():
        assert os.getsid(pid) == pid
        targets = dict(_descriptors(pid))
        assert targets[0] == "/dev/null"
        assert not [target for target in targets.values() if "manifests" in target]


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """What a process has open, by descriptor."""
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            yield int(each.name), str(each.readlink())


def test_workers_of_another_version_are_replaced_without_a_gap_and_end_with_their_flows(
    serving: Agent, own_world: World, tmp_path
) -> None:
    serving.apply([*objects(), *echo_objects()])
    serving.stop()
    old = {index: _start_old_worker(own_world, index, tmp_path) for index in (10, 11)}
    for index in old:
        inside(own_world, lambda index=index: _copy_table(index))
    inside(own_world, lambda: [_end(index) for index in supervisor.running() if index < 10])
    eventually(lambda: inside(own_world, supervisor.running) == [10, 11], "the old workers alone")
    with echo(own_world) as carries, streaming(own_world) as streams:
        serving.start()
        eventually(lambda: inside(own_world, supervisor.running) == [0, 1], "the new workers alone")
        serving.wait()
        eventually(lambda: sound(serving), "the table in the new workers")
        assert carries()
        assert all(process.poll() is None for process in old.values())
    # A datagram that an old worker has just passed on is answered to nobody: UDP flows end with the listener.
    assert not [each for each in streams.wrong() if "UDP" not in each], f"of {streams.made} connections"
    assert len(streams.wrong()) < 5
    for process in old.values():
        assert process.wait(timeout=DEADLINE) == 0


def _start_old_worker(world: World, index: int, directory: Any) -> subprocess.Popen[bytes]:
    with (directory / f"old-{index}.log").open("wb") as log:
        process = world.start("node1", [sys.executable, "-c", OLD_WORKER, str(index)], stdout=log, stderr=log)

    def answers() -> bool:
        with contextlib.suppress(OSError), contextlib.closing(Connection(index, greet=False)):
            return True
        return False

    eventually(lambda: inside(world, answers), f"the old worker {index}: {control_name(index)!r}")
    return process


def _copy_table(index: int) -> None:
    """Give a worker what worker 0 has."""
    with contextlib.closing(Connection(0)) as one, contextlib.closing(Connection(index, greet=False)) as other:
        for family in Family:
            held = one.ask(Table(family))
            assert isinstance(held, TableAnswer)
            other.ask(Apply(family=family, serial="old", node=held.node, put=held.routes, hairpins_added=held.hairpins))


def _end(index: int) -> None:
    with contextlib.closing(Connection(index)) as connection:
        connection.ask(Drain(5.0))


# --- workers die -------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_replaced_and_takes_only_its_own_flows_with_it(serving: Agent, own_world: World) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    assert len(before) == supervisor.default_count()
    victim = min(before)
    os.kill(before[victim], signal.SIGKILL)
    eventually(lambda: workers(own_world).get(victim, before[victim]) != before[victim], "the new worker")
    eventually(lambda: sound(serving), "its table")
    after = workers(own_world)
    assert {index: pid for index, pid in after.items() if index != victim} == {
        index: pid for index, pid in before.items() if index != victim
    }
    assert not alive(before[victim]), "a zombie is left"
    with streaming(own_world) as streams:
        time.sleep(0.2)
    assert not streams.wrong()


def test_all_workers_die_and_come_back(serving: Agent, own_world: World) -> None:
    before = workers(own_world)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(workers(own_world)) == len(before) and sound(serving), "new workers")
    assert answering(own_world, "c", "203.0.113.31", 80) == {"p1", "q1"}


def test_dead_workers_are_drift_that_the_next_agent_repairs(serving: Agent, own_world: World) -> None:
    serving.stop()
    for pid in workers(own_world).values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not inside(own_world, supervisor.running), "the end of the workers")
    table = serving.read(Family.IPV4)
    assert table is not None
    assert "no worker runs" in table.damage
    assert not table.routes
    serving.start()
    serving.wait()
    assert sound(serving)


# --- others ------------------------------------------------------------------------------------------------------


def test_a_port_that_somebody_else_holds_is_that_services_trouble_and_is_tried_again(
    serving: Agent, own_world: World
) -> None:
    serving.apply([])
    rival = inside(own_world, lambda: socket.create_server(("192.168.50.11", 30001)))
    try:
        serving.apply(objects())
        eventually(lambda: "default/wide" in troubles(serving), "the Service's trouble")
        assert "192.168.50.11:30001" in troubles(serving)
        assert answering(own_world, "p3", "10.96.6.1", 80) == {"p1", "q1"}
        assert answering(own_world, "c", "192.168.50.11", 30002) == {"p1"}
    finally:
        rival.close()
    eventually(lambda: answering(own_world, "c", "192.168.50.11", 30001) == {"p1", "q1"}, "the port")
    eventually(lambda: not troubles(serving), "the end of the trouble")


def troubles(agent: Agent) -> str:
    found = agent_socket.troubles(str(agent.run_directory))
    return "; ".join(f"{each.subject}: {each.reason}" for each in found if each.origin.startswith("kernel"))


@pytest.mark.parametrize("network", ["10.96.0.0/16", "203.0.113.31/32"])
def test_a_route_that_somebody_deletes_comes_back(network: str, serving: Agent, own_world: World) -> None:
    assert parse_prefix(network) in inside(own_world, lambda: read_routes(Family.IPV4)).ours
    said(own_world, "ip", "route", "delete", "table", "local", "local", network)
    eventually(lambda: parse_prefix(network) in inside(own_world, lambda: read_routes(Family.IPV4)).ours, "the route")
    eventually(lambda: sound(serving), "the repair")


def test_a_listener_that_somebody_closes_is_found_by_verify_and_opened_again(serving: Agent, own_world: World) -> None:
    frontend = Frontend(parse_address("10.96.6.1"), Protocol.TCP, 80)
    for pid in workers(own_world).values():
        inside(own_world, lambda pid=pid: _close_listener(pid, ("10.96.6.1", 80)))
    table = serving.read(Family.IPV4)
    assert table is not None
    assert frontend not in table.routes
    done = inside(
        own_world,
        lambda: subprocess.run(
            [sys.executable, "-m", "proxy", "verify", "--run-directory", str(serving.run_directory)],
            capture_output=True,
            text=True,
            check=False,
        ),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "10.96.6.1:80/TCP" in done.stdout
    serving.stop()
    serving.start()
    serving.publish(objects())
    serving.wait()
    assert sound(serving)
    assert answering(own_world, "p3", "10.96.6.1", 80) == {"p1", "q1"}


def _close_listener(pid: int, place: tuple[str, int]) -> None:
    """End the listening of another process's socket."""
    library = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    for number, target in list(_descriptors(pid)):
        if target.startswith("socket:"):
            descriptor = library.syscall(_PIDFD_GETFD, pidfd, number, 0)
            assert descriptor >= 0
            with socket.socket(fileno=descriptor) as each:
                listens = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens and each.family == socket.AF_INET and each.getsockname() == place:
                    each.shutdown(socket.SHUT_RDWR)
    os.close(pidfd)


def test_an_address_that_a_flow_still_uses_stays_until_it_ends(serving: Agent, own_world: World) -> None:
    def routes() -> frozenset[Any]:
        return inside(own_world, lambda: read_routes(Family.IPV4)).ours

    address = parse_prefix("203.0.113.60/32")
    serving.apply([*objects(), *echo_objects()])
    assert address in routes()
    with echo(own_world) as carries:
        serving.apply(objects())
        assert address in routes()
        assert carries()
        table = serving.read(Family.IPV4)
        assert table is not None
        assert not table.damage
        # It comes back, and goes again.
        serving.apply([*objects(), *echo_objects()])
        assert carries()
        serving.apply(objects())
        assert carries()
    eventually(lambda: address not in routes(), "the end of the route")


def test_a_new_address_of_the_node_answers_node_ports(serving: Agent, own_world: World) -> None:
    """TRF-20."""
    assert answering(own_world, "c", "192.168.51.77", 30001, count=1) != {"p1"}
    said(own_world, "ip", "addr", "add", "192.168.51.77/32", "dev", "eth0")
    try:
        eventually(lambda: answering(own_world, "c", "192.168.51.77", 30001) == {"p1", "q1"}, "the new address")
        eventually(lambda: sound(serving), "equality")
    finally:
        said(own_world, "ip", "addr", "delete", "192.168.51.77/32", "dev", "eth0")
    eventually(
        lambda: (
            not any(
                place.address == parse_address("192.168.51.77")
                for place in inside(own_world, lambda: read_listeners(Family.IPV4))
            )
        ),
        "the end of its listeners",
    )


def test_without_cap_net_admin_node_ports_work_and_the_log_says_what_does_not(
    serving: Agent, own_world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    serving.sweep()

    class Powerless(Agent):
        def command(self) -> list[str]:
            drop = "-net_admin"
            return ["setpriv", "--bounding-set", drop, "--inh-caps", drop, *super().command()]

    agent = Powerless(own_world, tmp_path_factory.mktemp("powerless"), "userspace")
    try:
        agent.configure({})
        agent.publish(objects())
        eventually(lambda: answering(own_world, "c", "192.168.50.11", 30001, count=8) <= {"p1", "q1"}, "the node port")
        assert answering(own_world, "c", "192.168.99.11", 80) == {"p1", "q1"}, "an external IP that the node has"
        assert not answering(own_world, "p3", "10.96.6.1", 80, count=1) & {"p1", "q1"}
        eventually(lambda: "without CAP_NET_ADMIN no address can be made" in agent.log.read_text(), "the log")
        assert "Operation not permitted" in troubles(agent)
    finally:
        agent.sweep()


def test_cleanup_ends_the_workers_and_removes_the_routes(serving: Agent, own_world: World) -> None:
    before = workers(own_world)
    said(own_world, "ip", "route", "add", "local", "203.0.113.99", "dev", "lo")
    try:
        serving.stop()
        done = inside(
            own_world,
            lambda: subprocess.run(
                [sys.executable, "-m", "proxy", "cleanup"], capture_output=True, text=True, check=False
            ),
        )
        assert done.returncode == 0, done.stderr
        assert "removed what userspace held for IPv4" in done.stdout
        assert not any(alive(pid) for pid in before.values())
        assert not inside(own_world, supervisor.running)
        for family in serving.families:
            assert not inside(own_world, lambda family=family: read_routes(family)).ours
        assert str(PROTOCOL) not in said(
            own_world, "ip", "-N", "route", "show", "table", "local", "proto", str(PROTOCOL)
        )
        assert "203.0.113.99" in said(own_world, "ip", "route", "show", "table", "local"), "somebody else's"
    finally:
        said(own_world, "ip", "route", "delete", "local", "203.0.113.99", "dev", "lo", "table", "local")
        serving.start()
        serving.wait()


def test_modes_change_places_and_hardly_a_connection_fails(
    serving: Agent, own_world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Agent(own_world, tmp_path_factory.mktemp("nftables"), "nftables")
    node_port_addresses = {"nodePortAddresses": ["192.168.50.0/24", "fd00:50::/64"]}
    try:
        with streaming(own_world) as streams:
            serving.stop()
            other.configure(node_port_addresses)
            other.apply(objects())
            # A connection that was being made in that instant may linger until the drain ends it.
            eventually(lambda: not inside(own_world, supervisor.anything_left), "the end of the workers", 90)
            other.stop()
            serving.start()
            serving.wait()
            eventually(lambda: "sluice" not in nft(own_world, "list", "tables"), "the end of nftables' tables")
        # Rules see connections that workers have accepted for the first time in the middle (docs/userspace.md).
        assert len(streams.wrong()) <= 3, f"of {streams.made} connections: {streams.wrong()}"
    finally:
        other.stop()


def test_status_says_what_the_mode_cannot_do(serving: Agent) -> None:
    """DESIGN 4.10."""
    notes = " ".join(agent_socket.status(str(serving.run_directory)).notes)
    assert "SCTP" in notes
    assert "source of every connection" in notes
    assert "SCTP is not carried" in serving.log.read_text()


def test_a_worker_that_is_stuck_is_replaced(serving: Agent, own_world: World) -> None:
    serving.stop()
    before = workers(own_world)
    victim = max(before)
    os.kill(before[victim], signal.SIGSTOP)
    serving.start()
    eventually(lambda: workers_answering(own_world) == len(before), "a worker that answers")
    serving.apply(objects())
    assert sound(serving)
    assert not alive(before[victim])


def workers_answering(world: World) -> int:
    def count() -> int:
        found = 0
        for index in supervisor.running():
            with contextlib.suppress(OSError), contextlib.closing(Connection(index, timeout=0.5)):
                found += 1
        return found

    return inside(world, count)


def test_stop_ends_a_worker_at_once(serving: Agent, own_world: World) -> None:
    serving.stop()
    before = workers(own_world)

    def stop() -> None:
        for index in supervisor.running():
            with contextlib.closing(Connection(index)) as connection:
                connection.ask(Stop())

    inside(own_world, stop)
    eventually(lambda: not any(alive(pid) for pid in before.values()), "the end of the workers")
