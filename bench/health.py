"""What a flood of connections to the health server costs syncs: their p99, idle and while 10,000 a second are offered.

    python -m bench.health                                     both, in turns, and the row
    python -m bench.health --offer 10000 --to 127.0.0.1:10256  the flood alone, from the network namespace that it is in

The flood is a process of its own.  It offers so many connections a second, each with a whole request, whether they are
taken or not, and gives each up after a fifth of a second.

It keeps a core of the machine busy, and the kernel, whoever is flooded.  So it is offered to a port that nobody serves,
too: what lies between that and idle is the machine's, what lies between that and the flood of /healthz is the agent's.
How much of its event loop the agent gives away it counts itself; that is the one number here that other work on the
machine leaves alone.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import random
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench import kernel, report, rounds
from bench.agent import HEALTH
from bench.cluster import Cluster
from bench.measure import places_of
from bench.report import Row
from bench.rounds import Place
from bench.server import Server, lists_of

RATE = 10_000
SERVICES = 1_000
CHANGES = 300
TURNS = 3
TARGET = 2.0
"""How many times the idle p99 it may be."""

SHARE = 0.2
"""How much of the event loop the servers may take."""
UNSERVED, METRICS = 7777, 10249

_HERE = Path(__file__).resolve().parent
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
_PATIENCE = 0.2
_ABORT = struct.pack("ii", 1, 0)
_KIND = "endpoint replaced"


class Offered(NamedTuple):
    """What became of a flood."""

    rate: float
    """Connections offered a second."""
    answered: float
    """Answers a second."""


def offer(host: str, port: int, rate: float, seconds: float, *, request: bytes = _REQUEST) -> Offered:
    """Offer connections to a server for some seconds."""
    start = now = time.monotonic()
    offered = answered = 0
    waiting: deque[tuple[float, socket.socket]] = deque()
    while now - start < seconds:
        due = min(int((now - start) * rate) - offered, 50)
        for _ in range(due):
            waiting.append((now + _PATIENCE, _begin(host, port, request)))
        offered += due
        while waiting and (waiting[0][0] < now or len(waiting) > rate):
            answered += _end(waiting.popleft()[1])
        if due < 5:
            select.select([], [], [], 0.0005)
        now = time.monotonic()
    for _, sock in waiting:
        answered += _end(sock)
    return Offered(offered / (now - start), answered / (now - start))


def _begin(host: str, port: int, request: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    # On loopback every address is the server's: that many more connections find a port of their own.
    address = f"127.0.0.{random.randint(1, 250)}" if host == "127.0.0.1" else host  # noqa: S311  # spreads, hides nothing
    with contextlib.suppress(OSError):  # BlockingIOError: it is under way; else the backlog is full
        sock.connect((address, port))
    with contextlib.suppress(OSError):
        sock.send(request)
    return sock


def _end(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(4096))
    except OSError:
        return False
    finally:
        sock.close()


@contextlib.contextmanager
def flood(rate: int = RATE, port: int = HEALTH) -> Iterator[list[Offered]]:
    """A flood for as long as the block runs; the list has what became of it afterwards."""
    command = [sys.executable, "-m", "bench.health", "--offer", str(rate), "--to", f"127.0.0.1:{port}"]
    found: list[Offered] = []
    process = subprocess.Popen(  # noqa: S603  # our own program
        command, cwd=_HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield found
    finally:
        out, _ = process.communicate("", timeout=30)
        rates = [tuple(map(float, line.split())) for line in out.splitlines()[1:]]
        found.extend(Offered(*each) for each in rates)


def rows(places: Mapping[str, Place], cluster: Cluster, *, changes: int = CHANGES, turns: int = TURNS) -> Iterator[Row]:
    """The p99 of syncs, idle and under a flood, and the one as a multiple of the other."""
    idle, beside, flooded, shares = ({name: list[float]() for name in places} for _ in range(4))
    floods: dict[str, list[Offered]] = {name: [] for name in places}
    with Server(lists_of(cluster)) as server:
        for _, (name, place) in itertools.product(range(turns), places.items()):
            idle[name].append(_p99(place, cluster, server, changes))
            with flood(port=UNSERVED):
                beside[name].append(_p99(place, cluster, server, changes))
            with flood() as offered, _shares() as taken:
                flooded[name].append(_p99(place, cluster, server, changes))
            floods[name] += offered
            shares[name] += taken

    def row(what: str, unit: str, values: Mapping[str, float], target: float | None = None) -> Row:
        return Row(str(cluster), what, unit, values, target)

    medians = [{name: statistics.median(taken) for name, taken in each.items()} for each in (idle, beside, flooded)]
    for what, values in zip(
        ("idle", f"{RATE} connections/s to a port that nobody serves", "to /healthz"), medians, strict=True
    ):
        yield row(f"endpoint replaced, p99, {what}", "ms", {name: value * 1e3 for name, value in values.items()})
    yield row("the third as a multiple of the first", "x", {n: medians[2][n] / medians[0][n] for n in places}, TARGET)
    yield row("the third as a multiple of the second", "x", {n: medians[2][n] / medians[1][n] for n in places}, TARGET)
    if all(shares.values()):
        busiest = {name: max(each) for name, each in shares.items()}
        yield row("the event loop's time for it, at most in a second", "", busiest, SHARE)
    for what, index in (("connections that were offered", 0), ("answers that came within 0.2 s", 1)):
        found = {name: statistics.median(each[index] for each in taken) for name, taken in floods.items()}
        yield row(what, "1/s", found)


@contextlib.contextmanager
def _shares() -> Iterator[list[float]]:
    """How much of its event loop the agent gives to its servers, second by second, for as long as the block runs."""
    ended = threading.Event()
    found: list[float] = []

    def sample() -> None:
        before: tuple[float, float] | None = None
        while not ended.wait(1.0):
            now = (time.monotonic(), _http_seconds())
            if before is not None and now[1] > before[1]:
                found.append((now[1] - before[1]) / (now[0] - before[0]))
            before = now

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        ended.set()
        sampler.join()


def _http_seconds() -> float:
    """What the agent has counted; 0 while it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=1)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    except (OSError, http.client.HTTPException):
        return 0.0
    finally:
        connection.close()
    return next((float(line.split()[1]) for line in lines if line.startswith("sluice_http_seconds_total ")), 0.0)


