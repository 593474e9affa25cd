"""What an explanation is made of: the packet asked about, the steps that were taken, and what came of it.

Plain values and their words; how they come about is in `rules.explain`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import msgspec

from rules.forwarding import Address, Backend, Frontend, Kind, Protocol, Route


class Origin(enum.Enum):
    """Where a connection comes from, as far as rules tell it apart."""

    LOCAL_POD = "pod"
    NODE = "node"
    ELSEWHERE = "outside"

    @property
    def words(self) -> str:
        return _ORIGINS[self]


_ORIGINS = {
    Origin.LOCAL_POD: "a local pod",
    Origin.NODE: "the node itself",
    Origin.ELSEWHERE: "outside",
}


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """The first packet of a connection."""

    destination: Address
    protocol: Protocol
    port: int
    source: Address | None = None
    """None: some address of its origin; it then counts as admitted by source ranges, and is no backend."""
    interface: str = ""
    """By which interface it comes in; empty for what the node itself sends, and where nobody knows."""
    origin: Origin | None = None
    """None: told from source and interface, as the rules do it."""


class StepKind(enum.Enum):
    """What a step is about."""

    ORIGIN = "origin"
    SOURCE_RANGES = "source-ranges"
    FRONTEND = "frontend"
    NODE_PORT_ADDRESS = "node-port-address"
    POLICY = "policy"
    BALANCE = "balance"
    AFFINITY = "affinity"
    MASQUERADE = "masquerade"
    HAIRPIN = "hairpin"
    REFUSAL = "refusal"
    NEAR_MISS = "near-miss"
    """A frontend that nearly matched, and why it did not."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One decision."""

    kind: StepKind
    words: str
    """One sentence without its full stop."""
    clause: str
    """Where the behaviour document says so."""
    frontend: Frontend | None = None
    label: str = ""
    """Of the frontend's route."""


class Why(enum.Enum):
    """What kept a packet from a backend."""

    SOURCE_RANGES = "source-ranges"
    NO_ENDPOINTS = "no-endpoints"
    NO_LOCAL_ENDPOINTS = "no-local-endpoints"
    CLOSED_PORT = "closed-port"
    UNALLOCATED = "unallocated"
    LOOPBACK = "loopback"
    NODE_PORT_ADDRESS = "node-port-address"
    NO_FRONTEND = "no-frontend"


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One backend that a connection may get."""

    backend: Backend
    probability: float
    masqueraded: bool


class Reaches(msgspec.Struct, frozen=True, tag="reaches", tag_field="is"):
    """The connection is handed to one of these."""

    shares: tuple[Share, ...]
    """By address and port; their probabilities sum to 1."""
    affinity: int
    """Seconds for which the client keeps its backend; 0: every connection is balanced afresh."""


class Rejected(msgspec.Struct, frozen=True, tag="rejected", tag_field="is"):
    """The client is told at once, by ICMP port unreachable."""

    why: Why


class Dropped(msgspec.Struct, frozen=True, tag="dropped", tag_field="is"):
    """The client hears nothing."""

    why: Why


class Untouched(msgspec.Struct, frozen=True, tag="untouched", tag_field="is"):
    """The packet goes on as it came."""

    why: Why


Outcome = Reaches | Rejected | Dropped | Untouched


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a packet, and by which decisions."""

    packet: Packet
    origin: Origin
    """As what the packet counts."""
    steps: tuple[Step, ...]
    outcome: Outcome
    frontend: Frontend | None = None
    """The frontend that decided; None: none did."""
    route: Route | None = None
    local_list: bool = False
    """Whether the list was that of external policy Local."""


def verdict(outcome: Outcome) -> str:
    """What becomes of a connection, in a few words."""
    if isinstance(outcome, Reaches):
        count = len(outcome.shares)
        backends = f"one of {count} backends" if count > 1 else str(outcome.shares[0].backend)
        return f"goes to {backends}, {_sources(outcome.shares)}"
    if isinstance(outcome, Rejected):
        return "is refused (ICMP port unreachable)"
    if isinstance(outcome, Dropped):
        return "is dropped (the client hears nothing)"
    return "goes on unchanged"


def _sources(shares: Iterable[Share]) -> str:
    masqueraded = {share.masqueraded for share in shares}
    if masqueraded == {True}:
        return "masqueraded"
    return "its source kept" if masqueraded == {False} else "its source kept unless it gets itself"


MATCHES = {
    Kind.CLUSTER_IP: ("the ClusterIP", "TRF-12"),
    Kind.EXTERNAL_IP: ("an external IP", "TRF-14"),
    Kind.LOAD_BALANCER: ("a load balancer address", "TRF-16"),
    Kind.NODE_PORT: ("a node port", "TRF-20"),
}
"""What a frontend of each kind is, and the clause that makes it one."""


def name_of(route: Route) -> str:
    """Whose route it is, for people."""
    return route.label or "a Service without a label"


def listed(items: Iterable[str], most: int = 8) -> str:
    """`a, b and c`; of many, the first."""
    every: Sequence[str] = list(items)
    if len(every) > most:
        return f"{', '.join(every[:most])} and {len(every) - most} more"
    return " and ".join(filter(None, (", ".join(every[:-1]), every[-1]))) if every else "none"
