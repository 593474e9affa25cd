"""The runner's timeline, with a clock of the test's own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from proxy.agent import _Agent
from proxy.config.settings import Settings
from proxy.runner import Periods, Runner


class Timeline:
    """A clock that jumps to the next thing that happens: a request that was planned, or the end of a wait."""

    def __init__(self, requests: Sequence[float], *, until: float) -> None:
        self.now = 0.0
        self.requests = sorted(requests)
        self.until = until
        self.runner: Runner

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        end = self.now + seconds
        while not event.is_set() and self.requests and self.requests[0] <= end:
            self.now = max(self.now, self.requests.pop(0))
            self.runner.request()
        if event.is_set():
            return True
        self.now = end
        if self.now > self.until:
            raise asyncio.CancelledError
        return False


def ran(
    periods: Periods, requests: Sequence[float], *, until: float, fails: Sequence[int] = ()
) -> list[tuple[float, bool]]:
    """When the runs were, and whether they were asked for; the runs with numbers in `fails` fail."""
    timeline = Timeline(requests, until=until)
    runs: list[tuple[float, bool]] = []

    async def run(periodic: bool) -> bool:
        runs.append((timeline.now, not periodic))
        return len(runs) - 1 not in fails

    timeline.runner = Runner(run, periods, timeline.wait)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(timeline.runner.loop())
    return runs


PERIODS = Periods(minimum=1.0, retry=5.0, maximum=10.0)


@pytest.mark.parametrize(
    ("mode", "maximum"), [("nftables", 3600.0), ("iptables", 3600.0), ("userspace", 3600.0), ("ipvs", 40.0)]
)
def test_SYN_3_periods_by_mode(mode: str, maximum: float) -> None:
    agent = SimpleNamespace(_mode=mode)
    settings = Settings(sync_period=40.0, min_sync_period=2.0)
    assert _Agent._periods(agent, settings) == Periods(minimum=2.0, retry=40.0, maximum=maximum)  # type: ignore[arg-type]


def test_SYN_4_the_first_request_of_a_quiet_period_runs_at_once() -> None:
    assert ran(PERIODS, [0.0], until=5) == [(0.0, True)]


def test_SYN_13_requests_within_the_minimum_are_one_run_when_it_is_over() -> None:
    assert ran(PERIODS, [0.0, 0.5, 0.999], until=5) == [(0.0, True), (1.0, True)]


def test_SYN_13_an_idle_runner_runs_after_the_maximum() -> None:
    runs = ran(PERIODS, [0.0], until=20)
    assert runs == [(0.0, True), (10.0, False), (20.0, False)]


def test_SYN_6_a_failure_is_tried_again_without_a_request_and_later_each_time() -> None:
    runs = ran(PERIODS, [0.0], until=30, fails=[0, 1, 2, 3, 4])
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(runs)]
    assert gaps[:5] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_SYN_5_a_request_before_a_retry_replaces_it() -> None:
    runs = ran(PERIODS, [0.0, 2.5], until=9, fails=[0, 1])
    assert runs == [(0.0, True), (1.0, False), (2.5, True)]


def test_SYN_8_without_a_minimum_every_request_runs_at_once() -> None:
    periods = Periods(minimum=0.0, retry=5.0)
    assert ran(periods, [0.0, 0.1, 0.2], until=3) == [(0.0, True), (0.1, True), (0.2, True)]


def test_an_urgent_request_does_not_wait_for_the_minimum() -> None:
    async def scenario() -> list[str]:
        events: list[str] = []

        async def run(_periodic: bool) -> bool:
            events.append("run")
            return True

        async def wait(event: asyncio.Event, seconds: float) -> bool:
            if event.is_set():
                return True
            events.append(f"waits {seconds:g}")
            if events == ["run", "waits 1"]:
                runner.request()
                runner.request(urgent=True)
                return True
            raise asyncio.CancelledError

        runner = Runner(run, PERIODS, wait)
        runner.request()
        assert runner.pending
        with pytest.raises(asyncio.CancelledError):
            await runner.loop()
        return events

    assert asyncio.run(scenario()) == ["run", "waits 1", "run", "waits 1"]


def test_requests_with_the_real_clock_wake_the_loop() -> None:
    async def scenario() -> list[bool]:
        runs: list[bool] = []
        done = asyncio.Event()

        async def run(periodic: bool) -> bool:
            runs.append(periodic)
            done.set()
            return True

        runner = Runner(run, Periods(minimum=0.0, retry=1.0))
        loop = asyncio.create_task(runner.loop())
        runner.request()
        await asyncio.wait_for(done.wait(), 10)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        return runs

    assert asyncio.run(scenario()) == [False]
