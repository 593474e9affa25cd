"""What the kernel's elements say: the forwarding table, and how its lists are laid out.

Elements are followed as a packet would follow them: from the frontend to the list, from the list to its backends.  What
is found so is the table.  Then the elements that this table must have, laid out as it was found, are compared with
those that are there.  A difference is damage: an element that leads nowhere, or one that nobody could have written.
The comparison yields, beside the words, the elements that repair it.

Not damage, but garbage that goes with the next change: indexes behind a list's count, and lists that nobody refers to
(see `rules.nftables.model`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from rules.forwarding import (
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Refusal,
    Route,
    merge_prefixes,
)
from rules.nftables import names
from rules.nftables.backend_list import BackendList, Use
from rules.nftables.describe import describe_key
from rules.nftables.elements import (
    ENDPOINT_MAPS,
    REFUSAL_SETS,
    Batch,
    Elements,
    MalformedError,
    Placed,
    unpack_frontend,
    unpack_hairpin,
    unpack_range,
)
from rules.nftables.lists import FoundLists
from rules.nftables.messages import Element
from rules.nftables.model import Model

_FRONTEND_SETS = (
    names.CLUSTER_IP,
    names.EXTERNAL,
    names.EXTERNAL_LOCAL,
    names.REJECT_FRONTENDS,
    names.DROP_FRONTENDS,
)
_NODE_PORT_SETS = (
    names.NODE_PORT,
    names.NODE_PORT_LOCAL,
    names.REJECT_NODE_PORTS,
    names.DROP_NODE_PORTS,
)
_REFUSALS = tuple(Refusal)
_LIST_SETS = frozenset({*ENDPOINT_MAPS.values(), names.MEMBERS, names.SLOTS})


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What a kernel holds of one family."""

    table: ForwardingTable
    model: Model
    """How it is laid out."""
    repair: Batch
    """What makes the elements those of the table, without its damage."""


def decode(family: Family, elements: Elements, facts: NodeFacts, damage: Iterable[str] = ()) -> Reading:
    """The table, its layout and its repair.

    Args:
        family: of the table that was dumped.
        elements: all elements of the sets that hold routes, lists and hairpins; unknown sets are ignored.
        facts: the node's facts, decoded from the static rules.
        damage: what was found wrong with the static part.
    """
    return _Decoder(family, elements).decode(facts, damage)


