"""The verb: ask the kernel for traces, put them together, print; for a bounded time and number of packets."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from proxy.dump import Filter
from proxy.explain.routing import own_addresses
from proxy.modes import open_dataplane
from proxy.trace.packets import Assembly, Place, Traced
from proxy.trace.told import lines, tell, to_data
from rules.dataplane import DataplaneError
from rules.forwarding import Address, Family, ForwardingTable, family_of
from rules.netlink.attributes import DecodeError
from rules.netlink.transaction import NetfilterSocket, NetlinkError, TransactionError
from rules.nftables.expressions import Reject
from rules.nftables.layout import TABLE
from rules.nftables.objects import decode_rule, list_rules
from rules.nftables.trace import Listener, Wanted, trace_table


class Bounds(NamedTuple):
    """When a trace ends: whichever comes first."""

    seconds: float
    packets: int


class UntraceableError(Exception):
    """Nothing can be traced; the message says why and what to do."""


def main(wanted: Filter, source: Address, bounds: Bounds, *, as_json: bool) -> int:
    """Print what becomes of first packets; 0, 1 if none was seen, 2 if it cannot be told.

    Args:
        wanted: which frontends; nothing: all that the kernel's rules have.
        source: from whom; empty: from anybody.
        bounds: when it ends.
        as_json: print one object a line.
    """
    try:
        tables = _read()
        asked = {family: each for family, table in tables.items() if (each := _wanted(table, wanted, source))}
        if not asked:
            sys.stderr.write("sluice trace: no frontend is what was asked for\n")
            return 1
        return _trace(tables, asked, bounds, as_json=as_json)
    except UntraceableError as error:
        sys.stderr.write(f"sluice trace: {error}\n")
        return 2


def _read() -> dict[Family, ForwardingTable]:
    tables = {}
    for family in Family:
        try:
            with contextlib.closing(open_dataplane("nftables", family)) as dataplane:
                table = dataplane.read()
        except DataplaneError as error:
            raise UntraceableError(str(error)) from None
        if table is not None:
            tables[family] = table
    if not tables:
        raise UntraceableError(
            "no rules of mode nftables are in the kernel of this network namespace; other modes cannot be traced"
        )
    return tables


def _wanted(table: ForwardingTable, wanted: Filter, source: Address) -> Wanted | None:
    """Which packets of a table's family are traced; None: none can be what was asked for."""
    given = [each for each in (wanted.address, source) if each]
    if any(family_of(each) is not table.family for each in given):
        return None
    if not (wanted.namespace or wanted.service) and (wanted.address or wanted.port):
        # Also what is no frontend: a closed port, an address that no Service has.
        return Wanted(None, wanted.address or b"", wanted.port, source)
    frontends = frozenset(frontend for frontend, route in table.routes.items() if wanted.admits(frontend, route))
    return Wanted(frontends, source=source) if frontends else None


def _trace(tables: dict[Family, ForwardingTable], asked: dict[Family, Wanted], bounds: Bounds, *, as_json: bool) -> int:
    try:
        with Listener() as listener, NetfilterSocket() as owner:
            name = f"sluice-trace-{owner.port}"
            for family, wanted in asked.items():
                owner.commit(trace_table(family, name, wanted, bounds.packets))
            sys.stderr.write(f"sluice trace: at work for {bounds.seconds:g} s or {bounds.packets} packets\n")
            sys.stderr.flush()
            local_addresses = frozenset(own_addresses())
            seen = 0
            for traced in _packets(listener, Assembly(name), bounds):
                told = tell(traced, tables[traced.family], local_addresses, _interface, _rejects)
                text = json.dumps(to_data(told)) if as_json else "\n".join(lines(told)) + "\n"
                sys.stdout.write(f"{text}\n")
                sys.stdout.flush()
                seen += 1
            if listener.lost:
                sys.stderr.write("sluice trace: the kernel told more than could be read: packets are missing\n")
    except (TransactionError, OSError) as error:
        raise UntraceableError(_obstacle(error)) from None
    if not seen:
        sys.stderr.write(f"sluice trace: no such connection was begun in {bounds.seconds:g} s\n")
    return 0 if seen else 1


def _packets(listener: Listener, assembly: Assembly, bounds: Bounds) -> Iterator[Traced]:
    """Packets as they are complete, at last those of which no end was told; ^C ends it early."""
    deadline = time.monotonic() + bounds.seconds
    left = bounds.packets
    with contextlib.suppress(KeyboardInterrupt):
        while left and (seconds := deadline - time.monotonic()) > 0:
            for event in listener.events(seconds):
                for traced in assembly.add(event)[:left]:
                    left -= 1
                    yield traced
                if not left or time.monotonic() > deadline:
                    break
    yield from assembly.rest()[:left]


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"  # it is gone since


def _rejects(place: Place) -> bool:
    """Whether a rule of our table refuses by ICMP; a rule that is gone counts as one that drops."""
    try:
        family = next(family for family in Family if family.af == place.family)
        with NetfilterSocket() as reader:
            listed = [decode_rule(each)[1] for each in reader.dump(list_rules(family, TABLE))]
    except (StopIteration, NetlinkError, DecodeError):
        return False
    return any(
        each.handle == place.handle and any(isinstance(one, Reject) for one in each.rule.expressions) for each in listed
    )


def _obstacle(error: TransactionError | OSError) -> str:
    codes = {each.errno for each in error.errors} if isinstance(error, TransactionError) else {error.errno}
    if codes & {errno.EPERM, errno.EACCES}:
        return "it takes CAP_NET_ADMIN in this network namespace: run it as root"
    if isinstance(error, TransactionError) and codes & {errno.EOPNOTSUPP, errno.EINVAL}:
        return f"this kernel cannot trace so that it ends by itself (that takes Linux 5.12 with nf_tables): {error}"
    return str(error)
