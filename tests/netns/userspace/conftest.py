"""A worker without an agent in a network namespace of its own, with the backends that a test asks for; and an agent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from proxy.demo.world import World
from rules.forwarding import Backend
from tests.netns.agent import Agent
from tests.netns.streams import listen, objects
from tests.netns.userspace.agent_rig import Hasty
from tests.netns.userspace.rig import Held, Serve, Server, Start, Worker, anyip_namespace, name_of_itself


@pytest.fixture
def namespace(root: None) -> Iterator[None]:
    with anyip_namespace():
        yield


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    """The event loop of a worker, for what a loop may do otherwise than the other."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return str(request.param)


@pytest.fixture
def start(namespace: None) -> Iterator[Start]:
    """Starts workers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(index: int = 0, *options: str, files: int = 0) -> Worker:
            worker = Worker(index, *options, files=files)
            stack.callback(worker.end)
            return worker

        yield begin


@pytest.fixture
def serve(namespace: None) -> Iterator[Serve]:
    """Starts TCP backends, which end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(address: str, handle: Callable[..., object] = name_of_itself) -> Server:
            server = Server(address, handle)
            stack.callback(server.close)
            return server

        yield begin


@pytest.fixture
def held(serve: Serve) -> Iterator[tuple[Held, Backend]]:
    """A backend whose side of each connection is the test's."""
    holder = Held()
    try:
        yield holder, serve("10.96.1.1", holder).backend
    finally:
        holder.over.set()


# --- with an agent -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="package")
def own_world(root: None) -> Iterator[World]:
    with World(prefix="sluice-user") as world:
        yield world


@pytest.fixture(scope="package")
def own_agent(own_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Hasty(own_world, tmp_path_factory.mktemp("userspace"), "userspace")
    yield agent
    agent.sweep()


@pytest.fixture
def serving(own_agent: Agent, own_world: World) -> Iterator[Agent]:
    """An agent that runs and has synced Services of every kind."""
    own_agent.configure({})
    listen(own_world)
    own_agent.apply(objects())
    yield own_agent
    own_world.probes.shut()
