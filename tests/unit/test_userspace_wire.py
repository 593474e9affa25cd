"""What goes over wires: the control messages, ICMP and the PROXY protocol."""

from __future__ import annotations

import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, IPerror, UDPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.inet6 import UDPerror as UDPerror6

from proxy.userspace import control
from proxy.userspace.control import Apply, ControlError, WireNode
from proxy.userspace.icmp import port_unreachable
from proxy.userspace.proxy_protocol import header
from proxy.userspace.worker import Options, parse
from rules.forwarding import Backend, Family, Frontend, InputInterface, Kind, Protocol, Route, parse_address
from tests.strategies import tables


@given(st.sampled_from(Family).flatmap(tables))
def test_a_table_crosses_as_it_is(table) -> None:  # type: ignore[no-untyped-def]
    asked = Apply(
        family=table.family,
        serial="x",
        put=list(table.routes.items()),
        removed=list(table.routes),
        hairpins_added=sorted(table.hairpins),
        node=WireNode(detector=InputInterface("cni0"), local_addresses=frozenset({bytes(4)})),
        reset=True,
    )
    framed = control.frame(asked)
    assert control.body_length(framed[: control.HEAD_BYTES]) == len(framed) - control.HEAD_BYTES
    assert control.decode_request(framed[control.HEAD_BYTES :]) == asked
    assert asked.fault() is None


VIP, POD = parse_address("10.96.0.1"), parse_address("10.244.1.11")


@pytest.mark.parametrize(
    ("frontend", "backend", "what"),
    [
        ((VIP, 80), (POD[:3], 80), "backend"),
        ((VIP, 80), (bytes(16), 80), "backend"),
        ((VIP, 80), (POD, 0), "backend"),
        ((VIP[:3], 80), (POD, 80), "frontend"),
        ((VIP, 70000), (POD, 80), "frontend"),
    ],
)
def test_a_table_with_half_an_address_is_not_applied(
    frontend: tuple[bytes, int], backend: tuple[bytes, int], what: str
) -> None:
    at = Frontend(frontend[0], Protocol.TCP, frontend[1])
    route = Route(kind=Kind.CLUSTER_IP, backends=frozenset({Backend(*backend)}))
    assert f"a {what} is no IPv4 address" in str(Apply(family=Family.IPV4, put=[(at, route)]).fault())
    if what == "frontend":
        assert Apply(family=Family.IPV4, removed=[at]).fault()


@pytest.mark.parametrize("body", [b"\x81\xa4type\xa4\xffdone", b"\xa1\xff", b"\x81\xa4type" + b"\x91" * 100_000, b""])
@pytest.mark.parametrize("decode", [control.decode_request, control.decode_answer])
def test_a_frame_of_nonsense_is_no_message(decode, body) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(msgspec.MsgspecError):
        decode(body)


def test_a_length_of_nonsense_is_refused() -> None:
    with pytest.raises(ControlError):
        control.body_length(b"HTTP")


def test_nobody_at_the_socket_is_one_clear_error() -> None:
    with pytest.raises(ControlError, match="worker 987 is not there"):
        control.Connection(987)


def test_an_unreachable_port_is_told_as_a_kernel_tells_it() -> None:
    client, frontend = (parse_address("192.0.2.9"), 40000), (parse_address("10.96.0.1"), 53)
    message = ICMP(port_unreachable(Family.IPV4, client, frontend))
    assert (message.type, message.code) == (3, 3)
    assert (message[IPerror].src, message[IPerror].dst) == ("192.0.2.9", "10.96.0.1")
    assert (message[UDPerror].sport, message[UDPerror].dport) == (40000, 53)
    stated = message.chksum
    del message.chksum
    assert ICMP(bytes(message)).chksum == stated
    inner = IP(bytes(message[IPerror]))
    del inner.chksum
    assert IP(bytes(inner)).chksum == message[IPerror].chksum


def test_an_unreachable_port_of_ipv6() -> None:
    client, frontend = (parse_address("2001:db8::9"), 40000), (parse_address("fd00::1"), 53)
    raw = port_unreachable(Family.IPV6, client, frontend)
    message = ICMPv6DestUnreach(raw)
    assert (message.type, message.code) == (1, 4)
    quoted = IPv6(raw[8:])
    assert (quoted.src, quoted.dst, quoted.nh, quoted.plen) == ("2001:db8::9", "fd00::1", socket.IPPROTO_UDP, 8)
    assert UDPerror6(raw[48:]).dport == 53


def test_the_proxy_protocol_says_who_the_client_is() -> None:
    client, frontend = (parse_address("2001:db8::9"), 40000), (parse_address("fd00::1"), 443)
    said = header(Protocol.TCP, client, frontend)
    assert said[:16] == b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x21, 0x21, 0, 36])
    assert said[16:] == client[0] + frontend[0] + (40000).to_bytes(2) + (443).to_bytes(2)


@given(st.integers(0, 100))
def test_options_have_the_defaults_of_the_agent(index: int) -> None:
    assert parse(["--index", str(index)]) == Options(index=index)


def test_an_option_that_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--index", "0", "--loop", "trio"])
    assert "invalid choice: 'trio'" in capsys.readouterr().err
