"""What nft keeps beside kernel objects for itself: comments, and how the keys of a set are to be printed.

The kernel stores these bytes and does not read them.  They are fields of a type byte, a length byte and a value.
Without byte order nft prints integers of a set the wrong way round, and without `typeof` it cannot print (nor load
again) a key that has no type of its own.

Anybody may have written what is parsed here: parsing never raises, and takes what makes no sense for absent.
"""

from __future__ import annotations

from typing import NamedTuple

from rules.netlink.attributes import U32

_LONGEST = 256
"""The most userdata that the kernel takes for one object."""

# --- comments ------------------------------------------------------------------------------------------------

_COMMENT = 0
"""The type of the comment field of tables, chains, rules and elements; sets have their own."""
_SET_COMMENT = 7
_COMMENT_REST = 192
"""Our own field, which nft passes over: what of an element's comment is longer than nft takes."""
_SHOWN = 127
"""nft loads comments of up to 128 bytes; a label can have 191 (two names of 63 and one more, with marks between)."""


def encode_comment(comment: str) -> bytes:
    """The userdata of a table, chain, rule or element with a comment.

    What doesn't fit into the kernel's 256 bytes is cut off.
    """
    raw = comment.encode(errors="replace")
    if len(raw) <= _SHOWN:
        return bytes((_COMMENT, len(raw) + 1)) + raw + b"\0"
    # Not in the middle of a character: nft shows the first part alone.
    cut = _SHOWN
    while raw[cut] & 0xC0 == 0x80:
        cut -= 1
    rest = raw[cut : cut + _LONGEST - cut - 5]
    return bytes((_COMMENT, cut + 1)) + raw[:cut] + b"\0" + bytes((_COMMENT_REST, len(rest))) + rest


def parse_comment(data: bytes) -> str:
    """The comment in the userdata of a table, chain, rule or element; empty when there is none or none to be read."""
    # The form that nearly all have; the hot path of reading a large set.
    if len(data) > 2 and data[0] == _COMMENT and data[1] == len(data) - 2:
        raw = data[2:]
    else:
        found = fields(data)
        raw = found.get(_COMMENT, b"").rstrip(b"\0") + found.get(_COMMENT_REST, b"")
    try:
        return raw.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return ""


def fields(data: bytes) -> dict[int, bytes]:
    """The fields of userdata by type, as far as they make sense."""
    found = {}
    position = 0
    while position + 2 <= len(data):
        kind, length = data[position], data[position + 1]
        position += 2
        if position + length > len(data):
            break
        found[kind] = data[position : position + length]
        position += length
    return found


def field(kind: int, value: bytes) -> bytes:
    """One field; raises ValueError if the value is longer than 255 bytes."""
    return bytes((kind, len(value))) + value


# --- how keys and data of sets are printed -----------------------------------------------------------------------

MIXED = 0
HOST = 1
NETWORK = 2

_KEY_BYTE_ORDER = 0
_DATA_BYTE_ORDER = 1
_KEY_TYPEOF = 3
_DATA_TYPEOF = 4
_DATA_INTERVAL = 6

_TYPEOF_EXPRESSION = 0
_TYPEOF_DATA = 1
_PAYLOAD, _META, _CONCATENATION, _NUMGEN = 7, 9, 13, 23
"""nft's own numbers of the kinds of expression."""


class Presentation(NamedTuple):
    """X: its byte order (mixed for concatenations), and its `typeof`, if it needs one."""

    order: int
    typeof: bytes = b""


def typeof_payload(header: int, number: int) -> bytes:
    """`typeof` a header's field, by nft's numbers of headers and their fields."""
    return _typeof(_PAYLOAD, _number(0, header) + _number(1, number))


def typeof_meta(key: int) -> bytes:
    """`typeof meta KEY`."""
    return _typeof(_META, _number(0, key))


def typeof_numgen() -> bytes:
    """`typeof numgen random mod 2`: it stands for any 32-bit integer."""
    return _typeof(_NUMGEN, _number(0, 1) + _number(1, 2) + _number(2, 0))


def typeof_concatenation(*parts: bytes) -> bytes:
    """`typeof` several things side by side; without parts: a concatenation that its types describe."""
    return _typeof(_CONCATENATION, b"".join(field(index, part) for index, part in enumerate(parts)))


def encode_set(key: Presentation, data: Presentation | None, comment: str = "") -> bytes:
    """The userdata of a set, or of a map if it has data."""
    encoded = _number(_KEY_BYTE_ORDER, key.order)
    if data is not None:
        encoded += _number(_DATA_BYTE_ORDER, data.order)
    if key.typeof:
        encoded += field(_KEY_TYPEOF, key.typeof)
    if data is not None:
        if data.typeof:
            encoded += field(_DATA_TYPEOF, data.typeof)
        encoded += _number(_DATA_INTERVAL, 0)
    if comment:
        encoded += field(_SET_COMMENT, comment.encode() + b"\0")
    return encoded


def _typeof(kind: int, data: bytes) -> bytes:
    return _number(_TYPEOF_EXPRESSION, kind) + field(_TYPEOF_DATA, data)


def _number(kind: int, value: int) -> bytes:
    return field(kind, U32.pack(value))
