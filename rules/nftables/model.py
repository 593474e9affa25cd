"""What the dataplane keeps of one family's table: which list of backends has which number and which order.

A forwarding table says what packets meet; the layout has to give every list of backends a number, every backend of it
an index, and with session affinity a slot.  A `Model` holds these choices and turns a `Delta` into the elements that
change (`plan`).  It is made empty, or by `rules.nftables.decode` from what the kernel holds, and it does no I/O.

Three promises are kept here (LAYOUT.md):

* A change costs what it changes: frontends of one service port share a list, and a list is rewritten in place, so
  that one endpoint replaced is one element deleted and one added.
* What a packet has already looked up stays valid until the next sync: a list that shrinks keeps its surplus indexes,
  pointing at backends that live, and a list that nobody refers to any more keeps its elements; both are garbage, which
  goes with a later plan (`GRACE` seconds later at the earliest).
* A slot belongs to one backend for as long as the backend is in the list, and isn't given to another one soon, so that
  a client that comes back either finds its backend or is balanced afresh.

A plan changes the model at once.  If its transaction then fails, the model is void: read the kernel again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.forwarding import Address, Delta, Endpoint, Family, Frontend, Kind, Route
from rules.nftables import names
from rules.nftables.backend_list import BackendList, Content, Use, reorder
from rules.nftables.elements import (
    MAX_LIST,
    Batch,
    Placed,
    affinity_element,
    backend_data,
    cluster_ip_element,
    frontend_elements,
    hairpin_element,
    index_key,
)
from rules.nftables.messages import Element

GRACE = 0.01
"""Seconds that garbage stays, at least: a packet that read the old answer has finished its lookups by then."""


class Placement(NamedTuple):
    """What the kernel holds for one frontend."""

    frontend: Frontend
    route: Route
    list: BackendList | None
    local_list: BackendList | None
    reference: bytes | None
    """The scratch value that the kernel holds for the list; the list itself may be on its way to another count."""
    local_reference: bytes | None

    def elements(self) -> Iterator[Placed]:
        """The frontend's elements."""
        return frontend_elements(self.frontend, self.route, self.reference, self.local_reference)