def _p99(place: Place, cluster: Cluster, server: Server, changes: int) -> float:
    session = rounds.session(place, cluster, server, count=changes, only=_KIND)
    return session.changes[_KIND].total.p99


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.health")
    parser.add_argument("--offer", type=float, metavar="RATE", help="only offer so many connections a second")
    parser.add_argument("--to", default=f"127.0.0.1:{HEALTH}", metavar="ADDRESS:PORT")
    parser.add_argument("--seconds", type=float, default=0.0, help="for so long, else until standard input ends")
    parser.add_argument("--against", type=Path, help="another checkout, measured in the same run")
    parser.add_argument("--services", type=int, default=SERVICES)
    parser.add_argument("--changes", type=int, default=CHANGES)
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    if options.offer:
        return _offer(options.to, options.offer, options.seconds)
    checkouts = {"now": _HERE.parent} | ({"before": options.against.resolve()} if options.against else {})
    kernel.enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        places = places_of(checkouts, Path(directory), kernel.Listener())
        cluster = Cluster(options.services, 4)
        found = report.results(list(rows(places, cluster, changes=options.changes, turns=options.turns)))
    print(report.table(found))  # noqa: T201  # what the program is for
    return 0


def _offer(to: str, rate: float, seconds: float) -> int:
    """Print a line when it begins, and what became of each second of it."""
    host, _, port = to.rpartition(":")
    end = time.monotonic() + (seconds or 3600.0)
    print("offering", flush=True)  # noqa: T201  # for whoever waits for it
    while time.monotonic() < end:
        if not seconds and select.select([sys.stdin], [], [], 0)[0]:
            break
        print(*offer(host, int(port), rate, 1.0), flush=True)  # noqa: T201  # likewise
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
