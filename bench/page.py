"""What the page /debug/services costs at 10,000 Services: the first paint, the first rows, a search.

The agent runs with the page, and a headless Chromium beside it, on the same cores.  Times in the browser are its own
(`performance`): from the start of the navigation, and from a key to the frame that shows what it found.

    make bench-page
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench import kernel, manifests, report, rounds
from bench.agent import Agent, Source
from bench.browser import Browser, missing
from bench.cluster import Cluster
from bench.report import Row
from bench.rounds import Place

PAGE = "http://127.0.0.1:10249/debug/services/"
PAINT, SEARCH = 1.0, 100.0
"""Targets: seconds to the first paint, and to the rows; milliseconds of a search."""
_QUERIES = ("service-77", "10.96.3.2", "10.128.40.1", "-service-1", "80/tcp service-9 -10.96.1", "nothing", "")
_PATIENCE = 60.0

_SEARCH = """
    const done = arguments[arguments.length - 1];
    const field = document.getElementById('search');
    field.value = arguments[0];
    const start = performance.now();
    field.dispatchEvent(new Event('input'));
    // The callback comes before the frame is painted, what it puts off after it.
    requestAnimationFrame(() => setTimeout(() => {
        done([performance.now() - start, performance.getEntriesByName('narrow', 'measure').at(-1).duration]);
    }));
"""


def rows(place: Place, cluster: Cluster, times: int) -> Iterator[Row]:
    """The figures of one checkout."""
    source = Source(manifests.write_json(cluster, place.directory))
    more = ["--debug-page", "--service-cidrs=10.96.0.0/12"]
    agent = Agent(place.checkout, place.directory, source, run_directory=place.directory / "run", more=more)
    title = str(cluster)

    def row(what: str, unit: str, value: float, target: float | None = None) -> Row:
        return Row(title, what, unit, {"now": value}, target)

    with rounds.synced(place, cluster, agent):
        before = agent.cpu()
        seconds, size = _fetch("data")
        yield row("the first answer with all Services", "s", seconds)
        yield row("the agent's CPU for it", "s", agent.cpu() - before)
        yield row("its size", "MB", size / 1e6)
        yield row("the next one", "s", statistics.median(_fetch("data")[0] for _ in range(times)))
        paints, shown, searches, narrowed = [], [], [], []
        with Browser() as browser:
            for _ in range(times):
                browser.open("about:blank")
                browser.open(PAGE)
                browser.until("return performance.getEntriesByName('rows').length > 0", seconds=_PATIENCE)
                paints.append(_entry(browser, "first-contentful-paint"))
                shown.append(_entry(browser, "rows"))
            for query in _QUERIES * times:
                whole, own = browser.run_async(_SEARCH, query)
                searches.append(whole)
                narrowed.append(own)
            before = agent.cpu()
            time.sleep(10)
            idle = (agent.cpu() - before) / 10
        yield row("first paint", "s", statistics.median(paints) / 1e3, PAINT)
        yield row("first rows of all Services", "s", statistics.median(shown) / 1e3, PAINT)
        yield row("a search, from the key to the frame", "ms", statistics.median(searches), SEARCH)
        yield row("the slowest of them", "ms", max(searches))
        yield row("of a search the script's own part", "ms", statistics.median(narrowed))
        yield row("of the slowest the script's own part", "ms", max(narrowed), SEARCH)
        yield row("the agent's CPU while the page is open, per s", "ms", idle * 1e3)


def _fetch(path: str) -> tuple[float, int]:
    """Seconds and bytes of an answer."""
    start = time.monotonic()
    with urllib.request.urlopen(f"{PAGE}{path}", timeout=_PATIENCE) as answer:  # noqa: S310  # our own server
        return time.monotonic() - start, len(answer.read())


def _entry(browser: Browser, name: str) -> float:
    """Milliseconds from the start of the navigation to a mark."""
    found: float = browser.run("return performance.getEntriesByName(arguments[0])[0].startTime", name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--endpoints", type=int, default=10)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "page.json")
    options = parser.parse_args()
    if lacking := missing():
        sys.exit(f"{lacking} not installed: make bench-page installs them")
    kernel.enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        place = Place(Path(__file__).parents[1], Path(directory), kernel.Listener())
        cluster = Cluster(options.services, options.endpoints)
        found = report.results(rows(place, cluster, options.times))
    report.save(found, options.out)
    print(report.table(found))  # noqa: T201  # what the program is for
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
