"""Two tables apart: what is wanted and what a kernel holds, in words and in data.

`compare` says where they differ, in the table's own terms: frontends that are missing or too many, and of those that
both have each aspect in which they differ; the node's facts, the hairpins, and the damage that a kernel has and no
table says.  `lines` prints it as a diff, with `-` for what is wanted and `+` for what is there instead; `to_data` gives
the same as values that JSON has.

What a dataplane cannot store is no difference: `fit` says what it would hold of a table, by its capabilities.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from rules.dataplane import Capabilities
from rules.forwarding import (
    Backend,
    Detector,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    Kind,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    format_address,
)

NONE = "none"
_REFUSALS = {Refusal.REJECT: "rejected", Refusal.DROP: "dropped", None: NONE}
_SHOWN = 3


class Presence(enum.Enum):
    """Who has a frontend."""

    MISSING = "missing"
    """It is wanted, and the kernel has it not."""
    EXTRA = "extra"
    """The kernel has it, and it is not wanted."""
    CHANGED = "changed"
    """Both have it, and it is not the same."""


class Change(NamedTuple):
    """One aspect in which two tables differ."""

    what: str
    """`backend`, `affinity`, `policy` and so on."""
    wanted: str | None
    """None: there should be no such thing."""
    held: str | None
    """None: there is no such thing."""


class FrontendDrift(NamedTuple):
    """One frontend on which two tables differ."""

    frontend: Frontend
    kind: Kind
    label: str
    """Whose it is: as wanted, or else as the kernel says."""
    presence: Presence
    changes: tuple[Change, ...]


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Where a kernel differs from a wanted table; empty, and so false, where it does not."""

    family: Family
    absent: bool = False
    """Whether the kernel has no table of ours at all."""
    frontends: tuple[FrontendDrift, ...] = ()
    """By Service, kind and frontend."""
    node: tuple[Change, ...] = ()
    hairpins: tuple[Change, ...] = ()
    damage: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many things differ: the table's being there, frontends, facts, hairpins and sentences of damage."""
        return self.absent + len(self.frontends) + len(self.node) + len(self.hairpins) + len(self.damage)


def fit(table: ForwardingTable, capabilities: Capabilities) -> ForwardingTable:
    """What a dataplane with these capabilities holds of a table."""
    most = capabilities.max_backends
    node = table.node
    node = msgspec.structs.replace(
        node,
        loopback_node_ports=node.loopback_node_ports and capabilities.loopback_node_ports,
        health_check_ports=node.health_check_ports if capabilities.health_check_ports else frozenset(),
        reject_closed_ports=(node.reject_closed_ports and capabilities.reject_closed_ports) or not capabilities.unbound,
        bound=not capabilities.unbound,
        service_cidrs=node.service_cidrs if capabilities.drop_unallocated else (),
    )
    if not capabilities.source_address:
        # Of a relayed connection nobody can tell whether it was to be masqueraded too.
        node = msgspec.structs.replace(
            node, mark=NodeFacts().mark, masquerade_all=False, reject_closed_ports=True, relayed=True
        )
    routes = table.routes
    if not capabilities.sctp:
        routes = {frontend: route for frontend, route in routes.items() if frontend.protocol is not Protocol.SCTP}
    if any(route.scheduler or route.proxy_protocol for route in routes.values()):
        routes = {
            frontend: msgspec.structs.replace(
                route,
                scheduler=_scheduler(route, capabilities),
                proxy_protocol=route.proxy_protocol and capabilities.proxy_protocol,
            )
            if route.scheduler or route.proxy_protocol
            else route
            for frontend, route in routes.items()
        }
    if not (capabilities.labels and capabilities.affinity and capabilities.source_ranges):
        routes = {
            frontend: msgspec.structs.replace(
                route,
                label=route.label if capabilities.labels else "",
                affinity=route.affinity if capabilities.affinity else 0,
                source_ranges=route.source_ranges if capabilities.source_ranges else (),
            )
            for frontend, route in routes.items()
        }
    if most:
        long = {
            frontend: msgspec.structs.replace(
                route,
                backends=_first(route.backends, most),
                local_backends=None if route.local_backends is None else _first(route.local_backends, most),
            )
            for frontend, route in routes.items()
            if len(route.backends) > most or len(route.local_backends or ()) > most
        }
        routes = {**routes, **long} if long else routes
    hairpins = table.hairpins if capabilities.hairpins else frozenset()
    return msgspec.structs.replace(table, node=node, routes=routes, hairpins=hairpins)