class _Decoder:
    """One decoding; see the head of this module."""

    def __init__(self, family: Family, elements: Elements) -> None:
        self.family = family
        self.elements = elements
        self.model = Model(family)
        self.repair = Batch()
        self.damage: set[str] = set()
        self.lists = FoundLists(family, elements)
        self.ranges = self._source_ranges()

    def decode(self, facts: NodeFacts, damage: Iterable[str]) -> Reading:
        self.damage.update(damage)
        for set_name, key in self.lists.malformed:
            self._stray(set_name, key)
        routes: dict[Frontend, Route] = {}
        placed: list[tuple[Frontend, Route, BackendList | None, BackendList | None]] = []
        for size, sets in ((self.family.address_bytes, _FRONTEND_SETS), (0, _NODE_PORT_SETS)):
            for key in dict.fromkeys(key for name in sets for key in self.elements.get(name, {})):
                try:
                    frontend = unpack_frontend(key, size)
                    route, chosen, local = self._route(frontend, key)
                except MalformedError:
                    continue  # the comparison finds the element
                routes[frontend] = route
                placed.append((frontend, route, chosen, local))
        unsound = self.lists.settle(self.model, self.repair)
        for frontend, route, chosen, local in placed:
            self.model.adopt_route(frontend, route, chosen, local)
        self._name_unsound(unsound)
        self._read_hairpins()
        self._compare()
        table = ForwardingTable(
            family=self.family,
            node=facts,
            routes=routes,
            hairpins=frozenset(self.model.hairpins),
            damage=frozenset(self.damage),
        )
        return Reading(table=table, model=self.model, repair=self.repair)

    def _holds(self, name: str, key: bytes) -> Element | None:
        return self.elements.get(name, {}).get(key)

    def _route(self, frontend: Frontend, key: bytes) -> tuple[Route, BackendList | None, BackendList | None]:
        kind = self._kind(frontend, key)
        if kind is Kind.CLUSTER_IP:
            main, policy, other = self._holds(names.CLUSTER_IP, key), None, None
        elif kind is Kind.NODE_PORT:
            main = self._holds(names.NODE_PORT, key)
            policy = self._holds(names.NODE_PORT_POLICY_LOCAL, key)
            other = self._holds(names.NODE_PORT_LOCAL, key)
        else:
            main = self._holds(names.EXTERNAL, key)
            policy = self._holds(names.EXTERNAL_POLICY_LOCAL, key)
            other = self._holds(names.EXTERNAL_LOCAL, key)
        refusal, refusal_element = None, None
        for verdict in _REFUSALS:
            refusal_element = self._holds(REFUSAL_SETS[verdict, frontend.is_node_port], key)
            if refusal_element is not None:
                refusal = verdict
                break
        if main is None and refusal is None and (policy is None or other is None):
            raise MalformedError  # no packet is moved by what is left of it
        label = next((each.comment for each in (main, refusal_element) if each is not None), "")
        chosen = self.lists.follow(main.data, frontend.protocol, label) if main else None
        local = self.lists.follow(other.data, frontend.protocol, label) if policy and other else None
        backends = chosen.content.backends if chosen else frozenset()
        local_backends = None
        if policy and (main or other):
            local_backends = local.content.backends if local else frozenset()
        everybody_served = bool(backends) and local_backends != frozenset()
        affinities = {each.content.affinity for each in (chosen, local) if each}
        if len(affinities) > 1:
            self.damage.add(f"{frontend}: its two lists of backends have different session affinity")
            for each in (chosen, local):
                each.sound = False  # type: ignore[union-attr]  # there are two of them
        route = Route(
            kind=kind,
            backends=backends,
            local_backends=local_backends,
            refusal=None if everybody_served else refusal,
            affinity=max(affinities, default=0),
            source_ranges=merge_prefixes(self.ranges.get(key, ())) if kind is Kind.LOAD_BALANCER else (),
            label=label,
        )
        return route, chosen, local

    def _kind(self, frontend: Frontend, key: bytes) -> Kind:
        if frontend.is_node_port:
            return Kind.NODE_PORT
        if self._holds(names.CLUSTER_IP, key):
            return Kind.CLUSTER_IP
        if self._holds(names.EXTERNAL_IPS, key):
            return Kind.EXTERNAL_IP
        if self._holds(names.LOAD_BALANCER_IPS, key) or self._holds(names.EXTERNAL, key):
            return Kind.LOAD_BALANCER
        return Kind.CLUSTER_IP

    def _source_ranges(self) -> dict[bytes, list[Prefix]]:
        ranges: dict[bytes, list[Prefix]] = defaultdict(list)
        ranged = self.elements.get(names.SOURCE_RANGED, {})
        for name, members in self.elements.items():
            length = names.source_ranges_length(name)
            if length is None:
                continue
            for key in members:
                try:
                    _, prefix = unpack_range(key, length, self.family)
                except MalformedError:
                    continue  # the comparison finds the element
                frontend_part = key[: -self.family.address_bytes]
                if frontend_part in ranged:
                    ranges[frontend_part].append(prefix)
        return ranges

    def _name_unsound(self, unsound: Iterable[BackendList]) -> None:
        for each in unsound:
            for use in each.uses or {Use(Frontend(b"", each.content.protocol, 0), local=False)}:
                whose = "local backends" if use.local else "backends"
                self.damage.add(f"{use.frontend}: the kernel's list {each.number} of its {whose} is not whole")

    def _read_hairpins(self) -> None:
        for key in self.elements.get(names.LOCAL_ENDPOINT_PAIRS, {}):
            try:
                self.model.hairpins.add(unpack_hairpin(key, self.family))
            except MalformedError:
                continue  # the comparison finds the element

    def _compare(self) -> None:
        """Find the elements that are there and must not be, and the other way round."""
        expected: dict[str, dict[bytes, Element]] = defaultdict(dict)
        for name, element in self.model.elements():
            expected[name][element.key] = element
        for name, members in self.elements.items():
            if name in _LIST_SETS or names.affinity_timeout(name) is not None or name not in _known(name):
                continue
            wanted = expected.get(name, {})
            for key, element in members.items():
                known = wanted.get(key)
                if known is None:
                    self._stray(name, key)
                elif known.data == element.data and known.comment != element.comment:
                    # A label is no damage; but the model must be right about what is there.
                    self.repair.delete(name, key)
                    self.repair.add(Placed(name, known))
        for name, wanted in expected.items():
            held = self.elements.get(name, {})
            for key, element in wanted.items():
                if key not in held:
                    self.damage.add(f"set {name} lacks {describe_key(name, key, self.family)}")
                    self.repair.add(Placed(name, element))

    def _stray(self, set_name: str, key: bytes) -> None:
        self.damage.add(f"set {set_name} has {describe_key(set_name, key, self.family)}, which leads nowhere")
        self.repair.delete(set_name, key)


_STATIC_SETS = frozenset({names.SERVICE_CIDRS, names.NODE_PORT_ADDRESSES, names.STICKY, "pick"})


def _known(name: str) -> frozenset[str]:
    """The name itself, where its elements are routes' or hairpins'; nothing for sets of the static part."""
    return frozenset() if name in _STATIC_SETS else frozenset({name})
