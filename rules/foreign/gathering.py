"""From steps that rules take with a connection to routes.  Pure.

A decoder hands over, for every frontend, the steps in their order: each with a condition on the source, and either a
mark for masquerade or a list of backends, where the connection ends.  Three sources tell all routes apart: a local pod,
the node itself, and somebody elsewhere (TRF-4 to TRF-6).  What the three of them meet is compared with what a route of
its kind says; where no route says it, that is damage.  The names of lists don't matter for that: there are but a few
sequences of steps that differ otherwise, and each is judged once.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from rules.explanation import Origin
from rules.forwarding import (
    Address,
    Backend,
    Detector,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    check_route,
    merge_prefixes,
)
from rules.words import one_line


class ForeignError(Exception):
    """What was given cannot be read as rules at all; the message says why."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of another proxy."""

    mode: str
    """Its mode: `iptables`, `nftables` or `ipvs`."""
    table: ForwardingTable
    vague: frozenset[Frontend] = frozenset()
    """Frontends of which the rules don't tell whether they are an external IP or a load balancer's address."""
    untold: frozenset[str] = frozenset()
    """Fields of `NodeFacts` that these rules don't tell, as no Service of theirs depends on them."""
    own: frozenset[Address] | None = None
    """In mode ipvs, the node's own addresses of the family, where they are known."""
    notes: tuple[str, ...] = ()
    """What should be known beside the table, a sentence each."""


class Condition(NamedTuple):
    """On which sources a step depends."""

    detector: Detector | None = None
    """What tells the sources that count as local pods; None: the node itself is meant, and nobody else."""
    inside: bool = True
    """Whether these sources are meant, or all others."""

    def admits(self, origin: Origin) -> bool:
        if self.detector is None:
            return origin is Origin.NODE
        return self.inside == (origin is Origin.LOCAL_POD)


NODE = Condition()
Conditions = tuple[Condition, ...]
"""All of them must admit a source; none: everybody is admitted."""


class Step(NamedTuple):
    """One thing that happens to a connection."""

    conditions: Conditions = ()
    to: str | None = None
    """The list that it is sent to, where its way ends; None: it is marked for masquerade."""


class Picks(NamedTuple):
    """What a list picks from."""

    backends: frozenset[Backend]
    affinity: int
    protocols: frozenset[Protocol]


NOTHING = Picks(frozenset(), 0, frozenset())


class Item(msgspec.Struct):
    """What the rules say about one frontend."""

    kind: Kind
    label: str = ""
    steps: list[Step] = []
    refusal: Refusal | None = None
    ranges: tuple[Prefix, ...] = ()
    vague: bool = False


_Shape = tuple[tuple[Conditions, int | None], ...]
"""Steps in which the lists are numbers, in the order in which they come."""


class _Way(NamedTuple):
    """What one source meets."""

    to: int | None
    masqueraded: bool


class _Verdict(NamedTuple):
    """What steps come to."""

    everywhere: int | None
    """The list of everybody."""
    here: int | None
    """That of outsiders: the same one unless the policy is Local."""
    faults: tuple[str, ...]