def compare(
    wanted: ForwardingTable,
    held: ForwardingTable | None,
    capabilities: Capabilities = Capabilities(loopback_node_ports=True),  # noqa: B008  # frozen
    *,
    but: Collection[Frontend] = (),
) -> Drift:
    """Where a kernel differs from what is wanted.

    Args:
        wanted: the table that it should hold.
        held: what was read from it; None: nothing of ours is there.
        capabilities: of the dataplane that was read; what it cannot store is not compared.
        but: frontends that are not compared, as they are just being changed.

    Raises:
        ValueError: the tables are of different families.
    """
    if held is None:
        empty = ForwardingTable(family=wanted.family, node=wanted.node)
        return msgspec.structs.replace(compare(wanted, empty, capabilities, but=but), absent=True, hairpins=())
    if held.family is not wanted.family:
        raise ValueError(f"a table of {wanted.family.label} has nothing to do with one of {held.family.label}")
    wanted, held = fit(wanted, capabilities), fit(held, capabilities)
    frontends: list[FrontendDrift] = []
    if wanted.routes != held.routes:
        for frontend, route in wanted.routes.items():
            there = held.routes.get(frontend)
            if there != route and frontend not in but:
                presence = Presence.MISSING if there is None else Presence.CHANGED
                frontends.append(_drift(frontend, presence, route, there))
        for frontend, route in held.routes.items():
            if frontend not in wanted.routes and frontend not in but:
                frontends.append(_drift(frontend, Presence.EXTRA, None, route))
    return Drift(
        family=wanted.family,
        frontends=tuple(sorted(frontends, key=_place)),
        node=tuple(_scalars(node_words(wanted.node), node_words(held.node))),
        hairpins=tuple(_members("hairpin", wanted.hairpins, held.hairpins)),
        damage=tuple(sorted(held.damage)),
    )


# --- words -----------------------------------------------------------------------------------------------------


def summary(drift: Drift) -> str:
    """A drift in a few words: `2 frontends missing, 1 changed, 1 sentence of damage`."""
    if drift.absent:
        return "the whole table is missing"
    counts = {
        **{f"frontend {presence.value}": 0 for presence in Presence},
        "fact of the node": len(drift.node),
        "hairpin": len(drift.hairpins),
        "sentence of damage": len(drift.damage),
    }
    for each in drift.frontends:
        counts[f"frontend {each.presence.value}"] += 1
    return ", ".join(_count(number, what) for what, number in counts.items() if number) or "nothing"


def lines(drift: Drift) -> Iterator[str]:
    """A drift as a diff: `-` stands before what is wanted, `+` before what the kernel holds instead."""
    if drift.absent:
        yield f"- the whole table, with {len(drift.frontends)} frontends"
        return
    for frontend, kind, label, presence, changes in drift.frontends:
        yield f"{label or '-'}  {kind.value} {frontend}"
        if presence is Presence.CHANGED:
            yield from _change_lines(changes)
        else:
            mark = "-" if presence is Presence.MISSING else "+"
            words = "; ".join(f"{what}: {wanted or held}" for what, wanted, held in _gathered(changes))
            yield f"  {mark} {'is missing' if mark == '-' else 'should not be there'}; {words}"
    for heading, changes in (("node", drift.node), ("hairpins", drift.hairpins)):
        if changes:
            yield heading
            yield from _change_lines(changes)
    if drift.damage:
        yield "damage"
        for sentence in drift.damage:
            yield f"  + {sentence}"


def to_data(drift: Drift) -> dict[str, Any]:
    """A drift as values that JSON has."""
    return {
        "family": drift.family.label,
        "equal": not drift,
        "absent": drift.absent,
        "frontends": [
            {
                "service": each.label,
                "kind": each.kind.value,
                "frontend": str(each.frontend),
                "drift": each.presence.value,
                "changes": [change._asdict() for change in each.changes],
            }
            for each in drift.frontends
        ],
        "node": [change._asdict() for change in drift.node],
        "hairpins": [change._asdict() for change in drift.hairpins],
        "damage": list(drift.damage),
    }


def route_words(route: Route) -> dict[str, str]:
    """The aspects of a route that have one value each, in words."""
    words = {
        "service": route.label or NONE,
        "kind": route.kind.value,
        "policy": "Local" if route.policy_local else "Cluster",
        "without backend": _REFUSALS[route.refusal],
        "affinity": f"{route.affinity}s" if route.affinity else NONE,
        "admits": "everybody" if not route.source_ranges else "source ranges",
        "scheduler": route.scheduler or NONE,
        "PROXY protocol": "sent" if route.proxy_protocol else NONE,
    }
    if route.kind is Kind.CLUSTER_IP:
        del words["policy"]
    return words


