"""IPVS' virtual and real servers as values, and the generic netlink messages that carry them.

A virtual server is found by address, protocol and port, or by the mark of a packet; it hands new connections to its
real servers by a scheduler.  Everything here is NAT mode (masquerading, as IPVS calls it), the only one in which a
Service's port may differ from its backends'.

Requests are whole payloads, a command and its attributes; who sends them adds the netlink header, as the number of
the IPVS family is the kernel's to give.  Bulk ones are packed in one go by precompiled structs.

Three traps: an IPv6 server's netmask is a prefix length in the machine's byte order (128, not a mask); a forwarding
method that is left out is direct routing, not 0; and every change of a server must carry all of its fields again.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from rules.forwarding import Address, Family
from rules.netlink.attributes import HEAD, NESTED, U32, DecodeError, attribute, attributes, nested, text, text_of

_NEW_SERVER, _SET_SERVER, _DELETE_SERVER, _GET_SERVER = 1, 2, 3, 4
_NEW_REAL, _SET_REAL, _DELETE_REAL, _GET_REAL = 5, 6, 7, 8
_SET_CONFIG, _GET_CONFIG, _GET_INFO = 12, 13, 15
_VERSION = 1

_SERVER, _REAL = 1, 2
_TIMEOUTS = (4, 5, 6)
"""Attributes of a configuration: TCP, TCP after a FIN, UDP."""
_FAMILY, _PROTOCOL, _ADDRESS, _PORT, _MARK, _SCHEDULER, _FLAGS, _TIMEOUT, _NETMASK, _ENGINE = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    11,
)
_REAL_ADDRESS, _REAL_PORT, _METHOD, _WEIGHT, _UPPER, _LOWER, _ACTIVE, _INACTIVE = 1, 2, 3, 4, 5, 6, 7, 8
_TUNNEL_TYPE, _TUNNEL_PORT, _TUNNEL_FLAGS = 13, 14, 15
_MASQUERADE, _METHODS = 0, 7

_GENERIC = struct.Struct("=BBH")
"""struct genlmsghdr: command, version, nothing."""
_U16 = struct.Struct("=H")
_PAIR = struct.Struct("=II")

PERSISTENT = 0x1
"""A server's flag: a client keeps its real server for `timeout` seconds (IPVS-10).

By mark, a persistent server sends connections to the port that they came for, whatever port its real servers have.
"""
SCHEDULER_1 = 0x8
"""A server's flag whose meaning its scheduler gives it; sh and mh: another real server instead of one of weight 0."""
SCHEDULER_2 = 0x10
"""Likewise; sh and mh: the source port counts too (IPVS-5)."""
_HASHED = 0x2
"""Set by the kernel alone."""


class Key(NamedTuple):
    """What packets a virtual server is for.  Either a mark, or all of the others."""

    family: Family
    protocol: int = 0
    """The IP protocol's number; 0 beside a mark."""
    address: Address = b""
    port: int = 0
    mark: int = 0
    """Packets with this mark, whatever their protocol and port; 0: by address."""


class VirtualServer(NamedTuple):
    """How new connections are handed out."""

    key: Key
    scheduler: str = "rr"
    """A kernel's name: rr, wrr, lc, ..."""
    timeout: int = 0
    """Seconds for which a client keeps its real server, where `flags` say so; otherwise the kernel only stores it."""
    flags: int = 0
    """`PERSISTENT` and others; what the kernel adds is left out."""


class Target(NamedTuple):
    """Which real server of a virtual one."""

    address: Address
    port: int


class Real(NamedTuple):
    """A real server as the kernel holds it."""

    weight: int
    """0: new connections go elsewhere, those that it has go on."""
    active: int = 0
    """Connections that are established."""
    inactive: int = 0
    """Others that are still tracked: opening, closing, all of UDP."""
    masquerading: bool = True
    """Whether it is reached by NAT, as all of ours are."""

    @property
    def connections(self) -> int:
        return self.active + self.inactive


