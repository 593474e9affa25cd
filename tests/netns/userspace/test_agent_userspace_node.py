"""The agent in userspace mode on its node: addresses, routes and ports, other programs, other modes, and clean-up."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from typing import Any

import pytest

from proxy import agent_socket, modes
from proxy.demo.world import World
from proxy.userspace import supervisor
from proxy.userspace.anyip import PROTOCOL, read_routes
from proxy.userspace.sockdiag import read_listeners
from rules.forwarding import Family, Frontend, Protocol, parse_address, parse_prefix
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import answering, eventually, said
from tests.netns.descriptors import sockets
from tests.netns.streams import objects, streaming
from tests.netns.userspace.agent_rig import Echo, alive, echo_objects, echoing, inside, sound, troubles, workers

# One world for all of them.
pytestmark = pytest.mark.xdist_group("agent-userspace")


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
    for each in sockets(pid):
        listens = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and each.family == socket.AF_INET and each.getsockname() == place:
            each.shutdown(socket.SHUT_RDWR)


def test_an_address_that_a_flow_still_uses_stays_until_it_ends(serving: Agent, own_world: World) -> None:
    def routes() -> frozenset[Any]:
        return inside(own_world, lambda: read_routes(Family.IPV4)).ours

    address = parse_prefix("203.0.113.60/32")
    serving.apply([*objects(), *echo_objects()])
    assert address in routes()
    with echoing(own_world) as echoes:
        serving.apply(objects())
        assert address in routes()
        assert echoes.alive() == 8
        table = serving.read(Family.IPV4)
        assert table is not None
        assert not table.damage
        # It comes back, and goes again.
        serving.apply([*objects(), *echo_objects()])
        assert echoes.alive() == 8
        serving.apply(objects())
        assert echoes.alive() == 8
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


def test_cleanup_lets_connections_go_on_for_as_long_as_was_configured(serving: Agent, own_world: World) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    with echoing(own_world) as echoes:
        serving.stop()
        cleaning = own_world.start("node1", [sys.executable, "-m", "proxy", "cleanup"])
        eventually(lambda: inside(own_world, _is_refused, "p3"), "the end of the listeners")
        assert echoes.alive() == 8
        # The configuration, which clean-up does not read, says a second: the default would outlast this test.
        assert cleaning.wait(timeout=DEADLINE) == 0
        assert echoes.alive() == 0
    assert not any(alive(pid) for pid in before.values())
    serving.start()
    serving.wait()


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


def _is_refused() -> bool:
    try:
        socket.create_connection((Echo.address, 80), DEADLINE).close()
    except ConnectionRefusedError:
        return True
    return False


TRIES = 3
"""A machine that stands still for a second, as a shared one may, has connections that say nothing for so long, and
those are cut at a change of modes (docs/userspace.md)."""


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_modes_change_places_and_no_connection_fails(
    mode: str, serving: Agent, own_world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Agent(own_world, tmp_path_factory.mktemp(mode), mode)
    try:
        for _ in range(TRIES):
            with streaming(own_world) as streams:
                serving.stop()
                other.configure({"nodePortAddresses": ["192.168.50.0/24", "fd00:50::/64"]})
                other.apply(objects())
                # What was being said in that instant goes on through the workers.
                eventually(lambda: not inside(own_world, supervisor.anything_left), "the end of the workers", 90)
                other.stop()
                serving.start()
                serving.wait()
                eventually(lambda: not holds(own_world, mode), f"the end of mode {mode}'s rules", 90)
            if not streams.wrong():
                break
        assert not streams.wrong(), f"of {streams.made} connections"
        # Without these a connection is lost now and then only.
        assert "connections of userspace mode are tracked before rules come" in other.log.read_text()
        assert f"mode={mode} family=IPv4 drain=1" in serving.log.read_text()
    finally:
        other.stop()


def holds(world: World, mode: str) -> bool:
    """Whether a mode of rules has anything in node1's kernel."""

    def read() -> bool:
        found = False
        for family in Family:
            with contextlib.closing(modes.open_dataplane(mode, family)) as dataplane:
                found = found or dataplane.read() is not None
        return found

    return inside(world, read)


def test_status_says_what_the_mode_cannot_do(serving: Agent) -> None:
    """DESIGN 4.10."""
    notes = " ".join(agent_socket.status(str(serving.run_directory)).notes)
    assert "SCTP" in notes
    assert "source of every connection" in notes
    assert "SCTP is not carried" in serving.log.read_text()
