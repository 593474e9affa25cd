"""Requests to connection tracking and its entries, byte by byte and without a kernel."""

from __future__ import annotations

import contextlib
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import Backend, Family, Protocol
from rules.netlink.attributes import DecodeError, attribute, attributes, be32, nested, pad, u8
from rules.netlink.conntrack import (
    ANSWERED,
    DESTINATION_NAT,
    Flow,
    Match,
    decode,
    delete_one_request,
    delete_request,
    list_request,
)
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.counters import measure
from rules.netlink.errors import Failure, NetlinkError

RECORDED = bytes.fromhex(
    # Linux 6.18: 10.1.0.9:1019 -> 192.168.1.1:30053/UDP, translated to 10.244.0.2:5353, unanswered.
    "02000000 34000180 14000180 08000100 0a010009 08000200 c0a80101 1c000280 05000100 11000000 06000200 03fb0000"
    "06000300 75650000 34000280 14000180 08000100 0af40002 08000200 0a010009 1c000280 05000100 11000000 06000200"
    "14e90000 06000300 03fb0000 08000300 000001a8 08000800 00000000 08000c00 c8b6e3a8 08000b00 00000001 08000700"
    "00000063 1c001880 08000100 00000000 08000200 00000000 08000300 00000000"
)
CLIENT, SERVICE, POD = bytes([10, 1, 0, 9]), bytes([10, 96, 0, 10]), bytes([10, 244, 0, 2])
BACKEND = Backend(POD, 5353)


def entry(flow: Flow, *, extra: bytes = b"", before: bytes = b"", flag: int = 0x8000) -> bytes:
    """An entry as a kernel sends it; `before` stands before the tuples, `flag` marks attributes of attributes."""

    def one(kind: int, source: bytes, destination: bytes, source_port: int, port: int) -> bytes:
        kinds = (1, 2) if len(source) == 4 else (3, 4)
        addresses = attribute(kinds[0], source) + attribute(kinds[1], destination)
        ports = attribute(2, source_port.to_bytes(2)) + attribute(3, port.to_bytes(2))
        parts = attribute(1 | flag, addresses) + attribute(2 | flag, u8(1, flow.protocol) + ports)
        return attribute(kind | flag, parts)

    family = Family.IPV4 if len(flow.source) == 4 else Family.IPV6
    return (
        bytes([family.af, 0, 0, 0])
        + before
        + one(1, flow.source, flow.destination, flow.source_port, flow.port)
        + one(2, flow.reply_source, flow.reply_destination, flow.reply_source_port, flow.reply_port)
        + be32(3, flow.status)
        + flow.rest
        + extra
    )


PORTS = st.integers(0, 65535)


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    address = st.binary(min_size=4, max_size=4) if draw(st.booleans()) else st.binary(min_size=16, max_size=16)
    return Flow(
        *(draw(address), draw(address)),
        draw(st.sampled_from([6, 17, 132])),
        *(draw(PORTS), draw(PORTS), draw(address), draw(address), draw(PORTS), draw(PORTS)),
        draw(st.integers(0, 0xFFFFFFFF)),
        be32(12, draw(st.integers(0, 0xFFFFFFFF))),
    )


def decoded(payload: bytes) -> Flow | None:
    """Whatever stands before and after an entry is nobody's business."""
    return decode(b"\x11" * 7 + payload + b"\x22" * 9, 7, 7 + len(payload))


def test_an_entry_as_a_kernel_sent_it() -> None:
    flow = decoded(RECORDED)
    assert flow is not None
    assert flow[:4] == (CLIENT, bytes([192, 168, 1, 1]), 17, 1019)
    assert flow.port == 30053
    assert flow.backend == BACKEND
    assert (flow.reply_destination, flow.reply_port) == (CLIENT, 1019)
    assert flow.status & DESTINATION_NAT
    assert not flow.status & ANSWERED
    assert flow.translated
    assert not flow.masqueraded
    assert measure(flow).identity == 0xC8B6E3A8


@given(flows())
def test_an_entry_is_read_as_it_was_written_in_any_spelling(flow: Flow) -> None:
    assert decoded(entry(flow)) == flow
    # Kernels before 5.x set no flag; another order takes the long way, too.
    assert decoded(entry(flow, flag=0)) == flow
    assert decoded(entry(flow, before=be32(8, 7))) == flow


@given(flows(), st.integers(1, 65535))
def test_an_entry_of_another_zone_is_none_of_ours(flow: Flow, zone: int) -> None:
    with_zone = be32(3, flow.status), attribute(18, zone.to_bytes(2))
    whole = entry(flow).replace(with_zone[0] + flow.rest, b"")
    assert decoded(whole + with_zone[1] + with_zone[0]) is None


