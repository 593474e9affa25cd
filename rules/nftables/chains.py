"""The names of the layout's chains, each with what it is for, and which of them change with what."""

from __future__ import annotations

import struct
from typing import NamedTuple

from rules.nftables.expressions import GOTO, Verdict
from rules.nftables.messages import Element

# --- chains that hang on hooks ---------------------------------------------------------------------------------

NAT_PREROUTING = "nat-prerouting"
"""New connections that come in: translate those to a Service."""
NAT_OUTPUT = "nat-output"
"""New connections of the node itself: likewise."""
NAT_POSTROUTING = "nat-postrouting"
"""Masquerade what is marked, and what reaches itself."""
DNAT_DONE_PREROUTING = "dnat-done-prerouting"
"""Behind the translation: remember the client's slot, give the scratch register back."""
DNAT_DONE_OUTPUT = "dnat-done-output"
PRE_DNAT_PREROUTING = "pre-dnat-prerouting"
"""Before the translation: source ranges."""
PRE_DNAT_OUTPUT = "pre-dnat-output"
FILTER_INPUT = "filter-input"
"""Refuse what found no backend, and guard loopback."""
FILTER_FORWARD = "filter-forward"
FILTER_OUTPUT = "filter-output"

# --- chains that are led to --------------------------------------------------------------------------------------

SERVICES = "services"
"""Which kind of frontend, and which list."""
INTERNAL = "internal"
"""ClusterIP: masquerade, or not."""
EXTERNAL_POLICY_LOCAL = "external-policy-local"
"""External address under policy Local: by source."""
EXTERNAL_ALL = "external-all"
"""The list of policy Cluster, source kept: the short-circuit of local pods."""
EXTERNAL_ALL_MASQUERADED = "external-all-masqueraded"
"""The list of policy Cluster, masqueraded: the short-circuit of the node."""
EXTERNAL_HERE = "external-here"
"""The list of policy Local."""
NODE_PORT_GATE = "node-port-gate"
"""Whether the destination answers node ports."""
NODE_PORTS = "node-ports"
"""Node ports by policy."""
NODE_PORTS_POLICY_LOCAL = "node-ports-policy-local"
"""Node port under policy Local: by source."""
NODE_PORT_ALL = "node-port-all"
"""As external-all, for node ports."""
NODE_PORT_ALL_MASQUERADED = "node-port-all-masqueraded"
"""As external-all-masqueraded, for node ports."""
NODE_PORT_HERE = "node-port-here"
"""As external-here, for node ports."""
MARK_FOR_MASQUERADE = "mark-for-masquerade"
"""Mark for masquerading, then dispatch."""
MASQUERADE_MARKED = "masquerade-marked"
"""Masquerade what is marked, and take the mark off."""
DISPATCH = "dispatch"
"""To the chain of the list's count."""
STICKY_READ = "sticky-read"
"""The client's remembered slot, if it has one that still stands."""
TO_SLOT = "to-slot"
"""Translate to the backend of the slot in the scratch register."""
AFTER_DNAT = "after-dnat"
"""Remember, then give the scratch register back."""
REMEMBER = "remember"
"""The client's slot, for the seconds of its list."""
SOURCE_CHECK = "source-check"
"""Whether the frontend admits only some sources."""
SOURCE_RANGES = "source-ranges"
"""Go on from admitted sources, drop others."""
REFUSE_FRONTENDS = "refuse-frontends"
"""Frontends without a backend for this packet."""
NODE_PORT_REFUSAL_GATE = "node-port-refusal-gate"
"""As node-port-gate, for refusals."""
REFUSE_NODE_PORTS = "refuse-node-ports"
"""Node ports without a backend for this packet."""
REFUSE_CLUSTER_IPS = "refuse-cluster-ips"
"""Closed ports of ClusterIPs, and addresses of the service networks that no Service has."""
GUARD_LOOPBACK = "guard-loopback"
"""Where loopback answers node ports: nobody else may reach 127.0.0.0/8 by that (IPT-14)."""

_PICK_PREFIX = "pick-"


class Depends(NamedTuple):
    """Which chains change with what; a chain in none of them is the same on every node."""

    facts: frozenset[str]
    timeouts: frozenset[str]
    lengths: frozenset[str]


DEPENDS = Depends(
    facts=frozenset(
        {
            MARK_FOR_MASQUERADE,
            MASQUERADE_MARKED,
            INTERNAL,
            EXTERNAL_POLICY_LOCAL,
            NODE_PORT_GATE,
            NODE_PORTS_POLICY_LOCAL,
            NODE_PORT_REFUSAL_GATE,
            REFUSE_CLUSTER_IPS,
            GUARD_LOOPBACK,
        }
    ),
    timeouts=frozenset({REMEMBER}),
    lengths=frozenset({SOURCE_RANGES}),
)
"""Beside them each count has its chain `pick_chain(count)`."""


# --- a chain for each count ---------------------------------------------------------------------------------------

_LARGEST_COUNT = 0x1FFF


def pick_chain(count: int) -> str:
    """The chain that draws one of `count` backends."""
    return f"{_PICK_PREFIX}{count}"


def pick_count(chain: str) -> int | None:
    """The count of such a chain by its name; None for other names."""
    tail = chain.removeprefix(_PICK_PREFIX)
    if tail == chain or not tail.isascii() or not tail.isdigit() or not 0 < int(tail) <= _LARGEST_COUNT:
        return None
    return int(tail) if pick_chain(int(tail)) == chain else None


def pick_element(count: int) -> Element:
    """What leads from a count to its chain."""
    return Element(struct.pack("=I", count), verdict=Verdict(GOTO, pick_chain(count)))
