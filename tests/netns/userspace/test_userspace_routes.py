"""The routes by which addresses are the node's, in a kernel."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from proxy.userspace.anyip import change_routes, prefer_source, read_routes
from rules.forwarding import Family, parse_address, parse_prefix
from tests.netns.isolation import own_network_namespace

ROUTES = frozenset(map(parse_prefix, ("10.97.0.0/16", "203.0.113.1/32")))


@pytest.fixture
def node(root: None) -> Iterator[None]:
    """A node with the addresses 192.0.2.1 and fd00:2::1."""
    with own_network_namespace():
        for command in (
            "link set lo up",
            "link add eth0 type veth peer name other",
            "link set eth0 up",
            "link set other up",
            "address add 192.0.2.1/24 dev eth0",
            "address add fd00:2::1/64 dev eth0 nodad",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        yield


def source_to(address: str) -> str:
    """The source that the kernel gives to what the node sends to an address."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def test_routes_come_go_and_are_told_from_those_of_others(node: None) -> None:
    subprocess.run(["ip", "route", "add", "local", "203.0.113.9", "dev", "lo"], check=True)
    assert change_routes(Family.IPV4, ROUTES, ()) == []
    assert change_routes(Family.IPV4, ROUTES, ()) == [], "those that are there already are no error"
    found = read_routes(Family.IPV4)
    assert found.ours == ROUTES
    assert parse_prefix("203.0.113.9/32") in found.others
    assert found.covering()(parse_address("10.97.1.2"))
    assert not found.covering()(parse_address("10.98.0.1"))
    assert change_routes(Family.IPV4, (), [*ROUTES, parse_prefix("203.0.113.9/32")]) == []
    after = read_routes(Family.IPV4)
    assert not after.ours
    assert parse_prefix("203.0.113.9/32") in after.others, "another's route is not deleted"


def test_the_nodes_own_connections_can_be_led_away_from_addresses_that_are_about_to_go(node: None) -> None:
    change_routes(Family.IPV4, ROUTES, ())
    assert source_to("10.97.1.2") == "10.97.1.2"
    prefer_source(Family.IPV4, ROUTES, parse_address("192.0.2.1"))
    assert source_to("10.97.1.2") == source_to("203.0.113.1") == "192.0.2.1"
    assert read_routes(Family.IPV4).ours == ROUTES
    change_routes(Family.IPV4, (), ROUTES)
    assert not read_routes(Family.IPV4).ours


def test_over_ipv6_they_never_begin_at_such_an_address(node: None) -> None:
    routes = [parse_prefix("fd00:97::/64")]
    change_routes(Family.IPV6, routes, ())
    assert source_to("fd00:97::5") == "fd00:2::1"
    assert read_routes(Family.IPV6).ours == frozenset(routes)
