"""IPVS and the dummy device in a kernel: what is written is what is read, by us and by ipvsadm."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, Protocol, parse_address
from rules.ipvs.device import NAME, Device
from rules.ipvs.messages import (
    PERSISTENT,
    SCHEDULER_1,
    SCHEDULER_2,
    Held,
    Key,
    Real,
    Target,
    Timeouts,
    VirtualServer,
    add_real,
    add_server,
    delete_real,
    delete_server,
    set_real,
    set_server,
)
from rules.ipvs.node import check_scheduler, sysctls
from rules.ipvs.services import Ipvs
from tests.netns.isolation import own_network_namespace
from tests.netns.patience import TIME_SCALE
from tests.strategies import PROTOCOLS

pytestmark = pytest.mark.vm

SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sed", "nq", "dh", "sh", "mh")
VIP, VIP6 = parse_address("10.96.0.1"), parse_address("fd00::1")
WEB = Key(Family.IPV4, Protocol.TCP, VIP, 80)
POD, OTHER_POD = Target(parse_address("10.244.1.1"), 8080), Target(parse_address("10.244.1.2"), 8080)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace(root: None) -> Iterator[None]:
    """A network namespace of the test's own, with IPVS, and a way to the pods."""
    with own_network_namespace():
        try:
            with Ipvs(), Device("pods") as device:
                device.ensure()
        except UnavailableError as error:
            pytest.skip(str(error))
        ip("link", "set", "lo", "up")
        for network, own in (("10.244.0.0/16", "10.244.1.1/24"), ("fd00:2::/32", "fd00:2::1/64")):
            ip("address", "add", own, "dev", "pods")
            ip("route", "add", network, "dev", "pods", *(["metric", "5"] if ":" in network else []))
        yield


@pytest.fixture
def ipvs(namespace: None) -> Iterator[Ipvs]:
    with Ipvs() as opened:
        yield opened


@pytest.fixture
def device(namespace: None) -> Iterator[Device]:
    with Device() as opened:
        yield opened


# --- servers -------------------------------------------------------------------------------------------------


@st.composite
def keys(draw: st.DrawFn, family: Family) -> Key:
    if draw(st.booleans()):
        return Key(family, mark=draw(st.sampled_from([1, 0x80000000, 0xFFFFFFFF])))
    addresses = {Family.IPV4: ["10.96.0.1", "203.0.113.1"], Family.IPV6: ["fd00::1", "2001:db8::1"]}[family]
    address = draw(st.sampled_from(addresses))
    return Key(family, draw(PROTOCOLS), parse_address(address), draw(st.sampled_from([1, 80, 65535])))


def servers(key: Key) -> st.SearchStrategy[VirtualServer]:
    # One that is persistent cannot do without seconds.
    sticky = st.tuples(st.integers(1, 86400), st.sampled_from([PERSISTENT, PERSISTENT | SCHEDULER_2]))
    others = st.tuples(st.sampled_from([0, 10800]), st.sampled_from([0, SCHEDULER_1, SCHEDULER_1 | SCHEDULER_2]))
    return st.builds(
        lambda scheduler, how: VirtualServer(key, scheduler, *how), st.sampled_from(SCHEDULERS), sticky | others
    )


def targets(family: Family) -> st.SearchStrategy[Target]:
    pods = {Family.IPV4: "10.244.1.{}", Family.IPV6: "fd00:2::{}"}[family]
    return st.builds(
        lambda host, port: Target(parse_address(pods.format(host)), port),
        st.integers(1, 5),
        st.sampled_from([80, 65535]),
    )


@st.composite
def states(draw: st.DrawFn) -> Mapping[Key, Held]:
    found = {}
    for family in Family:
        for key in draw(st.sets(keys(family), max_size=4)):
            weights = st.integers(0, 3).map(Real)
            found[key] = Held(draw(servers(key)), draw(st.dictionaries(targets(family), weights, max_size=4)))
    return found


def steps(old: Mapping[Key, Held], new: Mapping[Key, Held]) -> Iterator[bytes]:
    """Requests that turn one state into another."""
    yield from (delete_server(key) for key in old if key not in new)
    for key, held in new.items():
        before = old.get(key)
        if before is None:
            yield add_server(held.server)
        elif before.server != held.server:
            yield set_server(held.server)
        reals = before.reals if before else {}
        yield from (delete_real(key, target) for target in reals if target not in held.reals)
        for target, real in held.reals.items():
            if target not in reals:
                yield add_real(key, target, real.weight)
            elif reals[target] != real:
                yield set_real(key, target, real.weight)


def dumped(ipvs: Ipvs) -> Mapping[Key, Held]:
    return {**ipvs.dump(Family.IPV4), **ipvs.dump(Family.IPV6)}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states(), states())
def test_what_is_written_is_what_is_dumped(ipvs: Ipvs, first: Mapping[Key, Held], second: Mapping[Key, Held]) -> None:
    try:
        assert ipvs.send(list(steps({}, first))) == []
        assert dumped(ipvs) == first
        assert ipvs.send(list(steps(first, second))) == []
        assert dumped(ipvs) == second
        assert set(ipvs.servers()) == {held.server for held in second.values()}
        assert all(ipvs.reals(key) == held.reals for key, held in second.items())
    finally:
        assert ipvs.send([delete_server(key) for key in dumped(ipvs)]) == []
        assert dumped(ipvs) == {}


