"""Who may open a connection to a frontend, and as what a client counts.

Theory of operation
-------------------
What a route does with clients that get no backend is done by the kernel, before a worker hears of them:

* *rejected* (no endpoint at all, SEL-11): there is no listener.  The address is local, so the kernel answers with a
  reset, or with an ICMP port unreachable for UDP.  That also meets sources outside the source ranges, as it does in
  kube-proxy's iptables mode (NFT-11).
* *dropped* (source ranges, TRF-17; an outsider under external policy Local without local endpoints, SEL-11): a filter
  on the listening socket lets nothing of theirs through.

Two things are approximate.  A filter that would be too long (some 1,000 IPv4 prefixes) is left out: clients are then
looked at after the handshake and meet a reset instead of silence.  And where local pods are told by their interface,
the filter names the indexes that match when it is made: it is made anew every second or so, so the first packet of a
new pod to such a frontend may be one that has to be sent twice.

A client is *inside*, and gets the backends of all nodes under external policy Local too (TRF-4), if it is a local pod
by the detector, or the node itself: a loopback address, one of the node's, or the very address that it connects to,
which the kernel uses as the source of what a node sends to an address that is routed to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from proxy.userspace.control import WireNode
from proxy.userspace.filters import Stage
from rules.forwarding import (
    Address,
    InputInterface,
    InputInterfacePrefix,
    Prefix,
    Refusal,
    Route,
    SourcePrefix,
    merge_prefixes,
)

_LOOPBACK = {4: Prefix(bytes([127, 0, 0, 0]), 8), 16: Prefix(bytes(15) + b"\1", 128)}


class Admission(NamedTuple):
    """What the kernel does for a frontend's listeners."""

    listens: bool
    """Whether there is a listener at all; without one the kernel rejects."""
    stages: tuple[Stage, ...] = ()
    """What sources must pass; none: all come through."""


class Sources:
    """The sources of one family as a node sees them."""

    def __init__(self, node: WireNode, interfaces: Mapping[int, str]) -> None:
        """`interfaces` are the node's, by index; they matter to a detector that goes by interface."""
        detector = node.detector
        self.node = node
        self.pods = detector.prefix if isinstance(detector, SourcePrefix) else None
        self._name = detector.name if isinstance(detector, InputInterface) else None
        self._start = detector.prefix if isinstance(detector, InputInterfacePrefix) else None
        self.by_interface = self._name is not None or self._start is not None
        self.pod_interfaces = tuple(sorted(index for index, name in interfaces.items() if self.is_pod_interface(name)))

    def is_pod_interface(self, name: str) -> bool:
        """Whether what comes in by an interface of that name is of a local pod (TRF-10)."""
        return name == self._name or (self._start is not None and name.startswith(self._start))

    def are_inside(self, source: Address, destination: Address, interface: str | None = None) -> bool:
        """Whether a source counts as a local pod or as the node; `interface` is the one that it came in by."""
        if source == destination or source in self.node.local_addresses or source in _LOOPBACK[len(source)]:
            return True
        if self.pods is not None:
            return source in self.pods
        return interface is not None and self.is_pod_interface(interface)

    def inside(self, destination: Address) -> Stage:
        """All that are inside, for a filter."""
        hosts = [Prefix(each, len(each) * 8) for each in (*self.node.local_addresses, destination)]
        pods = [self.pods] if self.pods is not None else []
        return Stage(merge_prefixes([*hosts, *pods, _LOOPBACK[len(destination)]]), self.pod_interfaces)


def admission(route: Route, sources: Sources, destination: Address) -> Admission:
    """What the kernel does for the listener of a route at one address."""
    if not route.backends:
        return Admission(listens=route.refusal is Refusal.DROP, stages=(Stage(),))
    stages = [Stage(route.source_ranges)] if route.source_ranges else []
    if route.local_backends is not None and not route.local_backends and route.refusal is Refusal.DROP:
        stages.append(sources.inside(destination))
    return Admission(listens=True, stages=tuple(stages))


def admitted(route: Route, source: Address) -> bool:
    """Whether the source ranges admit a source."""
    return not route.source_ranges or any(source in prefix for prefix in route.source_ranges)
