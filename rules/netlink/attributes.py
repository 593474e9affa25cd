"""Netlink messages and their attributes, to bytes and back.

A netlink message is a 16-byte header and a payload; a payload is a fixed part (for netfilter, four bytes: see
`rules.netlink.transaction`) and attributes, each of a length, a type and a value padded to four bytes.  Values are
bytes, numbers in network order, texts that end in a zero byte, or attributes again.

Whatever is parsed may be anything: parsing raises `DecodeError` and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence number, port id."""
HEAD = struct.Struct("=HH")
"""Length and type of an attribute."""
U32 = struct.Struct("=I")
_BE32 = struct.Struct(">I")
_BE64 = struct.Struct(">Q")
_BE32_ATTRIBUTE = struct.Struct("=HH4s")

NESTED = 0x8000
"""The bit of an attribute's type that says that its value is attributes."""
_TYPE = 0x3FFF
MAX_VALUE = 0xFFFF - HEAD.size
"""The most bytes that one attribute can hold: its length is a 16-bit number."""

REQUEST = 0x1
ACK = 0x4
DUMP_INTERRUPTED = 0x10
DUMP = 0x300
EXCLUSIVE = 0x200
CREATE = 0x400
APPEND = 0x800

ERROR = 2
"""The type of a message that tells of an error, or acknowledges."""
DONE = 3
"""The type of the message that ends a dump."""

_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class DecodeError(ValueError):
    """Bytes are not what they should be; the message says what was expected."""


class Message(NamedTuple):
    """One message as it was received."""

    kind: int
    flags: int
    sequence: int
    payload: bytes


# --- to bytes ------------------------------------------------------------------------------------------------


def pad(value: bytes) -> bytes:
    """`value` filled up with zeros to a multiple of four bytes."""
    return value + _PADDING[len(value) & 3]


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded.

    Raises:
        ValueError: the value is longer than an attribute can hold.
    """
    if len(value) > MAX_VALUE:
        raise ValueError(f"{len(value)} bytes do not fit into a netlink attribute")
    return HEAD.pack(HEAD.size + len(value), kind) + value + _PADDING[len(value) & 3]


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute whose value is attributes."""
    return attribute(kind | NESTED, b"".join(attributes))


def be32(kind: int, value: int) -> bytes:
    """An attribute with a 32-bit number in network order; negative numbers as their complement."""
    return _BE32_ATTRIBUTE.pack(8, kind, _BE32.pack(value & 0xFFFFFFFF))


def be64(kind: int, value: int) -> bytes:
    """An attribute with a 64-bit number in network order."""
    return attribute(kind, _BE64.pack(value))


def u8(kind: int, value: int) -> bytes:
    """An attribute with a byte."""
    return attribute(kind, bytes((value,)))


def text(kind: int, value: str) -> bytes:
    """An attribute with a text that ends in a zero byte."""
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, flags: int, payload: bytes) -> bytes:
    """A whole message, to be numbered when it is sent."""
    return HEADER.pack(HEADER.size + len(payload), kind, flags, 0, 0) + pad(payload)


# --- from bytes ----------------------------------------------------------------------------------------------


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram.

    Raises:
        DecodeError: a length does not fit.
    """
    position, end = 0, len(data)
    while position < end:
        if end - position < HEADER.size:
            raise DecodeError("a message is cut short")
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, position)
        if length < HEADER.size or position + length > end:
            raise DecodeError(f"a message of {length} bytes does not fit")
        yield Message(kind, flags, sequence, data[position + HEADER.size : position + length])
        position += length + 3 & ~3


def attribute_list(data: bytes) -> list[tuple[int, bytes]]:
    """Types (without their flag bits) and values of a run of attributes, in order.

    Raises:
        DecodeError: a length does not fit.
    """
    found = []
    position, end = 0, len(data)
    while position < end:
        if end - position < HEAD.size:
            raise DecodeError("an attribute is cut short")
        length, kind = HEAD.unpack_from(data, position)
        if length < HEAD.size or position + length > end:
            raise DecodeError(f"an attribute of {length} bytes does not fit")
        found.append((kind & _TYPE, data[position + HEAD.size : position + length]))
        position += length + 3 & ~3
    return found


def attributes(data: bytes) -> dict[int, bytes]:
    """The values of a run of attributes by type; of two of one type, the last.

    Raises:
        DecodeError: a length does not fit.
    """
    return dict(attribute_list(data))


def parse_be32(value: bytes) -> int:
    """A 32-bit number in network order; raises DecodeError."""
    if len(value) != 4:
        raise DecodeError(f"a 32-bit number of {len(value)} bytes")
    return int.from_bytes(value)


def parse_be64(value: bytes) -> int:
    """A 64-bit number in network order; raises DecodeError."""
    if len(value) != 8:
        raise DecodeError(f"a 64-bit number of {len(value)} bytes")
    return int.from_bytes(value)


def parse_u8(value: bytes) -> int:
    """A byte; raises DecodeError."""
    if len(value) != 1:
        raise DecodeError(f"a byte of {len(value)} bytes")
    return value[0]


def parse_text(value: bytes) -> str:
    """A text up to its zero byte; raises DecodeError."""
    try:
        return value.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        raise DecodeError("a text that is not UTF-8") from None


def be32_of(found: Mapping[int, bytes], kind: int, default: int | None = None) -> int:
    """The 32-bit number of one attribute among `found`.

    Raises:
        DecodeError: it is malformed, or it is missing and there is no default.
    """
    value = found.get(kind)
    if value is None:
        return _absent(kind, default)
    return parse_be32(value)


def text_of(found: Mapping[int, bytes], kind: int, default: str | None = None) -> str:
    """The text of one attribute among `found`.

    Raises:
        DecodeError: it is malformed, or it is missing and there is no default.
    """
    value = found.get(kind)
    if value is None:
        if default is None:
            raise DecodeError(f"attribute {kind} is missing")
        return default
    return parse_text(value)


def _absent(kind: int, default: int | None) -> int:
    if default is None:
        raise DecodeError(f"attribute {kind} is missing")
    return default