class Held(NamedTuple):
    """A virtual server as the kernel holds it."""

    server: VirtualServer
    reals: Mapping[Target, Real]
    foreign: bool = False
    """Whether it has what none of ours has: real servers without NAT, a netmask, a persistence engine."""


class Timeouts(NamedTuple):
    """Seconds after which idle connections are forgotten."""

    tcp: int
    tcp_fin: int
    udp: int


# --- requests ------------------------------------------------------------------------------------------------


def add_server(server: VirtualServer) -> bytes:
    """Make a virtual server; EEXIST: there is one, ENOENT: there is no such scheduler."""
    return _server(_NEW_SERVER, server)


def set_server(server: VirtualServer) -> bytes:
    """Change everything of a virtual server but its key; ESRCH: there is none."""
    return _server(_SET_SERVER, server)


def delete_server(key: Key) -> bytes:
    """Delete a virtual server with its real servers; ESRCH: there is none."""
    return _GENERIC.pack(_DELETE_SERVER, _VERSION, 0) + nested(_SERVER, _key(key))


def add_real(key: Key, target: Target, weight: int = 1) -> bytes:
    """Add a real server to a virtual one; EEXIST: it has it, ESRCH: there is no such virtual server."""
    return _real(_NEW_REAL, key, target, weight)


def set_real(key: Key, target: Target, weight: int) -> bytes:
    """Change a real server's weight; ENOENT: there is none."""
    return _real(_SET_REAL, key, target, weight)


def delete_real(key: Key, target: Target) -> bytes:
    """Delete a real server; its connections are dropped when their next packet comes.  ENOENT: there is none."""
    real = nested(_REAL, attribute(_REAL_ADDRESS, target.address), attribute(_REAL_PORT, target.port.to_bytes(2)))
    return _GENERIC.pack(_DELETE_REAL, _VERSION, 0) + nested(_SERVER, _key(key)) + real


def get_servers() -> bytes:
    """Ask for all virtual servers of both families, as a dump."""
    return _GENERIC.pack(_GET_SERVER, _VERSION, 0)


def get_reals(key: Key) -> bytes:
    """Ask for the real servers of a virtual one, as a dump."""
    return _GENERIC.pack(_GET_REAL, _VERSION, 0) + nested(_SERVER, _key(key))


def get_info() -> bytes:
    """Ask whether IPVS answers us; what it says of itself doesn't matter."""
    return _GENERIC.pack(_GET_INFO, _VERSION, 0)


def get_timeouts() -> bytes:
    """Ask for `Timeouts`."""
    return _GENERIC.pack(_GET_CONFIG, _VERSION, 0)


def set_timeouts(timeouts: Timeouts) -> bytes:
    """Set those that aren't 0 (IPVS-4)."""
    values = (attribute(kind, U32.pack(value)) for kind, value in zip(_TIMEOUTS, timeouts, strict=True))
    return _GENERIC.pack(_SET_CONFIG, _VERSION, 0) + b"".join(values)


def _key(key: Key) -> bytes:
    family = attribute(_FAMILY, _U16.pack(key.family.af))
    if key.mark:
        return family + attribute(_MARK, U32.pack(key.mark))
    return (
        family
        + attribute(_PROTOCOL, _U16.pack(key.protocol))
        + attribute(_ADDRESS, key.address)
        + attribute(_PORT, key.port.to_bytes(2))
    )


def _server(command: int, server: VirtualServer) -> bytes:
    return _GENERIC.pack(command, _VERSION, 0) + nested(
        _SERVER,
        _key(server.key),
        text(_SCHEDULER, server.scheduler),
        attribute(_FLAGS, _PAIR.pack(server.flags, 0xFFFFFFFF)),
        attribute(_TIMEOUT, U32.pack(server.timeout)),
        attribute(_NETMASK, _NETMASKS[server.key.family]),
    )


