"""What deleting stale flows costs while connection tracking holds as many entries as the kernel admits.

The entries are written over netlink, as no traffic makes them fast enough.  The kernel bounds their number for each
network namespace by one setting of the host, which is left as it is: the row says how many there were.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.report import Row
from proxy.conntrack import Change, is_stale, matches_of
from rules.forwarding import Address, Backend, Family, Frontend, Protocol
from rules.netlink.attributes import attribute, be32, nested, u8
from rules.netlink.conntrack import Match
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.transaction import NetfilterSocket, netfilter_message

MOST = 1_000_000
_SPARE = 2_000
_BATCH = 1024
_FRONTENDS = 1_000
_BACKENDS = 4
_LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_CREATE, _SUBSYSTEM = 0, 1
_ORIGINAL, _REPLY, _STATUS, _TIMEOUT = 1, 2, 3, 7
_CONFIRMED, _DNAT_DONE, _DNAT = 1 << 3, 1 << 8, 1 << 5
_NLM_F_CREATE = 0x400


def rows(entries: int = MOST) -> list[Row]:
    """Rows for so many UDP flows to 1,000 frontends of 4 endpoints, or as many as the kernel admits."""
    entries = min(entries, int(_LIMIT.read_text()) - _SPARE)
    write(entries)
    gone = _backend(0, 0)
    others = frozenset(_backend(0, number) for number in range(1, _BACKENDS))
    what = f"{entries:,} UDP flows"
    with Conntrack(Family.IPV4) as conntrack:
        one = matches_of(Family.IPV4, {_frontend(0): Change(frozenset({gone}), others)}) or []
        seconds, deleted = _timed(lambda: sum(map(conntrack.delete_matching, one)))
        left = entries - deleted
        all_serve = serving()
        every = Match(Family.IPV4, Protocol.UDP)
        sweep, swept = _timed(partial(conntrack.sweep, every, partial(is_stale, serving=all_serve)))
        fewer = {frontend: backends - {min(backends)} for frontend, backends in all_serve.items()}
        quarter, many = _timed(partial(conntrack.sweep, every, partial(is_stale, serving=fewer)))
    if not deleted or swept or not many:
        raise RuntimeError(f"not what was to be deleted: {deleted}, {swept}, {many}")
    return [
        Row(what, f"an endpoint gone: its {deleted} flows deleted", "ms", {"now": seconds * 1000}),
        Row(what, f"a start: all {left:,} looked at, none stale", "s", {"now": sweep}),
        Row(what, f"1,000 endpoints gone: {many:,} flows deleted", "s", {"now": quarter}),
    ]


def serving() -> dict[Frontend, frozenset[Backend]]:
    """The frontends that flows are written to, and their endpoints."""
    return {
        _frontend(each): frozenset(_backend(each, number) for number in range(_BACKENDS)) for each in range(_FRONTENDS)
    }


def write(entries: int) -> None:
    """Put so many flows into connection tracking."""
    kernel = NetfilterSocket()
    try:
        batch: list[bytes] = []
        for each in _entries(entries):
            batch.append(each)
            if len(batch) == _BATCH:
                kernel.perform_each(batch)
                batch = []
        kernel.perform_each(batch)
    finally:
        kernel.close()


def _entries(count: int) -> Iterator[bytes]:
    rest = be32(_STATUS, _CONFIRMED | _DNAT | _DNAT_DONE) + be32(_TIMEOUT, 3600)
    for number in range(count):
        frontend = _frontend(number % _FRONTENDS)
        backend = _backend(number % _FRONTENDS, number // _FRONTENDS % _BACKENDS)
        client, port = (100 << 24 | 64 << 16 | number >> 14).to_bytes(4), 1024 + (number & 0x3FFF)
        original = _tuple(_ORIGINAL, client, frontend.address, port, frontend.port)
        reply = _tuple(_REPLY, backend.address, client, backend.port, port)
        yield netfilter_message(_CREATE, _NLM_F_CREATE, socket.AF_INET, original + reply + rest, _SUBSYSTEM)


def _tuple(kind: int, source: Address, destination: Address, source_port: int, port: int) -> bytes:
    addresses = nested(1, attribute(1, source), attribute(2, destination))
    ports = nested(2, u8(1, Protocol.UDP), attribute(2, source_port.to_bytes(2)), attribute(3, port.to_bytes(2)))
    return nested(kind, addresses, ports)


def _frontend(number: int) -> Frontend:
    return Frontend((10 << 24 | 96 << 16 | number + 1).to_bytes(4), Protocol.UDP, 53)


def _backend(frontend: int, number: int) -> Backend:
    return Backend((10 << 24 | 244 << 16 | frontend * _BACKENDS + number + 1).to_bytes(4), 5353)


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    start = time.monotonic()
    done = work()
    return time.monotonic() - start, done
