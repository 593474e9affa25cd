"""The sync loop of a family: deltas while the kernel is known, a whole sync when it is not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog

from proxy import desired
from proxy.compute import Outcome
from proxy.config.settings import Settings
from proxy.desired import Desired
from proxy.objects import TRIGGER_TIME_ANNOTATION, Key, Service
from proxy.runner import Allowance, Periods
from proxy.sources.base import Resource
from proxy.state import State
from proxy.sync import FamilySync
from rules.dataplane import Applied, Capabilities, DataplaneError
from rules.forwarding import Delta, Family, ForwardingTable, apply_delta
from tests.builders import endpoint, endpoint_slice, service
from tests.fakes.polling import eventually as until


class Memory:
    """A dataplane whose kernel is a variable."""

    name = "memory"
    family = Family.IPV4
    capabilities = Capabilities()

    def __init__(self) -> None:
        self.held: ForwardingTable | None = None
        self.calls: list[str] = []
        self.threads: list[int] = []
        self.fails = self.operations = 0

    def _call(self, name: str) -> None:
        self.threads.append(threading.get_ident())
        self.calls.append(name)
        if self.fails:
            self.fails -= 1
            raise DataplaneError("the kernel is in a bad mood")

    def read(self) -> ForwardingTable | None:
        return self.held

    def sync(self, table: ForwardingTable) -> Applied:
        self._call("sync")
        self.held = table
        return Applied(full=True, operations=self.operations)

    def apply(self, delta: Delta) -> Applied:
        self._call("apply")
        assert self.held is not None
        self.held = apply_delta(self.held, delta)
        return Applied()

    def cleanup(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to give back."""


class Reports:
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.drifts: list[tuple[int, bool]] = []

    def queued(self, family: Family) -> None:
        self.seen.append("queued")

    def started(self, family: Family) -> None:
        self.seen.append("started")

    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None:
        self.seen.append("succeeded")

    def failed(self, family: Family, seconds: float) -> None:
        self.seen.append("failed")

    def drifted(self, family: Family, differences: int, *, repaired: bool) -> None:
        self.drifts.append((differences, repaired))


class Rig:
    def __init__(self) -> None:
        self.state = State("node1")
        self.kernel = Memory()
        self.reports = Reports()
        self.desired = Desired(Settings(mode="nftables"), "node1", self.state, [Family.IPV4])
        periods = Periods(minimum=0.0, retry=0.01)
        self.sync = FamilySync(self.kernel, self.desired, self.state, periods, self.reports)
        self.state.on_change = self.sync.request

    def list_all(self, *names: str) -> None:
        slices = [endpoint_slice([endpoint("10.244.1.1")], name=f"{name}-1", owner=name) for name in names]
        self.state.replace(Resource.SLICES, slices)
        services = [service(name, cluster_ip=f"172.30.0.{number}") for number, name in enumerate(names, 1)]
        self.state.replace(Resource.SERVICES, services)

    def labels(self) -> set[str]:
        """Whose routes the kernel holds."""
        if self.kernel.held is None:
            return set()
        return {route.label for route in self.kernel.held.routes.values()}

    def wanted(self) -> bool:
        return self.kernel.held == self.desired.table(Family.IPV4)


def running(scenario: Callable[[Rig], Awaitable[None]], given: Rig | None = None) -> Rig:
    async def main() -> Rig:
        rig = given or Rig()
        loop = asyncio.create_task(rig.sync.run())
        try:
            await scenario(rig)
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
        return rig

    return asyncio.run(main())


def test_SYN_1_nothing_is_written_before_both_lists_are_there() -> None:
    async def scenario(rig: Rig) -> None:
        rig.state.replace(Resource.SERVICES, [service("web")])
        rig.sync.request()
        await asyncio.sleep(0)
        assert not rig.kernel.calls
        rig.state.replace(Resource.SLICES, [])
        await until(lambda: rig.kernel.calls == ["sync"])

    running(scenario)


def test_the_first_sync_is_whole_and_the_next_ones_are_deltas() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        rig.state.set(Resource.SERVICES, service("dns", cluster_ip="10.96.0.10"))
        await until(lambda: rig.kernel.calls == ["sync", "apply"] and rig.wanted())

    running(scenario)


