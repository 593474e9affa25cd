"""`sluice verify` of another proxy's rules: do they hold what the objects come to?

What is wanted comes from manifests, from the API server, or from an agent that runs beside the proxy.  Rules of this
node that differ are read again for a while: a proxy that is only late is told from one that is wrong.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

from proxy import agent_socket, modes
from proxy.agent_socket import AgentError, NoAgentError
from proxy.beside import beside
from proxy.config.settings import Settings
from proxy.foreign import wanted
from proxy.foreign.sources import PROXY, Files, Found, are_large, from_files, from_node, likely_mode
from proxy.foreign.wanted import CannotTellError, Objects
from proxy.node import Interfaces
from proxy.verify import Format, Verified, report
from rules.dataplane import DataplaneError
from rules.diff import compare
from rules.foreign.comparison import as_held_by, capabilities_of, named
from rules.foreign.gathering import ForeignError
from rules.forwarding import Family, ForwardingTable

LAG = 5.0
"""Seconds for which rules of this node that differ are read again: kube-proxy writes at most once a second (SYN-4)."""
PAUSE = 0.5

Read = Callable[[], Sequence[Found]]


class Asked(NamedTuple):
    """What is compared with what."""

    files: Files
    configured: bool
    """Whether the settings are the proxy's own.  Otherwise the node's facts are taken from its rules."""


def main(
    asked: Asked, settings: Settings, format_: Format, *, out: TextIO | None = None, read: Read = from_node
) -> int:
    """Compare, print, and return 0 if nothing differs, 1 if something does, 2 if it could not be told.

    Args:
        asked: which files were given.
        settings: what objects are computed with, and where the agent and the API server are.
        format_: how to print it.
        out: standard output unless given.
        read: this node's rules.
    """
    out = sys.stdout if out is None else out
    try:
        comparison = _Comparison(asked, settings, read)
        verified = comparison.run()
    except NoAgentError as error:
        _complain(f"{error}: give manifests with -f, or an API server with --kubeconfig")
        return 2
    except (AgentError, CannotTellError, DataplaneError, ForeignError, ValueError) as error:
        _complain(str(error))
        return 2
    for note in comparison.notes:
        _complain(note)
    if not verified:
        _complain(f"{PROXY} has no rules in this network namespace")
        return 1
    return report(verified, comparison.by, format_, out, tuple(comparison.notes))


class _Comparison:
    """One run of the verb."""

    def __init__(self, asked: Asked, settings: Settings, read: Read) -> None:
        self._files, self._configured = asked
        self._settings = settings
        self._read = read
        self._objects: Objects | None = None
        self._tables: dict[str, dict[Family, ForwardingTable]] = {}
        self._problems: dict[str, tuple[str, ...]] = {}
        self.by = "the agent"
        self.notes: dict[str, None] = {}

    def run(self) -> list[Verified]:
        """The comparison of each family of each mode.

        Raises:
            AgentError: the agent could not be asked (NoAgentError: there is none).
            CannotTellError: nobody says what is wanted.
            DataplaneError: a program failed.
            ForeignError: there are no rules, or none that can be read.
            ValueError: the node's name is empty.
        """
        if self._files.rules:
            large = are_large(self._files)
            with beside(lambda: from_files(self._files.rules), list[Found], worth_it=large) as reading:
                self._load()
                if large and (mode := likely_mode(self._files)):
                    self._wanted(mode)  # while the other process decodes; should it be another, that is computed too
                found = reading()
            verified = list(self._compared(found))
            self._note_missing(found)
            return verified
        self._load()
        found = list(self._read())
        kinds = sorted({each.dataplane for each in found})
        if len(kinds) > 1:
            self.notes[f"{PROXY} has rules in {' and in '.join(kinds)}: all of them act"] = None
        started = time.monotonic()
        verified = [*self._compared(found), *self._absent(found)]
        while any(each.drift for each in verified) and time.monotonic() - started < LAG:
            time.sleep(PAUSE)
            found = list(self._read())
            verified = [*self._compared(found), *self._absent(found)]
            if not any(each.drift for each in verified):
                late = time.monotonic() - started
                self.notes[f"{PROXY} was late: its rules differed, and no longer do after {late:.1f} s"] = None
        return verified

    def _load(self) -> None:
        self._objects = wanted.of_given(self._files.manifests, self._settings)
        if self._objects is None and self._files.rules:
            raise CannotTellError(
                "rules that were saved are compared with objects: give manifests with -f too, or an API server with "
                "--kubeconfig"
            )
        if self._objects is not None:
            self.by = self._objects.by

    def _compared(self, found: Sequence[Found]) -> Iterator[Verified]:
        for each in found:
            reading = each.reading
            family = reading.table.family
            table = self._wanted(reading.mode).get(family)
            self.notes.update(dict.fromkeys(self._problems.get(reading.mode, ())))
            if table is None:
                self.notes[f"{self.by} wants nothing of {family.label}: its rules are not compared"] = None
                continue
            if self._settings.mode not in {"", reading.mode}:
                self.notes[f"mode {self._settings.mode} is configured, and the rules are of mode {reading.mode}"] = None
            self.notes.update(dict.fromkeys(reading.notes))
            reading = named(reading, table)
            told = as_held_by(reading, table, configured=self._configured)
            drift = compare(told, reading.table, capabilities_of(reading.mode))
            where = "the kernel" if not self._files.rules else each.where
            yield Verified(each.title, drift, len(table.routes), where)

    def _absent(self, found: Sequence[Found]) -> Iterator[Verified]:
        """Families of which something is wanted, and the proxy has nothing."""
        there = {each.reading.table.family for each in found}
        for mode, tables in self._tables.items():
            for family, table in tables.items():
                if family not in there and table.routes and family in modes.supported_families():
                    there.add(family)
                    drift = compare(table, None, capabilities_of(mode))
                    yield Verified(f"{PROXY}'s rules", drift, len(table.routes))

    def _wanted(self, mode: str) -> dict[Family, ForwardingTable]:
        if mode not in self._tables:
            self._tables[mode] = self._compute(mode)
        return self._tables[mode]

    def _compute(self, mode: str) -> dict[Family, ForwardingTable]:
        if self._objects is None:
            return _of_agent(self._settings.run_directory)
        interfaces: Interfaces | None = None
        if not self._files.rules:
            from proxy.interfaces import read_addresses  # noqa: PLC0415  # pyroute2, which files do without

            interfaces = read_addresses()
        tables, self._problems[mode] = wanted.tables(
            self._objects, self._settings, socket.gethostname(), mode, interfaces
        )
        return tables

    def _note_missing(self, found: Sequence[Found]) -> None:
        given = {each.reading.table.family for each in found}
        for family in Family:
            if family not in given and any(family in each and each[family].routes for each in self._tables.values()):
                self.notes[f"the files have no rules of {family.label}: it is not compared"] = None


def _of_agent(run_directory: str) -> dict[Family, ForwardingTable]:
    """What the agent of this network namespace wants."""
    status = agent_socket.status(run_directory)
    if status.network_namespace != agent_socket.network_namespace():
        raise CannotTellError(
            f"the agent (process {status.pid}) serves another network namespace: give manifests with -f"
        )
    if not status.synced:
        raise CannotTellError("the agent has not listed all Services yet: nothing is wanted before that")
    labels = {each.family for each in status.families}
    return {family: agent_socket.table(family, run_directory)[0] for family in Family if family.label in labels}


def _complain(text: str) -> None:
    sys.stderr.write(f"sluice verify: {' '.join(text.split())}\n")
