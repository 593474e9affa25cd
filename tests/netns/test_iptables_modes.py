"""The agent is restarted in another mode, from each to the next, and no connection through any frontend fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from proxy.demo.world import World
from proxy.modes import IPTABLES
from rules.dataplane import UnavailableError
from rules.forwarding import Family
from rules.iptables.programs import BACKENDS, available
from rules.ipvs import DEVICE
from rules.ipvs.services import Ipvs
from tests.netns.agent import Agent
from tests.netns.asking import eventually, nft, said
from tests.netns.streams import INTERVAL, STREAMS, listen, objects, streaming

# One world for all of them, in which nobody else writes rules.
pytestmark = pytest.mark.xdist_group("iptables-modes")


class Way(NamedTuple):
    """A mode, and by which iptables it writes."""

    mode: str
    programs: str = ""

    def __str__(self) -> str:
        return f"{self.mode} {self.programs}".rstrip()


NFTABLES = Way("nftables")
IPVS = Way("ipvs")
"""Where the kernel has it; its rules are written by the programs in use."""
ROUND = (NFTABLES, Way("iptables", "nft"), Way("iptables", "legacy"), NFTABLES)
THROUGH_IPVS = (IPVS, NFTABLES, IPVS, Way("iptables", "nft"))
"""It begins with ipvs, so that its dozen modules are loaded before connections are counted: an emulated kernel stands
still for a second while it links them."""
BACK = (Way("iptables", "legacy"), Way("iptables", "nft"), Way("iptables", "legacy"))


@pytest.fixture(scope="module")
def modes_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-modes") as world:
        yield world


class Switched:
    """An agent of each mode, of which one runs."""

    def __init__(self, world: World, agents: dict[str, Agent], environment: pytest.MonkeyPatch) -> None:
        self._world = world
        self._agents = agents
        self._environment = environment
        self._running: Agent | None = None

    def to(self, way: Way) -> None:
        """Restart the agent this way, and wait until it serves and nothing of another way is left."""
        if self._running is not None:
            self._running.stop()
        self._environment.setenv(IPTABLES, way.programs)
        self._running = agent = self._agents[way.mode]
        agent.configure({})
        agent.apply(objects())
        eventually(lambda: self.holding() == {way}, f"{way} alone")

    def holding(self) -> set[Way]:
        """Which ways hold anything of ours."""
        found = {NFTABLES} if "sluice" in nft(self._world, "list", "tables") else set()
        for backend in BACKENDS:
            listings = [said(self._world, f"{name}-{backend}-save") for name in ("iptables", "ip6tables")]
            if any(re.search("^:SLUICE-(?!IPVS-)", each, re.MULTILINE) for each in listings):
                found.add(Way("iptables", backend))
            if any("SLUICE-IPVS-" in each for each in listings):
                found.add(IPVS)
        if DEVICE in said(self._world, "ip", "link"):
            found.add(IPVS)
        return found


@pytest.fixture
def switched(
    modes_world: World, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Switched]:
    if missing := set(BACKENDS) - available(Family.IPV4).keys():
        pytest.skip(f"iptables-{missing.pop()} is not installed")
    modes = ("nftables", "iptables", "ipvs")
    agents = {mode: Agent(modes_world, tmp_path_factory.mktemp(mode), mode) for mode in modes}
    listen(modes_world)
    yield Switched(modes_world, agents, monkeypatch)
    for agent in agents.values():
        agent.stop()
    modes_world.probes.shut()


def has_ipvs() -> bool:
    try:
        with Ipvs():
            return True
    except UnavailableError:
        return False


@pytest.mark.parametrize(
    "ways",
    [
        ROUND,
        BACK,
        pytest.param(THROUGH_IPVS, marks=pytest.mark.skipif("not has_ipvs()", reason="this kernel has no IPVS")),
    ],
    ids=["through all modes", "from one iptables to the other", "through ipvs"],
)
def test_modes_change_places_and_no_connection_fails(
    ways: tuple[Way, ...], switched: Switched, modes_world: World
) -> None:
    """DESIGN 4.10: the new mode's rules are in place before the old one's go."""
    switched.to(ways[0])
    # A kernel with IPVS may be an emulated one, which cannot make all these connections while agents start.
    through, interval = (STREAMS[::3], INTERVAL * 3) if IPVS in ways else (STREAMS, INTERVAL)
    with streaming(modes_world, through, interval=interval) as streams:
        for way in ways[1:]:
            switched.to(way)
    wrong = streams.wrong()
    assert not wrong, f"{len(wrong)} of {streams.made} connections:\n" + "\n".join(wrong)
