"""What becomes of rules that another process has changed: found, named, repaired or only told; a fight is no loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.settings import DriftPolicy, Settings
from proxy.desired import Desired
from proxy.objects import Key
from proxy.runner import Allowance, Periods
from proxy.sources.base import Resource
from proxy.state import State
from proxy.sync import FamilySync
from rules.dataplane import Applied, Capabilities, DataplaneError, Stranger
from rules.forwarding import Delta, Family, ForwardingTable, apply_delta
from tests.builders import endpoint, endpoint_slice, service
from tests.fakes.polling import eventually as until

NFT = Stranger("nft", 4711)
LONG = 3600.0


class Memory:
    """A dataplane whose kernel is a variable, and that knows what it held before."""

    name = "memory"
    family = Family.IPV4
    capabilities = Capabilities()

    def __init__(self) -> None:
        self.held: ForwardingTable | None = None
        self.calls: list[str] = []
        self.unreadable = self.unwritable = False

    def read(self) -> ForwardingTable | None:
        self.calls.append("read")
        if self.unreadable:
            raise DataplaneError("it cannot be read")
        return self.held

    def sync(self, table: ForwardingTable) -> Applied:
        self.calls.append("sync")
        found, self.held = self.held, table
        return Applied(full=True, found=found, operations=int(found != table))

    def apply(self, delta: Delta) -> Applied:
        self.calls.append("apply")
        if self.unwritable:
            self.unwritable = False
            raise DataplaneError("there is no such element")
        assert self.held is not None
        self.held = apply_delta(self.held, delta)
        return Applied(operations=1)


class Reports:
    def __init__(self) -> None:
        self.drifts: list[tuple[int, bool]] = []

    def queued(self, family: Family) -> None: ...
    def started(self, family: Family) -> None: ...
    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None: ...
    def failed(self, family: Family, seconds: float) -> None: ...

    def drifted(self, family: Family, differences: int, *, repaired: bool) -> None:
        self.drifts.append((differences, repaired))


class Rig:
    """A sync loop that would not run again for an hour after a sync, but for drift."""

    def __init__(self, policy: DriftPolicy, periods: Periods, allowance: Allowance | None) -> None:
        self.state = State("node1")
        self.kernel = Memory()
        self.reports = Reports()
        self.desired = Desired(Settings(mode="nftables"), "node1", self.state, [Family.IPV4])
        self.sync = FamilySync(
            self.kernel,
            self.desired,
            self.state,
            periods,
            self.reports,
            policy=policy,
            allowance=allowance,
        )
        self.state.on_change = self.sync.request
        self.state.replace(Resource.SLICES, [endpoint_slice([endpoint("10.244.1.1")], name="web-1", owner="web")])
        self.state.replace(Resource.SERVICES, [service("web", cluster_ip="172.30.0.1")])

    @property
    def wanted(self) -> ForwardingTable:
        return self.desired.table(Family.IPV4)

    def damage(self, *sentences: str) -> None:
        """Another process does something to our rules."""
        assert self.kernel.held is not None
        self.kernel.held = msgspec.structs.replace(self.kernel.held, damage=frozenset(sentences))


def running(
    scenario: Callable[[Rig], Awaitable[None]],
    policy: DriftPolicy = "repair",
    *,
    minimum: float = LONG,
    maximum: float = LONG,
    allowance: Allowance | None = None,
) -> None:
    async def main() -> None:
        rig = Rig(policy, Periods(minimum=minimum, retry=0.01, maximum=maximum), allowance)
        loop = asyncio.create_task(rig.sync.run())
        try:
            await until(lambda: rig.kernel.calls[:1] == ["sync"] and not rig.sync.statistics().pending)
            await scenario(rig)
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)

    asyncio.run(main())


def test_drift_is_repaired_at_once_whatever_the_period_between_syncs_and_its_maker_is_named() -> None:
    async def scenario(rig: Rig) -> None:
        assert rig.sync.statistics().drift_repairs == 0
        rig.damage("chain services lacks its rule 1")
        rig.sync.doubt([NFT])
        await until(lambda: rig.kernel.held == rig.wanted)
        await until(lambda: rig.reports.drifts == [(1, True)])
        statistics = rig.sync.statistics()
        seen = statistics.last_drift
        assert seen is not None
        assert (statistics.drift_repairs, statistics.drift_left) == (1, 0)
        assert (seen.by, seen.summary, seen.repaired) == (("nft (process 4711)",), "1 sentence of damage", True)
        assert "  + chain services lacks its rule 1" in seen.lines

    running(scenario)


def test_a_flush_of_everything_is_one_repair() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.held = None
        rig.sync.doubt([NFT])
        await until(lambda: rig.sync.statistics().drift_repairs == 1)
        assert rig.kernel.held == rig.wanted
        seen = rig.sync.statistics().last_drift
        assert seen is not None
        assert seen.summary == "the whole table is missing"

    running(scenario)


def test_who_touches_our_rules_and_changes_nothing_is_no_drift() -> None:
    async def scenario(rig: Rig) -> None:
        rig.sync.doubt([NFT])
        await until(lambda: rig.reports.drifts == [(0, True)])
        assert rig.sync.statistics().drift_repairs == 0
        assert rig.sync.statistics().last_drift is None

    running(scenario)


def test_a_change_of_Services_in_the_same_sync_is_not_taken_for_drift() -> None:
    async def scenario(rig: Rig) -> None:
        rig.state.set(Resource.SERVICES, service("dns", cluster_ip="172.30.0.2"))
        rig.damage("one thing")
        rig.sync.doubt([NFT])
        await until(lambda: rig.reports.drifts == [(1, True)])
        assert rig.kernel.held == rig.wanted

    running(scenario)


@pytest.mark.parametrize("policy", ["repair", "report"])
def test_SYN_10_12_what_nobody_told_is_found_by_the_hourly_look(policy: DriftPolicy) -> None:
    async def scenario(rig: Rig) -> None:
        rig.damage("one thing")
        await until(lambda: (1, policy == "repair") in rig.reports.drifts)
        assert (rig.kernel.held == rig.wanted) == (policy == "repair")
        seen = rig.sync.statistics().last_drift
        assert seen is not None
        assert seen.by == ()

    running(scenario, policy, minimum=0.0, maximum=0.005)


def test_under_report_drift_is_told_and_left() -> None:
    async def scenario(rig: Rig) -> None:
        rig.damage("one thing", "another")
        rig.sync.doubt([NFT])
        await until(lambda: rig.reports.drifts == [(2, False)])
        assert rig.kernel.calls == ["sync", "read"], "nothing was written"
        assert rig.kernel.held != rig.wanted
        statistics = rig.sync.statistics()
        assert (statistics.drift_repairs, statistics.drift_left) == (0, 2)
        rig.damage()
        rig.sync.doubt()
        await until(lambda: rig.sync.statistics().drift_left == 0)

    running(scenario, "report")


def test_under_report_changes_of_Services_go_on_and_drift_stays() -> None:
    async def scenario(rig: Rig) -> None:
        rig.damage("one thing")
        rig.sync.doubt([NFT])
        await until(lambda: rig.reports.drifts == [(1, False)])
        rig.state.delete(Resource.SERVICES, Key("ns", "web"))
        await until(lambda: "apply" in rig.kernel.calls)
        assert "sync" not in rig.kernel.calls[1:]

    running(scenario, "report", minimum=0.0)


def test_under_report_a_change_that_drift_is_in_the_way_of_repairs_it() -> None:
    async def scenario(rig: Rig) -> None:
        rig.damage("one thing")
        rig.kernel.unwritable = True
        rig.state.delete(Resource.SERVICES, Key("ns", "web"))
        await until(lambda: rig.kernel.held == rig.wanted)

    running(scenario, "report", minimum=0.0)


def test_under_report_a_kernel_that_cannot_be_read_is_not_written() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.unreadable = True
        rig.sync.doubt([NFT])
        await until(lambda: rig.kernel.calls == ["sync", "read"] and not rig.sync.statistics().pending)
        assert rig.sync.statistics().failures == 0

    running(scenario, "report")


def test_who_answers_every_repair_gets_a_bounded_number_of_them() -> None:
    async def scenario(rig: Rig) -> None:
        sync = rig.kernel.sync

        def fought(table: ForwardingTable) -> Applied:
            applied = sync(table)
            rig.damage("again")
            loop.call_soon_threadsafe(rig.sync.doubt, [NFT])
            return applied

        loop = asyncio.get_running_loop()
        rig.kernel.sync = fought  # type: ignore[method-assign]
        rig.damage("first")
        rig.sync.doubt([NFT])
        await until(lambda: rig.sync.statistics().drift_repairs == 3)
        # Whatever is to happen now happens: the loop is idle until the allowance has grown again.
        for _ in range(50):
            await asyncio.sleep(0)
        assert rig.sync.statistics().drift_repairs == 3

    running(scenario, allowance=Allowance(burst=3, every=LONG))


# --- how often ---------------------------------------------------------------------------------------------------


def answers(allowance: Allowance, until: float, seconds: float) -> list[float]:
    """When a stranger who touches our rules all the time is answered, each answer taking `seconds`."""
    now, found = 0.0, []
    while now < until:
        now += allowance.wait(now)
        found.append(now)
        now += seconds
        allowance.spend(now, seconds)
    return found


def test_the_first_touches_are_answered_at_once_and_a_fight_every_three_seconds() -> None:
    found = answers(Allowance(burst=10, every=3.0), 300.0, 0.001)
    assert found[9] < 0.1
    assert 10 + 300 / 3 - 2 <= len(found) <= 10 + 300 / 3 + 2


@given(
    burst=st.integers(1, 20),
    every=st.floats(0.1, 10),
    share=st.floats(0.01, 1),
    seconds=st.floats(0.001, 5),
)
def test_a_fight_never_takes_more_than_its_share(burst: int, every: float, share: float, seconds: float) -> None:
    length = 500 * max(every, seconds / share)
    found = answers(Allowance(burst=burst, every=every, share=share), length, seconds)
    spent = len(found) * seconds
    # The burst comes on top, and the answer that is at work in the end.
    assert spent <= share * length + (burst + 2) * seconds


def test_a_large_table_has_its_burst_too() -> None:
    found = answers(Allowance(burst=10, every=3.0, share=0.05), 300.0, 2.0)
    assert found[9] == pytest.approx(9 * 2.0), "ten answers without a pause"
    assert found[11] - found[10] == pytest.approx(2.0 / 0.05, rel=0.1)


def test_after_a_while_of_peace_the_burst_is_there_again() -> None:
    allowance = Allowance(burst=2, every=3.0)
    for _ in range(2):
        allowance.spend(100.0, 0.001)
    assert allowance.wait(100.0) == pytest.approx(3.0)
    assert allowance.wait(106.0) == 0
