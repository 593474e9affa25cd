"""Connections as connection tracking takes note of them: for IPVS, and where the kernel cannot trace packets.

Only what comes through is seen, and no rule is named.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

from proxy.trace.asked import Hear, Question, UntraceableError
from proxy.trace.ending import Ending
from proxy.trace.packets import Traced
from rules.forwarding import Address, Frontend, family_of
from rules.netlink.conntrack_events import decode_passages, listen
from rules.netlink.headers import Headers

_EVENTS = Path("/proc/sys/net/netfilter/nf_conntrack_events")


def packets(question: Question, ending: Ending, hear: Hear, local_addresses: AbstractSet[Address]) -> Iterator[Traced]:
    """The first packets of connections that come through.

    Raises:
        UntraceableError: it may not be done, or failed.
    """
    _check_events()
    try:
        listener = listen()
    except OSError as error:
        why = "it takes CAP_NET_ADMIN in this network namespace" if error.errno == errno.EPERM else str(error)
        raise UntraceableError(f"connection tracking cannot be listened to: {why}") from None
    with listener:
        hear.ready()
        hear.note("by connection tracking: what is refused or dropped is not seen, and no rule is named")
        left = question.bounds.packets
        ended = False
        while left and not ended:
            ended = ending.wait([listener])
            for datagram in listener.waiting():
                for before, after in decode_passages(datagram):
                    if left and is_wanted(question, before, local_addresses):
                        left -= 1
                        yield Traced(before=before, after=after, arrived=True)
        if listener.lost:
            hear.note("the kernel told more than could be read: connections are missing")


def is_wanted(question: Question, headers: Headers, local_addresses: AbstractSet[Address]) -> bool:
    """Whether a connection is what was asked for; a node port is one at the node's own addresses."""
    wanted = question.wanted.get(family_of(headers.destination))
    if wanted is None or (wanted.source and wanted.source != headers.source):
        return False
    if wanted.frontends is None:
        return wanted.address in {b"", headers.destination} and wanted.port in {0, headers.port}
    if Frontend(headers.destination, headers.protocol, headers.port) in wanted.frontends:
        return True
    node_port = Frontend(b"", headers.protocol, headers.port)
    return headers.destination in local_addresses and node_port in wanted.frontends


def _check_events() -> None:
    """Raises UntraceableError where the kernel tells nobody of connections."""
    with contextlib.suppress(OSError):
        if _EVENTS.read_text().strip() == "0":
            raise UntraceableError(
                "net.netfilter.nf_conntrack_events is 0: the kernel tells nobody of new connections (sysctl -w "
                "net.netfilter.nf_conntrack_events=1)"
            )