_NETMASKS = {Family.IPV4: b"\xff" * 4, Family.IPV6: U32.pack(128)}
"""Of persistence: every client is one of its own."""


class _Heads(NamedTuple):
    """What stands between the values of a request about a real server: the heads of attributes, and padding."""

    server: bytes
    """Before the virtual server's protocol, or its mark."""
    address: bytes
    port: bytes
    real: bytes
    """Before the real server's address, after a port."""
    real_of_mark: bytes
    """Likewise, after a mark."""
    real_port: bytes
    weight: bytes


def _heads(family: Family, *, by_mark: bool) -> _Heads:
    size = HEAD.size + family.address_bytes
    key = 8 if by_mark else 8 + size + 8  # the mark; or protocol, address, port
    server = HEAD.pack(HEAD.size + 8 + key, _SERVER | NESTED) + attribute(_FAMILY, _U16.pack(family.af))
    rest = attribute(_METHOD, U32.pack(_MASQUERADE)) + attribute(_UPPER, bytes(4)) + attribute(_LOWER, bytes(4))
    real = HEAD.pack(HEAD.size + size + 8 + len(rest) + 8, _REAL | NESTED) + HEAD.pack(size, _REAL_ADDRESS)
    return _Heads(
        server + (HEAD.pack(8, _MARK) if by_mark else HEAD.pack(6, _PROTOCOL)),
        b"\0\0" + HEAD.pack(size, _ADDRESS),
        HEAD.pack(6, _PORT),
        b"\0\0" + real,
        real,
        HEAD.pack(6, _REAL_PORT),
        b"\0\0" + rest + HEAD.pack(8, _WEIGHT),
    )


_BY_ADDRESS = {family: _heads(family, by_mark=False) for family in Family}
_BY_MARK = {family: _heads(family, by_mark=True) for family in Family}


def _real(command: int, key: Key, target: Target, weight: int) -> bytes:
    """In one go, as there are many: the same bytes as by `nested` and `attribute`, four times as fast."""
    family, protocol, address, port, mark = key
    generic = _GENERIC.pack(command, _VERSION, 0)
    real_address, real_port = target
    if mark:
        heads = _BY_MARK[family]
        server: tuple[bytes, ...] = (generic, heads.server, U32.pack(mark), heads.real_of_mark)
    else:
        heads = _BY_ADDRESS[family]
        server = (
            *(generic, heads.server, _U16.pack(protocol), heads.address, address),
            *(heads.port, port.to_bytes(2), heads.real),
        )
    real = (real_address, heads.real_port, real_port.to_bytes(2), heads.weight, U32.pack(weight))
    return b"".join((*server, *real))


# --- answers -------------------------------------------------------------------------------------------------


def decode_server(payload: bytes) -> tuple[VirtualServer, bool]:
    """A virtual server of a dump, and whether it is foreign (see `Held`).

    Raises:
        DecodeError: it is none.
    """
    found = attributes(_of(payload, _SERVER))
    family = _family(found)
    netmask, engine = found.get(_NETMASK, b""), found.get(_ENGINE)
    server = VirtualServer(
        _decode_key(family, found),
        text_of(found, _SCHEDULER),
        _number(found, _TIMEOUT),
        _number(found, _FLAGS) & ~_HASHED,
    )
    return server, engine is not None or netmask != _NETMASKS[family]


def _decode_key(family: Family, found: Mapping[int, bytes]) -> Key:
    if _MARK in found:
        return Key(family, mark=_number(found, _MARK))
    address, port = found.get(_ADDRESS, b""), found.get(_PORT, b"")
    if len(address) < family.address_bytes or len(port) != _U16.size:
        raise DecodeError("a virtual server without address and port")
    return Key(family, _short(found, _PROTOCOL), address[: family.address_bytes], int.from_bytes(port))


class _Shape(NamedTuple):
    """Where a dump says what of a real server: headers of attributes where they always are, values in between."""

    values: struct.Struct
    headers: int
    """The bytes with every value zero, as one number."""
    mask: int
    """Ones where headers are."""


