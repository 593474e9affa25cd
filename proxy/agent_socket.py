"""The agent's socket, seen from a verb: one request, one answer (DESIGN 4.12).

The socket is `agent.sock` in the agent's run directory, for root alone.  A connection carries one request, which is
one line of JSON:

    {"version": 1, "verb": "table", "arguments": {"family": "IPv4"}}

The answer is one line or more.  Whatever may be long comes in parts, so that neither side holds up the other; the last
line is the result, or why there is none:

    {"part": ...}
    {"part": ...}
    {"result": ...}            or            {"error": "there is no verb tabel"}

Verbs and what they return:

    status                       a `proxy.report.Status`
    table      family            the wanted table: parts are `TablePart`, the result is a `TableHead`
    serving    family            the endpoints that serve the frontends whose stale flows are deleted: parts are pairs
    decisions  service           what became of each endpoint of a Service: a list of `proxy.report.EndpointReport`
    objects    [service]         Services, slices, the Node and ServiceCIDRs, spelt as in the API: parts are lists
    troubles                     what is wrong with objects and files
    counters                     what has passed Services: parts are lists of `proxy.counters.Row`, the result is a
                                 `proxy.counters.Report`

This module is the client; `proxy.serving.agent_server` is the other end.  It loads neither asyncio nor aiohttp.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from proxy.config.settings import RUN_DIRECTORY as RUN_DIRECTORY  # noqa: PLC0414  # part of this interface
from proxy.conntrack import Serving
from proxy.counters import Report, Row
from proxy.report import EndpointReport, Status, Trouble
from rules.dataplane import Capabilities
from rules.forwarding import Endpoint, Family, ForwardingTable, Frontend, NodeFacts, Route

VERSION = 1
NAME = "agent.sock"
LONGEST_REQUEST = 1 << 16
TIMEOUT = 30.0
"""Seconds without a byte after which the agent counts as stuck."""
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What a decoder raises where an answer, or a request, is none."""

T = TypeVar("T")


class AgentError(Exception):
    """The agent could not be asked, or had no answer; the message is one line."""


class NoAgentError(AgentError):
    """No agent runs here."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sends."""

    version: int
    verb: str
    arguments: dict[str, str] = {}


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of an answer; one of the three is there."""

    part: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: str = ""


class TablePart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Some of a table's routes or hairpins; addresses are in base 64."""

    routes: tuple[tuple[Frontend, Route], ...] = ()
    hairpins: tuple[Endpoint, ...] = ()


class TableHead(msgspec.Struct, frozen=True, kw_only=True):
    """The rest of a table, and what a comparison with the kernel needs."""

    family: Family
    node: NodeFacts
    dataplane: str
    capabilities: Capabilities
    syncs: int
    """See `proxy.report.Syncs.count`."""
    pending: bool
    network_namespace: int


class WantedTable(NamedTuple):
    """What an agent wants a kernel to hold."""

    table: ForwardingTable
    head: TableHead


class Answer(NamedTuple):
    """What came back, undecoded."""

    parts: list[msgspec.Raw]
    result: msgspec.Raw


