"""One world and one agent per worker; scenarios are applied to them as differences."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from proxy.demo import namespaces
from proxy.demo.world import World
from tests.netns.agent import Agent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/netns/" in str(item.path):
            item.add_marker("netns")


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
    agent.stop()
