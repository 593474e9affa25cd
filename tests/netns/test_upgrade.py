"""Restarts, deaths and an upgrade of the agent: no connection through any kind of frontend fails, no flow is cut.

In userspace mode that holds for the agent, as flows belong to workers, which outlive it.
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
from typing import NamedTuple

import pytest

from proxy.demo.world import World
from proxy.modes import IPTABLES
from rules.forwarding import Family
from rules.iptables.programs import available
from tests.netns.agent import Agent
from tests.netns.asking import eventually
from tests.netns.runner import ANSWER
from tests.netns.streams import STREAMS, Stream, listen, objects, streaming
from tests.netns.test_agent_lifecycle import synced_since

CHECKOUT = Path(__file__).parents[2]
RESTARTS = 20
WAYS = ("nftables", "iptables-nft", "iptables-legacy", "userspace")


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
    for each in streams:
        if ":" in each.address and not world.ipv6:
            continue

        def connect(each: Stream = each) -> socket.socket:
            family = socket.AF_INET6 if ":" in each.address else socket.AF_INET
            kind = socket.SOCK_DGRAM if each.protocol == "UDP" else socket.SOCK_STREAM
            connected = stack.enter_context(socket.socket(family, kind))
            connected.settimeout(ANSWER)
            connected.connect((each.address, each.port))
            return connected

        connected = world.namespaces[each.host].inside(connect)
        found.append(Flow(each, connected, _ask(connected)))
    return found


@pytest.fixture(params=[pytest.param(way, marks=pytest.mark.xdist_group(f"upgrade-{way}")) for way in WAYS])
def serving(
    request: pytest.FixtureRequest, root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Agent]:
    """An agent in a world of its own, that has synced Services of every kind."""
    mode, _, backend = request.param.partition("-")
    if backend and backend not in available(Family.IPV4):
        pytest.skip(f"iptables-{backend} is not installed")
    monkeypatch.setenv(IPTABLES, backend)
    with World(prefix=f"sluice-up-{WAYS.index(request.param)}") as world:
        agent = Agent(world, tmp_path, mode)
        try:
            agent.configure({})
            listen(world)
            agent.apply(objects())
            yield agent
        finally:
            agent.sweep()


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


def test_no_connection_fails_over_restarts_deaths_and_an_upgrade(serving: Agent, tmp_path: Path) -> None:
    """NFT-22, CFG-51, DESIGN 4.3."""
    world = serving.world
    older = previous(tmp_path / "previous", serving.mode)
    with contextlib.ExitStack() as stack:
        lasting = flows(world, STREAMS, stack)
        assert all(flow.answering in flow.stream.answering for flow in lasting), [flow.answering for flow in lasting]
        with streaming(world) as streams:
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
    if older is None:
        pytest.skip("restarts cost no connection; there is no previous commit with this mode to upgrade from")
