"""Where what is wanted and what the kernel holds differ, as far as one connection could notice.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from proxy.explain.evidence import Evidence
from rules.diff import FrontendDrift, Presence, compare
from rules.forwarding import Endpoint, Family, ForwardingTable, Frontend

MOST_DAMAGE = 5
"""How many sentences of damage are told: one is enough to go and look."""


def disagreements(frontends: Collection[Frontend], family: Family, evidence: Evidence) -> Iterator[str]:
    """Where they differ on these frontends, or on what holds for all; a sentence each.

    Where only the kernel is known, that is what no table says and its rules do.
    """
    if evidence.kernel is None:
        return
    held = evidence.kernel.get(family)
    wanted = evidence.cluster.wanted.get(family) if evidence.cluster is not None else None
    if wanted is None:
        yield from _damage(held)
        return
    if held is None:
        yield f"the kernel has no table of ours for {family.label} at all"
        return
    drift = compare(_only(wanted, frontends), _only(held, frontends))
    for each in drift.frontends:
        yield from _drift(each)
    for what, one, other in drift.node:
        yield f"{what}: wanted {one or 'none'}, the kernel has {other or 'none'}"
    yield from _hairpins(wanted, held, frontends)
    yield from _damage(held)


def _damage(held: ForwardingTable | None) -> list[str]:
    return sorted(held.damage)[:MOST_DAMAGE] if held is not None else []


def _drift(drift: FrontendDrift) -> Iterator[str]:
    if drift.presence is Presence.MISSING:
        yield f"{drift.frontend} is wanted, and the kernel does not have it"
    elif drift.presence is Presence.EXTRA:
        yield f"{drift.frontend} is in the kernel, and is not wanted"
    else:
        for what, one, other in drift.changes:
            yield f"{drift.frontend}: {what}: wanted {one or 'none'}, the kernel has {other or 'none'}"


def _hairpins(wanted: ForwardingTable, held: ForwardingTable, frontends: Collection[Frontend]) -> Iterator[str]:
    """Of the endpoints of these frontends alone: what others make of the same address is not known here."""
    endpoints: set[Endpoint] = set()
    for table in (wanted, held):
        for frontend in frontends:
            if (route := table.routes.get(frontend)) is not None:
                backends = route.backends | (route.local_backends or frozenset())
                endpoints.update(Endpoint(each.address, frontend.protocol, each.port) for each in backends)
    for endpoint in sorted(wanted.hairpins ^ held.hairpins):
        if endpoint in endpoints:
            lacks = endpoint in wanted.hairpins
            yield f"hairpin {endpoint}: {'wanted, and not in the kernel' if lacks else 'in the kernel, and not wanted'}"


def _only(table: ForwardingTable, frontends: Collection[Frontend]) -> ForwardingTable:
    routes = {frontend: table.routes[frontend] for frontend in frontends if frontend in table.routes}
    return ForwardingTable(family=table.family, node=table.node, routes=routes)
