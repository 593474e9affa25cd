"""ipsets as values, and the netlink messages that carry them.

A set's elements go into a message as a list, each with its line number: the kernel stops at the first that it refuses
and sends the whole message back with that line in it; those before it stay done.

Every number that the kernel wants in network order must also say so in its attribute's type.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rules.forwarding import Address, Family
from rules.netlink.attributes import (
    EXCLUSIVE,
    HEAD,
    HEADER,
    NESTED,
    U32,
    DecodeError,
    attribute,
    attribute_list,
    attributes,
    be32,
    be32_of,
    nested,
    parse_be32,
    parse_text,
    parse_u8,
    text,
    text_of,
    u8,
)
from rules.netlink.transaction import attributes_of, netfilter_message

_SUBSYSTEM = 6
_AF_INET = Family.IPV4.af
_PROTOCOL_VERSION = 6
"""The lowest that kernels still speak (since 4.20 they prefer 7, which adds nothing that is used here)."""

_PROTOCOL_COMMAND, _CREATE, _DESTROY, _LIST, _ADD, _DELETE = 1, 2, 3, 7, 9, 10

# Of a message.
_PROTOCOL, _NAME, _TYPE, _REVISION, _FAMILY, _FLAGS, _DATA, _LIST_OF_DATA, _LINE = 1, 2, 3, 4, 5, 6, 7, 8, 9
_HEADERS_ALONE = 1 << 2
# Of a set.
_CREATE_FLAGS, _FIRST_PORT, _LAST_PORT, _HASH_SIZE, _MOST = 8, 4, 5, 18, 19
_ELEMENTS, _REFERENCES = 24, 25
_UNUSED = frozenset({6, 20, 27})
"""Options of sets that none of ours has: a timeout, a netmask, a bitmask."""
_WITH_COMMENTS, _WITH_MARKS = 1 << 4, 1 << 6
# Of an element.
_ADDRESS, _LENGTH, _PORT, _ELEMENT_PROTOCOL, _OTHER, _OTHER_LENGTH, _COMMENT, _MARK = 1, 3, 4, 7, 20, 21, 26, 27
_IPV4, _IPV6 = 1, 2
_NETWORK_ORDER = 0x4000

MOST_ELEMENTS = 1 << 20
"""How many a set may have; one without elements takes no more memory for it."""
_FIRST_HASH_SIZE = 1024
_LONGEST_COMMENT = 255
_LONGEST_NAME = 31
_MOST_AT_ONCE = 500
_MOST_BYTES = 28_000
"""Of elements in a message: it must fit, with the kernel's error before it, into what is read at once."""

_PAIR = struct.Struct(">II")


class SetType(enum.Enum):
    """What elements consist of, as ipset calls it."""

    IP = "hash:ip"
    IP_PORT = "hash:ip,port"
    IP_PORT_IP = "hash:ip,port,ip"
    IP_PORT_NET = "hash:ip,port,net"
    NET = "hash:net"
    NET_PORT = "hash:net,port"
    PORT = "bitmap:port"
    """Ports from 0 to 65535, of whatever protocol."""


_REVISIONS = {
    SetType.IP: 4,
    SetType.IP_PORT: 5,
    SetType.IP_PORT_IP: 5,
    SetType.IP_PORT_NET: 7,
    SetType.NET: 6,
    SetType.NET_PORT: 7,
    SetType.PORT: 3,
}
"""Those that brought marks (Linux 3.18): later ones have what isn't used here, and are told apart by it."""


class SetSpec(NamedTuple):
    """A set, without its elements."""

    name: str
    """31 bytes at most."""
    type: SetType
    family: Family | None = None
    """None: a set of ports."""
    comments: bool = False
    """Whether elements have comments."""
    marks: bool = False
    """Whether elements have marks (skbinfo)."""


class Element(NamedTuple):
    """What packets are compared with; parts that the set's type doesn't have are empty."""

    address: Address = b""
    """Of a set of networks, the network."""
    protocol: int = 0
    port: int = 0
    other: Address = b""
    """The second address, or the second part's network."""
    length: int = 0
    """The prefix length of the network, which no type can hold with length 0."""


