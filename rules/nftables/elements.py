"""What routes, lists of backends and the rest look like as elements of the layout's sets and maps, both ways.

Keys and data are the kernel's registers, byte for byte: every field of a concatenation is padded to four bytes;
addresses and ports are in network order, integers and priorities in the host's (LAYOUT.md).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.forwarding import Address, Backend, Endpoint, Family, Frontend, Kind, Prefix, Protocol, Refusal, Route
from rules.nftables import names
from rules.nftables.messages import Element

COUNT_BITS = 13
MAX_COUNT = (1 << COUNT_BITS) - 1
"""How many backends one list can have."""
MAX_LIST = (1 << 32 - COUNT_BITS) - 1

_U32 = struct.Struct("=I")
_U32_PAIR = struct.Struct("=II")
_PORT = struct.Struct("!H2x")
_BACKENDS = {family: struct.Struct(f"!{family.address_bytes}sH2x") for family in Family}
_PROTOCOL_PORT = struct.Struct("!B3xH2x")

PROTOCOLS = {int(protocol): protocol for protocol in Protocol}
ENDPOINT_MAPS = {
    Protocol.TCP: names.ENDPOINTS_TCP,
    Protocol.UDP: names.ENDPOINTS_UDP,
    Protocol.SCTP: names.ENDPOINTS_SCTP,
}
REFUSAL_SETS = {
    (Refusal.REJECT, False): names.REJECT_FRONTENDS,
    (Refusal.DROP, False): names.DROP_FRONTENDS,
    (Refusal.REJECT, True): names.REJECT_NODE_PORTS,
    (Refusal.DROP, True): names.DROP_NODE_PORTS,
}
KIND_SETS = {Kind.EXTERNAL_IP: names.EXTERNAL_IPS, Kind.LOAD_BALANCER: names.LOAD_BALANCER_IPS}

LABELLED = frozenset(
    {names.CLUSTER_IP, names.EXTERNAL, names.NODE_PORT, *REFUSAL_SETS.values()},
)
"""Sets whose elements have labels."""

Elements = Mapping[str, Mapping[bytes, Element]]
"""Set → key → element, as a kernel holds them."""


class Placed(NamedTuple):
    """An element and the set or map that it belongs to."""

    set: str
    element: Element


class MalformedError(Exception):
    """An element's bytes are not of the form that its set gives them."""


# --- references to lists -------------------------------------------------------------------------------------


def pack_reference(list_id: int, low: int) -> bytes:
    """A value of the scratch register: a list, and below it a count of backends or the number of a slot."""
    return _U32.pack(list_id << COUNT_BITS | low)


def unpack_reference(data: bytes) -> tuple[int, int]:
    """The list and the count (or slot) of a scratch value; raises MalformedError."""
    if len(data) != 4:
        raise MalformedError
    (value,) = _U32.unpack(data)
    return value >> COUNT_BITS, value & MAX_COUNT


def index_key(list_id: int, index: int) -> bytes:
    """The key of the `index`-th backend of a list."""
    return _U32_PAIR.pack(list_id << COUNT_BITS, index)


def unpack_index_key(key: bytes) -> tuple[int, int]:
    """The list and the index of such a key; raises MalformedError."""
    if len(key) != 8:
        raise MalformedError
    value, index = _U32_PAIR.unpack(key)
    if value & MAX_COUNT:
        raise MalformedError
    return value >> COUNT_BITS, index


def iter_index_keys(keys: bytes) -> Iterator[tuple[int, int]]:
    """List (shifted by COUNT_BITS, the bits below are to be zero) and index of many such keys, end to end."""
    return _U32_PAIR.iter_unpack(keys)


# --- frontends, backends, endpoints --------------------------------------------------------------------------


def frontend_key(frontend: Frontend) -> bytes:
    """The key of a frontend: address (none for a node port), protocol, port."""
    return frontend.address + _PROTOCOL_PORT.pack(frontend.protocol, frontend.port)


def unpack_frontend(key: bytes, address_bytes: int) -> Frontend:
    """The frontend of a key that begins with `address_bytes` bytes of address; raises MalformedError."""
    if len(key) != address_bytes + 8 or address_bytes < 0:
        raise MalformedError
    number, port = _PROTOCOL_PORT.unpack_from(key, address_bytes)
    if number not in PROTOCOLS:
        raise MalformedError
    return Frontend(key[:address_bytes], PROTOCOLS[number], port)


def backend_data(backend: Backend) -> bytes:
    """A backend as DNAT takes it from a map: address, port."""
    return backend.address + _PORT.pack(backend.port)


def unpack_backend(data: bytes, family: Family) -> Backend:
    """The backend of such a value; raises MalformedError."""
    if len(data) != family.address_bytes + 4:
        raise MalformedError
    return Backend(data[:-4], _PORT.unpack(data[-4:])[0])


def iter_backends(data: bytes, family: Family) -> Iterator[Backend]:
    """The backends of many such values, end to end."""
    return map(Backend._make, _BACKENDS[family].iter_unpack(data))


def hairpin_key(endpoint: Endpoint) -> bytes:
    """The key by which an endpoint is recognised that has reached itself: source, destination, protocol, port."""
    return endpoint.address * 2 + _PROTOCOL_PORT.pack(endpoint.protocol, endpoint.port)


