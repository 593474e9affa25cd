"""What follows syncs: nothing of it that fails ends the agent."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence

import pytest
import structlog.testing

from proxy import effects, modes, takeover
from proxy.config.settings import Settings
from proxy.desired import Desired
from proxy.effects import Effects
from proxy.serving.healthcheck import HealthCheckServers
from proxy.serving.metrics import Metrics
from proxy.state import State
from rules.dataplane import Applied
from rules.forwarding import Family
from tests.fakes.memory_dataplane import FlakyMemory
from tests.fakes.polling import eventually

FAILURES = (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/proc"), ValueError("a mistake of ours"))


class NoFlows:
    """Connection tracking that is not there."""

    def __init__(self, *_: object) -> None:
        self.begun = asyncio.Event()
        self.begun.set()

    def written(self, *_: object) -> None: ...

    async def run(self) -> None: ...


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "Reconciler", NoFlows)
    monkeypatch.setattr(modes, "release_others", lambda _: 0.0)
    monkeypatch.setattr(modes, "remove_others", lambda _: [])
    monkeypatch.setattr(takeover, "take_over", lambda _: [])


@pytest.fixture(params=FAILURES, ids=["no descriptor", "bug"])
def refuse(request: pytest.FixtureRequest) -> Callable[[object], list[str]]:
    def fail(_: object) -> list[str]:
        raise request.param

    return fail


async def lived(until: Sequence[Mapping[str, object]]) -> bool:
    """Whether effects live on after a first sync, once something was logged."""
    state = State("node1")
    settled = asyncio.Event()
    settled.set()
    following = Effects(
        FlakyMemory(Family.IPV4),
        Desired(Settings(), "node1", state, [Family.IPV4]),
        Metrics("nftables", "1"),
        HealthCheckServers(Family.IPV4, lambda: True),
        settled,
        remove_kube_proxy_rules=True,
    )
    task = asyncio.create_task(following.run())
    following.succeeded(Applied())
    await eventually(lambda: task.done() or any(each["log_level"] == "warning" for each in until))
    await asyncio.sleep(0)
    alive = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return alive


@pytest.mark.parametrize("what", ["release_others", "remove_others"])
def test_what_other_modes_have_left_may_be_out_of_reach(
    what: str, refuse: Callable[[object], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, what, refuse)
    with structlog.testing.capture_logs() as logs:
        assert asyncio.run(lived(logs))
    [told] = [each for each in logs if each["log_level"] == "warning"]
    assert told["event"] == "what another mode has left stays"


def test_what_kube_proxy_has_left_may_be_out_of_reach(
    refuse: Callable[[object], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "take_over", refuse)
    with structlog.testing.capture_logs() as logs:
        assert asyncio.run(lived(logs))
    [told] = [each for each in logs if each["log_level"] == "warning"]
    assert told["event"] == "rules of kube-proxy stay"
