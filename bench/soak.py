"""`python -m bench.soak`: churn for minutes, and neither memory nor the kernel's table may drift.  It needs root.

An agent follows a stand-in API server with many Services.  Every so many milliseconds one of them changes: an endpoint
is replaced, comes or goes, the Service goes and comes back, or flips between policies of affinity.  Now and then
somebody else edits the agent's rules.  At the end of every round the changes stop for a moment: then the kernel must
hold exactly what was sent.  The agent's memory is sampled all the time; what it holds in the last third of the rounds
may not be more than in the third before it, but for a small allowance.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench import kernel
from bench.agent import Agent, Usage
from bench.cluster import TARGET_PORT, Cluster, spare_pod
from bench.rounds import from_server
from bench.server import SERVICES, SLICES, Server, event, lists_of
from rules.forwarding import Backend, parse_address

_ALLOWANCE = 0.03
"""How much more memory may be held at the end: allocators breathe."""
_PATIENCE = 60.0
_MOST_ENDPOINTS = 12


class Failed(Exception):  # noqa: N818  # it is the result of the soak, not an error of the program
    """Something drifted; the message says what."""


class Sample(NamedTuple):
    at: float
    usage: Usage
    cpu: float


class Churn:
    """A cluster that changes, and what the kernel must hold of it."""

    def __init__(self, cluster: Cluster, server: Server, randomly: random.Random) -> None:
        self._cluster = cluster
        self._server = server
        self._random = randomly
        self._version = 10 * cluster.services
        self._spare = 0
        self._pods = {number: cluster.pods(number) for number in range(cluster.services)}
        self._gone: list[int] = []
        self.made = 0

    def change(self) -> None:
        """Make one change."""
        self.made += 1
        number = self._random.randrange(self._cluster.services)
        if number in self._gone:
            self._gone.remove(number)
            self._server.emit(SERVICES, event("ADDED", self._service(number)))
            return
        what = self._random.choices([self._replace, self._add, self._remove, self._go], [6, 3, 3, 1])[0]
        what(number)

    def _service(self, number: int) -> bytes:
        # With affinity or without: a Service that comes back may have changed its mind.
        sticky = self._random.random() < 0.1
        self._version += 1
        service = msgspec.json.decode(self._cluster._replace(sticky=1 if sticky else 0).service(number))
        service["metadata"]["resourceVersion"] = str(self._version)
        return msgspec.json.encode(service)

    def _replace(self, number: int) -> None:
        pods = self._pods[number]
        if pods:
            pods[self._random.randrange(len(pods))] = self._new_pod()
        self._tell(number)

    def _add(self, number: int) -> None:
        if len(self._pods[number]) < _MOST_ENDPOINTS:
            self._pods[number].append(self._new_pod())
        self._tell(number)

    def _remove(self, number: int) -> None:
        # Never the last: a Service without endpoints has no backends to compare.
        if len(self._pods[number]) > 1:
            self._pods[number].pop(self._random.randrange(len(self._pods[number])))
        self._tell(number)

    def _go(self, number: int) -> None:
        self._gone.append(number)
        self._server.emit(SERVICES, event("DELETED", self._service(number)))

    def _tell(self, number: int) -> None:
        self._version += 1
        self._server.emit(SLICES, event("MODIFIED", self._cluster.slice(number, self._pods[number], self._version)))

    def _new_pod(self) -> str:
        # Addresses come back, as they do in a cluster; no two Services share one at a time for long enough to matter.
        self._spare = (self._spare + 1) % 1_000_000
        return spare_pod(self._spare)

    def wanted(self) -> dict[str, frozenset[Backend]]:
        gone = set(self._gone)
        return {
            f"default/service-{number}": frozenset(Backend(parse_address(pod), TARGET_PORT) for pod in pods)
            for number, pods in self._pods.items()
            if number not in gone
        }


def soak(options: argparse.Namespace, directory: Path, tell: Callable[[str], None]) -> None:
    """Run it.

    Raises:
        Failed: memory grew, the kernel holds something else than it must, or a sync failed.
    """
    cluster = Cluster(options.services, 4, sticky=10)
    randomly = random.Random(options.seed)  # noqa: S311  # reproducible, not secret
    kernel.remove_tables()
    with (
        Server(lists_of(cluster)) as server,
        Agent(Path(__file__).resolve().parent.parent, directory, from_server(directory, server.url)) as agent,
    ):
        churn = Churn(cluster, server, randomly)
        _until_equal(churn, agent)
        tell(f"{cluster}: first sync after {time.monotonic() - agent.started:.1f} s, {_megabytes(agent)}")
        samples: list[Sample] = []
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < options.seconds:
            _round(churn, agent, min(options.round, options.seconds - elapsed), options.rate, samples)
            if options.meddle:
                _meddle(randomly)
            settled = time.monotonic()
            _until_equal(churn, agent)
            samples.append(Sample(time.monotonic(), agent.usage(), agent.cpu()))
            share = (samples[-1].cpu - samples[0].cpu) / max(1e-9, samples[-1].at - samples[0].at)
            tell(
                f"{time.monotonic() - start:6.0f} s: {churn.made:,} changes, equal after "
                f"{time.monotonic() - settled:.2f} s, {_megabytes(agent)}, {share:.0%} of a CPU"
            )
        _judge(samples, agent, meddled=options.meddle)


def _round(churn: Churn, agent: Agent, seconds: float, rate: float, samples: list[Sample]) -> None:
    """Changes at a steady rate, however long one takes to send."""
    start = time.monotonic()
    for count in range(int(seconds * rate)):
        time.sleep(max(0.0, start + count / rate - time.monotonic()))
        churn.change()
        if count % int(rate * 2) == 0:
            agent.check()
            samples.append(Sample(time.monotonic(), agent.usage(), agent.cpu()))


def _meddle(randomly: random.Random) -> None:
    """Another process edits the agent's rules: the agent has to notice by itself."""
    command = randomly.choice(
        [
            "flush map ip sluice cluster-ip",
            "flush set ip sluice cluster-ips",
            "flush chain ip sluice dispatch",
            "delete table ip sluice",
        ]
    )
    # It may meet a table that is just being repaired.
    subprocess.run(["nft", *command.split()], check=False, capture_output=True)  # noqa: S603, S607  # ours