def test_what_is_refused_is_named_and_all_else_is_done(ipvs: Ipvs) -> None:
    server = VirtualServer(WEB)
    nowhere = Target(parse_address("255.255.255.255"), 80)
    many = [add_real(WEB, Target(POD.address, port)) for port in range(1, 1000)]
    refused = ipvs.send(
        [
            *(add_server(server), add_server(server), set_server(server._replace(scheduler="magic"))),
            *(delete_server(WEB._replace(port=81)), set_real(WEB, POD, 2), add_real(WEB, nowhere), *many, many[0]),
        ]
    )
    assert [(each.place, each.errno) for each in refused] == [
        (1, errno.EEXIST),
        (2, errno.ENOENT),
        (3, errno.ESRCH),
        (4, errno.ENOENT),
        (5, errno.EINVAL),
        (6 + len(many), errno.EEXIST),
    ]
    assert refused[0].reason == "there is one already"
    assert dumped(ipvs) == {WEB: Held(server, {Target(POD.address, port): Real(1) for port in range(1, 1000)})}


@pytest.mark.skipif(shutil.which("ipvsadm") is None, reason="ipvsadm is not installed")
def test_ipvsadm_sees_what_was_written_and_writes_what_we_read(ipvs: Ipvs) -> None:
    dns = Key(Family.IPV6, Protocol.UDP, VIP6, 53)
    mark = Key(Family.IPV6, mark=0x100001)
    ipvs.send(
        [
            *(add_server(VirtualServer(WEB, "wlc", 10800, PERSISTENT)), add_real(WEB, POD, 2)),
            *(add_server(VirtualServer(dns, "mh", 0, SCHEDULER_2)), add_server(VirtualServer(mark, "sed"))),
            add_real(mark, Target(parse_address("fd00:2::5"), 5353), 0),
        ]
    )
    said = subprocess.run(["ipvsadm", "--save", "--numeric"], check=True, capture_output=True, text=True).stdout
    assert set(said.splitlines()) == {
        "-A -t 10.96.0.1:80 -s wlc -p 10800",
        "-a -t 10.96.0.1:80 -r 10.244.1.1:8080 -m -w 2",
        "-A -u [fd00::1]:53 -s mh -b mh-port",
        "-A -f 1048577 -6 -s sed",
        "-a -f 1048577 -6 -r [fd00:2::5]:5353 -m -w 0",
    }
    before = dumped(ipvs)
    subprocess.run(["ipvsadm", "--clear"], check=True)
    assert dumped(ipvs) == {}
    subprocess.run(["ipvsadm", "--restore"], input=said, check=True, text=True)
    assert dumped(ipvs) == before
    assert not any(held.foreign for held in before.values())
    # Direct routing, and persistence of networks, are not ours.
    subprocess.run(["ipvsadm", "-a", "-t", "10.96.0.1:80", "-r", "10.244.1.2:80", "-g"], check=True)
    subprocess.run(["ipvsadm", "-A", "-f", "7", "-p", "60", "-M", "255.255.255.0"], check=True)
    foreign = {key for key, held in dumped(ipvs).items() if held.foreign}
    assert foreign == {WEB, Key(Family.IPV4, mark=7)}


def test_servers_of_another_namespace_are_neither_seen_nor_in_the_way(ipvs: Ipvs) -> None:
    """The kernel's list in /proc leaves servers out then; what is dumped does not rest on it."""
    wanted = {}
    for number in range(200):
        key = WEB._replace(address=(10 << 24 | number).to_bytes(4))
        wanted[key] = Held(VirtualServer(key), {Target(POD.address, port): Real(1) for port in (80, 8080)})
    with own_network_namespace(), Ipvs() as theirs:
        assert theirs.send([add_server(held.server) for held in wanted.values()]) == []
        assert ipvs.send(list(steps({}, wanted))) == []
        assert dumped(ipvs) == wanted
        assert all(held.reals == {} for held in theirs.dump(Family.IPV4).values())


def test_timeouts_that_are_0_are_left(ipvs: Ipvs) -> None:
    before = ipvs.timeouts()
    ipvs.set_timeouts(Timeouts(700, 0, 130))
    assert ipvs.timeouts() == Timeouts(700, before.tcp_fin, 130)


@pytest.mark.parametrize("family", Family)
def test_every_scheduler_can_be_used_and_others_are_named(ipvs: Ipvs, family: Family) -> None:
    for scheduler in SCHEDULERS:
        check_scheduler(ipvs, scheduler, family)
    for name in ("magic", "none"):
        with pytest.raises(UnavailableError, match=f"this kernel has no IPVS scheduler {name}"):
            check_scheduler(ipvs, name, family)
    assert dumped(ipvs) == {}


def test_the_settings_that_the_mode_needs_are_there(ipvs: Ipvs) -> None:
    for name in sysctls(strict_arp=True, release=os.uname().release):
        assert Path("/proc/sys", name).exists(), name