class Extra(NamedTuple):
    """What an element carries."""

    mark: int = 0
    mask: int = 0
    """Which bits of a packet's mark `mark` replaces."""
    comment: str = ""
    """Cut at 255 bytes."""


NOTHING = Extra()


class HeldSet(NamedTuple):
    """A set as the kernel holds it."""

    spec: SetSpec | None
    """None: of a type or with options that none of ours has; its elements are left out then."""
    elements: Mapping[Element, Extra]
    references: int = 0
    """How many rules refer to it: it cannot be destroyed while there are any."""


_REASONS = {
    errno.ENOENT: "there is no such set",
    4097: "the kernel doesn't understand the request",
    4098: "the kernel has no such type of sets",
    4099: "there are too many sets",
    4100: "it is in use",
    4101: "there is another of that name",
    4102: "the sets' types differ",
    4103: "it is there already, or isn't there",
    4104: "it has no such prefix length",
    4106: "it is of another family",
    4108: "rules refer to it",
    4112: "the set has no comments",
    4114: "the set has no marks",
    4352: "the set is full, or the port is out of its range",
    4354: "the set takes no such protocol",
}
NO_SUCH_TYPE = 4098


def reason(code: int) -> str:
    """An error of the kernel's, in words."""
    return _REASONS.get(code) or os.strerror(code)


# --- requests ------------------------------------------------------------------------------------------------


def protocol_request() -> bytes:
    """Ask whether there are ipsets at all; the answer doesn't matter."""
    return _request(_PROTOCOL_COMMAND)


def create_request(spec: SetSpec) -> bytes:
    """Make a set; EEXIST: one of the name is there.

    Raises:
        ValueError: the name is too long, or family and type don't go together.
    """
    if len(spec.name.encode()) > _LONGEST_NAME:
        raise ValueError(f"{spec.name} is too long for the name of a set")
    if (spec.family is None) is not (spec.type is SetType.PORT):
        raise ValueError(f"a set of {spec.type.value} cannot be of family {spec.family}")
    flags = (_WITH_COMMENTS if spec.comments else 0) | (_WITH_MARKS if spec.marks else 0)
    options = [_be32(_CREATE_FLAGS, flags)] if flags else []
    if spec.family is None:
        options += [_be16(_FIRST_PORT, 0), _be16(_LAST_PORT, 0xFFFF)]
    else:
        options += [_be32(_HASH_SIZE, _FIRST_HASH_SIZE), _be32(_MOST, MOST_ELEMENTS)]
    return _request(
        _CREATE,
        text(_NAME, spec.name),
        text(_TYPE, spec.type.value),
        u8(_REVISION, _REVISIONS[spec.type]),
        u8(_FAMILY, 0 if spec.family is None else spec.family.af),
        nested(_DATA, *options),
        flags=EXCLUSIVE,
    )


def destroy_request(name: str) -> bytes:
    """Destroy a set; ENOENT: there is none."""
    return _request(_DESTROY, text(_NAME, name), flags=EXCLUSIVE)


def sizes_request() -> bytes:
    """Ask for all sets without their elements, as a dump."""
    return _request(_LIST, _be32(_FLAGS, _HEADERS_ALONE))


def list_request(name: str, *, elements: bool = True) -> bytes:
    """Ask for a set, with its elements or without, as a dump; ENOENT: there is none."""
    return _request(_LIST, text(_NAME, name), b"" if elements else _be32(_FLAGS, _HEADERS_ALONE))


