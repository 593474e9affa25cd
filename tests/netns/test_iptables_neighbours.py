"""Others who write with iptables at the same time: nobody loses a rule, and a lock that is held is waited for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from rules.dataplane import DataplaneError
from rules.forwarding import Backend, Delta, Family, ForwardingTable, Frontend, Kind, Protocol, Route
from rules.iptables import programs as module
from rules.iptables.dataplane import IptablesDataplane
from rules.iptables.programs import BACKENDS, available
from rules.iptables.programs import Backend as Programs
from tests.netns.isolation import own_network_namespace

CHANGES = 40
SERVICES = 60
OURSELVES = f"{Path('/proc/self/comm').read_text().strip()} (process {os.getpid()})"


@pytest.fixture(params=BACKENDS)
def programs(request: pytest.FixtureRequest, root: None) -> Iterator[Programs]:
    """A kind of programs that is installed, in a network namespace of the test's own."""
    kind: Programs = request.param
    if kind not in available(Family.IPV4):
        pytest.skip(f"iptables-{kind} is not installed")
    with own_network_namespace():
        yield kind


def frontend(number: int) -> Frontend:
    return Frontend(bytes([10, 96, 0, number]), Protocol.TCP, 80)


def route(number: int, generation: int) -> Route:
    backends = frozenset(Backend(bytes([10, 244, number, 1 + each]), 1 + generation) for each in range(3))
    return Route(kind=Kind.CLUSTER_IP, backends=backends, label=f"default/web-{number}")


TABLE = ForwardingTable(family=Family.IPV4, routes={frontend(number): route(number, 0) for number in range(SERVICES)})


class Neighbour:
    """A tool that adds rules of its own, keeps some of them and takes others away."""

    def __init__(self, name: str, programs: str, *, wait: bool, restore: bool) -> None:
        self.kept: list[str] = []
        """Its rules that must be there in the end, in this order."""
        self._name = name
        self._programs = programs
        self._wait = ["-w"] if wait else []
        self._restore = restore
        self._random = random.Random(name)

    def work(self, done: threading.Event) -> None:
        """Write until `done`."""
        chain = f"TOOL-{self._name}"
        self._write("nat", f"-N {chain}")
        self._write("nat", f"-A PREROUTING -j {chain}")
        number = 0
        while not done.is_set():
            number += 1
            rule = f"{chain} -p tcp -m tcp --dport {number} -j RETURN"
            passing = f"-m mark --mark {number:#x} -m comment --comment {self._name} -j ACCEPT"
            self._write("nat", f"-A {rule}")
            self._write("filter", f"-A INPUT {passing}")
            if self._random.random() < 0.5:
                self._write("nat", f"-D {rule}")
            else:
                self.kept.append(f"-A {rule}")
            self._write("filter", f"-D INPUT {passing}")

    def found(self, listing: str) -> list[str]:
        """Its rules that are there."""
        return [line for line in listing.splitlines() if line.startswith(f"-A TOOL-{self._name} ")]

    def _write(self, table: str, command: str) -> None:
        if self._restore and not command.startswith("-N"):
            words = [f"iptables-{self._programs}-restore", "--noflush", *self._wait]
            text = f"*{table}\n{command}\nCOMMIT\n"
        else:
            words, text = [f"iptables-{self._programs}", *self._wait, "-t", table, *command.split()], ""
        while True:
            ended = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
            if not ended.returncode:
                return
            # Without -w, iptables before 1.8.9 gives up at once when somebody else holds the lock.
            assert not self._wait, ended.stderr
            assert "xtables lock" in ended.stderr, ended.stderr


def test_nobody_loses_a_rule_to_others_who_write_at_the_same_time(programs: Programs) -> None:
    """Issue 5: tools that take the lock by -w, that don't wait for it, and that use iptables-restore."""
    neighbours = [
        Neighbour("PATIENT", programs, wait=True, restore=False),
        Neighbour("HASTY", programs, wait=False, restore=False),
        Neighbour("BULK", programs, wait=True, restore=True),
    ]
    done = threading.Event()
    wanted = TABLE
    with (
        contextlib.closing(IptablesDataplane(Family.IPV4, programs)) as dataplane,
        ThreadPoolExecutor(len(neighbours)) as pool,  # its threads are in this thread's namespace
    ):
        working = [pool.submit(each.work, done) for each in neighbours]
        try:
            dataplane.sync(wanted)
            for change in range(1, CHANGES + 1):
                changed = {frontend(change % SERVICES): route(change % SERVICES, change)}
                wanted = msgspec.structs.replace(wanted, routes={**wanted.routes, **changed})
                if change % 10:
                    dataplane.apply(Delta(changed=changed))
                else:
                    assert not dataplane.sync(wanted).notes
        finally:
            done.set()
        for each in working:
            each.result()
        assert dataplane.read() == wanted
        assert dataplane.sync(wanted).operations == 0
    save = [f"iptables-{programs}-save", "-t", "nat"]
    listing = subprocess.run(save, capture_output=True, text=True, check=True).stdout
    for each in neighbours:
        assert each.kept
        assert each.found(listing) == each.kept


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock that nobody but the test and its programs knows."""
    file = tmp_path / "xtables.lock"
    file.touch()
    monkeypatch.setenv("XTABLES_LOCKFILE", str(file))
    return file


@contextlib.contextmanager
def held(lock: Path, seconds: float) -> Iterator[None]:
    """The lock is held for so long, or until the block ends."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        release = threading.Timer(seconds, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        try:
            yield
        finally:
            release.cancel()
            release.join()


def legacy() -> IptablesDataplane:
    if "legacy" not in available(Family.IPV4):
        pytest.skip("iptables-legacy is not installed")
    return IptablesDataplane(Family.IPV4, "legacy")


@pytest.fixture
def namespace(root: None) -> Iterator[None]:
    with own_network_namespace():
        yield


def test_a_lock_that_others_hold_is_waited_for_and_told_in_one_line(namespace: None, lock: Path) -> None:
    dataplane = legacy()
    dataplane.check()
    with held(lock, 2.5):
        [note] = dataplane.sync(TABLE).notes
    assert f"s for the xtables lock, which {OURSELVES} held" in note
    assert dataplane.read() == TABLE


def test_what_trying_the_kernel_has_left_goes_with_the_next_sync(namespace: None, lock: Path) -> None:
    dataplane = legacy()
    subprocess.run(["iptables-legacy", "-t", "nat", "-N", "SLUICE-PROBE"], check=True)
    dataplane.sync(TABLE)
    listing = subprocess.run(["iptables-legacy-save"], capture_output=True, text=True, check=True).stdout
    assert "SLUICE-PROBE" not in listing
    assert dataplane.read() == TABLE


def test_a_lock_that_is_never_given_back_is_an_error_in_one_line_and_nothing_is_lost(
    namespace: None, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_WAIT", 2)
    dataplane = legacy()
    dataplane.sync(TABLE)
    with held(lock, 60), pytest.raises(DataplaneError) as failure:
        dataplane.apply(Delta(changed={frontend(1): route(1, 5)}))
    assert str(failure.value) == f"{OURSELVES} has held the xtables lock ({lock}) for 2 s"
    assert dataplane.read() == TABLE
    after = dataplane.sync(TABLE)
    assert after.operations == 0
    assert after.failed_partial_restores == 1
