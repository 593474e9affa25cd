"""What iptables mode costs, with both kinds of programs: syncs, changes, memory, and connections through the rules.

`python -m bench` measures it too; `python -m bench.iptables` nothing else.

iptables tells nobody when rules have changed, so the kernel is asked again and again: for nft by its generation, for
legacy by the number of entries in its tables (`rules.iptables.watch`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import kernel, report, rounds
from bench.agent import Agent, Usage
from bench.cluster import PORT, TARGET_PORT, Cluster, spare_pod
from bench.measure import places_of
from bench.report import Row
from bench.rounds import Place, Spread
from bench.server import SLICES, Server, event, lists_of
from proxy.modes import IPTABLES
from rules.forwarding import Backend, Family, ForwardingTable, parse_address
from rules.iptables import watch
from rules.iptables.dataplane import IptablesDataplane
from rules.iptables.programs import BACKENDS, available
from rules.iptables.programs import Backend as Programs
from rules.netlink.closing import Closing
from rules.netlink.transaction import NetfilterSocket

SIZES = (1_000, 5_000, 10_000)
_FULL_TARGETS = {("nft", 5_000): 3.0, ("legacy", 10_000): 1.5}
_CHANGE_TARGETS = {("nft", 5_000): 50.0}
_LAST_TARGET = 1.2
_SYNCED = re.compile(r"synced .*family=IPv4 full=True .*seconds=([0-9.]+)")
_PATIENCE = 120.0
_SETTLED = 0.5
"""Seconds without a change after which it is worth looking whether all is there."""
_LOOK = 0.0005
"""Seconds between two looks at the kernel."""


class _Taken(NamedTuple):
    """What one agent showed."""

    first: float
    """Seconds from the start of the process until the kernel holds everything."""
    full: float
    """Seconds of the sync in it, reading and writing, as the agent says."""
    cpu: float
    """CPU seconds until then, of the agent and of the programs that it ran."""
    programs_cpu: float
    """Those of the programs."""
    change: Spread
    change_cpu: float
    usage: Usage
    through: Mapping[str, Spread]
    """Connections."""


def rows(places: Mapping[str, Place], sizes: Sequence[int] = SIZES, changes: int = 20) -> Iterator[Row]:
    """The figures of iptables mode, of each kind of programs that is installed and each checkout in turn."""
    for size in sizes:
        cluster = Cluster(size, 4)
        for kind in BACKENDS:
            if kind in available(Family.IPV4):
                report.tell(f"{cluster}: iptables-{kind}")
                yield from _rows(
                    cluster, kind, {name: _measure(each, cluster, kind, changes) for name, each in places.items()}
                )


def _rows(cluster: Cluster, kind: Programs, taken: Mapping[str, _Taken]) -> Iterator[Row]:
    def row(what: str, unit: str, value: Callable[[_Taken], float], target: float | None = None) -> Row:
        return Row(
            f"{cluster}, iptables-{kind}", what, unit, {name: value(each) for name, each in taken.items()}, target
        )

    where = kind, cluster.services
    yield row("first sync, from the start of the process", "s", lambda each: each.first)
    yield row("full sync", "s", lambda each: each.full, _FULL_TARGETS.get(where))
    yield row("CPU until then", "s", lambda each: each.cpu)
    yield row("of it, iptables' programs: the floor", "s", lambda each: each.programs_cpu)
    yield row("change, median", "ms", lambda each: each.change.median * 1e3, _CHANGE_TARGETS.get(where))
    yield row("change, p99", "ms", lambda each: each.change.p99 * 1e3)
    yield row("change, CPU with the programs", "ms", lambda each: each.change_cpu * 1e3)
    yield row("USS after the first sync", "MB", lambda each: each.usage.uss / 1e6)
    yield row("RSS after the first sync", "MB", lambda each: each.usage.rss / 1e6)
    for what in next(iter(taken.values())).through:
        yield row(f"connect {what}", "us", lambda each, what=what: each.through[what].median * 1e6)  # type: ignore[misc]
    yield row(
        "the last Service over the first",
        "x",
        lambda each: each.through["through the last Service"].median / each.through["through the first Service"].median,
        _LAST_TARGET,
    )


def _measure(place: Place, cluster: Cluster, kind: Programs, changes: int) -> _Taken:
    last = cluster.services - 1
    with (
        _environment(kind),
        Server(lists_of(cluster)) as server,
        contextlib.closing(IptablesDataplane(Family.IPV4, kind)) as dataplane,
        _Sight(kind) as sight,
    ):
        dataplane.cleanup()
        [bare] = rounds.connect_times([(cluster.pods(0)[-1], TARGET_PORT)])
        source = rounds.from_server(place.directory, server.url)
        with Agent(place.checkout, place.directory, source, mode="iptables") as agent:
            end = _synced(agent, sight, dataplane, cluster)
            first, cpu, programs_cpu = end - agent.started, agent.cpu(), agent.children_cpu()
            usage = agent.usage()
            full = _SYNCED.search(agent.log.read_text())
            if full is None:
                raise RuntimeError(f"the agent says nothing of its first sync:\n{agent.tail()}")
            times, change_cpu = _change(agent, sight, server, cluster, changes)
            _check(dataplane.read(), cluster)
            spreads = rounds.connect_times(
                [
                    (cluster.cluster_ip(0), PORT),
                    (cluster.cluster_ip(last), PORT),
                    (cluster.pods(0)[-1], TARGET_PORT),
                ]
            )
        server.forget()
        dataplane.cleanup()
    names = ("through the first Service", "through the last Service", "to an address of no Service")
    through = {**dict(zip(names, spreads, strict=True)), "without any rules": bare}
    return _Taken(first, float(full[1]), cpu + programs_cpu, programs_cpu, times, change_cpu, usage, through)


def _synced(agent: Agent, sight: _Sight, dataplane: IptablesDataplane, cluster: Cluster) -> float:
    """When the kernel came to hold everything."""
    end = agent.started
    deadline = agent.started + _PATIENCE
    while True:
        if (seen := sight.wait(_SETTLED)) is not None:
            end = seen
            continue
        agent.check()
        table = dataplane.read()
        if table is not None and len(table.routes) == cluster.services:
            return end
        if time.monotonic() > deadline:
            raise TimeoutError(f"no first sync of {cluster}:\n{agent.tail()}")


def _change(agent: Agent, sight: _Sight, server: Server, cluster: Cluster, count: int) -> tuple[Spread, float]:
    """Time one endpoint more, and fewer again, in some of all Services; and the CPU seconds of each."""
    taken: list[float] = []
    version = 10 * cluster.services
    before = agent.cpu() + agent.children_cpu()
    for index in range(count):
        number = index // 2 * cluster.services * 2 // max(2, count)
        version += 1
        pods = cluster.pods(number) + ([spare_pod(1)] if index % 2 == 0 else [])
        sight.wait(0.02)
        start = time.monotonic()
        server.emit(SLICES, event("MODIFIED", cluster.slice(number, pods, version)))
        seen = sight.wait(10)
        if seen is None:
            raise TimeoutError(f"a change was not applied:\n{agent.tail()}")
        taken.append(seen - start)
    time.sleep(0.1)
    return Spread.of(taken), (agent.cpu() + agent.children_cpu() - before) / count


def _check(table: ForwardingTable | None, cluster: Cluster) -> None:
    """Compare the kernel with the cluster.

    Raises:
        AssertionError: it holds something else.
    """
    assert table is not None, "there are no rules"
    assert not table.damage, f"the rules are damaged: {sorted(table.damage)[:3]}"
    found = {route.label.partition(":")[0]: route.backends for route in table.routes.values()}
    wanted: dict[str, frozenset[Backend]] = {
        f"default/service-{number}": frozenset(Backend(parse_address(pod), TARGET_PORT) for pod in cluster.pods(number))
        for number in range(cluster.services)
    }
    wrong = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
    assert not wrong, f"the kernel is wrong about {len(wrong)} Services, among them {sorted(wrong)[:3]}"


class _Sight(Closing):
    """Sees when rules of a kind change."""

    def __init__(self, kind: Programs) -> None:
        self._netlink: NetfilterSocket | None = None
        self._signature: watch.Signature | None = None
        if kind == "nft":
            self._netlink = NetfilterSocket()
        else:
            self._signature = watch.signature(Family.IPV4, kind)
        self._last = self._take()

    def close(self) -> None:
        for each in (self._netlink, self._signature):
            if each is not None:
                each.close()

    def wait(self, seconds: float) -> float | None:
        """When the rules changed (monotonic seconds); None: they didn't, for so long."""
        deadline = time.monotonic() + seconds
        while (now := self._take()) == self._last:
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK)
        self._last = now
        return time.monotonic()

    def _take(self) -> Hashable:
        if self._netlink is not None:
            return self._netlink.generation()
        assert self._signature is not None
        return self._signature.take()


@contextlib.contextmanager
def _environment(kind: Programs) -> Iterator[None]:
    """Have agents use a kind of programs."""
    before = os.environ.get(IPTABLES)
    os.environ[IPTABLES] = kind
    try:
        yield
    finally:
        if before is None:
            del os.environ[IPTABLES]
        else:
            os.environ[IPTABLES] = before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.iptables", description="What iptables mode costs.")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="Services, of 4 endpoints each")
    parser.add_argument("--changes", type=int, default=20, help="changes of each size")
    options = parser.parse_args()
    kernel.enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        places = places_of({"now": Path(__file__).resolve().parent.parent}, Path(directory), kernel.Listener())
        sizes = [int(size) for size in options.sizes.split(",")]
        print(report.table(report.results(rows(places, sizes, options.changes))))  # noqa: T201  # what it is for
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