def node_words(node: NodeFacts) -> dict[str, str]:
    """The facts of a node in words."""
    if node.node_port_addresses is None:
        ports = "every address but loopback"
    else:
        ports = ", ".join(map(format_address, sorted(node.node_port_addresses))) or "no address"
    return {
        "mark": f"{node.mark:#x}",
        "masquerade": "every ClusterIP connection" if node.masquerade_all else "as needed",
        "local pods": detector_words(node.detector),
        "node ports on": ports,
        "node ports on 127.0.0.0/8": "answered" if node.loopback_node_ports else "not answered",
        "closed ports of a ClusterIP": "rejected" if node.reject_closed_ports else "left alone",
        "health-check ports let in": ", ".join(map(str, sorted(node.health_check_ports))) or NONE,
        "service CIDRs": ", ".join(map(str, node.service_cidrs)) or NONE,
        "connections": "relayed" if node.relayed else "taken at addresses of the node" if node.bound else "translated",
    }


def detector_words(detector: Detector | None) -> str:
    """How a node tells the traffic of its own pods from other traffic (TRF-10)."""
    if detector is None:
        return "not told apart"
    if isinstance(detector, SourcePrefix):
        return f"sources in {detector.prefix}"
    if isinstance(detector, InputInterface):
        return f"what comes in by {detector.name}"
    return f"what comes in by {detector.prefix}*"


def _change_lines(changes: Iterable[Change]) -> Iterator[str]:
    for what, wanted, held in changes:
        if wanted is not None:
            yield f"  - {what}: {wanted}"
        if held is not None:
            yield f"  + {what}: {held}"


def _gathered(changes: Iterable[Change]) -> Iterator[Change]:
    """The changes of a frontend that only one side has, with members of one kind in one line."""
    by_kind: dict[str, list[str]] = {}
    for what, wanted, held in changes:
        by_kind.setdefault(what, []).append(wanted or held or "")
    for what, values in by_kind.items():
        more = f" +{len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        yield Change(what, ", ".join(values[:_SHOWN]) + more, None)


def _count(number: int, what: str) -> str:
    head, _, tail = what.partition(" ")
    return f"{number} {head}{'' if number == 1 else 's'} {tail}".rstrip()


# --- what differs ------------------------------------------------------------------------------------------------


def _drift(frontend: Frontend, presence: Presence, wanted: Route | None, held: Route | None) -> FrontendDrift:
    one = wanted or held
    assert one is not None
    empty = frozenset[Backend]()
    changes = [
        *_scalars(_telling(wanted, held), _telling(held, wanted)),
        *_members("backend", wanted.backends if wanted else empty, held.backends if held else empty),
        *_members(
            "backend for outsiders",
            (wanted.local_backends if wanted else None) or empty,
            (held.local_backends if held else None) or empty,
        ),
        *_members("source range", wanted.source_ranges if wanted else (), held.source_ranges if held else ()),
    ]
    return FrontendDrift(frontend, one.kind, one.label, presence, tuple(changes))


def _telling(route: Route | None, other: Route | None) -> dict[str, str]:
    """The words of a route; of one that has no counterpart, those alone that its heading doesn't say already."""
    if route is None:
        return {}
    words = route_words(route)
    if other is not None:
        return words
    usual = {"without backend": NONE, "affinity": NONE, "admits": "everybody", "policy": "Cluster"}
    usual |= {"scheduler": NONE, "PROXY protocol": NONE}
    return {what: word for what, word in words.items() if what not in ("service", "kind") and usual.get(what) != word}


def _scalars(wanted: dict[str, str], held: dict[str, str]) -> Iterator[Change]:
    for what in dict.fromkeys((*wanted, *held)):
        if wanted.get(what) != held.get(what):
            yield Change(what, wanted.get(what), held.get(what))


def _members(what: str, wanted: Collection[Any], held: Collection[Any]) -> Iterator[Change]:
    for member in sorted(set(wanted) - set(held)):
        yield Change(what, str(member), None)
    for member in sorted(set(held) - set(wanted)):
        yield Change(what, None, str(member))


_KINDS = {kind: place for place, kind in enumerate(Kind)}


def _place(drift: FrontendDrift) -> tuple[str, int, Frontend]:
    return drift.label or "\U0010ffff", _KINDS[drift.kind], drift.frontend


def _scheduler(route: Route, capabilities: Capabilities) -> str:
    """The scheduler that a dataplane keeps of a route's."""
    asked = route.scheduler
    if asked not in capabilities.schedulers or asked == capabilities.usual_scheduler:
        return ""
    return asked if capabilities.sticky_schedulers or not route.affinity else ""


def _first(backends: frozenset[Backend], count: int) -> frozenset[Backend]:
    return frozenset(sorted(backends)[:count]) if len(backends) > count else backends
