"""ipsets in a kernel: what is written is what is listed, by us and by the ipset program."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, parse_address
from rules.netlink.ipset import NOTHING, Element, Extra, HeldSet, Ipsets, SetSpec, SetType
from tests.netns.isolation import own_network_namespace
from tests.strategies import PROTOCOLS, prefixes

pytestmark = pytest.mark.vm

WITH_PORT = frozenset({SetType.IP_PORT, SetType.IP_PORT_IP, SetType.IP_PORT_NET, SetType.NET_PORT})
VIP = parse_address("10.96.0.1")
SPEC = SetSpec("SLUICE-TEST", SetType.IP_PORT, Family.IPV4, comments=True, marks=True)


@pytest.fixture
def ipsets(root: None) -> Iterator[Ipsets]:
    """The ipsets of a network namespace of the test's own."""
    with own_network_namespace():
        try:
            opened = Ipsets()
        except UnavailableError as error:
            pytest.skip(str(error))
        with opened:
            yield opened


@st.composite
def specs(draw: st.DrawFn) -> SetSpec:
    kind = draw(st.sampled_from(SetType))
    family = None if kind is SetType.PORT else draw(st.sampled_from(Family))
    return SetSpec(f"SLUICE-{kind.name}", kind, family, draw(st.booleans()), draw(st.booleans()))


def addresses(family: Family) -> st.SearchStrategy[bytes]:
    # Few values, so that elements differ in one part alone.
    few = st.sampled_from([bytes([10] * family.address_bytes), bytes([10] * (family.address_bytes - 1) + [11])])
    return few | st.binary(min_size=family.address_bytes, max_size=family.address_bytes).filter(any)


@st.composite
def elements_of(draw: st.DrawFn, spec: SetSpec) -> Element:
    port = draw(st.sampled_from([1, 80, 65535]) | st.integers(0, 65535))
    if spec.family is None:
        return Element(port=port)
    address, other, length = draw(addresses(spec.family)), b"", 0
    if spec.type is SetType.IP_PORT_IP:
        other = draw(addresses(spec.family))
    elif spec.type is SetType.IP_PORT_NET:
        other, length = draw(prefixes(spec.family))
    elif spec.type in (SetType.NET, SetType.NET_PORT):
        address, length = draw(prefixes(spec.family))
    with_port = spec.type in WITH_PORT
    return Element(address, draw(PROTOCOLS) if with_port else 0, port if with_port else 0, other, length)


@st.composite
def extras(draw: st.DrawFn, spec: SetSpec) -> Extra:
    comments = st.text(st.characters(min_codepoint=1, codec="utf-8"), max_size=60)
    mark, mask = draw(st.tuples(*[st.integers(0, 2**32 - 1)] * 2)) if spec.marks else (0, 0)
    return Extra(mark if mask else 0, mask, draw(comments) if spec.comments else "")


@st.composite
def contents(draw: st.DrawFn) -> tuple[SetSpec, Mapping[Element, Extra], Mapping[Element, Extra]]:
    """A set, what it holds first, and what is added then; elements of both are likely."""
    spec = draw(specs())
    known = draw(st.lists(elements_of(spec), min_size=1, max_size=8))
    some = st.dictionaries(st.sampled_from(known), extras(spec))
    return spec, draw(some), draw(some)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_what_is_written_is_what_is_listed(
    ipsets: Ipsets, content: tuple[SetSpec, Mapping[Element, Extra], Mapping[Element, Extra]]
) -> None:
    spec, first, second = content
    assert ipsets.create(spec)
    try:
        assert not ipsets.create(spec)
        assert ipsets.add(spec, first) == []
        assert ipsets.held(spec.name) == HeldSet(spec, first)
        assert ipsets.add(spec, second) == []
        assert ipsets.held(spec.name) == HeldSet(spec, {**first, **second})
        assert ipsets.sizes() == {spec.name: len({**first, **second})}
        assert ipsets.delete(spec, second) == []
        assert ipsets.delete(spec, second) == []
        left = {element: extra for element, extra in first.items() if element not in second}
        assert ipsets.held(spec.name) == HeldSet(spec, left)
    finally:
        assert ipsets.destroy(spec.name)