# --- connections ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection to the virtual server."""
    client = socket.create_connection(("10.96.0.1", 80), timeout=10 * TIME_SCALE)
    with client:
        server, _ = listener.accept()
        with server:
            yield client, server


def test_a_real_server_of_weight_0_keeps_its_connections_and_gets_no_new_one(ipvs: Ipvs, device: Device) -> None:
    device.ensure()
    device.add([VIP])
    with socket.create_server(("10.244.1.1", 8080)) as listener:
        listener.settimeout(10 * TIME_SCALE)
        ipvs.send([add_server(VirtualServer(WEB)), add_real(WEB, POD)])
        with connected(listener) as (client, server):
            assert ipvs.reals(WEB) == {POD: Real(1, active=1)}
            assert ipvs.dump(Family.IPV4)[WEB].reals[POD].connections == 1
            assert ipvs.send([set_real(WEB, POD, 0)]) == []
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("10.96.0.1", 80), timeout=10 * TIME_SCALE)
            client.sendall(b"still there")
            assert server.recv(20) == b"still there"
            # A server that comes back takes new ones again.
            assert ipvs.send([set_real(WEB, POD, 1)]) == []
            with connected(listener):
                assert ipvs.reals(WEB)[POD].active == 2
        # What is closed is tracked for a while.
        assert ipvs.reals(WEB)[POD].connections > 0


# --- the device ----------------------------------------------------------------------------------------------


def test_the_device_is_made_once_and_brought_up_again(device: Device) -> None:
    assert not device.exists()
    assert device.addresses(Family.IPV4) == frozenset()
    assert device.ensure()
    assert not device.ensure()
    ip("link", "set", NAME, "down")
    assert device.ensure()
    assert ",UP" in ip("link", "show", NAME)
    assert device.delete()
    assert not device.delete()
    assert not device.exists()


def test_addresses_come_and_go_and_come_twice(device: Device) -> None:
    device.ensure()
    many = {(10 << 24 | 96 << 16 | number).to_bytes(4) for number in range(1500)}
    many6 = {VIP6[:14] + number.to_bytes(2) for number in range(1, 1500)}
    assert device.add([*many, *many6]) == {}
    assert device.add([VIP, VIP6]) == {}
    assert device.addresses(Family.IPV4) == many
    assert device.addresses(Family.IPV6) == many6
    gone = [each for each in (*many, *many6) if each not in (VIP, VIP6)]
    assert device.remove([*gone, gone[0]]) == {}
    assert device.addresses(Family.IPV4) == {VIP}
    assert device.addresses(Family.IPV6) == {VIP6}
    elsewhere = {parse_address(each) for each in ("127.0.0.1", "10.244.1.1")}
    assert device.elsewhere(Family.IPV4) == elsewhere
    assert device.elsewhere(Family.IPV6) == {parse_address("::1"), parse_address("fd00:2::1")}


def test_an_address_that_cannot_be_is_refused_with_a_reason_and_the_others_are_there(device: Device) -> None:
    device.ensure()
    multicast = parse_address("ff02::1")
    assert device.add([multicast, VIP6]) == {multicast: "Cannot assign requested address"}
    assert device.addresses(Family.IPV6) == {VIP6}


def test_the_addresses_are_answered_but_never_chosen_as_a_source(device: Device) -> None:
    device.ensure()
    device.add([VIP, VIP6])
    for address, elsewhere in (("10.96.0.1", "10.244.7.7"), ("fd00::1", "fd00:2::7")):
        assert ip("route", "get", address).startswith("local")
        assert f"src {address}" not in ip("route", "get", elsewhere)
    # Without any other address the kernel would take one of another device; it must not be one of ours.
    ip("address", "flush", "dev", "pods")
    ip("route", "add", "10.244.0.0/16", "dev", "pods")
    assert "src 10.96.0.1" not in ip("route", "get", "10.244.7.7")
    assert not [line for line in ip("-6", "address", "show", "dev", NAME).splitlines() if "fe80" in line]


def test_a_device_of_the_name_that_is_another_is_left_alone(device: Device) -> None:
    ip("link", "add", NAME, "type", "veth", "peer", "name", "peer")
    for call in (device.exists, device.ensure, device.delete, lambda: device.add([VIP])):
        with pytest.raises(DataplaneError, match="sluice-ipvs is no dummy device but veth: remove or rename it"):
            call()
    assert "sluice-ipvs" in ip("link", "show", "type", "veth")


def test_without_the_device_nothing_is_added_and_nothing_has_to_go(device: Device) -> None:
    assert device.remove([VIP]) == {}
    assert device.add([]) == {}
    with pytest.raises(DataplaneError, match="there is no device sluice-ipvs"):
        device.add([VIP])


def test_a_family_that_is_switched_off_is_told(device: Device) -> None:
    subprocess.run(["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"], check=True)
    device.ensure()
    refused = device.add([VIP, VIP6])
    assert refused == {VIP6: "the family is switched off there: see the sysctls net.ipv6.conf.*.disable_ipv6"}
