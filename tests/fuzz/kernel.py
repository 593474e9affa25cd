"""Whole conversations with a kernel that says anything: what asks it must end in its own error or in a value.

`recorded/` has real ones for a beginning (`record`).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from proxy import interfaces
from proxy.explain import legacy, nftables_chains, routing
from proxy.explain.crossing import bases_of
from proxy.explain.obstacles import obstacles
from proxy.explain.passing import Passing
from proxy.explain.passing_nftables import decode, members
from proxy.explain.surroundings import ForeignChain, Surroundings
from proxy.explain.xtables import match_of, target_of
from proxy.userspace import anyip, sockdiag
from rules.dataplane import DataplaneError
from rules.forwarding import Family, Protocol, check_route, parse_address
from rules.ipvs.device import Device
from rules.ipvs.services import Ipvs
from rules.netlink.attributes import DONE, DUMP, ERROR, HEADER, DecodeError, message
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.ipset import Ipsets
from rules.nftables.dataplane import NftablesDataplane
from rules.nftables.messages import Element
from rules.nftables.monitor import Monitor
from rules.nftables.objects import INTERVAL, SetSpec, decode_rule

_MOST_QUESTIONS = 64
"""In one conversation: what is asked again and again comes to an end."""


class Kernel:
    """A netlink socket whose other end says what it was given, message by message, to whatever it is asked."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self._at = 0
        self._asked = 0
        self._queue: list[bytes] = []

    def sendto(self, data: bytes, _: object = None) -> None:
        """A question: what comes next is its answer."""
        self._asked += 1
        if self._asked > _MOST_QUESTIONS:
            raise OSError("it has been asked enough")
        _, _, flags, sequence, _ = HEADER.unpack_from(data)
        self._queue = [self._answer(sequence, dump=flags & DUMP == DUMP)]
        if flags & DUMP:
            self._queue.append(_done(sequence))

    send = sendto

    def recv(self, _: int, flags: int = 0) -> bytes:
        """A datagram of the answer."""
        if self._queue and not flags:
            return self._queue.pop(0)
        raise BlockingIOError

    def _answer(self, sequence: int, *, dump: bool) -> bytes:
        """The messages of one answer, as if they answered this very question."""
        found = bytearray()
        while len(self._said) - self._at >= HEADER.size:
            length, kind, flags, _, port = HEADER.unpack_from(self._said, self._at)
            end = self._at + (max(length, HEADER.size) + 3 & ~3)
            found += HEADER.pack(length, kind, flags, sequence, port) + self._said[self._at + HEADER.size : end]
            self._at = end
            if kind in (DONE, ERROR) or not dump:
                return bytes(found)
        found += self._said[self._at :]
        self._at = len(self._said)
        return bytes(found) or _done(sequence)

    def getsockname(self) -> tuple[int, int]:
        """Its port."""
        return 1, 0

    def setsockopt(self, *_: object) -> None: ...

    def settimeout(self, _: float) -> None: ...

    def bind(self, _: object) -> None: ...

    def close(self) -> None: ...

    def fileno(self) -> int:
        """None."""
        return -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def _done(sequence: int) -> bytes:
    return HEADER.pack(HEADER.size + 4, DONE, 0, sequence, 0) + bytes(4)


@contextlib.contextmanager
def saying(data: bytes) -> Iterator[None]:
    """Sockets are opened to one kernel that says this."""
    kernel: Any = Kernel(data)
    plain = socket.socket
    socket.socket = lambda *_, **__: kernel  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        socket.socket = plain  # type: ignore[misc]


# --- beside our rules ----------------------------------------------------------------------------------------------


def kernel_routes(data: bytes) -> None:
    """The node's addresses and the ways to others, to explain: never an error."""
    asked = [*map(parse_address, ("10.244.1.11", "10.244.9.1", "fd00:50::11", "1.2.3.4"))]
    with saying(data):
        own = routing.own_addresses()
        ways, nowhere = routing.ways_to(asked)
    assert all(len(each) in (4, 16) for each in own)
    assert all(len(each or bytes(4)) in (4, 16) for way in ways.values() for each in way[1:])
    assert ways.keys() | nowhere.keys() <= set(asked)


def kernel_interfaces(data: bytes) -> None:
    """The interfaces' addresses, the local routes, and sockets that listen."""
    with contextlib.suppress(OSError, DecodeError), saying(data):
        interfaces.read_addresses()
    for family in Family:
        with contextlib.suppress(OSError, DecodeError), saying(data):
            anyip.read_routes(family)
        with contextlib.suppress(OSError, DecodeError), saying(data):
            sockdiag.read_listeners(family)


_PACKETS = {
    family: [
        Passing(parse_address(address), Protocol.TCP, 80, parse_address(source), "veth0", "eth0", masqueraded=some)
        for some in (None, True, False)
    ]
    for family, address, source in (
        (Family.IPV4, "10.244.1.11", "10.9.0.1"),
        (Family.IPV6, "fd00:244::1", "fd00:50::11"),
    )
}


