"""What an explanation rests on: a table of each family, and where it is known the objects behind it.

Tables come from manifests, from the kernel or from the agent.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from proxy.compute import Decision, View, decide
from proxy.explain.surroundings import Surroundings
from proxy.objects import EndpointSlice, Key, Service
from rules.forwarding import (
    Address,
    Family,
    ForwardingTable,
    Frontend,
    Route,
)


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """The objects that matter to what is asked, and the node that they are seen from."""

    view: View
    services: Mapping[Key, Service] = {}
    slices: Mapping[Key, tuple[EndpointSlice, ...]] = {}
    winners: Mapping[str, str] = {}
    """Of frontends that several Services claim, as text, the Service that has it."""
    wanted: Mapping[Family, ForwardingTable] = {}
    """What these objects come to; complete for what is asked, and for nothing else."""
    claims: Mapping[Key, Mapping[tuple[Family, Frontend], Route]] = {}
    """The frontends that each Service asks for, whether it gets them or not."""
    local_pods: frozenset[Address] = frozenset()
    """Addresses of endpoints on the node, where the rules tell local pods by interface."""
    troubles: Mapping[str, str] = {}
    """Of Services that cannot be used or not wholly, as `namespace/name`, what is wrong with them."""
    names: tuple[str, ...] = ()
    """Of all Services, as `namespace/name`, where more are known than those that matter."""
    decided: Mapping[tuple[Key, Family], tuple[Decision, ...]] = {}
    """Decisions that somebody else has taken, with all that they depend on."""

    def of_label(self, label: str) -> Service | None:
        """The Service that a route's label names."""
        namespace, _, rest = label.partition("/")
        return self.services.get(Key(namespace, rest.partition(":")[0]))

    def decisions(self, service: Service, family: Family) -> tuple[Decision, ...]:
        """What became of each endpoint of a Service."""
        if (known := self.decided.get((service.key, family))) is not None:
            return known
        return decide(service, self.slices.get(service.key, ()), self.view, family)


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known."""

    source: str
    """`manifests`, `kernel` or `agent`: whose table is explained."""
    words: str
    """The same, for people."""
    tables: Mapping[Family, ForwardingTable]
    """A family that is missing has no rules of ours."""
    local_addresses: frozenset[Address] = frozenset()
    node_ips: Mapping[Family, Address] = {}
    """The node's own address of each family, where one is known."""
    cluster: Cluster | None = None
    kernel: Mapping[Family, ForwardingTable] | None = None
    """What the kernel holds, where it could be read and is of the node that is asked about."""
    surroundings: Surroundings | None = None
    """The rest of the node, when it is this one."""
    proxy: str = ""
    """Whose rules are explained; empty: ours."""
    problems: tuple[str, ...] = ()
    """What should be known beside the answer, one line each."""
    live: bool = False
    """Whether it is of this node and of now, so that its packets can be looked at."""

    @property
    def relayed(self) -> bool:
        """Whether processes of the node carry connections (`NodeFacts.relayed`)."""
        return any(table.node.relayed for table in self.tables.values())


def of_this_node(tables: Mapping[Family, ForwardingTable], surroundings: Surroundings) -> Evidence:
    """What the kernel of this node holds, and nothing but that."""
    return Evidence(
        source="kernel",
        words="the kernel of this node",
        tables=tables,
        local_addresses=surroundings.addresses,
        node_ips=surroundings.node_ips,
        kernel=tables,
        surroundings=surroundings,
        live=True,
    )