class Model:
    """The lists, indexes and slots of one family's table.  See the head of this module."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.placements: dict[Frontend, Placement] = {}
        self.hairpins: set[Endpoint] = set()
        self._lists: dict[int, BackendList] = {}
        self._by_content: dict[Content, BackendList] = {}
        self._cluster_ips: dict[Address, int] = {}
        self._surplus: dict[int, float] = {}
        self._retired: dict[int, float] = {}
        self._leftovers: list[tuple[str, bytes]] = []
        self._last_number = 0

    # --- adopting what a kernel holds ------------------------------------------------------------------------

    def adopt_list(self, found: BackendList) -> None:
        """Take over a list that the kernel holds."""
        self._lists[found.number] = found
        self._last_number = max(self._last_number, found.number)
        if found.sound:
            self._by_content.setdefault(found.content, found)
        if len(found.order) > len(found.content.backends):
            self._surplus[found.number] = 0.0

    def adopt_route(
        self, frontend: Frontend, route: Route, chosen: BackendList | None, local: BackendList | None
    ) -> None:
        """Take over a frontend that the kernel holds, whose lists have been adopted."""
        self._place(frontend, route, chosen, local)

    def adopt_leftovers(self, leftovers: Iterable[tuple[str, bytes]]) -> None:
        """Let elements (set, key) that no list in use has go with the next plan."""
        self._leftovers.extend(leftovers)

    def unsound(self) -> frozenset[Frontend]:
        """Frontends with a list that the kernel does not hold properly."""
        return frozenset(
            frontend
            for frontend, placement in self.placements.items()
            if any(each is not None and not each.sound for each in (placement.list, placement.local_list))
        )

    def owners(self, keys: Iterable[tuple[str, bytes]]) -> dict[tuple[str, bytes], set[Frontend]]:
        """The frontends that need an element, for each of these (set, key); it walks all of them."""
        found: dict[tuple[str, bytes], set[Frontend]] = {key: set() for key in keys}

        def note(placed: Placed, frontends: Iterable[Frontend]) -> None:
            owners = found.get(_key_of(placed))
            if owners is not None:
                owners.update(frontends)

        for each in self._lists.values():
            for placed in each.elements():
                note(placed, (use.frontend for use in each.uses))
        for frontend, placement in self.placements.items():
            for placed in placement.elements():
                note(placed, (frontend,))
            if placement.route.kind is Kind.CLUSTER_IP:
                note(cluster_ip_element(frontend.address), (frontend,))
            for address, port in placement.route.backends:
                note(hairpin_element(Endpoint(address, frontend.protocol, port)), (frontend,))
        return found

    def elements(self) -> Iterator[Placed]:
        """The elements that the kernel must hold for the routes and the hairpins, but for those of lists."""
        for placement in self.placements.values():
            yield from placement.elements()
        for address in self._cluster_ips:
            yield cluster_ip_element(address)
        for endpoint in self.hairpins:
            yield hairpin_element(endpoint)

    def owned(self) -> Iterator[tuple[Placed, tuple[Frontend, ...]]]:
        """The elements of routes and lists, each with the frontends that it serves."""
        for placement in self.placements.values():
            for placed in placement.elements():
                yield placed, (placement.frontend,)
        for each in self._lists.values():
            frontends = tuple(sorted({use.frontend for use in each.uses}))
            for placed in each.elements():
                yield placed, frontends

    def hairpin_elements(self) -> Iterator[tuple[Placed, Endpoint]]:
        """The elements of hairpins, each with its endpoint."""
        for endpoint in self.hairpins:
            yield hairpin_element(endpoint), endpoint

    # --- planning a change -----------------------------------------------------------------------------------

    def plan(self, delta: Delta, now: float) -> Batch:
        """The elements that change with `delta`.

        Args:
            delta: new, changed and gone routes, and hairpins; its node facts are no elements of the model's.
            now: monotonic seconds, by which garbage grows old.
        """
        batch = Batch()
        self._collect_garbage(batch, now)
        touched = (*delta.removed, *delta.changed)
        addresses = {each.address: self._cluster_ips.get(each.address, 0) for each in touched}
        before = {frontend: self._displace(frontend) for frontend in touched}
        lists = self._find_lists(delta.changed, before, batch, now)
        for frontend, route in delta.changed.items():
            self._place(frontend, route, lists.get(Use(frontend, local=False)), lists.get(Use(frontend, local=True)))
        for frontend, old in before.items():
            new = self.placements.get(frontend)
            if old is None:
                for placed in new.elements() if new else ():
                    batch.add(placed)
                continue
            batch.exchange(old.elements(), new.elements() if new else ())
            for each in (old.list, old.local_list):
                if each is not None and not each.uses:
                    self._retire(each, now)
        for address, count in addresses.items():
            self._exchange_cluster_ip(address, count, batch)
        for endpoint in delta.hairpins_removed & self.hairpins:
            self.hairpins.discard(endpoint)
            batch.delete(names.LOCAL_ENDPOINT_PAIRS, hairpin_element(endpoint).element.key)
        for endpoint in delta.hairpins_added - self.hairpins:
            self.hairpins.add(endpoint)
            batch.add(hairpin_element(endpoint))
        return batch

    def _displace(self, frontend: Frontend) -> Placement | None:
        placement = self.placements.pop(frontend, None)
        if placement is None:
            return None
        if placement.list is not None:
            placement.list.uses.discard(Use(frontend, local=False))
        if placement.local_list is not None:
            placement.local_list.uses.discard(Use(frontend, local=True))
        if placement.route.kind is Kind.CLUSTER_IP:
            self._cluster_ips[frontend.address] -= 1
        return placement

    def _place(self, frontend: Frontend, route: Route, chosen: BackendList | None, local: BackendList | None) -> None:
        self.placements[frontend] = Placement(
            frontend,
            route,
            chosen,
            local,
            chosen.reference if chosen else None,
            local.reference if local else None,
        )
        if chosen is not None:
            chosen.uses.add(Use(frontend, local=False))
        if local is not None:
            local.uses.add(Use(frontend, local=True))
        if route.kind is Kind.CLUSTER_IP:
            self._cluster_ips[frontend.address] = self._cluster_ips.get(frontend.address, 0) + 1

    def _exchange_cluster_ip(self, address: Address, count: int, batch: Batch) -> None:
        now_count = self._cluster_ips.get(address, 0)
        placed = cluster_ip_element(address)
        if now_count and not count:
            batch.add(placed)
        elif count and not now_count:
            batch.delete(placed.set, placed.element.key)
        if not now_count:
            self._cluster_ips.pop(address, None)

    # --- lists -----------------------------------------------------------------------------------------------

    def _find_lists(
        self,
        routes: Mapping[Frontend, Route],
        before: Mapping[Frontend, Placement | None],
        batch: Batch,
        now: float,
    ) -> dict[Use, BackendList]:
        """A list for every use that the routes make of one.

        A list of the very content is shared.  Else one that a use of this content had, and nobody has now, is
        rewritten in place.  Else a new one is made.
        """
        wanted: dict[Content, list[Use]] = {}
        for frontend, route in routes.items():
            for local, backends in ((False, route.backends), (True, route.local_backends)):
                if backends:
                    content = Content(route.label, frontend.protocol, route.affinity, backends)
                    wanted.setdefault(content, []).append(Use(frontend, local))
        found: dict[Use, BackendList] = {}
        claimed: set[int] = set()
        rest: list[tuple[Content, list[Use]]] = []
        for content, uses in wanted.items():
            known = self._by_content.get(content)
            if known is None:
                rest.append((content, uses))
            else:
                claimed.add(known.number)
                found.update(dict.fromkeys(uses, known))
        for content, uses in rest:
            for use in uses:
                old = before[use.frontend]
                each = (old.local_list if use.local else old.list) if old else None
                if each and not each.uses and each.number not in claimed and each.can_become(content):
                    self._rewrite(each, content, batch, now)
                    break
            else:
                each = self._new_list(content, batch)
            claimed.add(each.number)
            found.update(dict.fromkeys(uses, each))
        return found

    def _new_list(self, content: Content, batch: Batch) -> BackendList:
        order = list(content.backends)
        slots = {backend: slot for slot, backend in enumerate(order)} if content.affinity else None
        each = BackendList(self._free_number(), content, order, slots)
        self._lists[each.number] = each
        self._by_content[content] = each
        if slots is None:
            # The bulk of a first sync: as `each.elements()`, without naming the map once for each.
            number = each.number
            elements = [Element(index_key(number, index), backend_data(own)) for index, own in enumerate(order)]
            batch.add_list(each.index_set, elements)
        else:
            for placed in each.elements():
                batch.add(placed)
        return each

    def _free_number(self) -> int:
        number = self._last_number
        while True:
            number = number % MAX_LIST + 1
            if number not in self._lists:
                self._last_number = number
                return number
            if number == self._last_number:
                raise OverflowError(f"more than {MAX_LIST} lists of backends")

    def _rewrite(self, each: BackendList, content: Content, batch: Batch, now: float) -> None:
        """Give a list another content in place, with the fewest elements."""
        old = each.content
        if self._by_content.get(old) is each:
            del self._by_content[old]
        self._by_content[content] = each
        each.content = content
        was = [each.index_element(index, backend) for index, backend in enumerate(each.order)]
        if each.slots is not None:
            self._rewrite_slots(each, old, content, batch)
        order, live = reorder(each.order, len(old.backends), content.backends)
        each.order = order
        batch.exchange(was, (each.index_element(index, backend) for index, backend in enumerate(order)))
        if len(order) > live:
            self._surplus[each.number] = now
        else:
            self._surplus.pop(each.number, None)

    def _rewrite_slots(self, each: BackendList, old: Content, content: Content, batch: Batch) -> None:
        assert each.slots is not None
        for backend in [backend for backend in each.slots if backend not in content.backends]:
            batch.delete(names.SLOTS, each.slot_element(backend).element.key)
            del each.slots[backend]
        for backend in content.backends - each.slots.keys():
            each.slots[backend] = each.free_slot()
            batch.add(each.slot_element(backend))
        if old.affinity != content.affinity:
            batch.exchange(
                [affinity_element(each.number, old.affinity)], [affinity_element(each.number, content.affinity)]
            )

    def _retire(self, each: BackendList, now: float) -> None:
        if self._by_content.get(each.content) is each:
            del self._by_content[each.content]
        self._retired[each.number] = now

    def _collect_garbage(self, batch: Batch, now: float) -> None:
        for set_name, key in self._leftovers:
            batch.delete(set_name, key)
        self._leftovers.clear()
        for number in [number for number, since in self._retired.items() if now - since >= GRACE]:
            del self._retired[number]
            self._surplus.pop(number, None)
            for placed in self._lists.pop(number).elements():
                batch.delete(placed.set, placed.element.key)
        for number in [number for number, since in self._surplus.items() if now - since >= GRACE]:
            del self._surplus[number]
            each = self._lists[number]
            count = len(each.content.backends)
            for index in range(count, len(each.order)):
                batch.delete(*_key_of(each.index_element(index, each.order[index])))
            del each.order[count:]


def _key_of(placed: Placed) -> tuple[str, bytes]:
    return placed.set, placed.element.key