def test_a_flow_without_ports_is_none_of_ours() -> None:
    ping = nested(1, attribute(1, CLIENT), attribute(2, SERVICE)) + nested(2, u8(1, 1), u8(5, 8))
    assert decoded(bytes([2, 0, 0, 0]) + nested(1, ping) + nested(2, ping)) is None


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_decode_error(data: bytes) -> None:
    for payload in (data, bytes([2, 0, 0, 0]) + data, bytes([10, 0, 0, 0]) + data):
        with contextlib.suppress(DecodeError):
            decode(payload, 0, len(payload))


@given(flows(), st.integers(4, 200), st.integers(0, 255))
def test_one_wrong_byte_raises_nothing_but_decode_error(flow: Flow, place: int, value: int) -> None:
    data = bytearray(entry(flow))
    data[min(place, len(data) - 1)] = value
    with contextlib.suppress(DecodeError):
        found = decode(bytes(data), 0, len(data))
        if found is not None:
            delete_one_request(Family.IPV4, found)


# --- requests ------------------------------------------------------------------------------------------------


def test_a_match_by_destination_and_reply_source_is_one_filter() -> None:
    match = Match(Family.IPV4, Protocol.UDP, SERVICE, 53, BACKEND, status=0, mask=DESTINATION_NAT)
    request = delete_request(match)
    assert request[4:8] == bytes([2, 1, 1, 0])  # delete, of connection tracking; a request
    found = attributes(request[20:])
    original, reply = attributes(found[1]), attributes(found[2])
    assert attributes(original[1]) == {2: SERVICE}
    assert attributes(original[2]) == {1: b"\x11", 3: b"\0\x35"}
    assert attributes(reply[1]) == {1: POD}
    assert attributes(reply[2]) == {1: b"\x11", 2: b"\x14\xe9"}
    assert (found[3], found[26]) == (bytes(4), b"\0\0\0\x20")
    assert found[18] == b"\0\0"
    # Flags in the machine's order: destination 2, protocol 8, port 32; source 1, protocol 8, source port 16.
    flags = {kind: int.from_bytes(value, "little") for kind, value in attributes(found[25]).items()}
    assert flags == {1: 2 | 8 | 32, 2: 1 | 8 | 16}


def test_a_node_port_is_matched_by_port_alone() -> None:
    found = attributes(list_request(Match(Family.IPV6, Protocol.UDP, b"", 30053))[20:])
    assert attributes(found[1]).keys() == {2}
    assert {2, 3, 26}.isdisjoint(found)
    assert [int.from_bytes(value, "little") for value in attributes(found[25]).values()] == [8 | 32]


def test_nothing_deletes_all_flows_of_a_protocol_in_one_request() -> None:
    with pytest.raises(ValueError, match="without a port"):
        delete_request(Match(Family.IPV4, Protocol.UDP, SERVICE))


@given(flows())
def test_a_flow_is_deleted_by_its_original_tuple_and_the_kernels_number(flow: Flow) -> None:
    family = Family.IPV4 if len(flow.source) == 4 else Family.IPV6
    request = delete_one_request(family, flow)
    assert request[16] == family.af
    found = attributes(request[20:])
    assert found.keys() == {1, 12}
    as_sent = bytes([family.af, 0, 0, 0]) + nested(1, found[1]) + nested(2, found[1]) + pad(be32(3, 0))
    again = decoded(as_sent)
    assert again is not None
    assert again[:5] == flow[:5]
    assert be32(12, int.from_bytes(found[12])) == flow.rest


@given(flows(), flows())
def test_a_match_admits_what_has_all_of_it_in_common(flow: Flow, other: Flow) -> None:
    family = Family.IPV4 if len(flow.source) == 4 else Family.IPV6
    match = Match(
        family,
        Protocol(flow.protocol),
        flow.destination,
        flow.port,
        flow.backend,
        flow.status & ANSWERED,
        ANSWERED,
    )
    assert match.admits(flow) == bool(flow.port or not match.port)
    assert match.coarse.admits(flow)
    same = (
        other.protocol == flow.protocol
        and other.destination == flow.destination
        and other.port == flow.port
        and other.backend == flow.backend
        and other.status & ANSWERED == flow.status & ANSWERED
    )
    assert match.admits(other) == same or not flow.port


# --- kernels -------------------------------------------------------------------------------------------------


