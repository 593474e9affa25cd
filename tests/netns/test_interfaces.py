"""The addresses of interfaces, as rtnetlink tells them."""

from __future__ import annotations

import subprocess

from proxy.interfaces import read_addresses
from rules.forwarding import parse_address
from tests.netns.isolation import own_network_namespace


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def test_every_address_is_read_under_its_interface(root):
    with own_network_namespace():
        for command in (
            "link set lo up",
            "link add one type veth peer name other",
            "address add 172.16.0.1/24 dev one",
            "address add 172.16.1.1/24 dev one",
            "address add 2001:db8::5/64 dev one nodad",
        ):
            ip(command)
        found = read_addresses()
        assert found["one"] == tuple(map(parse_address, ("172.16.0.1", "172.16.1.1", "2001:db8::5")))
        assert found["lo"] == tuple(map(parse_address, ("127.0.0.1", "::1")))
        assert "other" not in found


def test_of_a_point_to_point_address_the_own_end_counts(root):
    with own_network_namespace():
        ip("link add one type veth peer name other")
        ip("address add 10.9.0.1 peer 10.9.0.2/32 dev one")
        assert read_addresses() == {"one": (parse_address("10.9.0.1"),)}


def test_more_addresses_than_one_datagram_holds(root):
    with own_network_namespace():
        addresses = [f"10.9.{number // 250}.{number % 250 + 1}" for number in range(2000)]
        ip("link add one type veth peer name other")
        batch = "".join(f"address add {address}/32 dev one\n" for address in addresses)
        subprocess.run(["ip", "-batch", "-"], input=batch.encode(), check=True)
        assert read_addresses() == {"one": tuple(map(parse_address, addresses))}


def test_an_interface_may_have_any_name(root):
    with own_network_namespace():
        ip("link add one type veth peer name other")
        ip("address add 10.9.0.1/24 dev one")
        subprocess.run([b"ip", b"link", b"set", b"one", b"name", b"\xff\xfeone"], check=True)
        [(name, addresses)] = read_addresses().items()
        assert name.endswith("one")
        assert addresses == (parse_address("10.9.0.1"),)
