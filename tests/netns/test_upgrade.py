"""Restarts, deaths and an upgrade of the agent: no connection through any kind of frontend fails, no flow is cut.

In userspace mode that holds for the agent, as flows belong to workers, which outlive it.  Mode ipvs runs where the
kernel has IPVS: `make test-all` tries it in the virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from proxy.demo.world import World
from proxy.modes import IPTABLES, open_dataplane
from rules.dataplane import UnavailableError
from rules.forwarding import Family
from rules.iptables.programs import available
from tests.netns.agent import Agent
from tests.netns.asking import eventually, said
from tests.netns.netlink_witness import witness
from tests.netns.patience import TIME_SCALE
from tests.netns.runner import ANSWER
from tests.netns.streams import INTERVAL, STREAMS, Stream, listen, objects, streaming
from tests.netns.test_agent_lifecycle import synced_since

CHECKOUT = Path(__file__).parents[2]
RESTARTS = 20
WAYS = ("nftables", "iptables-nft", "iptables-legacy", "userspace", "ipvs")
WATCHED = ("nftables", "ipvs")
"""Whose every write netlink shows.  At its start mode iptables writes a chain that nothing leads to, and removes it, to
learn what extensions there are; iptables-legacy writes by setsockopt.  The log tells of their operations."""
PACE = INTERVAL if TIME_SCALE == 1 else 1.0
"""Seconds between two connections of a stream.  An emulated machine makes 60 to 100 connections a second through all of
them where it has a processor of its own and nothing else to do; here it starts agents, and is asked for 18."""

FLOWS_FROM = 61001
"""The first port of clients whose flows stay: above those of streams, and each has one of its own.  IPVS takes what an
endpoint sends to one port of a client for part of the newest connection between the two, whatever Service it is of."""


class Flow(NamedTuple):
    """A connection, or a UDP flow, that stays."""

    stream: Stream
    socket: socket.socket
    answering: str

    def ask(self) -> str:
        """Who answers now, or why nobody does."""
        return _ask(self.socket)


def _ask(connected: socket.socket) -> str:
    try:
        connected.send(b"?\n")
        line = connected.recv(4096)
    except OSError as error:
        return str(error)
    return str(json.loads(line)["host"]) if line else "it was closed"


def flows(world: World, streams: Sequence[Stream], stack: contextlib.ExitStack) -> list[Flow]:
    """A flow of each stream's kind; the stack closes them."""
    found = []
    for port, each in enumerate(streams, start=FLOWS_FROM):
        if ":" in each.address and not world.ipv6:
            continue

        def connect(each: Stream = each, port: int = port) -> socket.socket:
            family = socket.AF_INET6 if ":" in each.address else socket.AF_INET
            kind = socket.SOCK_DGRAM if each.protocol == "UDP" else socket.SOCK_STREAM
            connected = stack.enter_context(socket.socket(family, kind))
            connected.settimeout(ANSWER)
            connected.bind(("", port))
            connected.connect((each.address, each.port))
            return connected

        connected = world.namespaces[each.host].inside(connect)
        found.append(Flow(each, connected, _ask(connected)))
    return found


def ways(names: Sequence[str]) -> list[Any]:
    """Modes with their programs, as parameters of `serving`: the tests of one by one worker."""
    return [pytest.param(way, marks=pytest.mark.xdist_group(f"upgrade-{way}")) for way in names]


@pytest.fixture(params=ways(WAYS))
def serving(
    request: pytest.FixtureRequest, root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Agent]:
    """An agent in a world of its own, that has synced Services of every kind."""
    mode, _, backend = request.param.partition("-")
    if backend and backend not in available(Family.IPV4):
        pytest.skip(f"iptables-{backend} is not installed")
    monkeypatch.setenv(IPTABLES, backend)
    with World(prefix=f"sluice-up-{WAYS.index(request.param)}") as world:
        if mode == "ipvs" and (obstacle := world.namespaces["node1"].inside(without_ipvs)):
            pytest.skip(obstacle)
        agent = Agent(world, tmp_path, mode)
        try:
            agent.configure({})
            listen(world)
            agent.apply(objects())
            yield agent
        finally:
            agent.sweep()


