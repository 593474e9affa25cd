"""What an agent says of itself: the values that `sluice status` prints, as they cross the agent's socket.

Times are seconds ago, so that they mean the same in another process.
"""

from __future__ import annotations

import msgspec

from rules.dataplane import Capabilities


class _Report(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A part of the report; in JSON its fields are spelt as in Kubernetes."""


class Followed(_Report, frozen=True):
    """How a source follows one resource, or its files."""

    what: str
    """`services`, `endpointslices`, `files` and so on."""
    state: str
    """`watching`, `listing`, `waiting to try again` and so on."""
    lag: float | None
    """Since the source was last heard or read; minutes mean that the node may be behind.  None: never."""
    changed: float | None = None
    """Since the last change."""
    error: str = ""
    """Why it could not be read the last time; empty when it could."""


class SourceReport(_Report, frozen=True):
    """Where objects come from."""

    description: str
    followed: tuple[Followed, ...] = ()


class DriftSeen(_Report, frozen=True):
    """A drift that was found."""

    ago: float
    summary: str
    lines: tuple[str, ...]
    """The beginning of the diff."""
    by: tuple[str, ...]
    """The processes that touched our rules before, as far as the kernel told."""
    repaired: bool


class LastSync(_Report, frozen=True):
    """The last sync that had something to do and succeeded."""

    ago: float
    """Since its end."""
    seconds: float
    full: bool
    """Whether the kernel was read first."""
    operations: int


class Syncs(_Report, frozen=True):
    """How one family's syncs go."""

    count: int
    """How many had something to do and succeeded: the same number twice means that nothing was written in between."""
    pending: bool
    """Whether the kernel may hold something else than the wanted table, as a sync is due or at work."""
    failures: int
    """In a row, up to now."""
    error: str
    """Why the last one failed; empty when it did not."""
    last: LastSync | None
    refused: tuple[str, ...]
    """Labels of the routes that the kernel refused."""
    drift_repairs: int
    drift_left: int
    """Differences that were found and left, as the policy is to report."""
    last_drift: DriftSeen | None


class FamilyReport(_Report, frozen=True):
    """One family."""

    family: str
    dataplane: str
    capabilities: Capabilities
    healthy: bool
    """Whether syncs keep up, as /healthz has it."""
    frontends: int
    syncs: Syncs


class Unserved(_Report, frozen=True):
    """A family that the node cannot carry."""

    family: str
    reason: str


class Trouble(_Report, frozen=True):
    """Something that is wrong with an object or a file."""

    origin: str
    subject: str
    reason: str


class Contested(_Report, frozen=True):
    """A frontend that several Services claim."""

    frontend: str
    winner: str
    losers: tuple[str, ...]


class Unselected(_Report, frozen=True):
    """A Service with a selector for which nobody has made slices (DESIGN 4.14)."""

    service: str
    selector: str


class EndpointReport(_Report, frozen=True):
    """What became of one entry of a Service's slices: `proxy.compute.Decision`, with its reasons by name."""

    family: str
    port: str
    endpoint: str
    slice: str
    node: str
    cluster: str | None
    local: str | None


class Status(_Report, frozen=True):
    """Everything."""

    version: str
    pid: int
    uptime: float
    network_namespace: int
    """The inode by which the kernel knows it."""
    node: str
    mode: str
    """As configured; empty: the node's choice."""
    behaviour: str
    """The mode whose rules of behaviour hold."""
    drift_policy: str
    synced: bool
    """Whether Services and slices have been listed: before that nothing is written."""
    source: SourceReport
    families: tuple[FamilyReport, ...]
    """Those that are served."""
    services: int
    slices: int
    pending_changes: int
    """Objects that changed since the last computation."""
    troubles: tuple[Trouble, ...] = ()
    contested: tuple[Contested, ...] = ()
    unselected: tuple[Unselected, ...] = ()
    unserved: tuple[Unserved, ...] = ()
    notes: tuple[str, ...] = ()
    """What should be known about the node, a sentence each."""

    def syncs_of(self, family: str) -> int:
        """How many syncs a family has had; -1 for one that isn't served."""
        return next((each.syncs.count for each in self.families if each.family == family), -1)

    @property
    def in_trouble(self) -> bool:
        """Whether the kernel is not what it should be: a sync fails or was never done, or drift is left."""
        return not self.synced or any(
            not each.healthy or each.syncs.failures or not each.syncs.count or each.syncs.drift_left
            for each in self.families
        )
