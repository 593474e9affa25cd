"""The elements of sets and maps as netlink messages, in bulk, to bytes and back.

What is encoded here is for `NetfilterSocket.commit`, what is decoded came from `NetfilterSocket.dump`.  It is the hot
path: a node with 10,000 Services has some 100,000 elements.  They go in lists of nearly 64 KiB, the most that an
attribute can hold, put together from ready-made heads; and they are read by comparing each with the shape of the one
before.  Decoding raises `DecodeError` on bytes that are no elements, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from rules.forwarding import Family
from rules.netlink.attributes import (
    CREATE,
    HEAD,
    HEADER,
    NESTED,
    DecodeError,
    attribute_list,
    attributes,
    be32,
    nested,
    pad,
    parse_be32,
    text,
)
from rules.netlink.transaction import attributes_of, netfilter_message
from rules.nftables import userdata
from rules.nftables.expression_codec import encode_verdict, parse_value, parse_verdict
from rules.nftables.expressions import Verdict

_NEW_ELEMENT, _GET_ELEMENT, _DELETE_ELEMENT = 12, 13, 14

INTERVAL_END = 1
"""A flag: the element is the first key behind an interval."""
CATCH_ALL = 2
"""A flag: the element stands for all keys that have none; its key is empty."""

_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT = 1
_KEY, _DATA, _FLAGS, _USERDATA = 1, 2, 3, 6
_LARGEST_LIST = 0xFFFF - HEAD.size


class Element(NamedTuple):
    """An element of a set or map: key and data are the bytes of registers, each field of them padded to four."""

    key: bytes
    data: bytes = b""
    comment: str = ""
    verdict: Verdict | None = None
    """What a map of verdicts has instead of data."""
    flags: int = 0


def add_elements(family: Family, table: str, name: str, elements: Iterable[Element]) -> list[bytes]:
    """Add elements; EEXIST for a key that is there with other data.  No messages for no elements."""
    return [_message(family, _NEW_ELEMENT, table, name, each) for each in _lists(elements)]


def delete_elements(family: Family, table: str, name: str, keys: Iterable[bytes]) -> list[bytes]:
    """Delete the elements with these keys; ENOENT for a key that isn't there."""
    return remove_elements(family, table, name, map(Element, keys))


def remove_elements(family: Family, table: str, name: str, elements: Iterable[Element]) -> list[bytes]:
    """Delete elements by key and flags: ends of intervals and catch-alls too."""
    bare = (Element(element.key, flags=element.flags) for element in elements)
    return [_message(family, _DELETE_ELEMENT, table, name, each) for each in _lists(bare)]


def flush_elements(family: Family, table: str, name: str) -> bytes:
    """Delete all elements of a set."""
    return _message(family, _DELETE_ELEMENT, table, name)


def get_elements(family: Family, table: str, name: str) -> bytes:
    """Ask for all elements of one set, with `NetfilterSocket.dump`."""
    return _message(family, _GET_ELEMENT, table, name)


def _lists(elements: Iterable[Element]) -> list[bytes]:
    """Attributes with lists of elements, each as long as it may be."""
    lists: list[list[bytes]] = []
    room = 0
    key_length = data_length = -1
    head = key_head = data_head = key_tail = data_tail = b""
    size = 0
    for key, data, comment, verdict, bits in elements:
        if len(key) != key_length or len(data) != data_length:
            key_length, data_length = len(key), len(data)
            key_head, key_tail = _value_frame(_KEY, key_length)
            data_head, data_tail = _value_frame(_DATA, data_length)
            size = HEAD.size + sum(map(len, (key_head, key, key_tail, data_head, data, data_tail)))
            head = HEAD.pack(size, _ELEMENT | NESTED) + key_head
        if not comment and verdict is None and not bits:
            element = b"".join((head, key, key_tail, data_head, data, data_tail))
        else:
            element = b"".join((key_head, key, key_tail, data_head, data, data_tail, _extras(comment, verdict, bits)))
            element = HEAD.pack(HEAD.size + len(element), _ELEMENT | NESTED) + element
        room -= len(element)
        if room < 0:
            lists.append([])
            room = _LARGEST_LIST - len(element)
        lists[-1].append(element)
    return [nested(_LIST_ELEMENTS, b"".join(each)) for each in lists]


def _value_frame(kind: int, length: int) -> tuple[bytes, bytes]:
    """What stands before and behind a value of registers; nothing where there is no value."""
    if not length:
        return b"", b""
    padding = -length % 4
    outer = HEAD.pack(2 * HEAD.size + length + padding, kind | NESTED)
    return outer + HEAD.pack(HEAD.size + length, 1), bytes(padding)


def _extras(comment: str, verdict: Verdict | None, flags: int) -> bytes:
    encoded = encode_verdict(_DATA, verdict) if verdict is not None else b""
    if flags:
        encoded += be32(_FLAGS, flags)
    if comment:
        note = userdata.encode_comment(comment)
        encoded += HEAD.pack(HEAD.size + len(note), _USERDATA) + pad(note)
    return encoded


