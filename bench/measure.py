"""From rounds to figures: every figure of a cluster, of each checkout in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench import kernel, manifests, report, rounds
from bench.agent import Source
from bench.cluster import Cluster
from bench.report import Row
from bench.rounds import Place, Session, Start
from bench.server import Server, lists_of

_TARGETS = {
    ("first sync, API server", 10_000): 1.0,
    ("first sync, API server", 50_000): 5.0,
    ("first sync, YAML", 10_000): 3.0,
    ("median", 1_000): 1.0,
    ("median", 10_000): 1.0,
    ("median", 50_000): 2.0,
    ("USS", 10_000): 120.0,
}
_HEALTH_TARGET = 50.0
_AT_DEFAULTS = 8
"""Changes at default settings, where each has to wait until it may go out at once."""
_DEFAULT_PAUSE = 1.1
_REPLACED = "endpoint replaced"


class Measure:
    """Measures clusters on each of some checkouts."""

    def __init__(self, places: Mapping[str, Place], *, starts: int, changes: int) -> None:
        self._places = places
        self._starts = starts
        self._changes = changes

    def warm_up(self) -> None:
        """Have everything that is read from disk in memory."""
        cluster = Cluster(10, 1)
        with Server(lists_of(cluster)) as server:
            for place in self._places.values():
                rounds.first_sync(place, cluster, rounds.from_server(place.directory, server.url))
                rounds.first_sync(place, cluster, Source(manifests.write_yaml(cluster, place.directory)))

    def everything(self, cluster: Cluster) -> Iterator[Row]:
        """Every figure of a cluster."""
        with Server(lists_of(cluster)) as server:
            yield from self._first_syncs(cluster, server)
            report.tell(f"{cluster}: health during a first sync")
            waits = self._each(lambda place: rounds.health_wait(place, cluster, _source(place, server)) * 1e3)
            yield Row(str(cluster), "longest wait for /healthz in a first sync", "ms", waits, _HEALTH_TARGET)
            report.tell(f"{cluster}: changes")
            sessions = self._each(lambda place: rounds.session(place, cluster, server, count=self._changes))
            yield from _changes(cluster, sessions)
            yield from _memory(cluster, sessions)
            yield from _connects(cluster, sessions)
            report.tell(f"{cluster}: changes at default settings")
            at_defaults = self._each(
                lambda place: rounds.session(
                    place,
                    cluster,
                    server,
                    count=min(_AT_DEFAULTS, self._changes),
                    only=_REPLACED,
                    period=None,
                    pause=_DEFAULT_PAUSE,
                )
            )
            replaced = {name: each.changes[_REPLACED] for name, each in at_defaults.items()}
            yield Row(
                str(cluster),
                "default settings: endpoint replaced, median",
                "ms",
                {name: each.total.median * 1e3 for name, each in replaced.items()},
            )
            burst = {name: each.burst * 1e3 for name, each in at_defaults.items()}
            yield Row(str(cluster), f"default settings: {rounds.BURST} replaced in a burst", "ms", burst)

    def affinity(self, cluster: Cluster) -> Iterator[Row]:
        """What session affinity costs where some Services have it."""
        with Server(lists_of(cluster)) as server:
            report.tell(f"{cluster}")
            starts = self._each(lambda place: rounds.first_sync(place, cluster, _source(place, server)))
            yield Row(str(cluster), "first sync, API server", "s", {n: each.seconds for n, each in starts.items()})
            sessions = self._each(lambda place: rounds.session(place, cluster, server, count=self._changes))
            yield from _changes(cluster, sessions)
            yield from _memory(cluster, sessions)

    def _first_syncs(self, cluster: Cluster, server: Server) -> Iterator[Row]:
        files = next(iter(self._places.values())).directory
        json_file, yaml_file = manifests.write_json(cluster, files), manifests.write_yaml(cluster, files)
        sources: dict[str, Callable[[Place], Source]] = {
            "API server": lambda place: _source(place, server),
            "JSON": lambda _: Source(json_file),
            "YAML": lambda _: Source(yaml_file),
        }
        # Interleaved, so that what else the machine does concerns all of them.
        taken: dict[tuple[str, str], list[Start]] = {}
        for turn in range(self._starts):
            for kind, source in sources.items():
                for name, place in self._places.items():
                    report.tell(f"{cluster}: first sync {turn + 1}, {kind}, {name}")
                    taken.setdefault((kind, name), []).append(rounds.first_sync(place, cluster, source(place)))
                    server.forget()
        for kind in sources:
            what = f"first sync, {kind}"
            of_kind = {name: taken[kind, name] for name in self._places}
            seconds = {name: statistics.median(each.seconds for each in starts) for name, starts in of_kind.items()}
            yield Row(str(cluster), what, "s", seconds, _target(what, cluster))
            cpu = {name: statistics.median(each.cpu for each in starts) for name, starts in of_kind.items()}
            yield Row(str(cluster), f"{what}: CPU of the agent", "s", cpu)

    def _each(self, measured: Callable[[Place], rounds.T]) -> dict[str, rounds.T]:
        return {name: measured(place) for name, place in self._places.items()}


def _changes(cluster: Cluster, sessions: Mapping[str, Session]) -> Iterator[Row]:
    title = str(cluster)
    for kind in next(iter(sessions.values())).changes:
        taken = {name: each.changes[kind] for name, each in sessions.items()}
        median = {name: each.total.median * 1e3 for name, each in taken.items()}
        yield Row(title, f"{kind}, median", "ms", median, _target("median", cluster))
        yield Row(title, f"{kind}, until the send", "ms", {n: each.to_send.median * 1e3 for n, each in taken.items()})
        yield Row(title, f"{kind}, p99", "ms", {name: each.total.p99 * 1e3 for name, each in taken.items()})
        yield Row(title, f"{kind}, CPU of the agent", "ms", {name: each.cpu * 1e3 for name, each in taken.items()})
    burst = {name: each.burst * 1e3 for name, each in sessions.items()}
    yield Row(title, f"{rounds.BURST} replaced in a burst", "ms", burst)


def _memory(cluster: Cluster, sessions: Mapping[str, Session]) -> Iterator[Row]:
    title = str(cluster)
    uss = {name: each.uss / 1e6 for name, each in sessions.items()}
    yield Row(title, "USS after the first sync", "MB", uss, _target("USS", cluster))
    yield Row(title, "USS after the changes", "MB", {name: each.uss_at_end / 1e6 for name, each in sessions.items()})
    yield Row(title, "RSS after the first sync", "MB", {name: each.rss / 1e6 for name, each in sessions.items()})


def _connects(cluster: Cluster, sessions: Mapping[str, Session]) -> Iterator[Row]:
    for what in ("direct", "first", "last"):
        label = "connect directly" if what == "direct" else f"connect through the {what} Service"
        medians = {name: getattr(each.connects, what).median * 1e6 for name, each in sessions.items()}
        yield Row(str(cluster), label, "us", medians)


def _source(place: Place, server: Server) -> Source:
    return rounds.from_server(place.directory, server.url)


def _target(what: str, cluster: Cluster) -> float | None:
    if cluster.endpoints != 4 or cluster.sticky:
        return None
    return _TARGETS.get((what, cluster.services))


def clusters_of(sizes: str) -> list[Cluster]:
    """The clusters that a text names: numbers of Services with 4 endpoints each, and `wide` for 1,000 of 250."""
    return [Cluster(1000, 250) if size == "wide" else Cluster(int(size), 4) for size in sizes.split(",")]


def places_of(checkouts: Mapping[str, Path], directory: Path, listener: kernel.Listener) -> dict[str, Place]:
    """A place for each checkout, with a directory of its own."""
    places = {}
    for name, checkout in checkouts.items():
        (directory / name).mkdir()
        places[name] = Place(checkout, directory / name, listener)
    return places