def packed(spec: SetSpec, elements: Mapping[Element, Extra]) -> list[bytes]:
    """Elements for requests, each with its place as its line number; the first has line 1, as 0 is none.

    Raises:
        ValueError: an element lacks what the set's type has, or is of another family.
    """
    size = spec.family.address_bytes if spec.family else 0
    inner = HEAD.pack(HEAD.size + size, (_IPV4 if size == 4 else _IPV6) | _NETWORK_ORDER)
    address_head = HEAD.pack(HEAD.size + len(inner) + size, _ADDRESS | NESTED) + inner
    other_head = HEAD.pack(HEAD.size + len(inner) + size, _OTHER | NESTED) + inner
    other_size = size if spec.type in (SetType.IP_PORT_IP, SetType.IP_PORT_NET) else 0
    has_port = spec.type in (SetType.IP_PORT, SetType.IP_PORT_IP, SetType.IP_PORT_NET, SetType.NET_PORT)
    length_kind = _LENGTHS.get(spec.type)
    found = []
    for line, (element, extra) in enumerate(elements.items(), start=1):
        address, protocol, port, other, length = element
        if len(address) != size or len(other) != other_size:
            raise ValueError(f"{element} is none of a set of {spec.type.value}, {spec.family}")
        body = address_head + address if size else _PORT_HEAD + port.to_bytes(2) + b"\0\0"
        if other:
            body += other_head + other
        if has_port:
            body += _PORT_HEAD + port.to_bytes(2) + _AFTER_PORT + bytes((protocol, 0, 0, 0))
        if length_kind is not None:
            body += HEAD.pack(5, length_kind) + bytes((length, 0, 0, 0))
        if extra.comment:
            body += text(_COMMENT, _cut(extra.comment))
        if extra.mask:
            body += _MARK_HEAD + _PAIR.pack(extra.mark, extra.mask)
        found.append(HEAD.pack(HEAD.size + len(body) + 8, _DATA | NESTED) + body + _LINE_HEAD + U32.pack(line))
    return found


_LENGTHS = {SetType.NET: _LENGTH, SetType.NET_PORT: _LENGTH, SetType.IP_PORT_NET: _OTHER_LENGTH}
_PORT_HEAD = HEAD.pack(6, _PORT | _NETWORK_ORDER)
_AFTER_PORT = b"\0\0" + HEAD.pack(5, _ELEMENT_PROTOCOL)
_MARK_HEAD = HEAD.pack(12, _MARK | _NETWORK_ORDER)
_LINE_HEAD = HEAD.pack(8, _LINE)


def _cut(comment: str) -> str:
    """A comment as far as it fits, whole characters only; a zero byte would end it."""
    return comment.partition("\0")[0].encode()[:_LONGEST_COMMENT].decode(errors="ignore")


