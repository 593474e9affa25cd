"""One world and one agent per worker; scenarios are applied to them as differences."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.demo import namespaces
from proxy.demo.world import World
from tests.netns.agent import Agent

CAPABILITIES = ("source_address", "sctp")
"""What scenarios may need and a mode may lack; its tests say how many probes that concerns."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/netns/" in str(item.path):
            item.add_marker("netns")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many probes were left out, or not looked at wholly, for want of a capability (DESIGN 6)."""
    lacking: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name in CAPABILITIES:
                lacking[name] += value
    for name, probes in lacking.items():
        terminalreporter.write_line(f"{probes} probes beyond the capability {name}")


@pytest.fixture(scope="session")
def mode() -> str:
    """The mode that scenarios run in: SLUICE_TEST_MODE, or nftables."""
    return os.environ.get("SLUICE_TEST_MODE", "nftables")


@pytest.fixture(scope="session")
def root() -> None:
    """Skips where no network namespace can be made."""
    if obstacle := namespaces.obstacle():
        pytest.skip(obstacle)


@pytest.fixture(scope="session")
def world(root: None) -> Iterator[World]:
    """The cluster of this worker."""
    with World(prefix="sluice-test") as world:
        yield world


@pytest.fixture(scope="session")
def agent(world: World, mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """The agent on node1 of this worker's cluster."""
    agent = Agent(world, tmp_path_factory.mktemp(f"agent-{os.getpid()}"), mode)
    yield agent
    if mode == "userspace":
        agent.sweep()  # workers outlive the agent, and would outlive the world
    agent.stop()