def test_cfg_64_syncs_are_told_from_verbosity_2_but_for_the_first_and_for_repairs() -> None:
    """The others would be most of a node's log."""

    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        rig.state.set(Resource.SERVICES, service("dns", cluster_ip="10.96.0.10"))
        await until(lambda: rig.kernel.calls == ["sync", "apply"] and rig.wanted())
        for number, rig.kernel.operations in enumerate((0, 7), 3):
            rig.sync.doubt()
            await until(lambda number=number: len(rig.kernel.calls) == number and not rig.sync.at_work)

    with structlog.testing.capture_logs() as told:
        running(scenario)
    synced = [(each["full"], each["operations"], each["from_verbosity"]) for each in told if each["event"] == "synced"]
    assert synced == [(True, 0, 0), (False, 0, 2), (True, 0, 2), (True, 7, 0)]


def test_a_small_delta_is_applied_on_the_loops_own_thread_and_a_large_one_is_not() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.capabilities = Capabilities(at_once=5)
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        rig.state.set(Resource.SERVICES, service("dns", cluster_ip="10.96.0.10"))
        await until(lambda: rig.kernel.calls == ["sync", "apply"] and rig.wanted())
        pods = [endpoint(f"10.244.1.{number}") for number in range(1, 9)]
        rig.state.set(Resource.SLICES, endpoint_slice(pods, name="web-1", owner="web"))
        await until(lambda: rig.kernel.calls == ["sync", "apply", "apply"] and rig.wanted())
        here = threading.get_ident()
        assert [thread == here for thread in rig.kernel.threads] == [False, True, False]

    running(scenario)


def test_a_change_that_changes_no_route_writes_nothing_and_counts_as_done() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        done = rig.reports.seen.count("succeeded")
        rig.state.set(Resource.SLICES, endpoint_slice([endpoint("10.244.1.1")], owner="nobody"))
        await until(lambda: rig.reports.seen.count("succeeded") > done)
        assert rig.kernel.calls == ["sync"]

    running(scenario)


def test_SYN_6_after_a_failure_the_kernel_is_read_again() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        rig.kernel.fails = 2
        rig.state.delete(Resource.SERVICES, Key("ns", "web"))
        await until(lambda: rig.kernel.calls == ["sync", "apply", "sync", "sync"] and rig.wanted())
        assert rig.reports.seen.count("failed") == 1, "a refused delta alone is no failure"

    running(scenario)


def test_doubt_reads_the_kernel_again() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        rig.kernel.held = ForwardingTable(family=Family.IPV4)
        rig.sync.doubt()
        await until(lambda: rig.kernel.calls == ["sync", "sync"] and rig.wanted())

    running(scenario)


def test_a_process_that_fights_for_our_rules_is_complained_of_once_for_as_long_as_it_does() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(rig.wanted)
        for _ in range(6):
            syncs = len(rig.kernel.calls)
            rig.sync.doubt()
            await until(lambda syncs=syncs: len(rig.kernel.calls) > syncs)

    rig = Rig()
    periods, allowance = Periods(minimum=0.0, retry=0.01), Allowance(burst=2, every=0.01)
    rig.sync = FamilySync(
        rig.kernel, rig.desired, rig.state, periods, rig.reports, allowance=allowance, clock=lambda: 1.0
    )
    rig.state.on_change = rig.sync.request
    with structlog.testing.capture_logs() as logs:
        running(scenario, rig)
    assert len([each for each in logs if "again and again" in each["event"] and each["log_level"] == "warning"]) == 1


def test_doubt_during_an_apply_is_not_lost() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])
        loop = asyncio.get_running_loop()
        apply = rig.kernel.apply

        def interrupted(delta: Delta) -> Applied:
            asyncio.run_coroutine_threadsafe(_call(rig.sync.doubt), loop).result()
            return apply(delta)

        rig.kernel.apply = interrupted  # type: ignore[method-assign]
        rig.state.delete(Resource.SERVICES, Key("ns", "web"))
        await until(lambda: rig.kernel.calls == ["sync", "apply", "sync"] and rig.wanted())

    running(scenario)


async def _call(function: Callable[[], None]) -> None:
    function()


def test_two_Services_that_claim_one_frontend_are_reported_and_the_loser_takes_over() -> None:
    async def scenario(rig: Rig) -> None:
        old = service("old", created="2026-01-01T00:00:00Z")
        new = service("new", created="2026-02-01T00:00:00Z")
        rig.state.replace(Resource.SLICES, [])
        rig.state.replace(Resource.SERVICES, [new, old])
        await until(lambda: ("conflict", "Service ns/new") in rig.state.troubles)
        rig.state.delete(Resource.SERVICES, old.key)
        await until(lambda: not rig.state.troubles and rig.labels() == {"ns/new"})

    running(scenario)