def network_namespace() -> int:
    """The inode of the calling thread's network namespace."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def socket_path(run_directory: str = RUN_DIRECTORY) -> Path:
    """Where the socket of an agent with that run directory is."""
    return Path(run_directory) / NAME


def request(verb: str, *, run_directory: str = RUN_DIRECTORY, timeout: float = TIMEOUT, **arguments: str) -> Answer:
    """Ask the agent.

    Args:
        verb: see the head of this module.
        run_directory: the agent's.
        timeout: seconds without a byte after which to give up.
        arguments: the verb's.

    Raises:
        NoAgentError: nobody listens there.
        AgentError: the socket may not be used, the agent refuses, or it does not answer.
    """
    path = socket_path(run_directory)
    message = msgspec.json.encode(Request(version=VERSION, verb=verb, arguments=arguments)) + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            # An agent that has no time for us has answered that, and left.
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(message)
            return _collect(_lines(connection))
    except TimeoutError:
        raise AgentError(f"the agent at {path} does not answer") from None
    except UNREADABLE:
        raise AgentError(f"the agent at {path} answers in a way that this sluice does not understand") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            raise NoAgentError(f"no agent answers at {path}: start it with sluice run") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AgentError(f"the agent's socket {path} is for root alone") from None
        raise AgentError(f"the agent at {path} cannot be asked: {error.strerror or error}") from None


def _lines(connection: socket.socket) -> Iterator[bytes]:
    held: list[bytes] = []
    while data := connection.recv(1 << 20):
        *whole, rest = data.split(b"\n")
        for line in whole:
            yield b"".join((*held, line))
            held.clear()
        held.append(rest)


def _collect(lines: Iterator[bytes]) -> Answer:
    decoder = msgspec.json.Decoder(Line)
    parts: list[msgspec.Raw] = []
    for data in lines:
        line = decoder.decode(data)
        if line.error:
            raise AgentError(f"the agent says: {line.error}")
        if line.result is not msgspec.UNSET:
            return Answer(parts, line.result)
        if line.part is not msgspec.UNSET:
            parts.append(line.part)
    raise AgentError("the agent ended in the middle of its answer")


# --- answers in their types --------------------------------------------------------------------------------------


def status(run_directory: str = RUN_DIRECTORY) -> Status:
    """How the agent is; raises what `request` raises."""
    return _decode(Status, request("status", run_directory=run_directory).result)


def table(family: Family, run_directory: str = RUN_DIRECTORY) -> WantedTable:
    """The table that the agent wants the kernel to hold; raises what `request` raises."""
    answer = request("table", run_directory=run_directory, family=family.label)
    head = _decode(TableHead, answer.result)
    decoder = msgspec.json.Decoder(TablePart)
    routes: dict[Frontend, Route] = {}
    hairpins: set[Endpoint] = set()
    try:
        for part in map(decoder.decode, answer.parts):
            routes.update(part.routes)
            hairpins.update(part.hairpins)
    except UNREADABLE as error:
        raise AgentError(f"the agent's table cannot be read: {error}") from None
    return WantedTable(
        ForwardingTable(family=head.family, node=head.node, routes=routes, hairpins=frozenset(hairpins)), head
    )


def serving(family: Family, run_directory: str = RUN_DIRECTORY) -> dict[Frontend, Serving]:
    """The endpoints that serve each frontend whose stale flows are deleted; raises what `request` raises."""
    answer = request("serving", run_directory=run_directory, family=family.label)
    kind = tuple[tuple[Frontend, Serving], ...]
    return dict(pair for part in answer.parts for pair in _decode(kind, part))


def decisions(service: str, run_directory: str = RUN_DIRECTORY) -> tuple[EndpointReport, ...]:
    """What became of each endpoint of a Service (`namespace/name`); raises what `request` raises."""
    answer = request("decisions", run_directory=run_directory, service=service)
    return _decode(tuple[EndpointReport, ...], answer.result)


def troubles(run_directory: str = RUN_DIRECTORY) -> tuple[Trouble, ...]:
    """What is wrong with objects and files; raises what `request` raises."""
    return _decode(tuple[Trouble, ...], request("troubles", run_directory=run_directory).result)


def counters(run_directory: str = RUN_DIRECTORY) -> tuple[Report, list[Row]]:
    """What has passed each Service; raises what `request` raises."""
    answer = request("counters", run_directory=run_directory)
    rows = [row for part in answer.parts for row in _decode(tuple[Row, ...], part)]
    return _decode(Report, answer.result), rows


def objects(service: str = "", run_directory: str = RUN_DIRECTORY) -> list[Any]:
    """The agent's objects as plain values in the API's spelling, of one Service (`namespace/name`) or all of them.

    Raises what `request` raises.
    """
    answer = request("objects", run_directory=run_directory, service=service)
    return [each for part in answer.parts for each in _decode(list[Any], part)]


def _decode(kind: type[T], data: msgspec.Raw) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as error:
        raise AgentError(f"the agent's answer cannot be read: {error}") from None
