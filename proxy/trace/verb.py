"""The verb: have connections told, by whoever carries them, and print; for a bounded time and number.

nftables, iptables   their packets through the kernel's rules (`by_rules`)
userspace            connections, from the workers (`by_workers`)
ipvs, and kernels    connections, from connection tracking (`by_flows`)
without nf_tables
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from proxy import modes
from proxy.dump import Filter, Open, read_all
from proxy.explain.routing import own_addresses, way_to
from proxy.trace import by_flows, by_rules
from proxy.trace.asked import Bounds, Question, UntraceableError, question_of
from proxy.trace.by_rules import NoTracesError
from proxy.trace.ending import Ending
from proxy.trace.judged import Judge
from proxy.trace.packets import KUBE_PROXY, SLUICE, Traced, Whose
from proxy.trace.told import Witness, lines, tell, to_data
from rules.dataplane import DataplaneError
from rules.foreign.gathering import ForeignError
from rules.forwarding import Address, Family, ForwardingTable
from rules.iptables.programs import available
from rules.iptables.trace import Chain, chains_of

__all__ = ["Bounds", "main"]

By = Literal["", "rules", "conntrack"]
"""How connections are seen; empty: as the mode allows."""

_BY_RULES = ("nftables", "iptables")
_NOT_BEGUN = "begun in {:g} s (those that were open before are not traced: sluice conntrack shows them)"
_NOT_SEEN = {"userspace": "taken up by a worker in {:g} s (what the kernel refuses before, sluice explain tells)"}
"""What is said where nothing was seen, by mode."""
_LEGACY_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}
_NET = Path("/proc/thread-self/net")


def main(
    wanted: Filter,
    source: Address,
    bounds: Bounds,
    open_dataplane: Open = modes.open_dataplane,
    *,
    by: By = "",
    of: str = "",
    as_json: bool,
) -> int:
    """Print what becomes of first packets; 0, 1 if none was seen, 2 if it cannot be told.

    Args:
        wanted: which frontends; nothing: all that the node's rules have.
        source: from whom; empty: from anybody.
        bounds: when it ends.
        open_dataplane: how the node's rules are read.
        by: how connections are seen.
        of: whose rules carry them; empty: those of sluice, or where there are none those of another proxy.
        as_json: print one object a line.
    """
    try:
        name, tables, whose = _read(open_dataplane, of)
        question = question_of(tables, wanted, source, bounds, whose)
        if question is None:
            sys.stderr.write("sluice trace: no frontend is what was asked for\n")
            return 1
        local_addresses = frozenset(own_addresses())
        seen = 0
        witness = Witness(_interface, _way_back, Judge(by_rules.rejects, whose))
        with Ending(bounds.seconds) as ending:
            for traced in _packets(name, question, by, ending, local_addresses):
                told = tell(traced, tables[traced.family], local_addresses, witness)
                text = json.dumps(to_data(told)) if as_json else "\n".join(lines(told)) + "\n"
                sys.stdout.write(f"{text}\n")
                sys.stdout.flush()
                seen += 1
    except UntraceableError as error:
        sys.stderr.write(f"sluice trace: {error}\n")
        return 2
    if not seen:
        note(f"no such connection was {_NOT_SEEN.get(name, _NOT_BEGUN).format(bounds.seconds)}")
    return 0 if seen else 1


def _read(open_dataplane: Open, of: str) -> tuple[str, dict[Family, ForwardingTable], Whose]:
    """The mode that carries the node's Services, its tables, and whose they are."""
    if of == KUBE_PROXY.name:
        return _read_other()
    shown, failures = read_all(open_dataplane)
    routes: dict[str, int] = {}
    for each in shown:
        routes[each.dataplane] = routes.get(each.dataplane, 0) + len(each.table.routes)
    if not routes and not of and not failures:
        with contextlib.suppress(UntraceableError):
            found = _read_other()
            note("sluice has no rules here, and kube-proxy has: connections are followed through those")
            return found
    if not routes:
        raise UntraceableError(
            "; ".join(failures) or "nothing of sluice is in the kernel of this network namespace: no Service is served"
        )
    # Remains of another mode may be there too, until the agent has removed them.
    name = max(routes, key=lambda name: routes[name])
    return name, {each.table.family: each.table for each in shown if each.dataplane == name}, SLUICE


def _read_other() -> tuple[str, dict[Family, ForwardingTable], Whose]:
    """The same of kube-proxy, whose modes are those of its rules."""
    from proxy.foreign.explain import one_each  # noqa: PLC0415  # where sluice's rules are, nobody needs it
    from proxy.foreign.sources import from_node  # noqa: PLC0415  # likewise

    try:
        readings, problems = one_each(from_node())
    except (ForeignError, DataplaneError) as error:
        raise UntraceableError(str(error)) from None
    if not readings:
        raise UntraceableError("kube-proxy has no rules in this network namespace")
    for problem in problems:
        note(problem)
    found = next(iter(readings.values())).reading
    return found.mode, {family: each.reading.table for family, each in readings.items()}, KUBE_PROXY


def note(line: str) -> None:
    """Say something on standard error."""
    sys.stderr.write(f"sluice trace: {line}\n")
    sys.stderr.flush()


class _Standard:
    """Says on standard error what is said beside the packets."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def ready(self) -> None:
        self.note(f"at work for {self._bounds.seconds:g} s or {self._bounds.packets} packets")

    def note(self, line: str) -> None:
        note(line)


def _packets(
    name: str, question: Question, by: By, ending: Ending, local_addresses: frozenset[Address]
) -> Iterator[Traced]:
    hear = _Standard(question.bounds)
    if name == "userspace":
        if by:
            raise UntraceableError(f"--by {by} is for modes whose packets the kernel carries: this is mode userspace")
        from proxy.trace import by_workers  # noqa: PLC0415  # msgpack and processes, which the others do without

        yield from by_workers.packets(question, ending, hear)
        return
    if by == "rules" and name not in _BY_RULES:
        raise UntraceableError(f"--by rules is for modes {' and '.join(_BY_RULES)}: this is mode {name}")
    if by != "conntrack" and name in _BY_RULES:
        try:
            yield from by_rules.packets(question, ending, hear, _legacy(question))
        except NoTracesError as error:
            if by:
                raise
            hear.note(str(error))
        else:
            return
    yield from by_flows.packets(question, ending, hear, local_addresses)


def _legacy(question: Question) -> Mapping[Family, Mapping[tuple[str, str], Chain]]:
    """The chains of legacy iptables, of the families that have any: rules of others count too."""
    found = {}
    for family in question.wanted:
        try:
            if not (_NET / _LEGACY_NAMES[family]).read_text().strip():
                continue
        except OSError:
            continue
        saved = ""
        programs = available(family).get("legacy")
        if programs is not None:
            with contextlib.suppress(DataplaneError):
                saved = programs.saved()
        found[family] = chains_of(saved)
    return found


def _way_back(address: Address) -> str:
    way = way_to(address)
    return way.interface if way is not None else ""


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"  # it is gone since
