"""What counting the traffic of Services costs with very many flows: a look at all that are open, and each that ends.

python -m bench.counting
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from bench import conntrack, kernel, report
from bench.report import Row
from proxy.counters import Ledger
from rules.forwarding import Family, Kind, Protocol, Route
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.counters import EndedFlows

_ACCOUNTING = Path("/proc/sys/net/netfilter/nf_conntrack_acct")
_SOME = 5_000
"""Flows that are ended: as many as the events' buffer holds without anybody reading."""


def rows(flows: int) -> list[Row]:
    """Rows for so many open UDP flows to 1,000 frontends of 4 backends."""
    _ACCOUNTING.write_text("1\n")
    what = f"{flows:,} open flows"
    routes = {frontend: Route(kind=Kind.CLUSTER_IP, backends=all_) for frontend, all_ in conntrack.serving().items()}
    ledger = Ledger(Family.IPV4, lambda: routes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    # Only flows that begin while somebody listens tell their ends (nf_conntrack_events is 2 by default).  Those
    # that are written over netlink are not marked as translated.
    with Conntrack(Family.IPV4) as table, EndedFlows(every=True) as ended:
        conntrack.write(flows)
        for which in ("first", "next"):
            start, cpu = time.monotonic(), time.process_time()
            ledger.begin()
            ledger.see(table.flows(Protocol.UDP))
            ledger.finish()
            found.append(Row(what, f"the {which} look at all", "s", {"now": time.monotonic() - start}))
            found.append(Row(what, f"the {which} look: CPU", "s", {"now": time.process_time() - cpu}))
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        found.append(Row(what, "memory", "MB", {"now": held / 1024}))
        some = [flow for _, flow in zip(range(_SOME), table.flows(Protocol.UDP), strict=False)]
        table.delete(some)
        start = time.process_time()
        count = 0
        while flows_ended := ended.take():
            ledger.end(flows_ended)
            count += len(flows_ended)
        seconds = time.process_time() - start
    if count + ended.lost == 0 or sum(row.traffic.connections for row in ledger.rows()) < min(flows, 100_000):
        told = sum(row.traffic.connections for row in ledger.rows())
        raise RuntimeError(f"not all were counted: {told} seen, {count} ended, {ended.lost} times lost")
    return [*found, Row(what, f"each of {count:,} that end: CPU", "us", {"now": seconds / max(1, count) * 1e6})]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counting", description=__doc__.partition("\n")[0])
    parser.add_argument("--flows", type=int, default=100_000)
    options = parser.parse_args()
    kernel.enter_own_namespace()
    print(report.table(report.results(rows(options.flows)), unit=""))  # noqa: T201  # what the program is for
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
