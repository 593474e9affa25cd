"""Watching over workers, choosing the mode, and the figures in /metrics: with dataplanes that are values."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import threading
from collections.abc import Iterator

import structlog
from prometheus_client import CollectorRegistry, generate_latest

from proxy import modes
from proxy.userspace.control import FrontendStats, StatsAnswer
from proxy.userspace.dataplane import UserspaceDataplane
from proxy.userspace.metrics import WorkersCollector
from proxy.userspace.supervisor import Changed
from proxy.userspace.totals import Totals
from proxy.userspace.watch import Watch
from rules.dataplane import DataplaneError, Touch, UnavailableError
from rules.forwarding import Family, Frontend, Protocol, parse_address

PATIENCE = 30.0


class Fake:
    """A dataplane over workers that don't exist; each call of `attend` is an event."""

    family = Family.IPV4

    def __init__(self) -> None:
        self.attended = threading.Event()
        self.looked = threading.Event()
        self.pids: dict[int, int] = {}
        self.is_disturbed = False
        self.is_deaf = False
        self.fails = False

    def attend(self) -> Changed:
        self.attended.set()
        if self.fails:
            raise DataplaneError("no more processes")
        return Changed()

    def tidy(self) -> None:
        self.looked.set()

    def count(self) -> None:
        """Nothing has passed."""

    def deaf(self) -> bool:
        return self.is_deaf

    def disturbed(self) -> bool:
        return self.is_disturbed

    def worker_pids(self) -> dict[int, int]:
        return dict(self.pids)


@contextlib.contextmanager
def watching(fake: Fake, *, tidy: float = 3600.0, listeners: float = 3600.0) -> Iterator[Watch]:
    watch = Watch([fake], tidy=tidy, listeners=listeners)
    try:
        yield watch
    finally:
        watch.close()


def is_readable(watch: Watch) -> bool:
    return bool(select.select([watch], [], [], PATIENCE)[0])


def test_the_end_of_a_worker_is_heard_of_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fake = Fake()
    fake.pids = {0: process.pid}
    with watching(fake):
        process.communicate(b"\n")
        assert fake.attended.wait(PATIENCE)


def test_workers_that_cannot_be_replaced_are_for_the_next_sync() -> None:
    fake = Fake()
    fake.fails = True
    with watching(fake, tidy=0.01) as watch:
        assert is_readable(watch)
        assert watch.touched() == {Touch(Family.IPV4, None)}


def test_a_listener_that_is_gone_is_for_the_next_sync() -> None:
    fake = Fake()
    fake.is_deaf = True
    with watching(fake, tidy=0.01, listeners=0.01) as watch:
        assert is_readable(watch)
        assert watch.touched() == {Touch(Family.IPV4, None)}


def test_addresses_that_linger_are_looked_at_now_and_then() -> None:
    fake = Fake()
    with watching(fake, tidy=0.01) as watch:
        assert fake.looked.wait(PATIENCE)
        assert watch.touched() == frozenset()


def test_workers_that_cannot_be_looked_after_are_told_of_once_for_each_reason() -> None:
    class Odd(Fake):
        looks = 0

        def attend(self) -> Changed:
            return Changed()

        def count(self) -> None:
            self.looks += 1
            if self.looks == 13:
                self.attended.set()
            if self.looks not in {5, 6}:
                raise DataplaneError("no descriptor" if self.looks < 10 else "no memory")

    odd = Odd()
    with structlog.testing.capture_logs() as logs, watching(odd, tidy=0.001):
        assert odd.attended.wait(PATIENCE)
    told = [each["reason"] for each in logs if each["log_level"] == "warning"]
    assert told == ["no descriptor", "no descriptor", "no memory"]


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_are_in_the_metrics_by_service_port() -> None:
    class Counted:
        family = Family.IPV6
        totals = Totals(Family.IPV6)

    frontend = Frontend(parse_address("fd00::1"), Protocol.TCP, 80)
    stats = FrontendStats(
        frontend=frontend,
        family=Family.IPV6,
        label="default/web:http",
        open=2,
        total=5,
        bytes_in=10,
        bytes_out=20,
        failures=1,
        connect_seconds=0.5,
        connects=[1, 2, *[0] * 10, 1],
    )
    Counted.totals.take([(1, StatsAnswer(frontends=[stats]))])
    registry = CollectorRegistry()
    registry.register(WorkersCollector([Counted()]))
    text = generate_latest(registry).decode()
    labels = 'ip_family="IPv6",protocol="TCP",service_port="default/web:http"'
    assert f"sluice_userspace_open_connections{{{labels}}} 2.0" in text
    assert f"sluice_userspace_connections_total{{{labels}}} 5.0" in text
    assert f"sluice_userspace_failures_total{{{labels}}} 1.0" in text
    for direction, count in (("to_backend", 10.0), ("to_client", 20.0)):
        series = f'sluice_userspace_bytes_total{{direction="{direction}",{labels}}} {count}'
        assert series in text
    name = "sluice_userspace_connect_duration_seconds"
    assert f'{name}_bucket{{ip_family="IPv6",le="0.0025",protocol="TCP",service_port="default/web:http"}} 3.0' in text
    assert f"{name}_count{{{labels}}} 4.0" in text
    assert f"{name}_sum{{{labels}}} 0.5" in text
    assert 'sluice_userspace_workers{ip_family="IPv6"} 1.0' in text


# --- the mode ----------------------------------------------------------------------------------------------------


def test_the_last_resort_is_userspace_and_why_is_said(monkeypatch) -> None:
    opened = modes.open_dataplane

    def lacking(name: str, *arguments):
        if name != "userspace":
            raise UnavailableError(f"this kernel has no {name}")
        return opened(name, *arguments)

    monkeypatch.setattr(modes, "open_dataplane", lacking)
    told = []

    class Log:
        def warning(self, _what: str, **words: str) -> None:
            told.append(words)

    monkeypatch.setattr("proxy.logs.get_logger", lambda _: Log())
    assert modes.choose("") == "userspace"
    [reasons] = told
    others = [name for name in modes.BUILT if name != "userspace"]
    assert reasons["because"] == "; ".join(f"{name}: this kernel has no {name}" for name in others)


def test_userspace_can_be_asked_for_by_name() -> None:
    assert modes.choose("userspace") == "userspace"
    dataplane = modes.open_dataplane("userspace", Family.IPV6)
    assert isinstance(dataplane, UserspaceDataplane)
    assert dataplane.family is Family.IPV6
    dataplane.check()
    dataplane.close()
