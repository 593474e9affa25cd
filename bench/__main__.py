"""`python -m bench`: measure, print a table, and write bench/results/latest.json.  It needs root."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench import conntrack, health, iptables, kernel, report, verbs
from bench.measure import Measure, clusters_of, places_of

_HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="How fast Sluice is, measured from outside.")
    parser.add_argument(
        "--sizes", default="1000,10000,50000,wide", help="Services, of 4 endpoints each; wide: 1,000 Services of 250"
    )
    parser.add_argument("--starts", type=int, default=3, help="first syncs of each kind")
    parser.add_argument("--changes", type=int, default=100, help="changes of each kind")
    parser.add_argument("--iptables", action=argparse.BooleanOptionalAction, default=True, help="iptables mode too")
    parser.add_argument("--flows", type=int, default=conntrack.MOST, help="entries of connection tracking, at most")
    parser.add_argument("--against", type=Path, help="another checkout, measured in the same run")
    parser.add_argument("--out", type=Path, default=_HERE / "results" / "latest.json")
    options = parser.parse_args()
    checkouts = {"now": _HERE.parent}
    if options.against:
        checkouts["before"] = options.against.resolve()
    clusters = clusters_of(options.sizes)
    kernel.enter_own_namespace()
    listener = kernel.Listener()
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        places = places_of(checkouts, Path(directory), listener)
        measure = Measure(places, starts=options.starts, changes=options.changes)
        measure.warm_up()
        rows = [row for cluster in clusters for row in measure.everything(cluster)]
        # Of all sizes, the one nearest to the reference stands for what affinity costs.
        some = min(clusters, key=lambda each: abs(each.services - 10_000))
        rows += measure.affinity(some._replace(sticky=10))
        rows += verbs.rows(places, some, times=min(5, options.changes))
        rows += health.rows(places, some, changes=3 * options.changes, turns=options.starts)
        if options.iptables:
            rows += iptables.rows(places)
        rows += conntrack.rows(options.flows)  # last: they stay in the namespace
    found = report.results(rows)
    report.save(found, options.out)
    print(report.table(found))  # noqa: T201  # what the program is for
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
