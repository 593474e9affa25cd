"""ipsets' messages, and how a batch goes on after elements that the kernel refuses."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.ipset import ipset_msg

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, parse_address
from rules.netlink.attributes import DecodeError, Message, attribute_list, attributes, messages
from rules.netlink.ipset import NOTHING, Element, Extra, HeldSet, Ipsets, SetSpec, SetType
from rules.netlink.ipset_messages import (
    add_request,
    create_request,
    decode_set,
    decode_size,
    packed,
    refused_place,
    spans,
)
from rules.netlink.transaction import attributes_of

VIP = parse_address("10.96.0.1")
PORTS = SetSpec("SLUICE-CLUSTER-IP", SetType.IP_PORT, Family.IPV4, comments=True, marks=True)
RANGES = SetSpec("SLUICE6-SOURCES", SetType.IP_PORT_NET, Family.IPV6)

# What Linux 6.18 answers to a request for a set after
#   ipset create a hash:ip,port comment skbinfo maxelem 1048576
#   ipset add a 10.96.0.1,tcp:80 comment default/web:http skbmark 0x100000/0xfff00000
#   ipset add a 10.96.0.2,sctp:65535
MARKED = bytes.fromhex(
    "020000000500010006000000060002006100000011000300686173683a69702c706f727400000000050005000200000005000400070000004400"
    "078008001240000004000800134000100000050015000c00000008001140a93ce1af080019400000000008001a40000001b90800184000000002"
    "080008400000005068000880440007800c000180080001000a6000010600044000500000050007000600000015001a0064656661756c742f7765"
    "623a68747470000000000c001b4000100000fff00000200007800c000180080001000a60000206000440ffff00000500070084000000"
)
#   ipset create b hash:ip,port,net family inet6; ipset add b fd00::1,udp:53,fd00:2::/64
FOREIGN = bytes.fromhex(
    "020000000500010006000000060002006200000015000300686173683a69702c706f72742c6e657400000000050005000a000000050004000800"
    "00003c00078008001240000004000800134000010000050015000c00000008001140a28242d1080019400000000008001a400000055008001840"
    "00000001500008804c0007801800018014000200fd0000000000000000000000000000011800148014000200fd00000200000000000000000000"
    "0000060004400035000005001500400000000500070011000000"
)


def read(request: bytes) -> dict[str, object]:
    """A request's attributes by pyroute2."""
    message = ipset_msg(request)
    message.decode()
    return dict(message["attrs"])


# --- requests ------------------------------------------------------------------------------------------------


def test_a_set_is_made_with_its_options() -> None:
    said = read(create_request(PORTS))
    data = dict(said.pop("IPSET_ATTR_DATA")["attrs"])  # type: ignore[index]  # pyroute2's own mapping
    assert said == {
        "IPSET_ATTR_PROTOCOL": 6,
        "IPSET_ATTR_SETNAME": "SLUICE-CLUSTER-IP",
        "IPSET_ATTR_TYPENAME": "hash:ip,port",
        "IPSET_ATTR_REVISION": 5,
        "IPSET_ATTR_FAMILY": 2,
    }
    assert data == {
        "IPSET_ATTR_CADT_FLAGS": 1 << 4 | 1 << 6,
        "IPSET_ATTR_HASHSIZE": 1024,
        "IPSET_ATTR_MAXELEM": 1 << 20,
    }


@pytest.mark.parametrize(
    "spec",
    [
        SetSpec("n" * 32, SetType.IP, Family.IPV4),
        SetSpec("ports", SetType.PORT, Family.IPV4),
        SetSpec("addresses", SetType.IP),
    ],
)
def test_a_set_that_cannot_be_is_not_asked_for(spec: SetSpec) -> None:
    with pytest.raises(ValueError, match=r"too long|cannot be"):
        create_request(spec)