def _until_equal(churn: Churn, agent: Agent) -> None:
    """Wait until the kernel holds what was sent.

    Raises:
        Failed: it does not in good time.
    """
    wanted = churn.wanted()
    deadline = time.monotonic() + _PATIENCE
    why = ""
    while time.monotonic() < deadline:
        agent.check()
        with contextlib.suppress(AssertionError):  # there is no whole table yet
            found = kernel.services()
            wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            if not wrong:
                return
            some = "; ".join(f"{name} has {_few(found.get(name))}, not {_few(wanted.get(name))}" for name in wrong[:3])
            why = f"wrong about {len(wrong)} Services: {some}"
        time.sleep(0.1)
    raise Failed(f"the kernel is {why or 'without a table'} after {_PATIENCE:.0f} s\n{agent.tail()}")


def _few(backends: frozenset[Backend] | None) -> str:
    return "none" if backends is None else ", ".join(sorted(map(str, backends)))


def _judge(samples: list[Sample], agent: Agent, *, meddled: bool) -> None:
    third = len(samples) // 3
    before, last = (
        statistics.median(each.usage.uss for each in part) for part in (samples[third : 2 * third], samples[-third:])
    )
    if last > before * (1 + _ALLOWANCE):
        raise Failed(f"memory grows: {before / 1e6:.1f} MB in the second third, {last / 1e6:.1f} MB in the last")
    log = agent.log.read_text(errors="replace")
    for sign in ("sync failed", "Traceback", *(() if meddled else ("drift repaired", "changes not applied"))):
        if sign in log:
            raise Failed(f"the log says {sign!r}:\n{agent.tail()}")


def _megabytes(agent: Agent) -> str:
    usage = agent.usage()
    return f"USS {usage.uss / 1e6:.1f} MB, RSS {usage.rss / 1e6:.1f} MB"


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sluice-soak-") as directory:
        yield Path(directory)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Churn, and nothing may drift.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=50, help="changes a second")
    parser.add_argument("--services", type=int, default=5000)
    parser.add_argument("--round", type=float, default=30, help="seconds between comparisons with the kernel")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--meddle", action="store_true", help="let another process edit the rules after each round")
    options = parser.parse_args()
    kernel.enter_own_namespace()

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    with _directory() as directory:
        try:
            soak(options, directory, tell)
        except Failed as error:
            tell(f"FAILED: {error}")
            return 1
    tell("flat memory, no drift")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
