"""IPVS' messages: what we send is what pyroute2 reads, and what kernels send is read as what ipvsadm made."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.generic.ipvs import ipvsmsg

from rules.forwarding import Family, Protocol, parse_address
from rules.ipvs.messages import (
    PERSISTENT,
    SCHEDULER_2,
    Key,
    Real,
    Target,
    Timeouts,
    VirtualServer,
    add_real,
    add_server,
    decode_real,
    decode_server,
    decode_timeouts,
    delete_real,
    delete_server,
    set_real,
    set_server,
    set_timeouts,
)
from rules.netlink.attributes import U32, DecodeError, attribute, attribute_list, attributes, nested
from tests.strategies import PROTOCOLS

IPV4 = Key(Family.IPV4, Protocol.TCP, parse_address("10.96.0.1"), 80)
IPV6 = Key(Family.IPV6, Protocol.UDP, parse_address("fd00::1"), 53)
MARK = Key(Family.IPV6, mark=0x100001)


@st.composite
def keys(draw: st.DrawFn) -> Key:
    family = draw(st.sampled_from(Family))
    if draw(st.booleans()):
        return Key(family, mark=draw(st.integers(1, 2**32 - 1)))
    size = family.address_bytes
    return Key(family, draw(PROTOCOLS), draw(st.binary(min_size=size, max_size=size)), draw(st.integers(1, 65535)))


@st.composite
def reals(draw: st.DrawFn) -> tuple[Key, Target]:
    key = draw(keys())
    size = key.family.address_bytes
    return key, Target(draw(st.binary(min_size=size, max_size=size)), draw(st.integers(0, 65535)))


SERVERS = st.builds(
    VirtualServer,
    keys(),
    st.sampled_from(["rr", "wlc", "mh", "lblcr"]),
    st.integers(0, 2**31),
    st.sampled_from([0, PERSISTENT, SCHEDULER_2, PERSISTENT | SCHEDULER_2]),
)


# --- requests, as another library reads them -----------------------------------------------------------------


def read(request: bytes) -> tuple[int, dict[str, object], dict[str, object]]:
    """Command, and attributes of the virtual and the real server, by pyroute2."""
    message = ipvsmsg(struct.pack("=IHHII", 16 + len(request), 30, 1, 0, 0) + request)
    message.decode()
    parts = {name: dict(part["attrs"]) for name, part in message["attrs"]}
    return message["cmd"], parts.get("IPVS_CMD_ATTR_SERVICE", {}), parts.get("IPVS_CMD_ATTR_DEST", {})


def test_a_server_by_address_has_every_field_that_the_kernel_asks_for() -> None:
    command, server, real = read(add_server(VirtualServer(IPV4, "wrr", 10800, PERSISTENT)))
    flags = server.pop("IPVS_SVC_ATTR_FLAGS")
    assert (command, real) == (1, {})
    assert flags == {"flags": PERSISTENT, "mask": 0xFFFFFFFF}
    assert server == {
        "IPVS_SVC_ATTR_AF": 2,
        "IPVS_SVC_ATTR_PROTOCOL": 6,
        "IPVS_SVC_ATTR_ADDR": "10.96.0.1",
        "IPVS_SVC_ATTR_PORT": 80,
        "IPVS_SVC_ATTR_SCHED_NAME": "wrr",
        "IPVS_SVC_ATTR_TIMEOUT": 10800,
        "IPVS_SVC_ATTR_NETMASK": "255.255.255.255",
    }


def test_the_netmask_of_an_ipv6_server_is_a_prefix_length_in_the_machines_order() -> None:
    _, server, _ = read(set_server(VirtualServer(IPV6)))
    assert server["IPVS_SVC_ATTR_ADDR"] == "fd00::1"
    assert server["IPVS_SVC_ATTR_NETMASK"] == ".".join(map(str, U32.pack(128)))


def test_a_server_by_mark_has_neither_address_nor_port() -> None:
    command, server, _ = read(delete_server(MARK))
    assert (command, server) == (3, {"IPVS_SVC_ATTR_AF": 10, "IPVS_SVC_ATTR_FWMARK": 0x100001})


@pytest.mark.parametrize(("key", "address"), [(IPV4, "10.244.1.1"), (IPV6, "fd00:2::5"), (MARK, "fd00:2::5")])
def test_a_real_server_is_masqueraded_to_and_has_no_thresholds(key: Key, address: str) -> None:
    target = Target(parse_address(address), 8080)
    # pyroute2 leaves it as it is, as the family is said of the virtual server alone.
    packed = attribute(1, target.address)
    command, server, real = read(add_real(key, target, 3))
    assert (command, server) == (5, read(delete_server(key))[1])
    assert real == {
        "IPVS_DEST_ATTR_ADDR": packed,
        "IPVS_DEST_ATTR_PORT": 8080,
        "IPVS_DEST_ATTR_FWD_METHOD": 0,
        "IPVS_DEST_ATTR_WEIGHT": 3,
        "IPVS_DEST_ATTR_U_THRESH": 0,
        "IPVS_DEST_ATTR_L_THRESH": 0,
    }
    assert read(set_real(key, target, 0))[2] == {**real, "IPVS_DEST_ATTR_WEIGHT": 0}
    command, server, real = read(delete_real(key, target))
    assert (command, real) == (7, {"IPVS_DEST_ATTR_ADDR": packed, "IPVS_DEST_ATTR_PORT": 8080})


def test_timeouts_are_sent_each_by_itself() -> None:
    assert set_timeouts(Timeouts(900, 0, 300))[4:] == b"".join(
        attribute(kind, U32.pack(value)) for kind, value in ((4, 900), (5, 0), (6, 300))
    )


# --- the same in another way ---------------------------------------------------------------------------------


def slowly(command: int, key: Key, target: Target, weight: int) -> bytes:
    """A request about a real server, attribute by attribute."""
    if key.mark:
        which = [attribute(5, U32.pack(key.mark))]
    else:
        protocol = attribute(2, struct.pack("=H", key.protocol))
        which = [protocol, attribute(3, key.address), attribute(4, key.port.to_bytes(2))]
    family = attribute(1, struct.pack("=H", key.family.af))
    return (
        bytes((command, 1, 0, 0))
        + nested(1, family, *which)
        + nested(
            2,
            attribute(1, target.address),
            attribute(2, target.port.to_bytes(2)),
            *(attribute(kind, bytes(4)) for kind in (3, 5, 6)),
            attribute(4, U32.pack(weight)),
        )
    )


@given(reals(), st.integers(0, 65535))
def test_real_servers_packed_in_one_go_are_the_same_bytes(real: tuple[Key, Target], weight: int) -> None:
    assert add_real(*real, weight) == slowly(5, *real, weight)
    assert set_real(*real, weight) == slowly(6, *real, weight)


@given(SERVERS)
def test_a_server_as_it_was_sent_is_the_server_that_is_read(server: VirtualServer) -> None:
    assert decode_server(add_server(server)) == (server, False)
    assert decode_server(set_server(server)) == (server, False)


# --- the kernel's answers ------------------------------------------------------------------------------------


def said() -> dict[str, tuple[str, bytes]]:
    """What a kernel answered, by the command before."""
    lines = (Path(__file__).parents[1] / "data/ipvs/linux-6.1.txt").read_text().splitlines()[1:]
    found = {}
    command = ""
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "#":
            command = rest
        else:
            found[command if kind in ("server", "real") else kind] = (kind, bytes.fromhex(rest))
    return found


SAID = said()
SERVERS_SAID = {
    "ipvsadm -A -t 10.96.0.1:80 -s rr -p 10800": (VirtualServer(IPV4, "rr", 10800, PERSISTENT), False),
    "ipvsadm -A -u [fd00::1]:53 -s mh -b mh-port": (VirtualServer(IPV6, "mh", 0, SCHEDULER_2), False),
    "ipvsadm -A -f 8192 -s lc -p 60 -M 255.255.255.0": (
        VirtualServer(Key(Family.IPV4, mark=8192), "lc", 60, PERSISTENT),
        True,
    ),
    "ipvsadm -A -f 4096 -6 -s sed": (VirtualServer(Key(Family.IPV6, mark=4096), "sed"), False),
}
REALS_SAID = {
    "ipvsadm -a -t 10.96.0.1:80 -r 10.244.1.1:8080 -m -w 3": ("10.244.1.1", 8080, Real(3)),
    "ipvsadm -a -t 10.96.0.1:80 -r 10.244.1.2:80 -g": ("10.244.1.2", 80, Real(1, masquerading=False)),
    "ipvsadm -a -u [fd00::1]:53 -r [fd00:2::5]:5353 -m -w 0": ("fd00:2::5", 5353, Real(0)),
}


@pytest.mark.parametrize("command", SERVERS_SAID)
def test_what_a_kernel_says_of_a_server_is_what_ipvsadm_made(command: str) -> None:
    assert decode_server(SAID[command][1]) == SERVERS_SAID[command]


@pytest.mark.parametrize("command", REALS_SAID)
def test_what_a_kernel_says_of_a_real_server_is_what_ipvsadm_made(command: str) -> None:
    address, port, real = REALS_SAID[command]
    family = Family.IPV6 if ":" in address else Family.IPV4
    payload = SAID[command][1]
    meant = Target(parse_address(address), port), real
    assert decode_real(family, payload) == meant
    assert decode_real(family, b"before" + payload + b"after", 6, 6 + len(payload)) == meant
    # A kernel that says it in another order is read too.
    parts = attribute_list(attributes(payload[4:])[2])
    assert decode_real(family, payload[:4] + nested(2, *(attribute(*part) for part in reversed(parts)))) == meant


def test_what_a_kernel_says_of_itself() -> None:
    assert decode_timeouts(SAID["timeouts"][1]) == Timeouts(900, 120, 300)


@given(st.data())
def test_mutated_answers_raise_nothing_but_decode_errors(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([payload for _, payload in SAID.values()])))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(99, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    for decode in (decode_server, decode_timeouts, lambda each: decode_real(Family.IPV6, each)):
        with contextlib.suppress(DecodeError):
            decode(cut)
