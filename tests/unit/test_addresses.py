"""Addresses as kube-proxy reads them (SVC-8, SVC-10, SVC-17, EPS-7, B-155)."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.addresses import lenient_address, lenient_prefix
from rules.forwarding import parse_address, parse_prefix


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("172.030.0.041", "172.30.0.41"),
        ("1.2.3.004", "1.2.3.4"),
        ("192.168.099.022", "192.168.99.22"),
        ("10.180.00.001", "10.180.0.1"),
        ("0000.0.0.010", "0.0.0.10"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.004", "1.2.3.4"),
        ("::ffff:102:304", "1.2.3.4"),
        ("FD00:0:0::0001", "fd00::1"),
        ("fd00::00001", "fd00::1"),
    ],
)
def test_svc17_old_spellings_are_read_as_they_always_were(text: str, canonical: str) -> None:
    assert lenient_address(text) == parse_address(canonical)


@pytest.mark.parametrize(
    "text",
    ["", " ", "1.2.3", "1.2.3.4.5", "1.2.3.256", " 1.2.3.4", "1.2.3.4/24", "0x1.2.3.4", "1.2.3.a", "fe80::1%eth0",
     "::ffff:1.2.3.256", "::g", "a.b.c.d", "1.2.3.4\0", "\ud800", "1.2.3.٤"],
)  # fmt: skip
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no IP address") as caught:
        lenient_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("203.0.113.000/025", "203.0.113.0/25"),
        ("1.2.3.4/24", "1.2.3.0/24"),
        ("1.2.3.4/0", "0.0.0.0/0"),
        ("fd00::1234/64", "fd00::/64"),
        ("::ffff:1.2.3.4/120", "1.2.3.0/24"),
        ("::/0", "::/0"),
    ],
)
def test_svc10_networks_lose_their_host_bits_and_their_zeros(text: str, canonical: str) -> None:
    assert lenient_prefix(text) == parse_prefix(canonical)


@pytest.mark.parametrize(
    "text", ["", "1.2.3.4", "1.2.3.4/", "1.2.3.4/33", "::/129", "1.2.3.4/-1", "1.2.3.4/2a", "/8", "1.2.3.4/²"]
)
def test_what_is_no_network_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        lenient_prefix(text)


@given(st.ip_addresses())
def test_canonical_addresses_are_themselves(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    assert lenient_address(str(address)) == (mapped or address).packed


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_leading_zeros_never_change_an_address(octets: list[int], zeros: list[int]) -> None:
    text = ".".join("0" * more + str(octet) for more, octet in zip(zeros, octets, strict=True))
    assert lenient_address(text) == bytes(octets)


@given(st.text(alphabet="0123456789abcdef.:/ x"))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    for read in (lenient_address, lenient_prefix):
        try:
            read(text)
        except ValueError:
            continue
