"""Servers and probes inside the hosts of a world, asked for from outside; the other side of `proxy.demo.hosts`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy.demo import hosts


class Server(NamedTuple):
    """Where a host listens; without an address, on all of its own."""

    host: str
    protocol: str
    address: str
    port: int


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """Connections to make, all at once."""

    host: str
    address: str
    port: int
    protocol: str = "TCP"
    source: str = ""
    """The address to connect from; empty: the kernel's choice."""
    source_port: int = 0
    count: int = 1
    timeout: float = 3.0
    """Seconds of silence that count as dropped."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one connection."""

    kind: str
    """`answered`; `icmp`: an ICMP error came back; `reset`: a TCP reset; `silent`: nothing within the time;
    `failed`: the kernel of the host itself refused, for `reason`."""
    began: float
    """The monotonic clock when it began, the same clock in every process."""
    seconds: float
    host: str = ""
    """Who answered."""
    address: str = ""
    port: int = 0
    peer: tuple[str, int] = ("", 0)
    """Whom the server saw."""
    local: tuple[str, int] = ("", 0)
    """Who the client was."""
    icmp: tuple[int, int] = (0, 0)
    """Type and code."""
    sender: str = ""
    """Who sent the ICMP error."""
    reason: str = ""

    @property
    def refused(self) -> bool:
        """An ICMP or ICMPv6 port unreachable came back, which is what a Service without endpoints answers."""
        return self.kind == "icmp" and self.icmp in ((3, 3), (1, 4))

    def __str__(self) -> str:
        match self.kind:
            case "answered":
                (address, port), (own, own_port) = self.peer, self.local
                seen = f"{address} for {own}" if address != own else address
                seen += f", port {port} for {own_port}" if port != own_port else ""
                return f"{self.host}:{self.port} answered, saw {seen}"
            case "icmp":
                return f"ICMP {self.icmp[0]}/{self.icmp[1]} from {self.sender}"
            case "failed":
                return self.reason
            case kind:
                return kind


class _Reply(msgspec.Struct):
    errors: list[str] = []
    results: list[list[Outcome]] = []
    outcomes: list[Outcome] = []


class Probes:
    """The process of the hosts.  Its methods block until it has answered."""

    def __init__(
        self, paths: Mapping[str, Path], program: Sequence[str] = (sys.executable, "-I", "-S", hosts.__file__)
    ) -> None:
        command = [*program, *(f"{name}={path}" for name, path in paths.items())]
        # A session of its own: ^C at the terminal is for the parent, whose end ends the input and with it the process.
        self._process = subprocess.Popen(  # noqa: S603  # our own script
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._open: set[Server] = set()

    def open(self, servers: Iterable[Server]) -> None:
        """Listen; what listens already goes on.

        Raises:
            OSError: a port is taken; the others listen.
        """
        wanted = [server for server in dict.fromkeys(servers) if server not in self._open]
        errors = self._ask({"do": "open", "servers": wanted}).errors
        self._open.update(wanted)
        if errors:
            raise OSError("; ".join(errors))

    def shut(self, servers: Iterable[Server] | None = None) -> None:
        """Listen no longer there; without argument, anywhere.  Connections that are open stay open."""
        chosen = list(self._open if servers is None else servers)
        self._ask({"do": "close", "servers": chosen})
        self._open.difference_update(chosen)

    def probe(self, *probes: Probe) -> list[list[Outcome]]:
        """Make all connections of all probes at the same time; per probe, what came of each."""
        return self._ask({"do": "probe", "probes": probes}).results

    def start(self, name: str, probe: Probe, interval: float) -> None:
        """Make a connection every `interval` seconds, until `stop`."""
        self._ask({"do": "start", "name": name, "probe": probe, "interval": interval})

    def stop(self, name: str) -> list[Outcome]:
        """Stop, wait for the connections that are under way, and return all outcomes in the order of their ends."""
        return self._ask({"do": "stop", "name": name}).outcomes

    def close(self) -> None:
        """End the process."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ask(self, request: Mapping[str, object]) -> _Reply:
        pipes = self._process.stdin, self._process.stdout
        if pipes[0] is None or pipes[1] is None:
            raise RuntimeError("the hosts' process has no pipes")
        pipes[0].write(msgspec.json.encode(request) + b"\n")
        pipes[0].flush()
        line = pipes[1].readline()
        if not line:
            raise RuntimeError("the hosts' process has ended")
        return msgspec.json.decode(line, type=_Reply)


def count_answers(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How often each host answered, the busiest first."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.kind == "answered":
            counts[outcome.host] = counts.get(outcome.host, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
