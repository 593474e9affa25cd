"""The lists of backends that a kernel's elements hold, found by the references that lead to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from rules.forwarding import Backend, Family, Protocol
from rules.nftables import names
from rules.nftables.backend_list import BackendList, Content
from rules.nftables.elements import (
    COUNT_BITS,
    ENDPOINT_MAPS,
    MAX_COUNT,
    Batch,
    Elements,
    MalformedError,
    iter_backends,
    iter_index_keys,
    unpack_backend,
    unpack_index_key,
    unpack_reference,
)
from rules.nftables.messages import Element
from rules.nftables.model import Model

T = TypeVar("T")


class FoundLists:
    """All elements that belong to lists, sorted by the lists' numbers."""

    def __init__(self, family: Family, elements: Elements) -> None:
        self.malformed: list[tuple[str, bytes]] = []
        """Elements (set, key) that belong to no list, as they are not of the form that their set gives them."""
        self._keys: dict[int, list[tuple[str, bytes]]] = defaultdict(list)
        self._followed: dict[tuple[int, int, Protocol], BackendList] = {}

        def slot(element: Element) -> tuple[int, int, Backend]:
            return (*unpack_reference(element.key), unpack_backend(element.data, family))

        self._direct = {
            protocol: self._sort_endpoints(name, elements.get(name, {}), family)
            for protocol, name in ENDPOINT_MAPS.items()
        }
        self._members = self._sort(names.MEMBERS, elements, _member)
        self._slots = self._sort(names.SLOTS, elements, slot)
        self._timeouts: dict[int, list[int]] = defaultdict(list)
        for name in elements:
            timeout = names.affinity_timeout(name)
            if timeout is not None and names.affinity(timeout) == name:
                for number in self._sort(name, elements, _sticky):
                    self._timeouts[number].append(timeout)

    def _sort_endpoints(
        self, name: str, held: Mapping[bytes, Element], family: Family
    ) -> dict[int, dict[int, Backend]]:
        """As `_sort`, for the maps that hold most of all elements: all keys and all values are unpacked in one go."""
        keys, values = list(held), [element.data for element in held.values()]
        if not set(map(len, keys)) <= {8} or not set(map(len, values)) <= {family.address_bytes + 4}:

            def direct(element: Element) -> tuple[int, int, Backend]:
                return (*unpack_index_key(element.key), unpack_backend(element.data, family))

            return self._sort(name, {name: held}, direct)
        found: dict[int, dict[int, Backend]] = defaultdict(dict)
        for key, (shifted, index), backend in zip(
            keys, iter_index_keys(b"".join(keys)), iter_backends(b"".join(values), family), strict=True
        ):
            if shifted & MAX_COUNT:
                self.malformed.append((name, key))
                continue
            number = shifted >> COUNT_BITS
            found[number][index] = backend
            self._keys[number].append((name, key))
        return found

    def _sort(
        self, name: str, elements: Elements, unpack: Callable[[Element], tuple[int, int, T]]
    ) -> dict[int, dict[int, T]]:
        """The elements of one set as list number → index or slot → value."""
        found: dict[int, dict[int, T]] = defaultdict(dict)
        for key, element in elements.get(name, {}).items():
            try:
                number, place, value = unpack(element)
            except MalformedError:
                self.malformed.append((name, key))
            else:
                found[number][place] = value
                self._keys[number].append((name, key))
        return found

    def follow(self, reference: bytes, protocol: Protocol, label: str) -> BackendList:
        """The list that a scratch value leads packets of a protocol to.

        Raises:
            MalformedError: it is no scratch value.
        """
        number, count = unpack_reference(reference)
        found = self._followed.get((number, count, protocol))
        if found is None:
            found = self._followed[number, count, protocol] = self._list(number, count, protocol, label)
        return found

    def _list(self, number: int, count: int, protocol: Protocol, label: str) -> BackendList:
        members, slots = self._members.get(number, {}), self._slots.get(number, {})
        timeouts = self._timeouts.get(number, [])
        direct = self._direct[protocol].get(number, {})
        at = {index: slots[slot] for index, slot in members.items() if slot in slots} | direct if members else direct
        live = [at[index] for index in range(count) if index in at]
        order = list(live)
        if len(at) > count:
            while len(order) in at:
                order.append(at[len(order)])
        sticky = {backend: slot for slot, backend in slots.items()} if members else None
        content = Content(label, protocol, timeouts[0] if members and timeouts else 0, frozenset(live))
        found = BackendList(number, content, order, sticky)
        found.sound = (
            0 < count == len(live) == len(content.backends)
            and set(order) == content.backends
            and not (direct and members)
            and len(timeouts) == (0 if sticky is None else 1)
            and (sticky is None or (len(sticky) == len(slots) and sticky.keys() == content.backends))
        )
        return found

    def settle(self, model: Model, repair: Batch) -> list[BackendList]:
        """Adopt the lists that were followed, and leave the others as garbage.

        Returns those that are not sound; the repair deletes all their elements.
        """
        by_number: dict[int, list[BackendList]] = defaultdict(list)
        for each in self._followed.values():
            by_number[each.number].append(each)
        unsound: list[BackendList] = []
        for number, found in by_number.items():
            keys = self._keys.pop(number, [])
            if len(found) == 1 and found[0].sound:
                # A sound list's own elements are all there: as many as it has means that there are no others.
                if len(keys) > found[0].size:
                    own = {(placed.set, placed.element.key) for placed in found[0].elements()}
                    model.adopt_leftovers(key for key in keys if key not in own)
            else:
                unsound += found
                _delete_all(keys, repair)
                for each in found:
                    each.sound, each.order, each.slots = False, [], None
            for each in found:
                model.adopt_list(each)
        for keys in self._keys.values():
            model.adopt_leftovers(keys)
        return unsound


def _member(element: Element) -> tuple[int, int, int]:
    number, index = unpack_index_key(element.key)
    owner, slot = unpack_reference(element.data)
    if owner != number:
        raise MalformedError
    return number, index, slot


def _sticky(element: Element) -> tuple[int, int, None]:
    number, low = unpack_reference(element.key)
    if low:
        raise MalformedError
    return number, low, None


def _delete_all(keys: Iterable[tuple[str, bytes]], repair: Batch) -> None:
    for set_name, key in keys:
        repair.delete(set_name, key)