def _judge(chains: Iterable[ForeignChain]) -> None:
    """Lead packets through chains, and put what they meet into words."""
    node = Surroundings(chains=tuple(chains))
    _ = node.forward_drops, node.other_proxies
    for family, packets in _PACKETS.items():
        for bases in bases_of(node, family).values():
            for each in obstacles(bases, packets).obstacles:
                assert each.place
                assert each.does
                assert each.listing
                assert each.rule is None or each.rule.words


def kernel_chains(data: bytes) -> None:
    """The chains of others in nftables, with rules and sets, and what they do to packets: never an error."""
    with saying(data):
        found = list(nftables_chains.read_chains())
    _judge(found)


class _Anything(dict[str, Any]):
    """Sets of any name, each of which holds these."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def get(self, _: str, __: object = None) -> Any:
        """The set."""
        return self._held


def kernel_rules(data: bytes) -> None:
    """A rule of others in nftables, with any set beside it: never an error, once it is a rule."""
    half = len(data) // 2
    keys = data[half - half % 5 :]
    elements = [Element(keys[at : at + 4], flags=keys[at + 4] & 1) for at in range(0, len(keys) - 4, 5)]
    elements += [Element(data[:3]), Element(b"", flags=1), Element(data[:16])]
    held = [members(elements, SetSpec("s", flags=flags, key_type=0, key_length=4)) for flags in (0, INTERVAL)]
    with contextlib.suppress(DecodeError):
        listed = decode_rule(data)[1]
        for sets in ({}, *map(_Anything, held)):
            _judge([ForeignChain("ip", "t", "f", forwards=True, drops=False, rules=(decode(listed, sets),))])


def kernel_legacy(data: bytes) -> None:
    """The tables of legacy iptables, and what they do to packets."""
    size = legacy._INFO.size
    for family in Family:
        with contextlib.suppress(OSError):
            table = legacy.decode(family, data[:size].ljust(size, b"\0"), data[size:])
            short = "ip" if family is Family.IPV4 else "ip6"
            _judge(
                ForeignChain(short, "filter", name, name == "FORWARD", table.forward_drops, legacy=True, rules=rules)
                for name, rules in table.rules.items()
            )


_MATCHES = ("conntrack", "state", "tcp", "udp", "multiport", "comment", "mark")


def xtables_matches(data: bytes) -> None:
    """A match of iptables in the kernel's form, by each name that is known: never an error."""
    for name in (*_MATCHES, data[:29].partition(b"\0")[0].decode(errors="replace")):
        for condition in match_of(name, sum(data[:1]) & 3, data[1:]):
            assert str(condition)
        target_of(name)


# --- mode ipvs -----------------------------------------------------------------------------------------------------


def kernel_ipsets(data: bytes) -> None:
    """All sets with their elements, whoever made them."""
    for read in (Ipsets.any_set, Ipsets.held):
        with contextlib.suppress(DataplaneError), saying(data):
            sets = Ipsets()
            for name in sorted(sets.names()):
                read(sets, name)


def kernel_ipvs(data: bytes) -> None:
    """All virtual servers with their real ones, and timeouts."""
    with contextlib.suppress(DataplaneError), saying(data):
        ipvs = Ipvs()
        for family in Family:
            ipvs.dump(family)
        ipvs.timeouts()


def kernel_device(data: bytes) -> None:
    """The device, and the addresses on it and elsewhere."""
    with contextlib.suppress(DataplaneError), saying(data):
        device = Device()
        for family in Family:
            for found in (device.addresses(family), device.elsewhere(family)):
                assert all(len(each) == family.address_bytes for each in found)


# --- our own table, which others may have edited ---------------------------------------------------------------------


def kernel_table(data: bytes) -> None:
    """Our table as a kernel holds it: a table with its damage, rules and elements with their owners, or an error."""
    with contextlib.suppress(DataplaneError), saying(data):
        dataplane = NftablesDataplane(Family.IPV4)
        if (raw := dataplane.raw()) is not None:
            for frontend, route in raw.table.routes.items():
                assert check_route(Family.IPV4, frontend, route) is None


class _Told(Kernel):
    """A socket that is told things: some datagrams."""

    def __init__(self, datagrams: list[bytes]) -> None:
        super().__init__(b"")
        self._queue = datagrams


def kernel_changes(data: bytes) -> None:
    """What nftables tells of changes by others: never an error."""
    ear: Any = _Told([data, message(10 << 8 | 15, 0, data), message(10 << 8 | 6, 0, data + b"sluice\0")])
    plain = socket.socket
    socket.socket = lambda *_, **__: ear  # type: ignore[assignment,misc]
    try:
        monitor = Monitor("sluice", [])
    finally:
        socket.socket = plain  # type: ignore[misc]
    for touch in monitor.touched():
        assert touch.family in Family


def kernel_flows(data: bytes) -> None:
    """The table of connection tracking."""
    for family in Family:
        with contextlib.suppress(OSError, DecodeError), saying(data):
            for flow in Conntrack(family).flows(Protocol.UDP):
                assert len(flow.source) in (4, 16)


TARGETS: tuple[Callable[[bytes], None], ...] = (
    *(kernel_routes, kernel_interfaces, kernel_chains, kernel_rules, kernel_legacy, xtables_matches),
    *(kernel_ipsets, kernel_ipvs, kernel_device, kernel_table, kernel_changes, kernel_flows),
)
