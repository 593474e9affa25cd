"""The address plan of the demo cluster: who lives where.

Two nodes, four pods on each, two clients outside and a router share one segment:

    c  192.168.50.100 --+                          +-- pod-p1 .. pod-p4 -- p1 .. p4  10.244.1.11 .. 14
    x  203.0.113.130  --+-- segment -- node1 ------+
    upstream  .50.1   --+        |     192.168.50.11
                                 +---- node2 ------+-- pod-q1 .. pod-q4 -- q1 .. q4  10.244.2.11 .. 14
                                       192.168.50.12

Only node1 runs the agent.  Clients, node2 and the router send everything by way of node1, and get everything back by
way of node1, so that each connection passes its connection tracking in both directions, also where no source is
rewritten.  Pods are routed (a /32 behind a link-local gateway, no bridge), so that this holds for two pods of one
node too.

`upstream` is where node1's default route leads, and it owns every address that nobody else has.  A packet for a
Service that node1 leaves alone ends there and is answered by `upstream`: a probe can tell "untouched" from
"dropped".  An endpoint outside the cluster, such as 11.11.11.11, is answered there as well.
"""

from __future__ import annotations

from typing import NamedTuple


class Host(NamedTuple):
    """A network namespace of the cluster; the first address of each family is the one it speaks from."""

    name: str
    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...]
    node: str = ""
    """For a pod, the node that it runs on."""

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.ipv4 + self.ipv6

    @property
    def interface(self) -> str:
        """The name of the interface that leads to the host: on its node, or on the segment's bridge."""
        return f"{POD_INTERFACE_PREFIX}{self.name}" if self.node else self.name


POD_INTERFACE_PREFIX = "pod-"
CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:244::/32")
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")

NODE1 = Host(
    "node1",
    # Its own; a second one; one for externalIPs; two that stand for load balancer addresses held by the node itself.
    ("192.168.50.11", "192.168.51.11", "192.168.99.11", "203.0.113.1", "203.0.113.2"),
    ("fd00:50::11", "fd00:51::11", "fd00:99::11", "2001:db8:113::1", "2001:db8:113::2"),
)
NODE2 = Host("node2", ("192.168.50.12",), ("fd00:50::12",))
CLIENT = Host("c", ("192.168.50.100",), ("fd00:50::100",))
FAR_CLIENT = Host("x", ("203.0.113.130",), ("2001:db8:113::130",))
UPSTREAM = Host("upstream", ("192.168.50.1",), ("fd00:50::1",))

PODS1 = tuple(Host(f"p{n}", (f"10.244.1.{10 + n}",), (f"fd00:244:1::{10 + n}",), "node1") for n in range(1, 5))
PODS2 = tuple(Host(f"q{n}", (f"10.244.2.{10 + n}",), (f"fd00:244:2::{10 + n}",), "node2") for n in range(1, 5))

POD_CIDRS = {
    "node1": ("10.244.1.0/24", "fd00:244:1::/64"),
    "node2": ("10.244.2.0/24", "fd00:244:2::/64"),
}

PODS = PODS1 + PODS2
HOSTS = {host.name: host for host in (UPSTREAM, NODE1, NODE2, CLIENT, FAR_CLIENT, *PODS)}
"""Every host by its name, in the order in which they are made."""

HOST_OF = {address: host.name for host in HOSTS.values() for address in host.addresses}
"""Whose address it is; addresses that nobody has belong to `upstream`."""