def without_ipvs() -> str:
    """Why mode ipvs cannot be run here; empty where it can."""
    try:
        open_dataplane("ipvs", Family.IPV4).close()
    except UnavailableError as error:
        return str(error)
    return ""


def restart(agent: Agent, number: int) -> None:
    """End the agent by a signal, start it, and wait for its first sync of every family."""
    position = len(agent.log.read_text())
    os.kill(agent.pid, number)
    if number == signal.SIGKILL:
        agent.kill()
    else:
        agent.stop()
    agent.start()
    eventually(lambda: len(synced_since(agent, position)) == len(agent.families), "the first sync of every family")


def previous(directory: Path, mode: str) -> Path | None:
    """The code of the commit before, below a directory; None where there is none that has the mode."""
    archive = subprocess.run(
        ["git", "-c", "safe.directory=*", "archive", "HEAD~1", "proxy", "rules"],
        cwd=CHECKOUT,
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        return None
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(directory, filter="data")
    ask = "from proxy import modes; print(modes.__file__, *modes.BUILT)"
    found = subprocess.run(
        [sys.executable, "-c", ask], cwd=directory, capture_output=True, text=True, check=True
    ).stdout.split()
    assert found[0].startswith(str(directory)), "another version would run"
    return directory if mode in found else None


def second_attempts(world: World) -> dict[str, int]:
    """By host, how many first packets of TCP connections were sent again, as nothing came back for a second."""
    found = {}
    for host in world.namespaces:
        lines = said(world, "cat", "/proc/net/netstat", host=host).splitlines()
        names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
        found[host] = int(dict(zip(names, values, strict=True))["TCPSynRetrans"])
    return found


def test_no_connection_fails_over_restarts_deaths_and_an_upgrade(serving: Agent, tmp_path: Path) -> None:
    """NFT-22, CFG-51, DESIGN 4.3."""
    world = serving.world
    older = previous(tmp_path / "previous", serving.mode)
    with contextlib.ExitStack() as stack:
        lasting = flows(world, STREAMS, stack)
        assert all(flow.answering in flow.stream.answering for flow in lasting), [flow.answering for flow in lasting]
        before = second_attempts(world)
        with streaming(world, interval=PACE) as streams:
            for turn in range(RESTARTS):
                restart(serving, signal.SIGKILL if turn % 4 == 3 else signal.SIGTERM)
                # A UDP flow that says nothing for half a minute is forgotten, and balanced afresh.
                cut = [f"{flow.stream.about}: {now}" for flow in lasting if (now := flow.ask()) != flow.answering]
                assert not cut, f"restart {turn}"
            if older is not None:
                # Back, and forward again: each reads what the other one has written.
                serving.code = older
                restart(serving, signal.SIGTERM)
                serving.code = None
                restart(serving, signal.SIGTERM)
        cut = [f"{flow.stream.about}: {now}" for flow in lasting if (now := flow.ask()) != flow.answering]
    assert not streams.wrong(), f"of {streams.made} connections"
    assert not cut
    assert second_attempts(world) == before
    if older is None:
        pytest.skip("restarts cost no connection; there is no previous commit with this mode to upgrade from")


@pytest.mark.parametrize("serving", ways(WATCHED), indirect=True)
def test_a_restart_over_unchanged_objects_writes_nothing(serving: Agent) -> None:
    """NFT-22, DESIGN 4.3: neither the agent's life from its start to its end, nor a program that it runs."""
    with witness(serving.world.namespaces["node1"]) as seen:
        restart(serving, signal.SIGTERM)
        serving.stop()
        assert not seen.writes()
        serving.start()
        serving.apply(objects())
        assert seen.writes(), "what was published anew was written unseen"
