"""What every dataplane offers: a pair of functions between a forwarding table and a kernel.

A dataplane serves one family in one network namespace.  Its methods block (a large transaction holds its thread for
some 0.1 s per 10,000 Services): the agent calls them from a worker thread, never two at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from typing import Protocol as Interface

import msgspec

from rules.forwarding import Delta, Family, ForwardingTable, Frontend


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataplane can store; equality of tables ignores exactly what it cannot."""

    labels: bool = True
    affinity: bool = True
    source_ranges: bool = True
    hairpins: bool = True
    loopback_node_ports: bool = False
    health_check_ports: bool = False
    reject_closed_ports: bool = True
    unbound: bool = True
    """Whether frontends' addresses can be other than the node's own; without, they are `NodeFacts.bound`."""
    drop_unallocated: bool = True
    source_address: bool = True
    """Whether clients' source addresses can be kept; without, connections are relayed (`NodeFacts.relayed`)."""
    sctp: bool = True
    schedulers: frozenset[str] = frozenset()
    """Which schedulers a route may ask for; of others it has the usual one."""
    usual_scheduler: str = ""
    """That one, if it is one of these: asking for it is asking for nothing."""
    sticky_schedulers: bool = True
    """Whether a route with affinity may ask for one too."""
    proxy_protocol: bool = False
    max_backends: int = 0
    """How many backends one list can have; 0: any number.  Of more, the first are used."""
    at_once: int = 0
    """Of deltas up to this `Delta.size`, `apply` takes a millisecond or so and waits for no other program: a caller
    need not give it a thread of its own, which would cost as much again.  0: always give it one."""


def limits(capabilities: Capabilities) -> tuple[str, ...]:
    """What a dataplane with these capabilities does otherwise than Kubernetes describes it, a sentence each.

    It is what an operator should know before choosing a mode; what costs nothing that packets can tell is left out.
    """
    told = {
        "backends see the node as the source of every connection: a client's own address is not kept, not even under "
        "external traffic policy Local": not capabilities.source_address,
        "SCTP is not carried": not capabilities.sctp,
        "session affinity is not kept": not capabilities.affinity,
        "loadBalancerSourceRanges are not obeyed": not capabilities.source_ranges,
    }
    return tuple(sentence for sentence, applies in told.items() if applies)


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What one sync did."""

    operations: int = 0
    """Kernel objects (elements, rules, chains) that were added or deleted."""
    bytes_sent: int = 0
    refused: frozenset[str] = frozenset()
    """Labels of the routes that the kernel refused and that were left out, so that the others could be served."""
    why_refused: Mapping[str, str] = {}
    """By these labels, what was refused, and in the kernel's words why."""
    full: bool = False
    """Whether the kernel was read first."""
    notes: tuple[str, ...] = ()
    """What was repaired or could not be done, one sentence each, for the log."""
    found: ForwardingTable | None = None
    """What the kernel held before, if it was read and held anything of ours."""
    rules: Mapping[str, int] = {}
    """iptables alone: how many rules of ours each of its tables holds now (MET-14); empty where nothing changed."""
    rules_written: Mapping[str, int] = {}
    """Likewise: how many of them were written by this sync (MET-15)."""
    failed_restores: int = 0
    """Likewise: restores that were refused since the sync before, and whose work this one did another way (MET-12).
    One that made a sync fail is not among them: the failure tells of it."""
    failed_partial_restores: int = 0
    """Those of them that were to write changes alone (MET-13)."""


_REPAIRS = 10
"""Repairs of one sync that notes name: a flushed table lacks hundreds of things, and the log need not have them all."""


def repairs(damage: Iterable[str]) -> list[str]:
    """Notes of a sync that repaired what a table said of its damage: the first by name, and how many more."""
    found = sorted(damage)
    notes = [f"repaired: {each}" for each in found[:_REPAIRS]]
    if len(found) > _REPAIRS:
        notes.append(f"repaired: {len(found) - _REPAIRS} more")
    return notes


class Stranger(NamedTuple):
    """Another process that changed the kernel's rules, as the kernel calls it."""

    name: str
    pid: int
    """In the first process namespace: in a container it may be unknown or another."""

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"


class Touch(NamedTuple):
    """Somebody else changed something of ours."""

    family: Family
    by: Stranger | None
    """None: the kernel didn't tell."""


class RawItem(NamedTuple):
    """One of a dataplane's own objects in the kernel: a rule, a set, an element."""

    depth: int
    """How deep it stands in its parent's, for indenting."""
    text: str
    """What it is, in the dataplane's own words."""
    frontends: tuple[Frontend, ...] = ()
    """Whom it serves; none: everybody, or nobody."""


class Raw(NamedTuple):
    """What a dataplane holds in the kernel, object by object, and the table that it comes to."""

    table: ForwardingTable
    items: Sequence[RawItem]


class DataplaneError(Exception):
    """A sync, a read or a clean-up failed; the message says what and, where it can, what to do.

    The kernel holds what it held before.  The next `sync` reads it again.
    """


class UnavailableError(DataplaneError):
    """The node lacks what the dataplane needs (a privilege, a kernel feature): no retry will help."""


class Dataplane(Interface):
    """One way to realise a table of one family."""

    @property
    def name(self) -> str:
        """The mode's name: `nftables`, `iptables`, `ipvs`, `userspace`."""

    @property
    def family(self) -> Family: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def check(self) -> None:
        """Ask the kernel whether it has all that the dataplane needs, without changing anything.

        Raises:
            UnavailableError: it lacks something; the message says what.
        """

    def read(self) -> ForwardingTable | None:
        """The table that the kernel really holds, decompiled from its own rules; None: nothing of ours is there.

        It changes nothing, in the kernel or in the dataplane.

        Raises:
            DataplaneError: the kernel could not be read.
        """

    def raw(self) -> Raw | None:
        """What the kernel really holds in the dataplane's own terms, for people; None: nothing of ours is there.

        Raises:
            DataplaneError: the kernel could not be read.
        """

    def sync(self, table: ForwardingTable) -> Applied:
        """Read what the kernel holds, and write what makes it equal to `table`; nothing where it already is.

        Raises:
            DataplaneError: nothing was changed.
        """

    def apply(self, delta: Delta) -> Applied:
        """Apply `delta` to the table of the last successful `sync` or `apply`, without reading the kernel.

        Raises:
            DataplaneError: nothing was changed, and `sync` must come next.
        """

    def cleanup(self) -> bool:
        """Remove everything of ours and nothing else; whether there was anything.

        Raises:
            DataplaneError: something could not be removed.
        """

    def close(self) -> None:
        """Give back sockets; the rules stay."""
