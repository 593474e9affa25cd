"""The ipsets of kube-proxy's ipvs mode, by what they are for (IPVS-11).  Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

from rules.foreign.ipvs_state import KeptSet
from rules.forwarding import Family
from rules.netlink.ipset_messages import Element, SetType

_LONGEST = 31


class Set(enum.Enum):
    """A set, by the end of its name in IPv4."""

    LOOP_BACK = "LOOP-BACK"
    """Endpoints of this node, each with its own address as the source."""
    CLUSTER_IP = "CLUSTER-IP"
    EXTERNAL_IP = "EXTERNAL-IP"
    EXTERNAL_IP_LOCAL = "EXTERNAL-IP-LOCAL"
    LOAD_BALANCER = "LOAD-BALANCER"
    """All addresses of load balancers."""
    LOAD_BALANCER_LOCAL = "LOAD-BALANCER-LOCAL"
    """Those of them under policy Local."""
    RANGED = "LOAD-BALANCER-FW"
    """Those that have source ranges."""
    SOURCE_CIDR = "LOAD-BALANCER-SOURCE-CIDR"
    SOURCE_IP = "LOAD-BALANCER-SOURCE-IP"
    """Those whose source ranges admit the node, with their own address as the source."""
    NODE_PORT_TCP = "NODE-PORT-TCP"
    NODE_PORT_LOCAL_TCP = "NODE-PORT-LOCAL-TCP"
    NODE_PORT_UDP = "NODE-PORT-UDP"
    NODE_PORT_LOCAL_UDP = "NODE-PORT-LOCAL-UDP"
    NODE_PORT_SCTP = "NODE-PORT-SCTP-HASH"
    NODE_PORT_LOCAL_SCTP = "NODE-PORT-LOCAL-SCTP-HASH"
    HEALTH_CHECK = "HEALTH-CHECK-NODE-PORT"
    BOUND = "IPVS-IPS"
    """Addresses on kube-proxy's device."""


TYPES = dict.fromkeys(Set, SetType.IP_PORT) | {
    Set.LOOP_BACK: SetType.IP_PORT_IP,
    Set.SOURCE_CIDR: SetType.IP_PORT_NET,
    Set.SOURCE_IP: SetType.IP_PORT_IP,
    Set.NODE_PORT_TCP: SetType.PORT,
    Set.NODE_PORT_LOCAL_TCP: SetType.PORT,
    Set.NODE_PORT_UDP: SetType.PORT,
    Set.NODE_PORT_LOCAL_UDP: SetType.PORT,
    Set.HEALTH_CHECK: SetType.PORT,
    Set.BOUND: SetType.IP,
}


def name(which: Set, family: Family) -> str:
    """What a set is called."""
    return f"KUBE-{'6-' if family is Family.IPV6 else ''}{which.value}"[:_LONGEST]


class Sets:
    """One family's sets."""

    def __init__(self, sets: Mapping[str, KeptSet], family: Family) -> None:
        self._family = family
        self._found: dict[Set, KeptSet] = {
            which: sets[called] for which in Set if (called := name(which, family)) in sets
        }

    def __contains__(self, which: object) -> bool:
        return which in self._found

    def __getitem__(self, which: Set) -> frozenset[Element]:
        """The elements of a set; none where there is no such set, or where it is none of kube-proxy's."""
        found = self._found.get(which)
        if found is None or not self._fits(which, found):
            return frozenset()
        return found.elements

    def name(self, which: Set) -> str:
        """What a set is called."""
        return name(which, self._family)

    def faults(self) -> Iterator[str]:
        """Sets that are not what kube-proxy makes, one sentence each."""
        for which, found in self._found.items():
            if not self._fits(which, found):
                yield f"ipset {self.name(which)} is of another type than kube-proxy makes: {found.type.value}"

    def _fits(self, which: Set, found: KeptSet) -> bool:
        return found.type is TYPES[which] and found.family in (None, self._family)
