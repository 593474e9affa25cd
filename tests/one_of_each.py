"""A table with a route of each kind that another process may spoil, for the tests of every dataplane."""

from __future__ import annotations

from rules.forwarding import (
    Backend,
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
)


def backend(host: int) -> Backend:
    return Backend(bytes([10, 244, 1, host]), 8080)


WEB = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80)
BALANCER = Frontend(bytes([203, 0, 113, 1]), Protocol.TCP, 80)
NODE_PORT = Frontend(b"", Protocol.TCP, 30080)
DNS = Frontend(bytes([10, 96, 0, 10]), Protocol.UDP, 53)


def one_of_each(node: NodeFacts) -> ForwardingTable:
    """The table, on a node of which that holds."""
    return ForwardingTable(
        family=Family.IPV4,
        node=node,
        routes={
            WEB: Route(kind=Kind.CLUSTER_IP, backends=frozenset(map(backend, (1, 2, 3))), label="default/web:http"),
            NODE_PORT: Route(
                kind=Kind.NODE_PORT,
                backends=frozenset(map(backend, (1, 2, 3))),
                local_backends=frozenset(),
                refusal=Refusal.DROP,
                label="default/web:http",
            ),
            BALANCER: Route(
                kind=Kind.LOAD_BALANCER,
                backends=frozenset(map(backend, (1, 2, 3))),
                local_backends=frozenset([backend(1)]),
                affinity=600,
                source_ranges=(Prefix(bytes([192, 168, 0, 0]), 24), Prefix(bytes([203, 0, 113, 1]), 32)),
                label="default/web:http",
            ),
            DNS: Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="kube-system/dns:dns"),
        },
        hairpins=frozenset({Endpoint(bytes([10, 244, 1, 1]), Protocol.TCP, 8080)}),
    )
