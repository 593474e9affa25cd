"""A wanted table as another proxy would hold it, so that only real differences are left.  Pure.

Whatever is set aside here is set aside for a reason, which `ALLOWANCES` gives with its clause.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rules.dataplane import Capabilities
from rules.diff import fit
from rules.foreign.gathering import Reading
from rules.forwarding import ForwardingTable, Kind

MODES = ("nftables", "iptables")


class Allowance(NamedTuple):
    """Something that a table says and that a proxy's rules don't, or say otherwise."""

    name: str
    modes: tuple[str, ...]
    words: str
    clause: str


ALLOWANCES = (
    Allowance(
        "kind",
        MODES,
        "an external IP and a load balancer's address have the same rules where no source ranges or comments tell them "
        "apart; iptables mode tells them apart but for those without endpoints",
        "NFT-5, IPT-8, IPT-16",
    ),
    Allowance(
        "untold facts",
        ("iptables",),
        "masquerading and the detector of local pods stand in the chains of Services with endpoints: where there are "
        "none, nothing tells them",
        "IPT-11, IPT-12",
    ),
    Allowance("service CIDRs", ("iptables",), "nothing is done about addresses that no Service has", "CID-2, TRF-13"),
    Allowance(
        "annotations",
        MODES,
        "schedulers and the PROXY protocol are asked for by annotations, which kube-proxy does not read",
        "SVC-7",
    ),
)

_CAPABILITIES = {
    "nftables": Capabilities(proxy_protocol=False),
    "iptables": Capabilities(
        proxy_protocol=False,
        loopback_node_ports=True,
        health_check_ports=True,
        reject_closed_ports=False,
        drop_unallocated=False,
    ),
}


def capabilities_of(mode: str) -> Capabilities:
    """What the rules of a mode can say of a table."""
    return _CAPABILITIES[mode]


def as_held_by(reading: Reading, wanted: ForwardingTable, *, configured: bool) -> ForwardingTable:
    """A wanted table in the words of a proxy's rules, ready to be compared with those that were read.

    Args:
        reading: what was read; of it matter its mode, and what its rules leave open.
        wanted: what the objects come to.
        configured: whether the proxy's own configuration is known.  Otherwise the node's facts are no part of the
            comparison: they are taken from the rules.
    """
    held = reading.table
    wanted = fit(wanted, capabilities_of(reading.mode))
    node = held.node
    if configured:
        node = msgspec.structs.replace(
            wanted.node, **{name: getattr(held.node, name) for name in sorted(reading.untold)}
        )
    else:
        node = msgspec.structs.replace(held.node, health_check_ports=wanted.node.health_check_ports)
    routes = dict(wanted.routes)
    for frontend in reading.vague & routes.keys():
        route = routes[frontend]
        if route.kind in {Kind.EXTERNAL_IP, Kind.LOAD_BALANCER}:
            routes[frontend] = msgspec.structs.replace(route, kind=held.routes[frontend].kind)
    return msgspec.structs.replace(wanted, node=node, routes=routes)
