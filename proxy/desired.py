"""The tables that the node is to hold, kept up to date from the state of the cluster.

`refresh` takes what changed since the last time and computes those Services again, for every family, and only those.
What holds for the whole node (its zone and addresses, the settings) computes all of them, a slice at a time so that
health answers are not kept waiting, and still leads to a delta with nothing but differences.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

from proxy.assemble import Assembler, Conflict, precedence_of
from proxy.compute import Decision, HealthCheck, Outcome, View, compute, decide
from proxy.config.settings import Settings
from proxy.conntrack import Change, Serving, compose
from proxy.node import Interfaces, node_facts, view_of
from proxy.objects import Key, Metadata
from proxy.state import State, Trigger
from rules.forwarding import Delta, Family, ForwardingTable, Frontend, NodeFacts, Route

MOST_TRIGGERS = 10_000
"""Changes of endpoints whose times are kept until they are rules: while no sync succeeds, the oldest are forgotten."""

_SLICE = 100
"""Services that are computed in one go: some 5 ms."""


class NoLocal(msgspec.Struct, frozen=True, kw_only=True):
    """How many service ports have endpoints, and none that a policy Local admits here (SEL-12)."""

    internal: int = 0
    external: int = 0


class Desired:
    """The wanted table of each family; on the event loop's thread."""

    def __init__(self, settings: Settings, node_name: str, state: State, families: Iterable[Family]) -> None:
        self._settings = settings
        self._node_name = node_name
        self._state = state
        self._standalone = bool(settings.manifests)
        self._assemblers = {family: Assembler(family) for family in families}
        self._aside: dict[Family, dict[Key, Outcome]] = {family: {} for family in self._assemblers}
        """Outcomes of which more than routes matters: health checks, policies that admit nobody."""
        self._triggers: dict[Family, deque[Trigger]] = {
            family: deque(maxlen=MOST_TRIGGERS) for family in self._assemblers
        }
        self._changes: dict[Family, dict[Frontend, Change]] = {family: {} for family in self._assemblers}
        """Those in deltas that were taken."""
        self._conflicts: set[str] = set()
        self._troubled: set[Key] = set()
        """Services that the state was told something about."""
        self._interfaces: Interfaces = {}
        self._interfaces_changed = False
        self._view: View | None = None
        self._refreshing = asyncio.Lock()

    def set_settings(self, settings: Settings) -> None:
        """The configuration is another one; the mode, the detector's mode and the source of objects are the same."""
        self._settings = settings
        self._interfaces_changed = True

    def set_interfaces(self, interfaces: Interfaces) -> None:
        """The addresses of the node's interfaces are others."""
        self._interfaces = interfaces
        self._interfaces_changed = True

    async def refresh(self) -> None:
        """Compute what changed."""
        async with self._refreshing:
            changes = self._state.take_changes()
            services: Iterable[Key] = changes.services
            if self._view is None or changes.node or changes.service_cidrs or self._interfaces_changed:
                self._interfaces_changed = False
                if self._take_node():
                    # In the order in which they lie in memory: a quarter faster than in that of a set.
                    services = [*self._state.services, *changes.services.difference(self._state.services)]
            for count, key in enumerate(services, 1):
                self._compute(key)
                if count % _SLICE == 0:
                    await asyncio.sleep(0)
            for trigger in changes.triggers:
                if trigger.family in self._triggers:
                    self._triggers[trigger.family].append(trigger)
            self._report_conflicts()

    def take_delta(self, family: Family) -> Delta:
        """What makes the table of the last call into the one of now."""
        pending = self._changes[family]
        for frontend, each in self._assemblers[family].take_changes().items():
            pending[frontend] = compose(pending[frontend], each) if frontend in pending else each
        return self._assemblers[family].take_delta()

    def take_changes(self, family: Family) -> Mapping[Frontend, Change]:
        """What became of frontends whose stale flows are deleted, in the deltas that were taken since the last call.

        To be called once those have become rules.
        """
        taken, self._changes[family] = self._changes[family], {}
        return taken

    def serving(self, family: Family) -> Mapping[Frontend, Serving]:
        """The endpoints that serve each frontend whose stale flows are deleted; it changes with later refreshes."""
        return self._assemblers[family].serving

    def take_triggers(self, family: Family) -> list[Trigger]:
        """When the changes since the last call happened in the cluster."""
        taken = list(self._triggers[family])
        self._triggers[family].clear()
        return taken

    def table(self, family: Family) -> ForwardingTable:
        """The whole table of now."""
        return self._assemblers[family].table()

    def routes(self, family: Family) -> Mapping[Frontend, Route]:
        """Its routes alone, without a copy: they change with later refreshes."""
        return self._assemblers[family].routes

    def conflicts(self, family: Family) -> tuple[Conflict, ...]:
        """The frontends that several Services claim."""
        return self._assemblers[family].conflicts()

    def facts(self, family: Family) -> NodeFacts:
        """What holds for every route."""
        return self._assemblers[family].node

    def decisions(self, key: Key, family: Family) -> tuple[Decision, ...]:
        """What becomes of each endpoint of a Service, and why; nothing for one that is not known."""
        service = self._state.services.get(key)
        if service is None or self._view is None:
            return ()
        return decide(service, self._state.slices_of(key), self._view, family)

    def size(self, family: Family) -> int:
        """How many frontends the table has."""
        return self._assemblers[family].size

    def health_checks(self, family: Family) -> Mapping[Key, HealthCheck]:
        """What load balancers may ask about Services (HC-20)."""
        return {
            key: outcome.health_check
            for key, outcome in self._aside[family].items()
            if outcome.health_check is not None
        }

    def no_local(self, family: Family) -> NoLocal:
        """How many service ports have no endpoint here that their policy wants."""
        outcomes = self._aside[family].values()
        return NoLocal(
            internal=sum(outcome.no_local_internal for outcome in outcomes),
            external=sum(outcome.no_local_external for outcome in outcomes),
        )

    def _take_node(self) -> bool:
        """Tell the tables what the node is; whether every Service has to be computed again."""
        state, settings = self._state, self._settings
        facts = node_facts(
            settings, state.node, self._interfaces, state.service_cidrs.values(), standalone=self._standalone
        )
        for family, assembler in self._assemblers.items():
            assembler.set_node(facts[family])
        view = view_of(settings, self._node_name, state.node, self._interfaces, standalone=self._standalone)
        changed = view != self._view
        self._view = view
        return changed

    def _report_conflicts(self) -> None:
        found: dict[str, str] = {}
        for assembler in self._assemblers.values():
            for conflict in assembler.conflicts():
                for loser in conflict.losers:
                    found[f"Service {loser}"] = f"{conflict.frontend} belongs to the older Service {conflict.winner}"
        for subject in self._conflicts - found.keys():
            self._state.trouble("conflict", subject, None)
        for subject, reason in found.items():
            self._state.trouble("conflict", subject, reason)
        self._conflicts = set(found)

    def _compute(self, key: Key) -> None:
        assert self._view is not None
        service = self._state.services.get(key)
        slices = self._state.slices_of(key)
        precedence = precedence_of(service.metadata if service is not None else Metadata())
        problems: list[str] = []
        for family, assembler in self._assemblers.items():
            aside = self._aside[family]
            if service is None:
                aside.pop(key, None)
                assembler.update(key, precedence, None)
                continue
            try:
                outcome = compute(service, slices, self._view, family)
            except Exception as error:  # noqa: BLE001  # one object must not stop the others (DESIGN 4.4)
                problems.append(f"internal error, its {family.label} rules stay as they were: {error!r}")
                continue
            assembler.update(key, precedence, outcome)
            problems += (problem for problem in outcome.problems if problem not in problems)
            if outcome.health_check or outcome.no_local_internal or outcome.no_local_external:
                aside[key] = outcome
            else:
                aside.pop(key, None)
        if problems or key in self._troubled:
            self._state.trouble("compute", f"Service {key}", "; ".join(problems) or None)
            (self._troubled.add if problems else self._troubled.discard)(key)