@pytest.mark.skipif(shutil.which("ipset") is None, reason="the ipset program is not installed")
def test_the_ipset_program_sees_what_was_written(ipsets: Ipsets) -> None:
    ranges = SetSpec("SLUICE6-SOURCES", SetType.IP_PORT_NET, Family.IPV6)
    ipsets.create(SPEC)
    ipsets.create(ranges)
    ipsets.add(SPEC, {Element(VIP, 6, 80): Extra(0x100000, 0xFFF00000, "default/web:http")})
    network = parse_address("fd00:2::")
    ipsets.add(ranges, {Element(parse_address("fd00::1"), 132, 53, network, 64): NOTHING})
    said = subprocess.run(["ipset", "save"], capture_output=True, text=True, check=True).stdout
    assert 'add SLUICE-TEST 10.96.0.1,tcp:80 comment "default/web:http" skbmark 0x100000/0xfff00000' in said
    assert "add SLUICE6-SOURCES fd00::1,sctp:53,fd00:2::/64" in said
    # And what it writes is ours.
    subprocess.run(["ipset", "add", "SLUICE-TEST", "10.96.0.2,udp:53", "comment", "by hand"], check=True)
    held = ipsets.held("SLUICE-TEST")
    assert held is not None
    assert held.elements[Element(parse_address("10.96.0.2"), 17, 53)] == Extra(comment="by hand")


def test_elements_that_are_refused_are_named_and_all_others_are_there(ipsets: Ipsets) -> None:
    spec = SetSpec("SLUICE-NETS", SetType.NET, Family.IPV4)
    ipsets.create(spec)
    wanted = {
        Element(bytes((high, low, 0, 0)), length=0 if low in (0, 77, 255) and high == 20 else 16): NOTHING
        for high in range(10, 30)
        for low in range(256)
    }
    refused = ipsets.add(spec, wanted)
    assert [(each.element.address[:2], each.reason) for each in refused] == [
        (bytes((20, low)), "it has no such prefix length") for low in (0, 77, 255)
    ]
    held = ipsets.held(spec.name)
    assert held is not None
    assert held.elements == {element: NOTHING for element in wanted if element.length}


def test_a_set_of_the_name_that_is_another_is_told_and_left_alone(ipsets: Ipsets) -> None:
    ipsets.create(SPEC)
    ipsets.add(SPEC, {Element(VIP, 6, 80): NOTHING})
    for other in (
        SPEC._replace(marks=False),
        SPEC._replace(family=Family.IPV6),
        SPEC._replace(type=SetType.IP_PORT_IP),
    ):
        with pytest.raises(DataplaneError, match="ipset SLUICE-TEST could not be made: there is another of that name"):
            ipsets.create(other)
    assert ipsets.held(SPEC.name) == HeldSet(SPEC, {Element(VIP, 6, 80): NOTHING})


def test_sets_are_counted_and_destroyed(ipsets: Ipsets) -> None:
    other = SPEC._replace(name="SLUICE-NEXT")
    for each in (SPEC, other):
        ipsets.create(each)
    ipsets.add(SPEC, {Element(VIP, 6, 80): NOTHING})
    assert ipsets.sizes() == {SPEC.name: 1, other.name: 0}
    assert ipsets.destroy(other.name)
    assert not ipsets.destroy(other.name)
    assert ipsets.names() == {SPEC.name}
    assert ipsets.held(other.name) is None


def test_what_is_not_there_is_named(ipsets: Ipsets) -> None:
    with pytest.raises(DataplaneError, match="ipset SLUICE-TEST could not be changed: there is no such set"):
        ipsets.add(SPEC, {Element(VIP, 6, 80): NOTHING})


@pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed")
def test_a_set_that_rules_refer_to_is_not_destroyed(ipsets: Ipsets) -> None:
    ipsets.create(SPEC)
    rule = ["-t", "mangle", "-A", "PREROUTING", "-m", "set", "--match-set", SPEC.name, "dst,dst", "-j", "ACCEPT"]
    subprocess.run(["iptables", *rule], check=True, capture_output=True)
    held = ipsets.held(SPEC.name)
    assert held is not None
    assert held.references == 1
    with pytest.raises(DataplaneError, match="ipset SLUICE-TEST could not be destroyed: it is in use"):
        ipsets.destroy(SPEC.name)


def test_more_elements_than_fit_into_a_message_or_a_bucket(ipsets: Ipsets) -> None:
    ipsets.create(SPEC)
    wanted = {
        Element((10 << 24 | number).to_bytes(4), 6, 80): Extra(number + 1, 0xFFFFFFFF, f"default/service-{number}:http")
        for number in range(6000)
    }
    assert ipsets.add(SPEC, wanted) == []
    assert ipsets.held(SPEC.name) == HeldSet(SPEC, wanted)
