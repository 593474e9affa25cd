"""What the verbs of a large node cost, each in a process of its own, and how fast drift is healed there.

The agent runs beside them.  Each verb is started some times, in turns; the medians count.  Drift is made by a socket of
this process, and healed when the last transaction is through after which the kernel holds everything.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bench import kernel, manifests, rounds
from bench.agent import Agent, Source
from bench.cluster import PORT, Cluster
from bench.report import Row
from bench.rounds import Place
from rules.forwarding import Family
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import names
from rules.nftables.elements import ENDPOINT_MAPS
from rules.nftables.layout import TABLE
from rules.nftables.messages import Element, add_elements, delete_elements
from rules.nftables.objects import delete_table
from rules.nftables.state import read_elements

_HELP_TARGET = 150.0
_HEAL_TARGET = 1.0
_TARGETS = {"dump": 1.0, "explain --live": 1.0, "explain": 1.0, "verify": 2.0}
"""Seconds from the start of the command to its end, at 10,000 Services."""
_HEALS = 2
"""Of each kind of drift."""
_REST = 4.0
"""Seconds before each drift: an agent whose rules are touched again and again takes its time (`proxy.runner`)."""
_PATIENCE = 20.0


class Cost(NamedTuple):
    """Of one run of a command, in seconds."""

    wall: float
    cpu: float


def rows(places: Mapping[str, Place], cluster: Cluster, times: int = 5) -> Iterator[Row]:
    """The figures of the verbs and of healing, of each checkout in turn."""
    found = {name: _measure(place, cluster, times) for name, place in places.items()}
    costs = {name: each[0] for name, each in found.items()}
    title = str(cluster)
    for what in next(iter(costs.values())):
        wall = {name: statistics.median(run.wall for run in each[what]) for name, each in costs.items()}
        cpu = {name: statistics.median(run.cpu for run in each[what]) for name, each in costs.items()}
        if what == "--help":
            yield Row(title, "sluice --help: CPU", "ms", {n: each * 1e3 for n, each in cpu.items()}, _HELP_TARGET)
            continue
        target = _TARGETS.get(what) if cluster.services == 10_000 else None
        yield Row(title, f"sluice {what}", "s", wall, target)
        yield Row(title, f"sluice {what}: CPU", "s", cpu)
    for what in DRIFTS:
        yield Row(
            title, f"healed: {what}", "s", {name: healed[what] for name, (_, healed) in found.items()}, _HEAL_TARGET
        )


def _measure(place: Place, cluster: Cluster, times: int) -> tuple[dict[str, list[Cost]], dict[str, float]]:
    source = Source(manifests.write_json(cluster, place.directory))
    run_directory = place.directory / "run"
    agent = Agent(place.checkout, place.directory, source, run_directory=run_directory)
    own = ["--run-directory", str(run_directory)]
    address = f"{cluster.cluster_ip(cluster.services // 2)}:{PORT}"
    commands = {
        "--help": ["--help"],
        "dump": ["dump"],
        "dump of one Service": ["dump", "--service", "default/service-7"],
        "dump -o raw": ["dump", "-o", "raw"],
        "explain": ["explain", address, "--from", "node", *own],
        "explain --live": ["explain", address, "--from", "node", "--live", *own],
        "verify": ["verify", *own],
    }
    kernel.remove_tables()
    with rounds.synced(place, cluster, agent):
        time.sleep(1)
        costs: dict[str, list[Cost]] = {what: [] for what in commands}
        for turn in range(times + 1):
            for what, arguments in commands.items():
                cost = run(place, arguments)
                if turn:  # the first one compiles
                    costs[what].append(cost)
        healed = {
            what: statistics.median(_heal(place, cluster, agent, drift) for _ in range(_HEALS))
            for what, drift in DRIFTS.items()
        }
    return costs, healed


def run(place: Place, arguments: Sequence[str]) -> Cost:
    """One run of a verb, whose bytecode is kept as that of an installed program is.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(place.directory / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "proxy", *arguments]
    start = time.monotonic()
    process = subprocess.Popen(  # noqa: S603  # our own program
        command, cwd=place.checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    errors = process.communicate()[1]
    if process.returncode != 0:
        raise RuntimeError(f"sluice {' '.join(arguments)} ended with {process.returncode}: {errors.decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


# --- drift -------------------------------------------------------------------------------------------------------


def _flush(netlink: NetfilterSocket) -> int:
    netlink.commit([delete_table(family, TABLE) for family in Family])
    return 2


def _remove(netlink: NetfilterSocket) -> int:
    element = read_elements(netlink, Family.IPV4, names.CLUSTER_IP)[0]
    netlink.commit(delete_elements(Family.IPV4, TABLE, names.CLUSTER_IP, [element.key]))
    return 1


def _change(netlink: NetfilterSocket) -> int:
    name = next(iter(ENDPOINT_MAPS.values()))
    old = read_elements(netlink, Family.IPV4, name)[0]
    new = old._replace(data=bytes([old.data[0] ^ 1]) + old.data[1:])
    deletion = delete_elements(Family.IPV4, TABLE, name, [old.key])
    netlink.commit([*deletion, *add_elements(Family.IPV4, TABLE, name, [new])])
    return 1


def _add(netlink: NetfilterSocket) -> int:
    intruder = Element(bytes([10, 9, 9, 9]))
    netlink.commit(add_elements(Family.IPV4, TABLE, names.CLUSTER_IPS, [intruder]))
    return 1


DRIFTS: dict[str, Callable[[NetfilterSocket], int]] = {
    "everything flushed": _flush,
    "an element removed": _remove,
    "an element changed": _change,
    "an element added": _add,
}
"""Each makes its drift, and says in how many transactions it is healed: one for each family."""


def _heal(place: Place, cluster: Cluster, agent: Agent, drift: Callable[[NetfilterSocket], int]) -> float:
    """Seconds from a drift until the agent has healed it.

    Raises:
        TimeoutError: it has not.
    """
    place.listener.drain(_REST)
    end: float | None = 0.0
    with NetfilterSocket() as netlink:
        transactions = 1 + drift(netlink)  # the drift's own comes first
        start = time.monotonic()
    for _ in range(transactions):
        if (end := place.listener.wait(_PATIENCE)) is None:
            raise TimeoutError(f"a drift was not healed:\n{agent.tail()}")
    assert end is not None
    held = kernel.services()
    wrong = [n for n in range(cluster.services) if held.get(f"default/service-{n}") != cluster.backends(n)]
    assert not wrong, f"the kernel is wrong about {len(wrong)} Services after a repair"
    assert kernel.cluster_ips() == cluster.services, "an element too many is left after a repair"
    return end - start
