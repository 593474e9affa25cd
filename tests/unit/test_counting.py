"""Counting at work, without a kernel: looks, ends of flows, what goes wrong."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from proxy.counters import Ledger, Traffic
from proxy.counting import Counting, Off, Relayed
from proxy.userspace.control import CONNECT_BUCKETS, FrontendStats, StatsAnswer
from proxy.userspace.totals import Totals
from rules.forwarding import Family, Frontend, Protocol, parse_address
from rules.netlink.attributes import DecodeError
from rules.netlink.counters import Counts
from tests.unit.test_counters import ROUTES, flow

DEADLINE = 10.0


def in_loop(test):
    """Run a coroutine function as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


class Kernel:
    """Open flows and events, as two sockets would tell them."""

    def __init__(self):
        self.open = []
        self.ended = []
        self.lost = 0
        self.looks = 0
        self.error = None
        self.refused = 0
        self.readable, self.writable = os.pipe()

    def table(self, family):
        return self

    def events(self, *, every):
        assert not every
        if self.refused:
            self.refused -= 1
            raise PermissionError(1, "Operation not permitted")
        return self

    def flows(self, protocol, status=0):
        if self.error is not None:
            raise self.error
        self.looks += protocol is Protocol.TCP
        return iter([each for each in self.open if each.protocol == protocol])

    def fileno(self):
        return self.readable

    def end(self, *flows):
        self.ended += flows
        os.write(self.writable, b"!")

    def take(self):
        if self.ended:
            os.read(self.readable, 64)
        taken, self.ended = self.ended, []
        return taken

    def close(self):
        pass


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        await asyncio.sleep(0.005)


class Running:
    """Counting, for as long as the block lasts."""

    def __init__(self, kernel: Kernel, accounting: Path) -> None:
        self.counting = Counting(
            [Ledger(Family.IPV4, lambda: ROUTES)],
            open_table=kernel.table,
            open_events=kernel.events,
            accounting=accounting,
        )

    async def __aenter__(self) -> Counting:
        self.task = asyncio.create_task(self.counting.run())
        await asyncio.sleep(0)
        return self.counting

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def accounting(directory: Path, value: str = "1") -> Path:
    path = directory / "acct"
    path.write_text(f"{value}\n")
    return path


def total(counting: Counting) -> Traffic:
    return sum((row.traffic for row in counting.rows()), Traffic())


@in_loop
async def test_open_flows_are_looked_at_and_ends_are_heard(tmp_path):
    kernel = Kernel()
    kernel.open = [flow(1, Counts(1, 60, 1, 60))]
    async with Running(kernel, accounting(tmp_path)) as counting:
        await until(lambda: total(counting).open == 1)
        kernel.open = []
        kernel.end(flow(1, Counts(4, 216, 2, 1112)), flow(2, Counts(1, 1, 1, 1)))
        await until(lambda: total(counting).connections == 2)
        assert total(counting) == Traffic(connections=2, packets_in=5, bytes_in=217, packets_out=3, bytes_out=1113)
        report = counting.report()
    assert (report.on, report.lost, report.uncounted, report.problems) == (True, 0, 0, ())


@in_loop
async def test_whoever_watches_gets_fresh_figures(tmp_path):
    kernel = Kernel()
    async with Running(kernel, accounting(tmp_path)) as counting:
        await until(lambda: kernel.looks == 1)
        counting.watched()
        # Seconds sooner than it would be looked again.
        await until(lambda: kernel.looks >= 2)


@in_loop
async def test_what_is_lost_or_cannot_be_read_is_told_and_nothing_ends(tmp_path):
    kernel = Kernel()
    kernel.refused = 1
    kernel.error = OSError(105, "No buffer space available")
    async with Running(kernel, accounting(tmp_path, "0")) as counting:
        await until(lambda: len(counting.report().problems) == 3)
        told = counting.report().problems
        assert "ends of flows are not heard of: Operation not permitted" in told
        assert any(each.startswith("open IPv4 flows cannot be read") for each in told)
        assert any("nf_conntrack_acct" in each for each in told)
        kernel.error = None
        (tmp_path / "acct").write_text("1\n")
        counting.watched()
        await until(lambda: len(counting.report().problems) == 1)


@in_loop
async def test_lost_events_are_counted(tmp_path):
    kernel = Kernel()
    async with Running(kernel, accounting(tmp_path)) as counting:
        await until(lambda: kernel.looks == 1)
        take = kernel.take

        def losing():
            if kernel.ended:
                kernel.lost += 1
            return take()

        kernel.take = losing
        kernel.end(flow(1, Counts(1, 1, 1, 1)))
        await until(lambda: counting.report().lost == 1)
        assert total(counting).connections == 1


@in_loop
async def test_malformed_events_open_another_socket(tmp_path):
    kernel = Kernel()
    async with Running(kernel, accounting(tmp_path)) as counting:
        await until(lambda: kernel.looks == 1)

        def broken():
            raise DecodeError("a number of 3 bytes")

        kernel.take = broken
        os.write(kernel.writable, b"!")
        await until(lambda: any("a number of 3 bytes" in each for each in counting.report().problems))


def test_off_says_so_and_has_nothing():
    assert not Off().report().on
    assert Off().rows() == []
    Off().watched()


def test_mode_userspace_tells_what_its_workers_counted():
    class Dataplane:
        family = Family.IPV4
        totals = Totals(Family.IPV4)

    stats = FrontendStats(
        frontend=Frontend(parse_address("10.96.0.1"), Protocol.TCP, 80),
        family=Family.IPV4,
        label="default/web:http",
        open=2,
        total=5,
        bytes_in=10,
        bytes_out=20,
        failures=0,
        connect_seconds=0.0,
        connects=[0] * (len(CONNECT_BUCKETS) + 1),
    )
    Dataplane.totals.take([(1, StatsAnswer(frontends=[stats]))])
    [row] = Relayed([Dataplane()]).rows()
    assert (row.service, row.protocol, row.frontend) == ("default/web:http", "TCP", "")
    assert row.traffic == Traffic(connections=5, open=2, bytes_in=10, bytes_out=20)
    assert Relayed([]).report().on