def unpack_hairpin(key: bytes, family: Family) -> Endpoint:
    """The endpoint of such a key; raises MalformedError, also when source and destination differ."""
    size = family.address_bytes
    frontend = unpack_frontend(key[size:], size)
    if key[:size] != frontend.address:
        raise MalformedError
    return Endpoint(*frontend)


def range_element(frontend: Frontend, prefix: Prefix) -> Placed:
    """The element that admits the sources of a prefix to a frontend."""
    return Placed(names.source_ranges(prefix.length), Element(frontend_key(frontend) + prefix.address))


def unpack_range(key: bytes, length: int, family: Family) -> tuple[Frontend, Prefix]:
    """The frontend and the prefix of such an element; raises MalformedError."""
    size = family.address_bytes
    address = key[-size:]
    shift = size * 8 - length
    if shift < 0:
        raise MalformedError
    if int.from_bytes(address) >> shift << shift != int.from_bytes(address):
        raise MalformedError
    return unpack_frontend(key[:-size], size), Prefix(address, length)


def affinity_element(list_id: int, timeout: int) -> Placed:
    """The element that makes the clients of a list keep their backend for `timeout` seconds."""
    return Placed(names.affinity(timeout), Element(pack_reference(list_id, 0)))


def cluster_ip_element(address: Address) -> Placed:
    """The element that makes an address a ClusterIP, whose other ports are closed."""
    return Placed(names.CLUSTER_IPS, Element(address))


def hairpin_element(endpoint: Endpoint) -> Placed:
    """The element that has an endpoint's connections to itself masqueraded."""
    return Placed(names.LOCAL_ENDPOINT_PAIRS, Element(hairpin_key(endpoint)))


def frontend_elements(
    frontend: Frontend, route: Route, reference: bytes | None, local_reference: bytes | None
) -> Iterator[Placed]:
    """All elements of one frontend.

    Args:
        frontend: where clients connect.
        route: what happens there.
        reference: the scratch value of the list `route.backends`; None when that is empty.
        local_reference: the same of `route.local_backends`.
    """
    key = frontend_key(frontend)
    node_port = frontend.is_node_port
    if route.kind is Kind.CLUSTER_IP:
        lists, policy, local_lists = names.CLUSTER_IP, "", ""
    elif node_port:
        lists, policy, local_lists = names.NODE_PORT, names.NODE_PORT_POLICY_LOCAL, names.NODE_PORT_LOCAL
    else:
        lists, policy, local_lists = names.EXTERNAL, names.EXTERNAL_POLICY_LOCAL, names.EXTERNAL_LOCAL
        yield Placed(KIND_SETS[route.kind], Element(key))
    if reference is not None:
        yield Placed(lists, Element(key, reference, route.label))
    if route.policy_local:
        yield Placed(policy, Element(key))
        if local_reference is not None:
            yield Placed(local_lists, Element(key, local_reference))
    if route.refusal is not None:
        yield Placed(REFUSAL_SETS[route.refusal, node_port], Element(key, b"", route.label))
    if route.source_ranges:
        yield Placed(names.SOURCE_RANGED, Element(key))
        for prefix in route.source_ranges:
            yield range_element(frontend, prefix)


class Batch:
    """Elements to delete and to add in one transaction, per set; deletions go first.

    An element of a map is replaced by deleting and adding it, as the kernel refuses a key that exists with other data.
    """

    def __init__(self) -> None:
        self.deleted: dict[str, dict[bytes, None]] = defaultdict(dict)
        self.added: dict[str, dict[bytes, Element]] = defaultdict(dict)

    def __len__(self) -> int:
        return sum(map(len, self.deleted.values())) + sum(map(len, self.added.values()))

    def add(self, placed: Placed) -> None:
        """Add an element that the kernel has not, or that is deleted in the same batch."""
        set_name, element = placed
        self.added[set_name][element.key] = element

    def add_list(self, set_name: str, elements: Iterable[Element]) -> None:
        """The same for many elements of one set."""
        added = self.added[set_name]
        for element in elements:
            added[element.key] = element

    def delete(self, set_name: str, key: bytes) -> None:
        """Delete an element that the kernel has."""
        self.deleted[set_name][key] = None

    def exchange(self, old: Iterable[Placed], new: Iterable[Placed]) -> None:
        """What makes the elements `old` into `new`; those that are equal are not touched."""
        before = {(placed.set, placed.element.key): placed for placed in old}
        for placed in new:
            known = before.pop((placed.set, placed.element.key), None)
            if known == placed:
                continue
            if known is not None:
                self.delete(placed.set, placed.element.key)
            self.add(placed)
        for set_name, key in before:
            self.delete(set_name, key)

    def merge(self, later: Batch) -> None:
        """Let another batch follow in the same transaction: an element that this one adds may be deleted by it."""
        for set_name, keys in later.deleted.items():
            for key in keys:
                if self.added.get(set_name, {}).pop(key, None) is None:
                    self.delete(set_name, key)
        for set_name, elements in later.added.items():
            deleted, added = self.deleted[set_name], self.added[set_name]
            for key, element in elements.items():
                if key in deleted and key not in added and set_name not in LABELLED and element == Element(key):
                    del deleted[key]  # its key is all that there is of it: it may stay
                else:
                    added[key] = element