def spans(elements: Sequence[bytes], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Places [first, last) cut into runs that fit into a request each."""
    begin, size = first, 0
    for place in range(first, last):
        size += len(elements[place])
        if size > _MOST_BYTES or place - begin == _MOST_AT_ONCE:
            yield begin, place
            begin, size = place, len(elements[place])
    if begin < last:
        yield begin, last


def add_request(name: str, elements: Sequence[bytes]) -> bytes:
    """Add packed elements, or replace what they carry; they must fit."""
    return _request(_ADD, text(_NAME, name), nested(_LIST_OF_DATA, *elements), _LINE_HEAD + bytes(4))


def delete_request(name: str, elements: Sequence[bytes]) -> bytes:
    """Delete packed elements; those that aren't there are passed over."""
    return _request(_DELETE, text(_NAME, name), nested(_LIST_OF_DATA, *elements), _LINE_HEAD + bytes(4))


def refused_place(error: bytes) -> int | None:
    """Which of all packed elements an error's payload is about, from 0 on; None: about the whole request.

    Raises:
        DecodeError: it holds a request that is none.
    """
    request = error[4 + HEADER.size :]
    if not request:
        return None
    line = attributes(attributes_of(request)).get(_LINE, b"")
    return U32.unpack(line)[0] - 1 if len(line) == U32.size and any(line) else None


def _request(command: int, *parts: bytes, flags: int = 0) -> bytes:
    payload = u8(_PROTOCOL, _PROTOCOL_VERSION) + b"".join(parts)
    return netfilter_message(command, flags, _AF_INET, payload, _SUBSYSTEM)


def _be32(kind: int, value: int) -> bytes:
    return be32(kind | _NETWORK_ORDER, value)


def _be16(kind: int, value: int) -> bytes:
    return attribute(kind | _NETWORK_ORDER, value.to_bytes(2))


# --- answers -------------------------------------------------------------------------------------------------


def decode_size(payload: bytes) -> tuple[str, int]:
    """Name and number of elements from an answer to `sizes_request`; raises DecodeError."""
    found = attributes(attributes_of(payload))
    return text_of(found, _NAME), be32_of(attributes(found.get(_DATA, b"")), _ELEMENTS, 0)


def decode_set(payloads: Iterable[bytes]) -> HeldSet | None:
    """A set from all answers to `list_request`; None: there are no answers.

    Raises:
        DecodeError: they are none.
    """
    spec: SetSpec | None = None
    references = 0
    begun = False
    elements: dict[Element, Extra] = {}
    for payload in payloads:
        found = attributes(attributes_of(payload))
        if not begun:
            begun = True
            options = attributes(found.get(_DATA, b""))
            spec, references = _decode_spec(found, options), be32_of(options, _REFERENCES, 0)
        if spec is not None:
            for kind, data in attribute_list(found.get(_LIST_OF_DATA, b"")):
                if kind == _DATA:
                    element, extra = _decode_element(spec, data)
                    elements[element] = extra
    return HeldSet(spec, elements, references) if begun else None


def decode_any_set(payloads: Iterable[bytes]) -> tuple[SetSpec, frozenset[Element]] | None:
    """A set of a known type that others made, whatever its size and options; None: there is none, or another type.

    Raises:
        DecodeError: they are no answers to `list_request`.
    """
    spec: SetSpec | None = None
    elements: set[Element] = set()
    for payload in payloads:
        found = attributes(attributes_of(payload))
        if spec is None:
            try:
                kind = SetType(text_of(found, _TYPE))
            except ValueError:
                return None
            number = parse_u8(found.get(_FAMILY, b"\0"))
            family = next((each for each in Family if each.af == number), None)
            if (family is None) is not (kind is SetType.PORT):
                return None
            spec = SetSpec(text_of(found, _NAME), kind, family)
        for kind_of, data in attribute_list(found.get(_LIST_OF_DATA, b"")):
            if kind_of == _DATA:
                elements.add(_decode_element(spec, data)[0])
    return (spec, frozenset(elements)) if spec is not None else None


def _decode_spec(found: Mapping[int, bytes], options: Mapping[int, bytes]) -> SetSpec | None:
    try:
        kind = SetType(text_of(found, _TYPE))
    except ValueError:
        return None
    number = parse_u8(found.get(_FAMILY, b"\0"))
    family = next((each for each in Family if each.af == number), None)
    flags = be32_of(options, _CREATE_FLAGS, 0)
    if kind is SetType.PORT:
        usual = (options.get(_FIRST_PORT), options.get(_LAST_PORT)) == (b"\0\0", b"\xff\xff") and family is None
    else:
        usual = be32_of(options, _MOST, 0) == MOST_ELEMENTS and family is not None
    if not usual or flags & ~(_WITH_COMMENTS | _WITH_MARKS) or not _UNUSED.isdisjoint(options):
        return None
    return SetSpec(text_of(found, _NAME), kind, family, bool(flags & _WITH_COMMENTS), bool(flags & _WITH_MARKS))


def _decode_element(spec: SetSpec, data: bytes) -> tuple[Element, Extra]:
    """One element; raises DecodeError."""
    found = attributes(data)
    mark, mask = (parse_be32(half) for half in _halves(found[_MARK])) if _MARK in found else (0, 0)
    comment = found.get(_COMMENT)
    element = Element(
        _decode_address(spec, found.get(_ADDRESS)),
        parse_u8(found[_ELEMENT_PROTOCOL]) if _ELEMENT_PROTOCOL in found else 0,
        int.from_bytes(found.get(_PORT, b"")),
        _decode_address(spec, found.get(_OTHER)),
        parse_u8(found[_LENGTH]) if _LENGTH in found else parse_u8(found.get(_OTHER_LENGTH, b"\0")),
    )
    return element, Extra(mark, mask, parse_text(comment) if comment is not None else "")


def _halves(value: bytes) -> tuple[bytes, bytes]:
    return value[:4], value[4:]


def _decode_address(spec: SetSpec, value: bytes | None) -> Address:
    if value is None or spec.family is None:
        return b""
    address = attributes(value).get(_IPV4 if spec.family is Family.IPV4 else _IPV6, b"")
    if len(address) != spec.family.address_bytes:
        raise DecodeError(f"an address of {len(address)} bytes in a set of {spec.family.label}")
    return address