def test_elements_are_read_by_another_library_as_they_are_meant() -> None:
    element = Element(parse_address("fd00::1"), 17, 53, parse_address("fd00:2::"), 64)
    [data] = read(add_request(RANGES.name, packed(RANGES, {element: NOTHING})))["IPSET_ATTR_ADT"]["attrs"]  # type: ignore[index]
    parts = dict(data[1]["attrs"])
    assert dict(parts.pop("IPSET_ATTR_IP_FROM")["attrs"]) == {"IPSET_ATTR_IPADDR_IPV6": "fd00::1"}
    assert dict(parts.pop("IPSET_ATTR_IP2")["attrs"]) == {"IPSET_ATTR_IPADDR_IPV6": "fd00:2::"}
    assert parts == {
        "IPSET_ATTR_PORT_FROM": 53,
        "IPSET_ATTR_PROTO": 17,
        "IPSET_ATTR_CIDR2": 64,
        "IPSET_ATTR_CADT_LINENO": int.from_bytes(struct.pack("=I", 1)),
    }


@pytest.mark.parametrize(
    ("spec", "element"),
    [
        (PORTS, Element(parse_address("fd00::1"), 6, 80)),
        (PORTS, Element(b"", 6, 80)),
        (PORTS, Element(VIP, 6, 80, VIP)),
        (RANGES, Element(parse_address("fd00::1"), 6, 80)),
        (SetSpec("ports", SetType.PORT), Element(VIP, port=80)),
    ],
)
def test_an_element_of_another_family_or_type_is_not_packed(spec: SetSpec, element: Element) -> None:
    with pytest.raises(ValueError, match="is none of a set of"):
        packed(spec, {element: NOTHING})


@given(st.text(max_size=300))
def test_comments_are_cut_between_characters(comment: str) -> None:
    [data] = packed(PORTS, {Element(VIP, 6, 80): Extra(comment=comment)})
    kept = attributes(data[4:]).get(26, b"\0")
    assert len(kept) <= 256
    assert kept.endswith(b"\0")
    before = comment.partition("\0")[0].encode("utf-8", "surrogatepass")
    assert before.startswith(kept[:-1])
    assert len(kept) == len(before) + 1 or len(before) > 255


@given(st.lists(st.integers(8, 400), max_size=2000), st.integers(0, 5), st.integers(0, 5))
def test_spans_are_everything_once_and_fit(sizes: list[int], before: int, after: int) -> None:
    elements = [bytes(size) for size in sizes]
    first, last = min(before, len(sizes)), max(min(before, len(sizes)), len(sizes) - after)
    found = list(spans(elements, first, last))
    assert [place for begin, end in found for place in range(begin, end)] == list(range(first, last))
    assert all(0 < end - begin <= 500 and sum(sizes[begin:end]) <= 28_000 for begin, end in found)


# --- answers -------------------------------------------------------------------------------------------------


def test_a_set_is_read_with_marks_and_comments() -> None:
    spec = SetSpec("a", SetType.IP_PORT, Family.IPV4, comments=True, marks=True)
    assert decode_set([MARKED]) == HeldSet(
        spec,
        {
            Element(VIP, 6, 80): Extra(0x100000, 0xFFF00000, "default/web:http"),
            Element(parse_address("10.96.0.2"), 132, 65535): NOTHING,
        },
    )
    assert decode_size(MARKED) == ("a", 2)


def test_a_set_with_other_options_than_ours_is_none_of_ours() -> None:
    assert decode_set([FOREIGN]) == HeldSet(None, {})
    # As many as ours may have, and it is one.
    ours = FOREIGN.replace(bytes.fromhex("0800134000010000"), bytes.fromhex("0800134000100000"))
    element = Element(parse_address("fd00::1"), 17, 53, parse_address("fd00:2::"), 64)
    assert decode_set([ours]) == HeldSet(SetSpec("b", SetType.IP_PORT_NET, Family.IPV6), {element: NOTHING})


def test_no_answers_are_no_set() -> None:
    assert decode_set([]) is None


