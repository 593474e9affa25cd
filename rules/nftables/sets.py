"""The sets and maps of the layout: types, flags, sizes, and how nft prints them.

None has a limit that a cluster could reach: sets that only we write grow as they need, and the one that rules write,
which the kernel would stop at 65,535, has a size.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from typing import NamedTuple

from rules.forwarding import Family, Prefix, merge_prefixes
from rules.nftables import names
from rules.nftables.messages import INTERVAL_END, Element
from rules.nftables.objects import EVALUATED, INTERVAL, MAP, TIMEOUT, VERDICT_LENGTH, VERDICT_TYPE, SetSpec
from rules.nftables.userdata import (
    HOST,
    MIXED,
    NETWORK,
    Presentation,
    encode_set,
    typeof_concatenation,
    typeof_meta,
    typeof_numgen,
    typeof_payload,
)

PICK = "pick"
"""The map of counts to their chains: the only map of verdicts, as those make the kernel check all chains again."""
STICKY_SIZE = 1 << 20
"""Clients that are remembered at once."""
STICKY_TIMEOUT = 3 * 3600 * 1000
"""What nft would give an element without one of its own; every rule of ours gives one."""


class _Type(NamedTuple):
    """A type of nft: its number, the bytes of a value, and their order."""

    number: int
    length: int
    order: int


_INTEGER = _Type(4, 4, HOST)
_IPV4 = _Type(7, 4, NETWORK)
_IPV6 = _Type(8, 16, NETWORK)
_PROTOCOL = _Type(12, 1, NETWORK)
_PORT = _Type(13, 2, NETWORK)
_CLASS = _Type(23, 4, HOST)
"""`classid`, the type of a priority: it stands for a list, and a count or a slot."""

_TYPE_BITS = 6

_META_PRIORITY = typeof_meta(2)
_LIST_AND_NUMBER = typeof_concatenation(_META_PRIORITY, typeof_numgen())
# nft's numbers of headers (ip, ip6; tcp, udp, sctp) and of their fields for destination address and port.
_DESTINATION = {Family.IPV4: typeof_payload(12, 12), Family.IPV6: typeof_payload(13, 9)}
_DESTINATION_PORT = {
    names.ENDPOINTS_TCP: typeof_payload(8, 2),
    names.ENDPOINTS_UDP: typeof_payload(6, 2),
    names.ENDPOINTS_SCTP: typeof_payload(10, 2),
}


class _Side(NamedTuple):
    """The key or the data of a set."""

    number: int
    length: int
    shown: Presentation


def _side(*types: _Type, typeof: bytes = b"") -> _Side:
    if len(types) == 1:
        (only,) = types
        return _Side(only.number, only.length, Presentation(only.order, typeof))
    number = 0
    for each in types:
        number = number << _TYPE_BITS | each.number
    # In registers every field of a concatenation fills whole words.
    length = sum(each.length + 3 & ~3 for each in types)
    return _Side(number, length, Presentation(MIXED, typeof))


def _key(*types: _Type, typeof: bytes = b"") -> _Side:
    """A key; nft describes one of several fields as a concatenation, even where the types say all."""
    return _side(*types, typeof=typeof or (typeof_concatenation() if len(types) > 1 else b""))


def _set(name: str, key: _Side, flags: int = 0) -> SetSpec:
    return SetSpec(name, key.number, key.length, flags=flags, userdata=encode_set(key.shown, None))


def _map(name: str, key: _Side, data: _Side, *, flags: int = 0, size: int = 0, timeout: int = 0) -> SetSpec:
    return SetSpec(
        name,
        key.number,
        key.length,
        data.number,
        data.length,
        MAP | flags,
        size,
        timeout,
        userdata=encode_set(key.shown, data.shown),
    )


def build_sets(family: Family, timeouts: Collection[int], lengths: Collection[int]) -> tuple[SetSpec, ...]:
    """All sets and maps of the layout; see `rules.nftables.names` for what each is for.

    Raises:
        ValueError: a timeout or a prefix length is out of range.
    """
    address = _IPV4 if family is Family.IPV4 else _IPV6
    frontend = _key(address, _PROTOCOL, _PORT)
    port = _key(_PROTOCOL, _PORT)
    reference = _side(_CLASS)
    # `typeof meta priority` where the partner needs a typeof too: nft takes either types or typeofs for one set.
    typed_reference = _side(_CLASS, typeof=_META_PRIORITY)
    list_and_number = _key(_CLASS, _INTEGER, typeof=_LIST_AND_NUMBER)
    verdict = _Side(VERDICT_TYPE, VERDICT_LENGTH, Presentation(MIXED))

    def endpoints(name: str) -> SetSpec:
        backend = typeof_concatenation(_DESTINATION[family], _DESTINATION_PORT[name])
        return _map(name, list_and_number, _side(address, _PORT, typeof=backend))

    for timeout in timeouts:
        if not 0 < timeout < 1 << 32:
            raise ValueError(f"affinity for {timeout} s cannot be kept")
    for length in lengths:
        if not 0 <= length <= family.address_bytes * 8:
            raise ValueError(f"{family.label} has no prefixes of {length} bits")
    return (
        _map(names.CLUSTER_IP, frontend, reference),
        _map(names.EXTERNAL, frontend, reference),
        _map(names.EXTERNAL_LOCAL, frontend, reference),
        _set(names.EXTERNAL_POLICY_LOCAL, frontend),
        _set(names.EXTERNAL_IPS, frontend),
        _set(names.LOAD_BALANCER_IPS, frontend),
        _map(names.NODE_PORT, port, reference),
        _map(names.NODE_PORT_LOCAL, port, reference),
        _set(names.NODE_PORT_POLICY_LOCAL, port),
        _set(names.NODE_PORT_ADDRESSES, _key(address)),
        *(endpoints(name) for name in _DESTINATION_PORT),
        _map(names.MEMBERS, list_and_number, typed_reference),
        _map(names.SLOTS, _key(_CLASS), _side(address, _PORT, typeof=typeof_concatenation())),
        _map(
            names.STICKY,
            list_and_number,
            typed_reference,
            flags=EVALUATED | TIMEOUT,
            size=STICKY_SIZE,
            timeout=STICKY_TIMEOUT,
        ),
        *(_set(names.affinity(timeout), typed_reference) for timeout in sorted(timeouts)),
        _set(names.LOCAL_ENDPOINT_PAIRS, _key(address, address, _PROTOCOL, _PORT)),
        _set(names.CLUSTER_IPS, _key(address)),
        _set(names.SERVICE_CIDRS, _key(address), flags=INTERVAL),
        _set(names.REJECT_FRONTENDS, frontend),
        _set(names.DROP_FRONTENDS, frontend),
        _set(names.REJECT_NODE_PORTS, port),
        _set(names.DROP_NODE_PORTS, port),
        _set(names.SOURCE_RANGED, frontend),
        *(_set(names.source_ranges(length), _key(address, _PROTOCOL, _PORT, address)) for length in sorted(lengths)),
        _map(PICK, _key(_CLASS), verdict),
    )


# --- sets of intervals -----------------------------------------------------------------------------------------


def prefix_elements(prefixes: Iterable[Prefix]) -> list[Element]:
    """The elements of a set of intervals for prefixes of one family that are merged.

    Each prefix is an interval: an element for its first address, and one that is an end for the first behind it.
    """
    elements: list[Element] = []
    for address, length in sorted(prefixes):
        size = len(address)
        # As nft does: a set opens with an end at zero unless an interval starts there.
        if not elements and any(address):
            elements.append(Element(bytes(size), flags=INTERVAL_END))
        elements.append(Element(address))
        stop = int.from_bytes(address) + (1 << size * 8 - length)
        if stop < 1 << size * 8:
            elements.append(Element(stop.to_bytes(size), flags=INTERVAL_END))
    return elements


def element_prefixes(elements: Iterable[Element], family: Family) -> tuple[Prefix, ...] | None:
    """The prefixes of such a set, merged and sorted; None if its elements make no intervals."""
    size = family.address_bytes
    bits = size * 8
    listed = list(elements)
    if any(len(each.key) != size or each.flags not in {0, INTERVAL_END} for each in listed):
        return None
    # An end sorts before a start with the same address.
    marks = sorted({(int.from_bytes(each.key), not each.flags) for each in listed})
    prefixes: list[Prefix] = []
    start: int | None = None
    for place, opens in [*marks, (1 << bits, False)]:
        if opens:
            if start is not None:
                return None
            start = place
        elif start is not None:
            prefixes += _span(start, place, size)
            start = None
        elif 0 < place < 1 << bits:
            return None
    return merge_prefixes(prefixes)


def _span(start: int, stop: int, size: int) -> list[Prefix]:
    """The fewest prefixes that cover the addresses from `start` up to `stop`."""
    first, last = (ipaddress.ip_address(number.to_bytes(size)) for number in (start, stop - 1))
    networks = ipaddress.summarize_address_range(first, last)
    return [Prefix(network.network_address.packed, network.prefixlen) for network in networks]