class OldKernel:
    """Both sockets of a kernel that filters dumps or not, and refuses to delete by a match."""

    def __init__(self, payloads: list[bytes], refusal: int = errno.EOPNOTSUPP, interruptions: int = 0) -> None:
        self.payloads = payloads
        self.refusal = refusal
        self.interruptions = interruptions
        self.asked: list[bytes] = []
        self.refused = 0
        self.deleted: list[bytes] = []
        self.gone: set[int] = set()
        self.closed = 0

    def stream(self, message: bytes):
        self.asked.append(message)
        if self.payloads:
            spans, data = [], b""
            for payload in self.payloads:
                spans.append((len(data), len(data) + len(payload)))
                data += payload
            yield data, spans
        if self.interruptions:
            self.interruptions -= 1
            raise NetlinkError(errno.EINTR, "it changed")

    def perform(self, message: bytes) -> None:
        self.refused += 1
        raise NetlinkError(self.refusal, "no")

    def perform_each(self, messages: list[bytes]) -> list[Failure]:
        self.deleted += messages
        return [Failure(place, errno.ENOENT, "", 0) for place in range(len(messages)) if place in self.gone]

    def close(self) -> None:
        self.closed += 1


def flow_to(backend: Backend, source_port: int = 1000, **fields: object) -> Flow:
    flow = Flow(
        CLIENT, SERVICE, 17, source_port, 53, backend.address, CLIENT, backend.port, source_port, 0x1A8, be32(12, 7)
    )
    return flow._replace(**fields)


OTHER = Backend(bytes([10, 244, 0, 3]), 5353)
MATCH = Match(Family.IPV4, Protocol.UDP, SERVICE, 53, BACKEND)


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_kernel_that_deletes_by_no_match_is_asked_once_and_read_instead(refusal: int) -> None:
    unrelated = flow_to(BACKEND, port=54)
    kernel = OldKernel([entry(each) for each in (flow_to(BACKEND), flow_to(OTHER, 1001), unrelated)], refusal)
    conntrack = Conntrack(Family.IPV4, open_socket=lambda: kernel)  # type: ignore[arg-type,return-value]
    assert conntrack.delete_matching(MATCH) == 1
    assert kernel.deleted == [delete_one_request(Family.IPV4, flow_to(BACKEND))]
    # What some kernels cannot compare in a dump is left to us.
    assert kernel.asked[-1] == list_request(MATCH.coarse)
    assert conntrack.delete_matching(MATCH) == 1
    assert kernel.refused == 1


def test_ipv6_addresses_are_never_left_to_the_kernel() -> None:
    """Linux 6.18 takes equal ones for different ones."""
    address, backend = bytes(15) + b"\1", Backend(bytes(15) + b"\2", 53)
    match = Match(Family.IPV6, Protocol.UDP, address, 53)
    for each in (match, match._replace(address=b"", backend=backend)):
        for request in (delete_request, list_request):
            with pytest.raises(ValueError, match="wrong way round"):
                request(each)
        kernel = OldKernel([])
        Conntrack(Family.IPV6, open_socket=lambda kernel=kernel: kernel).delete_matching(each)  # type: ignore[arg-type,misc]
        assert kernel.asked == [list_request(Match(Family.IPV6, Protocol.UDP, b"", 53))]


def test_nothing_to_delete_is_no_request_to_delete() -> None:
    kernel = OldKernel([])
    assert Conntrack(Family.IPV4, open_socket=lambda: kernel).delete_matching(MATCH) == 0  # type: ignore[arg-type,return-value]
    assert len(kernel.asked) == 1
    assert not kernel.refused


def test_another_refusal_is_told() -> None:
    kernel = OldKernel([entry(flow_to(BACKEND))], errno.EPERM)
    with pytest.raises(NetlinkError, match="no"):
        Conntrack(Family.IPV4, open_socket=lambda: kernel).delete_matching(MATCH)  # type: ignore[arg-type,return-value]


def test_CT_6_an_interrupted_dump_counts_and_is_made_five_times_at_most() -> None:
    kernel = OldKernel([entry(flow_to(BACKEND))], interruptions=2)
    conntrack = Conntrack(Family.IPV4, open_socket=lambda: kernel)  # type: ignore[arg-type,return-value]
    assert conntrack.sweep(MATCH, lambda _: True) == 3
    kernel.interruptions, kernel.deleted = 99, []
    assert conntrack.sweep(MATCH, lambda _: True) == 5
    assert len(list(conntrack.flows(Protocol.UDP))) == 1


def test_what_went_by_itself_was_not_deleted_and_a_long_list_goes_in_batches() -> None:
    kernel = OldKernel([entry(flow_to(BACKEND, number)) for number in range(5000)])
    kernel.gone = {0}
    conntrack = Conntrack(Family.IPV4, open_socket=lambda: kernel)  # type: ignore[arg-type,return-value]
    # One of each batch was gone.
    assert conntrack.sweep(MATCH, lambda _: True) == 5000 - 3
    assert len(kernel.deleted) == 5000
    conntrack.close()
    assert kernel.closed == 2