class Gathering:
    """What has been found of one family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.items: dict[Frontend, Item] = {}
        self.lists: dict[str, Picks] = {}
        self.hairpins: set[Endpoint] = set()
        self.damage: set[str] = set()

    def item(self, frontend: Frontend, kind: Kind, label: str) -> Item:
        """What is known about a frontend, made if nothing was."""
        found = self.items.get(frontend)
        if found is None:
            found = self.items[frontend] = Item(kind, label, [])
        elif label and not found.label:
            found.label = label
        return found

    def reading(self, mode: str, node: NodeFacts, *, masquerade: tuple[bool, Detector | None] | None = None) -> Reading:
        """The table that all of it comes to.

        Args:
            mode: of the proxy.
            node: the node's facts, but for `masquerade_all` and `detector`.
            masquerade: these two; None: routes tell them.
        """
        untold: frozenset[str] = frozenset()
        if masquerade is None:
            masquerade, untold = self._masquerade()
        node = msgspec.structs.replace(node, masquerade_all=masquerade[0], detector=masquerade[1])
        self._check_detectors(node.detector)
        judge = functools.cache(functools.partial(_judge, node))
        routes = {}
        for frontend, item in self.items.items():
            route, faults = self._route(frontend, item, judge)
            if fault := check_route(self.family, frontend, route):
                self.damage.add(f"the rules for {frontend} make no sense: {fault}")
                continue
            routes[frontend] = route
            for fault in faults:
                self.damage.add(f"{frontend} ({item.label}): {fault}" if item.label else f"{frontend}: {fault}")
        table = ForwardingTable(
            family=self.family,
            node=node,
            routes=routes,
            hairpins=frozenset(self.hairpins),
            damage=frozenset(map(one_line, self.damage)),  # names may be any bytes
        )
        vague = frozenset(frontend for frontend, item in self.items.items() if item.vague and frontend in routes)
        return Reading(mode=mode, table=table, vague=vague, untold=untold)

    # --- the node ------------------------------------------------------------------------------------------------

    def _conditions(self) -> Iterable[Condition]:
        return (each for item in self.items.values() for step in item.steps for each in step.conditions)

    def _masquerade(self) -> tuple[tuple[bool, Detector | None], frozenset[str]]:
        """`masquerade_all` and `detector` as most rules have them, and which of them no rule tells."""
        found = Counter(each.detector for each in self._conditions() if each.detector is not None)
        detector = found.most_common(1)[0][0] if found else None
        served = [item for item in self.items.values() if item.kind is Kind.CLUSTER_IP and item.steps]
        every = sum(Step() in item.steps for item in served)
        masquerade_all = 2 * every > len(served)
        untold = set()
        if not served:
            untold.add("masquerade_all")
        if detector is None and every == len(served) and not any(map(_short_circuits, self.items.values())):
            untold.add("detector")
        return (masquerade_all, detector), frozenset(untold)

    def _check_detectors(self, detector: Detector | None) -> None:
        others = {each.detector for each in self._conditions()} - {None, detector}
        for frontend, item in self.items.items() if others else ():
            if any(each.detector in others for step in item.steps for each in step.conditions):
                self.damage.add(f"{frontend} takes other sources for local pods than most rules do")

    # --- one route -----------------------------------------------------------------------------------------------

    def _route(
        self, frontend: Frontend, item: Item, judge: Callable[[_Shape, bool], _Verdict]
    ) -> tuple[Route, list[str]]:
        lists = list(dict.fromkeys(step.to for step in item.steps if step.to is not None))
        shape = tuple((conditions, None if to is None else lists.index(to)) for conditions, to in item.steps)
        everywhere, here, found = judge(shape, item.kind is Kind.CLUSTER_IP)
        faults = list(found)
        picks = self._picks(None if everywhere is None else lists[everywhere], frontend, faults)
        local = picks
        if everywhere != here:
            local = self._picks(None if here is None else lists[here], frontend, faults)
            if local.backends and local.affinity != picks.affinity:
                faults.append("affinity is not the same for all clients")
        empty = not (picks.backends and local.backends)
        refusal = item.refusal
        if empty and refusal is None:
            faults.append("connections that find no backend are not refused")
            refusal = Refusal.DROP if picks.backends else Refusal.REJECT
        elif not empty and refusal is not None:
            faults.append("it has a rule that refuses connections, and backends for all of them")
            refusal = None
        return Route(
            kind=item.kind,
            backends=picks.backends,
            local_backends=local.backends if everywhere != here and picks.backends else None,
            refusal=refusal,
            affinity=picks.affinity if picks.backends else 0,
            source_ranges=merge_prefixes(item.ranges) if item.ranges else (),
            label=item.label,
        ), faults

    def _picks(self, name: str | None, frontend: Frontend, faults: list[str]) -> Picks:
        if name is None:
            return NOTHING
        picks = self.lists.get(name)
        if picks is None:
            faults.append(f"{name} is missing")
            return NOTHING
        if picks.protocols - {frontend.protocol}:
            faults.append(f"{name} leads to backends of another protocol")
        return picks


def parse_port(text: str) -> int:
    """A port number.

    Raises:
        ValueError: it is none.
    """
    port = int(text) if len(text) < 6 else 0
    if not 0 < port < 65536:
        raise ValueError(f"{text} is no port")
    return port


def _short_circuits(item: Item) -> bool:
    """Whether the rules of a frontend tell the node from others, and so would tell local pods (TRF-4)."""
    return any(NODE in step.conditions for step in item.steps)


def _judge(node: NodeFacts, shape: _Shape, internal: bool) -> _Verdict:
    ways = {origin: _way(shape, origin) for origin in Origin}
    everywhere, here, faults = _lists(ways, internal=internal, detector=node.detector)
    faults += _masquerade_faults(ways, node, internal=internal, local=everywhere != here)
    return _Verdict(everywhere, here, tuple(faults))


def _way(shape: _Shape, origin: Origin) -> _Way:
    masqueraded = False
    for conditions, to in shape:
        if all(each.admits(origin) for each in conditions):
            if to is not None:
                return _Way(to, masqueraded)
            masqueraded = True
    return _Way(None, masqueraded)


def _lists(
    ways: Mapping[Origin, _Way], *, internal: bool, detector: Detector | None
) -> tuple[int | None, int | None, list[str]]:
    """The list of everybody, that of outsiders, and what is wrong."""
    pod, node, here = (ways[each].to for each in (Origin.LOCAL_POD, Origin.NODE, Origin.ELSEWHERE))
    if detector is None:
        pod = here  # nobody counts as a local pod
    if pod == node == here:
        return here, here, []
    if internal:
        return node, node, ["not all clients are given the same backends"]
    everywhere = node if node != here else pod
    faults = []
    if node != everywhere:
        faults.append("connections of the node itself are not sent to all backends")
    if detector is not None and pod != everywhere:
        faults.append("connections of local pods are not sent to all backends")
    return everywhere, here, faults


def _masquerade_faults(ways: Mapping[Origin, _Way], node: NodeFacts, *, internal: bool, local: bool) -> Iterable[str]:
    told = node.detector is not None
    if internal:
        outsiders = node.masquerade_all or told
        wanted = {Origin.LOCAL_POD: node.masquerade_all, Origin.NODE: outsiders, Origin.ELSEWHERE: outsiders}
    else:
        wanted = {Origin.LOCAL_POD: not local, Origin.NODE: True, Origin.ELSEWHERE: not local}
    for origin, way in ways.items():
        if way.to is not None and way.masqueraded != wanted[origin] and (told or origin is not Origin.LOCAL_POD):
            yield f"connections from {origin.words} are {'' if way.masqueraded else 'not '}masqueraded"