def test_an_address_of_the_node_that_comes_computes_every_Service_and_writes_the_difference() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web", "shop")
        await until(lambda: rig.kernel.calls == ["sync"])
        rig.desired.set_interfaces({"eth0": (bytes([192, 0, 2, 1]),)})
        rig.sync.request()
        await until(lambda: rig.reports.seen.count("succeeded") == 2)
        assert rig.wanted()
        assert rig.kernel.calls == ["sync"], "no route depends on that address"

    running(scenario)


def test_a_Service_that_cannot_be_computed_keeps_its_rules_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = desired.compute

    def fragile(each: Service, *arguments: Any) -> Outcome:
        if each.spec.cluster_ip == "172.30.0.9":
            raise ZeroDivisionError("a bug")
        return compute(each, *arguments)

    monkeypatch.setattr(desired, "compute", fragile)

    async def scenario(rig: Rig) -> None:
        rig.list_all("web", "shop")
        await until(lambda: rig.labels() == {"ns/web", "ns/shop"})
        rig.state.set(Resource.SERVICES, service("web", cluster_ip="172.30.0.9"))
        rig.state.delete(Resource.SERVICES, Key("ns", "shop"))
        await until(lambda: rig.labels() == {"ns/web"})
        assert "a bug" in rig.state.troubles["compute", "Service ns/web"]

    running(scenario)


def test_MET_5_what_waits_for_a_sync_that_never_succeeds_does_not_pile_up() -> None:
    state = State("node1")
    wanted = Desired(Settings(), "node1", state, [Family.IPV4])

    async def churn() -> None:
        for number in range(2 * desired.MOST_TRIGGERS):
            time = f"2026-01-01T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}Z"
            state.set(
                Resource.SLICES,
                endpoint_slice(name="web-1", owner="web", annotations={TRIGGER_TIME_ANNOTATION: time}),
            )
            if number % 1000 == 999:
                await wanted.refresh()

    asyncio.run(churn())
    triggers = wanted.take_triggers(Family.IPV4)
    assert len(triggers) == desired.MOST_TRIGGERS
    assert triggers[-1].time > triggers[0].time, "the newest are those that count"
    assert wanted.take_triggers(Family.IPV4) == []


def test_SYN_9_a_sync_that_was_asked_for_before_the_loop_began_waits_since_then() -> None:
    """The start sets health right; what is to be written all the same must not be forgotten by it (HC-2)."""

    async def main() -> list[str]:
        rig = Rig()
        rig.list_all("web")
        rig.kernel.fails = 1
        loop = asyncio.create_task(rig.sync.run())
        await until(lambda: "failed" in rig.reports.seen)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        return rig.reports.seen

    seen = asyncio.run(main())
    assert seen[seen.index("started") + 1 : seen.index("failed")] == ["queued"]


class Slow(Memory):
    """A kernel that takes until it is let, and remembers how many write to it at once."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family  # type: ignore[misc]  # of another family than the rig's
        self.let = threading.Event()
        self.at_once = self.most = 0

    def sync(self, table: ForwardingTable) -> Applied:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.let.wait(20)
        self.at_once -= 1
        return super().sync(table)


def test_SYN_11_families_are_written_beside_each_other_and_each_by_one_sync_at_a_time() -> None:
    async def main() -> None:
        state = State("node1")
        kernels = [Slow(family) for family in Family]
        desired = Desired(Settings(mode="nftables"), "node1", state, Family)
        periods = Periods(minimum=0.0, retry=0.01)
        syncs = [FamilySync(kernel, desired, state, periods, Reports()) for kernel in kernels]
        tasks = [asyncio.create_task(each.run()) for each in syncs]
        try:
            state.replace(Resource.SLICES, [])
            state.replace(Resource.SERVICES, [service("web")])
            for _ in range(3):
                for each in syncs:
                    each.request()
                await until(lambda: [kernel.at_once for kernel in kernels] == [1, 1])
                await asyncio.sleep(0)
            for kernel in kernels:
                kernel.let.set()
            await until(lambda: not any(each.at_work or each.statistics().pending for each in syncs))
            assert [kernel.most for kernel in kernels] == [1, 1]
        finally:
            for kernel in kernels:
                kernel.let.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_SYN_7_an_error_of_our_own_making_is_a_failed_sync_and_not_the_end() -> None:
    async def scenario(rig: Rig) -> None:
        rig.list_all("web")
        await until(lambda: rig.kernel.calls == ["sync"])

        def broken(_: Delta) -> Applied:
            raise ZeroDivisionError("a bug")

        rig.kernel.apply = broken  # type: ignore[method-assign]
        rig.state.delete(Resource.SERVICES, Key("ns", "web"))
        await until(lambda: rig.kernel.calls == ["sync", "sync"] and rig.wanted())

    running(scenario)