def decode_elements(payloads: Iterable[bytes]) -> list[Element]:
    """The elements in the payloads of one set's dump; what the kernel counts and times for them is passed over.

    Raises:
        DecodeError: these are no elements.
    """
    elements: list[Element] = []
    for payload in payloads:
        found = attributes(attributes_of(payload))
        if _LIST_ELEMENTS in found:
            _decode_list(found[_LIST_ELEMENTS], elements)
    return elements


def _decode_list(data: bytes, elements: list[Element]) -> None:
    """Decode one list of elements onto the end of `elements`.

    Elements of one set are alike but for their comments.  The first is taken apart attribute by attribute; those
    after it only need to have the same heads in the same places.
    """
    make = tuple.__new__
    parse_comment = userdata.parse_comment
    unpack = HEAD.unpack_from
    shape: _Shape | None = None
    key_head = data_head = b""
    key_end = data_start = data_end = 0
    position, end = 0, len(data)
    while position < end:
        if end - position < HEAD.size:
            raise DecodeError("an element is cut short")
        length, _ = unpack(data, position)
        stop = position + length
        if length < HEAD.size or stop > end:
            raise DecodeError(f"an element of {length} bytes does not fit")
        if (
            shape is not None
            and data_end <= length
            and data[position + 2 : position + 12] == key_head
            and data[position + key_end : position + data_start] == data_head
        ):
            key = data[position + 12 : position + key_end]
            value = data[position + data_start : position + data_end]
            if data_end == length:
                elements.append(make(Element, (key, value, "", None, 0)))
                position = stop
                continue
            tail = position + data_end
            if tail + HEAD.size <= stop:
                size, kind = unpack(data, tail)
                if kind == _USERDATA and (size + 3 & ~3) == (length - data_end + 3 & ~3):
                    comment = parse_comment(data[tail + HEAD.size : tail + size])
                    elements.append(make(Element, (key, value, comment, None, 0)))
                    position += length + 3 & ~3
                    continue
        element = _decode_element(data[position + HEAD.size : stop])
        elements.append(element)
        first = shape is None
        shape = _shape_of(element, data[position:stop])
        if shape is not None:
            key_head, data_head, key_end, data_start, data_end = shape
            if first and data_end == length and _decode_alike(data[position + length :], shape, elements):
                return
        position += length + 3 & ~3


def _decode_alike(data: bytes, shape: _Shape, elements: list[Element]) -> bool:
    """Decode elements that are all of one shape without a comment; False, and nothing done, if they are not."""
    length = shape.data_end
    if len(data) % length:
        return False
    form = f"{shape.key_end - 12}s{shape.data_start - shape.key_end}s{shape.data_end - shape.data_start}s"
    found = list(struct.iter_unpack(f"=2s10s{form}", data))
    expected = HEAD.pack(length, 0)[:2], shape.key_head, shape.data_head
    if any((head, key_head, data_head) != expected for head, key_head, _, data_head, _ in found):
        return False
    make = tuple.__new__
    elements += [make(Element, (key, value, "", None, 0)) for _, _, key, _, value in found]
    return True


class _Shape(NamedTuple):
    """Where the parts of an element lie that has a key, perhaps data, and perhaps a comment."""

    key_head: bytes
    data_head: bytes
    key_end: int
    data_start: int
    data_end: int


def _shape_of(element: Element, raw: bytes) -> _Shape | None:
    """The shape of a decoded element, if elements like it can be read without looking at every attribute."""
    key, data = len(element.key), len(element.data)
    if not key or key % 4 or data % 4 or element.verdict is not None or element.flags:
        return None
    key_end = 12 + key
    data_start = key_end + 8 if data else key_end
    if raw[12:key_end] != element.key or raw[data_start : data_start + data] != element.data:
        return None
    return _Shape(raw[2:12], raw[key_end:data_start], key_end, data_start, data_start + data)


def _decode_element(content: bytes) -> Element:
    found = attributes(content)
    data, verdict = b"", None
    if _DATA in found:
        inner = attributes(found[_DATA])
        if 1 in inner:
            data = inner[1]
        else:
            verdict = parse_verdict(found[_DATA])
    return Element(
        parse_value(found[_KEY]) if _KEY in found else b"",
        data,
        userdata.parse_comment(found.get(_USERDATA, b"")),
        verdict,
        parse_be32(found[_FLAGS]) if _FLAGS in found else 0,
    )


def key_at(message: bytes, offset: int) -> bytes | None:
    """The key of the element of an element message in which the byte at `offset` lies, as an error names it.

    None: the offset lies in no element, or the message has none.
    """
    start = HEADER.size + 4
    try:
        for kind, content in attribute_list(message[start:]):
            start += HEAD.size
            if kind == _LIST_ELEMENTS:
                for _, element in attribute_list(content):
                    if start <= offset < start + HEAD.size + len(element):
                        return _decode_element(element).key
                    start += HEAD.size + len(pad(element))
                return None
            start += len(pad(content))
    except DecodeError:
        return None
    return None


def _message(family: Family, kind: int, table: str, name: str, elements: bytes = b"") -> bytes:
    flags = CREATE if kind == _NEW_ELEMENT else 0
    return netfilter_message(kind, flags, family.af, text(_LIST_TABLE, table) + text(_LIST_SET, name) + elements)
