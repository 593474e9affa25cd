"""What every dataplane offers: a pair of functions between a forwarding table and a kernel.

A dataplane serves one family in one network namespace.  Its methods block (a large transaction holds its thread for
some 0.1 s per 10,000 Services): the agent calls them from a worker thread, never two at a time.
"""

from __future__ import annotations

from typing import Protocol as Interface

import msgspec

from rules.forwarding import Delta, Family, ForwardingTable


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataplane can store; equality of tables ignores exactly what it cannot."""

    labels: bool = True
    affinity: bool = True
    source_ranges: bool = True
    hairpins: bool = True
    loopback_node_ports: bool = False
    reject_closed_ports: bool = True
    drop_unallocated: bool = True
    max_backends: int = 0
    """How many backends one list can have; 0: any number.  Of more, the first are used."""


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What one sync did."""

    operations: int = 0
    """Kernel objects (elements, rules, chains) that were added or deleted."""
    bytes_sent: int = 0
    refused: frozenset[str] = frozenset()
    """Labels of the routes that the kernel refused and that were left out, so that the others could be served."""
    full: bool = False
    """Whether the kernel was read first."""
    notes: tuple[str, ...] = ()
    """What was repaired or could not be done, one sentence each, for the log."""


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

    def read(self) -> ForwardingTable | None:
        """The table that the kernel really holds, decompiled from its own rules; None: nothing of ours is there.

        It changes nothing, in the kernel or in the dataplane.

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