@given(st.data())
def test_mutated_sets_raise_nothing_but_decode_errors(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([MARKED, FOREIGN])))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    for decode in (lambda each: decode_set([each]), decode_size, refused_place):
        with contextlib.suppress(DecodeError):
            decode(cut)


# --- the socket ----------------------------------------------------------------------------------------------


class FakeKernel:
    """The kernel's end of a socket: keeps the elements it is given, and refuses some of them as the kernel does."""

    def __init__(self, refused: Sequence[int] = (), code: int = 4103, *, refuses_all: bool = False) -> None:
        self.refused, self.code, self.refuses_all = frozenset(refused), code, refuses_all
        self.taken: list[int] = []
        self.requests = 0
        self._queue: list[bytes] = []

    def sendto(self, data: bytes, _address: object) -> None:
        for request in messages(data):
            self._take(request)

    def _take(self, request: Message) -> None:
        parts = attributes(attributes_of(request.payload))
        if self.refuses_all:
            self._answer(request, struct.pack("=i", -self.code) + bytes(16))
            return
        if 8 not in parts:  # the question whether there are ipsets
            self._answer(request, struct.pack("=i", 0) + bytes(16), kind=0)
            return
        self.requests += 1
        for _, element in attribute_list(parts[8]):
            (line,) = struct.unpack("=I", attributes(element)[9])
            if line in self.refused:
                # It sends back the whole request, with the number of the line where it stopped.
                whole = struct.pack("=IHHII", 16 + len(request.payload), request.kind, 1, request.sequence, 0)
                said = request.payload[:-4] + struct.pack("=I", line)
                self._answer(request, struct.pack("=i", -self.code) + whole + said)
                return
            self.taken.append(line)

    def _answer(self, request: Message, payload: bytes, kind: int = 2) -> None:
        self._queue.append(struct.pack("=IHHII", 16 + len(payload), kind, 0, request.sequence, 0) + payload)

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self._queue:
            raise BlockingIOError
        return self._queue.pop(0)

    def setsockopt(self, *_: object) -> None: ...

    def bind(self, _address: object) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def ipsets(refused: Sequence[int] = (), code: int = 4103) -> Iterator[tuple[Ipsets, FakeKernel]]:
    kernel = FakeKernel(refused, code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", lambda *_: kernel)
        with Ipsets() as sets:
            yield sets, kernel


def many(count: int) -> dict[Element, Extra]:
    return {Element(VIP, 6, port): NOTHING for port in range(1, count + 1)}


@given(st.integers(0, 1700), st.lists(st.integers(1, 1700), max_size=8))
def test_all_elements_but_those_refused_are_taken_and_those_refused_are_named(count: int, lines: list[int]) -> None:
    elements = many(count)
    with ipsets(lines) as (sets, kernel):
        refused = sets.add(PORTS, elements)
    expected = sorted({line for line in lines if line <= count})
    assert [each.element.port for each in refused] == expected
    assert sorted(kernel.taken) == [line for line in range(1, count + 1) if line not in expected]
    assert kernel.requests <= count // 500 + 1 + len(expected)


def test_a_refused_element_says_why_in_words() -> None:
    with ipsets([2], 4104) as (sets, _):
        [refused] = sets.delete(PORTS, many(3))
    assert refused.reason == "it has no such prefix length"


def test_a_request_that_is_refused_as_a_whole_names_the_set() -> None:
    with ipsets(code=errno.ENOENT) as (sets, kernel):
        kernel.refuses_all = True
        with pytest.raises(DataplaneError, match="ipset SLUICE-CLUSTER-IP could not be changed: there is no such set"):
            sets.add(PORTS, many(3))


@pytest.mark.parametrize(
    ("code", "said"), [(errno.EPERM, "CAP_NET_ADMIN"), (errno.EINVAL, "this kernel has no ipset .*: load ip_set")]
)
def test_a_kernel_without_ipsets_is_one_line(code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_: FakeKernel(code=code, refuses_all=True))
    with pytest.raises(UnavailableError, match=said):
        Ipsets()