def _shape() -> _Shape:
    """As of Linux 5.3, up to the count of inactive connections; found as what differing values leave alike."""
    kinds = (_METHOD, _WEIGHT, _TUNNEL_TYPE, _TUNNEL_PORT, _TUNNEL_FLAGS, _UPPER, _LOWER, _ACTIVE, _INACTIVE)
    sizes = {_TUNNEL_TYPE: 1, _TUNNEL_PORT: 2, _TUNNEL_FLAGS: 2}

    def said(filler: bytes) -> int:
        address, port = attribute(_REAL_ADDRESS, filler * 16), attribute(_REAL_PORT, filler * 2)
        rest = b"".join(attribute(kind, filler * sizes.get(kind, 4)) for kind in kinds)
        return int.from_bytes(filler * 8 + address + port + rest)

    first, second = said(b"\x55"), said(b"\xaa")
    values = struct.Struct("=8x 4x16s 4x2s2x 4xI 4xI 24x 16x 4xI 4xI")
    mask = (1 << 8 * values.size) - 1 ^ first ^ second
    return _Shape(values, first & mask, mask)


_PLAIN = _shape()


def decode_real(family: Family, data: bytes, start: int = 0, end: int | None = None) -> tuple[Target, Real]:
    """The real server of a dump that is `data[start:end]`.

    Raises:
        DecodeError: it is none.
    """
    end = len(data) if end is None else end
    plain = data[start : min(end, start + _PLAIN.values.size)]
    if len(plain) == _PLAIN.values.size and int.from_bytes(plain) & _PLAIN.mask == _PLAIN.headers:
        address, port, method, weight, active, inactive = _PLAIN.values.unpack(plain)
        target = Target(address[: family.address_bytes], int.from_bytes(port))
        return target, Real(weight, active, inactive, method & _METHODS == _MASQUERADE)
    found = attributes(_of(data[start:end], _REAL))
    address, port = found.get(_REAL_ADDRESS, b""), found.get(_REAL_PORT, b"")
    if len(address) < family.address_bytes or len(port) != _U16.size:
        raise DecodeError("a real server without address and port")
    target = Target(address[: family.address_bytes], int.from_bytes(port))
    masquerading = _number(found, _METHOD) & _METHODS == _MASQUERADE
    return target, Real(_number(found, _WEIGHT), _number(found, _ACTIVE), _number(found, _INACTIVE), masquerading)


def decode_timeouts(payload: bytes) -> Timeouts:
    """Raises DecodeError."""
    found = attributes(_attributes_of(payload))
    tcp, tcp_fin, udp = (_number(found, kind) for kind in _TIMEOUTS)
    return Timeouts(tcp, tcp_fin, udp)


def _attributes_of(payload: bytes) -> bytes:
    if len(payload) < _GENERIC.size:
        raise DecodeError("a generic netlink message without its header")
    return payload[_GENERIC.size :]


def _of(payload: bytes, kind: int) -> bytes:
    found = attributes(_attributes_of(payload))
    if kind not in found:
        raise DecodeError(f"attribute {kind} is missing")
    return found[kind]


def _family(found: Mapping[int, bytes]) -> Family:
    number = _short(found, _FAMILY)
    for family in Family:
        if family.af == number:
            return family
    raise DecodeError(f"address family {number}")


def _number(found: Mapping[int, bytes], kind: int) -> int:
    """The first 32 bits, in the machine's order, of an attribute."""
    value = found.get(kind, b"")
    if len(value) < U32.size:
        raise DecodeError(f"attribute {kind} is missing or short")
    return int(U32.unpack_from(value)[0])


def _short(found: Mapping[int, bytes], kind: int) -> int:
    value = found.get(kind, b"")
    if len(value) != _U16.size:
        raise DecodeError(f"attribute {kind} is missing or no 16-bit number")
    return int(_U16.unpack(value)[0])
