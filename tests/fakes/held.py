"""A node that was made up: what its kernel holds of us, and what else there is."""

from __future__ import annotations

from proxy.explain.gather import Means
from proxy.explain.surroundings import Surroundings
from rules.forwarding import (
    Family,
    ForwardingTable,
    Kind,
    NodeFacts,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from tests.builders import at, backends

HELD = ForwardingTable(
    family=Family.IPV4,
    node=NodeFacts(detector=SourcePrefix(parse_prefix("10.244.0.0/16"))),
    routes={
        at("10.96.0.41:80"): Route(
            kind=Kind.CLUSTER_IP, backends=backends("10.244.1.11", "10.244.2.11"), label="default/web:http"
        ),
        at("*:30001"): Route(
            kind=Kind.NODE_PORT, backends=backends("10.244.1.11", "10.244.2.11"), label="default/web:http"
        ),
    },
)
NODE = Surroundings(
    addresses=frozenset(map(parse_address, ["192.168.0.2", "127.0.0.1"])),
    node_ips={Family.IPV4: parse_address("192.168.0.2")},
    forwarding={Family.IPV4: True},
    conntrack=(10, 1000),
)


class Held:
    """A dataplane that holds a table of IPv4."""

    def __init__(self, table: ForwardingTable | None) -> None:
        self._table = table

    def read(self) -> ForwardingTable | None:
        return self._table

    def close(self) -> None:
        """Nothing is open."""


def means(node: Surroundings = NODE, table: ForwardingTable | None = HELD) -> Means:
    """How such a node is read."""
    return Means(
        open_dataplane=lambda _, family: Held(table if family is Family.IPV4 else None),  # type: ignore[arg-type,return-value]
        look=lambda *_: node,
    )
