"""A wanted table as another proxy would hold it, so that only real differences are left.  Pure.

Whatever is set aside here is set aside for a reason, which `ALLOWANCES` gives with its clause.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rules.dataplane import Capabilities
from rules.diff import fit
from rules.foreign.gathering import Reading
from rules.foreign.kube_proxy_ipvs_wanted import as_served
from rules.forwarding import ForwardingTable, Kind

MODES = ("nftables", "iptables", "ipvs")


class Allowance(NamedTuple):
    """Something that a table says and that a proxy's rules don't, or say otherwise."""

    name: str
    modes: tuple[str, ...]
    words: str
    clause: str


ALLOWANCES = (
    Allowance(
        "kind",
        ("nftables", "iptables"),
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
    Allowance(
        "service CIDRs", ("iptables", "ipvs"), "nothing is done about addresses that no Service has", "CID-2, TRF-13"
    ),
    Allowance(
        "annotations",
        MODES,
        "schedulers and the PROXY protocol are asked for by annotations, which kube-proxy does not read",
        "SVC-7",
    ),
    Allowance(
        "labels", ("ipvs",), "virtual servers and sets have no room for names: the objects' names are shown", "IPVS-11"
    ),
    Allowance(
        "policy Local",
        ("ipvs",),
        "there is one list of backends for everybody: under policy Local the local one, for local pods and the node "
        "too, whose source is kept; or that of the cluster where the local one is empty, so that nobody is dropped",
        "IPVS-15, IPVS-19, IPVS-20, IPVS-21",
    ),
    Allowance("refusals", ("ipvs",), "a virtual server without backends rejects, and none drops", "IPVS-9, IPVS-20"),
    Allowance(
        "hairpins", ("ipvs",), "all endpoints of the node are there, those too that no frontend uses", "IPVS-11, B-214"
    ),
    Allowance(
        "node-port addresses",
        ("ipvs",),
        "each address has virtual servers of its own: where all addresses are meant, those that the node has are "
        "there; without any node port nothing tells them",
        "IPVS-8, IPVS-9",
    ),
    Allowance(
        "masquerading",
        ("ipvs",),
        "where every ClusterIP connection is masqueraded, nothing tells the detector of local pods",
        "IPVS-14",
    ),
    Allowance(
        "source ranges",
        ("ipvs",),
        "where they admit the node, each load balancer's address admits itself as a source, and none of the Service's "
        "others",
        "IPVS-11, TRF-18",
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
    "ipvs": Capabilities(proxy_protocol=False, health_check_ports=True, unbound=False, drop_unallocated=False),
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
    if reading.mode == "ipvs":
        wanted = as_served(wanted, reading)
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


def named(reading: Reading, wanted: ForwardingTable) -> Reading:
    """What was read with the names that the objects have, where the rules have no room for any."""
    if reading.mode != "ipvs":
        return reading
    routes = {
        frontend: msgspec.structs.replace(route, label=wanted.routes[frontend].label)
        if frontend in wanted.routes
        else route
        for frontend, route in reading.table.routes.items()
    }
    return msgspec.structs.replace(reading, table=msgspec.structs.replace(reading.table, routes=routes))
