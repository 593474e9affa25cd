"""What the demo probes, what it expects, and how an outcome reads.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe, count_answers

Seen = Literal["kept", "masqueraded"]

CONNECTIONS = 60
"""Per check: with three backends, one is missed by bad luck once in 10^10 times."""


class Check(NamedTuple):
    """One client at one frontend."""

    client: str
    frontend: str
    """What kind of address it is: `ClusterIP`, `node port`, `load balancer`."""
    address: str
    port: int
    protocol: str = "TCP"
    backends: Mapping[str, Seen] = {}
    """Who answers, and how each sees the source; nobody: see `silence`."""
    silence: Literal["", "refused", "dropped"] = ""

    @property
    def v6(self) -> bool:
        return ":" in self.address

    @property
    def target(self) -> str:
        host = f"[{self.address}]" if self.v6 else self.address
        return f"{host}:{self.port}" + ("/UDP" if self.protocol == "UDP" else "")

    @property
    def who(self) -> str:
        """The client, for people."""
        host = plan.HOSTS[self.client]
        if host.node:
            return f"pod {self.client}"
        return self.client if host is plan.NODE1 else f"client {self.client}"

    def probe(self) -> Probe:
        count = CONNECTIONS if self.backends else 3
        return Probe(
            host=self.client,
            address=self.address,
            port=self.port,
            protocol=self.protocol,
            count=count,
            timeout=0.8 if self.silence == "dropped" else 3.0,
        )


class Section(NamedTuple):
    """The checks of one Service."""

    service: str
    about: str
    checks: tuple[Check, ...]


def _all(seen: Seen, *hosts: str) -> dict[str, Seen]:
    return dict.fromkeys(hosts, seen)


_WEB = ("p1", "p2", "q1")

SECTIONS = (
    Section(
        "web",
        "ClusterIP, three pods on two nodes",
        (
            Check("p4", "ClusterIP", "10.96.0.10", 80, backends=_all("kept", *_WEB)),
            Check(
                "p1", "ClusterIP", "10.96.0.10", 80, backends={"p1": "masqueraded", "p2": "kept", "q1": "kept"}
            ),  # p1 is a backend itself (hairpin)
            Check("node1", "ClusterIP", "10.96.0.10", 80, backends=_all("masqueraded", *_WEB)),
            Check("c", "ClusterIP", "10.96.0.10", 80, backends=_all("masqueraded", *_WEB)),
            Check("p4", "ClusterIP", "fd00:10:96::10", 80, backends=_all("kept", *_WEB)),
            Check("node1", "ClusterIP", "fd00:10:96::10", 80, backends=_all("masqueraded", *_WEB)),
            Check("c", "ClusterIP", "fd00:10:96::10", 80, backends=_all("masqueraded", *_WEB)),
        ),
    ),
    Section("dns", "UDP", (Check("p4", "ClusterIP", "10.96.0.53", 53, "UDP", backends=_all("kept", "p3", "q3")),)),
    Section(
        "shop",
        "NodePort",
        (
            Check("p4", "node port", "192.168.50.11", 30080, backends=_all("masqueraded", "p3", "q3")),
            Check("node1", "node port", "192.168.50.11", 30080, backends=_all("masqueraded", "p3", "q3")),
            Check("c", "node port", "192.168.50.11", 30080, backends=_all("masqueraded", "p3", "q3")),
            Check("c", "node port", "fd00:50::11", 30080, backends=_all("masqueraded", "p3", "q3")),
        ),
    ),
    Section(
        "front",
        "LoadBalancer under policy Local: outsiders stay on this node, their source is kept",
        (
            Check("c", "load balancer", "203.0.113.30", 80, backends=_all("kept", "p2")),
            Check("p4", "load balancer", "203.0.113.30", 80, backends=_all("kept", "p2", "q2")),
            Check("node1", "load balancer", "203.0.113.30", 80, backends=_all("masqueraded", "p2", "q2")),
            Check("c", "node port", "192.168.50.11", 30081, backends=_all("kept", "p2")),
        ),
    ),
    Section(
        "api",
        "LoadBalancer for 192.168.50.0/24 only; x is 203.0.113.130",
        (
            Check("c", "load balancer", "203.0.113.31", 80, backends=_all("masqueraded", "p1", "q1")),
            Check("x", "load balancer", "203.0.113.31", 80, silence="dropped"),
        ),
    ),
    Section(
        "void",
        "no endpoints; and an address that no Service has",
        (
            Check("p4", "ClusterIP", "10.96.0.99", 80, silence="refused"),
            Check("c", "ClusterIP", "10.96.0.99", 80, silence="refused"),
            Check("p4", "unallocated", "10.96.0.200", 80, silence="dropped"),
        ),
    ),
)


class Reading(NamedTuple):
    """The outcomes of one check, for people."""

    right: bool
    answers: str
    source: str


def read(check: Check, outcomes: Sequence[Outcome]) -> Reading:
    """What came of a check, and whether it is what was expected."""
    counts = count_answers(outcomes)
    silent = [outcome for outcome in outcomes if outcome.kind != "answered"]
    sources = {host: _source([outcome for outcome in outcomes if outcome.host == host]) for host in counts}
    right = sources == dict(check.backends) and len(silent) == (0 if check.backends else len(outcomes))
    if check.silence:
        right = right and all(
            outcome.refused if check.silence == "refused" else outcome.kind == "silent" for outcome in silent
        )
    parts = [f"{host} {count}" for host, count in sorted(counts.items())]
    if silent:
        parts.append(_describe(silent[0]) + (f" ({len(silent)} times)" if counts else ""))
    return Reading(right, "  ".join(parts), _sources(sources))


def _source(answers: Sequence[Outcome]) -> str:
    """What one backend saw: the client, the node in its place, or the address of somebody else."""
    if all(outcome.peer == outcome.local for outcome in answers):
        return "kept"
    strangers = [outcome.peer[0] for outcome in answers if plan.HOST_OF.get(outcome.peer[0]) != "node1"]
    return strangers[0] if strangers else "masqueraded"


def _sources(sources: Mapping[str, str]) -> str:
    by_source: dict[str, list[str]] = {}
    for host, seen in sorted(sources.items()):
        by_source.setdefault(seen, []).append(host)
    (most, _), *others = sorted(by_source.items(), key=lambda item: -len(item[1])) or [("", [])]
    return ", ".join([most, *(f"{seen} at {' '.join(hosts)}" for seen, hosts in others)])


def _describe(outcome: Outcome) -> str:
    if outcome.refused:
        return "refused (ICMP port unreachable)"
    return "dropped (silence)" if outcome.kind == "silent" else str(outcome)
