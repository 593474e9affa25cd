"""`sluice verify`: does the kernel hold the wanted table?

What is wanted is what the running agent says, or what manifests come to (`-f`).  An agent may be about to write while
it is asked: a difference counts only if the agent had nothing to do and wrote nothing between its answer and the end of
the reading.

0: equal.  1: drift, printed as a diff.  2: it could not be told.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TextIO

import msgspec

from proxy import agent_socket, modes
from proxy.agent_socket import AgentError, NoAgentError
from proxy.config.settings import Settings
from rules.dataplane import Dataplane, DataplaneError
from rules.diff import Drift, compare, lines, summary, to_data
from rules.forwarding import Family, ForwardingTable

Format = Literal["text", "json"]
Open = Callable[[str, Family], Dataplane]

PATIENCE = 10.0
"""Seconds for which an agent that keeps writing is asked again."""
PAUSE = 0.1


class CannotTellError(Exception):
    """Neither equal nor different; the message says why."""


class Verified(NamedTuple):
    """One family's comparison."""

    dataplane: str
    drift: Drift
    frontends: int
    """How many are wanted."""
    where: str = "the kernel"
    """Where they were looked for."""


def main(
    settings: Settings,
    filename: str,
    format_: Format,
    *,
    out: TextIO | None = None,
    open_dataplane: Open = modes.open_dataplane,
) -> int:
    """Compare, print, and return what the head of this module says.

    Args:
        settings: the effective configuration; of it matters where the agent's socket is, and with manifests the rest.
        filename: manifests; empty: ask the agent.
        format_: how to print it.
        out: standard output unless given.
        open_dataplane: see `proxy.modes`.
    """
    out = sys.stdout if out is None else out
    notes: Sequence[str] = ()
    try:
        if filename:
            source = filename
            name = modes.choose(settings.mode, settings.iptables_backend)
            tables, notes = _wanted(settings, filename)
            verified = list(against_tables(tables, name, open_dataplane))
        else:
            source = "the agent"
            verified = list(against_agent(settings.run_directory, open_dataplane))
    except NoAgentError as error:
        sys.stderr.write(f"sluice verify: {error}, or give manifests with -f\n")
        return 2
    except (AgentError, CannotTellError, DataplaneError) as error:
        sys.stderr.write(f"sluice verify: {error}\n")
        return 2
    return report(verified, source, format_, out, notes)


def report(verified: Sequence[Verified], source: str, format_: Format, out: TextIO, notes: Sequence[str] = ()) -> int:
    """Print comparisons with what `source` wants; 0 if nothing differs, else 1.

    `notes` are what was said on standard error about them, which JSON has as well.
    """
    if format_ == "json":
        value = {
            "wanted": source,
            "equal": not any(each.drift for each in verified),
            "families": [{"dataplane": each.dataplane, **to_data(each.drift)} for each in verified],
            "notes": list(notes),
        }
        out.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")
    else:
        out.writelines(f"{line}\n" for line in _text(verified, source))
    return 1 if any(each.drift for each in verified) else 0


def against_agent(run_directory: str, open_dataplane: Open = modes.open_dataplane) -> Iterator[Verified]:
    """The kernel compared with what the agent wants, for each family that it serves.

    Raises:
        AgentError: the agent could not be asked (NoAgentError: there is none).
        CannotTellError: it serves another network namespace, or never stops writing.
        DataplaneError: the kernel could not be read.
    """
    status = agent_socket.status(run_directory)
    if status.network_namespace != agent_socket.network_namespace():
        raise CannotTellError(
            f"the agent (process {status.pid}) serves another network namespace: "
            f"nsenter --net=/proc/{status.pid}/ns/net sluice verify looks into that"
        )
    if not status.synced:
        raise CannotTellError("the agent has not listed all Services yet: nothing is wanted before that")
    for label in (each.family for each in status.families):
        family = next(each for each in Family if each.label == label)
        dataplane: Dataplane | None = None
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                wanted, head = agent_socket.table(family, run_directory)
                if dataplane is None:
                    dataplane = open_dataplane(head.dataplane, family)
                    modes.read_as(dataplane, head.capabilities)
                drift = compare(wanted, dataplane.read(), head.capabilities)
                if not drift:
                    break
                if not head.pending and agent_socket.status(run_directory).syncs_of(label) == head.syncs:
                    break
                if time.monotonic() > deadline:
                    raise CannotTellError(f"the agent keeps changing the rules of {label}: try again")
                time.sleep(PAUSE)
        finally:
            if dataplane is not None:
                dataplane.close()
        yield Verified(head.dataplane, drift, len(wanted.routes))


def against_tables(
    tables: Iterable[ForwardingTable], name: str, open_dataplane: Open = modes.open_dataplane
) -> Iterator[Verified]:
    """The kernel compared with tables, of the families that this node can carry, in the dataplane `name`.

    Raises:
        DataplaneError: the kernel could not be read.
    """
    for table in tables:
        if table.family not in modes.supported_families():
            continue
        dataplane = open_dataplane(name, table.family)
        try:
            drift = compare(table, dataplane.read(), dataplane.capabilities)
        finally:
            dataplane.close()
        yield Verified(name, drift, len(table.routes))


def _wanted(settings: Settings, filename: str) -> tuple[Sequence[ForwardingTable], Sequence[str]]:
    """What manifests come to on this node, and what is wrong with them, which is told at once.

    Raises:
        CannotTellError: they cannot be read or used.
    """
    from proxy.interfaces import read_addresses  # noqa: PLC0415  # pyroute2, which an agent's answer does without
    from proxy.render import render  # noqa: PLC0415  # likewise the parsers
    from proxy.sources.manifest_files import Unreadable  # noqa: PLC0415  # likewise
    from proxy.sources.manifest_loading import given  # noqa: PLC0415  # likewise
    from proxy.sources.manifest_objects import FileError  # noqa: PLC0415  # likewise

    try:
        loaded = given(filename)
        rendered = render(loaded, settings, socket.gethostname(), interfaces=read_addresses())
    except (Unreadable, FileError) as error:
        raise CannotTellError(str(error)) from None
    except ValueError as error:
        raise CannotTellError(f"--hostname-override: {error}") from None
    for problem in rendered.problems:
        sys.stderr.write(f"sluice verify: {problem}\n")
    if loaded.unusable:
        raise CannotTellError(f"nothing in {filename} can be used")
    return rendered.tables, rendered.problems


def _text(verified: Sequence[Verified], source: str) -> Iterator[str]:
    for dataplane, drift, frontends, held in verified:
        where = f"{drift.family.label} in {dataplane}"
        if not drift:
            yield f"{where}: equal to what {source} wants, {frontends} frontend{'' if frontends == 1 else 's'}"
            continue
        yield f"{where}: {summary(drift)} (- wanted by {source}, + in {held})"
        yield from (f"  {line}" for line in lines(drift))
