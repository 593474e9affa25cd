"""What mode ipvs costs beside ipvsadm, which is given the same virtual and real servers: full loads, changes, reading.

`make bench-ipvs` runs it in a virtual machine (tests/vm), as most kernels of containers have no IPVS: there the ratios
count, not the seconds.  Where the kernel has it, `python -m bench.ipvs` needs root and ipvsadm, nothing else.

ipvsadm writes servers alone.  Sluice writes, in the same time, the sets, addresses and rules that go with them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import kernel, report
from bench.cluster import PORT, TARGET_PORT, Cluster, spare_pod
from bench.report import Row
from rules.dataplane import UnavailableError
from rules.forwarding import (
    Backend,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Protocol,
    Route,
    parse_address,
)
from rules.ipvs.dataplane import IpvsDataplane
from rules.ipvs.messages import Key as ServerKey
from rules.ipvs.messages import Target, VirtualServer, add_real, add_server
from rules.ipvs.services import Ipvs

SIZES = (1_000, 5_000)
_PROGRAMS = ("sluice", "ipvsadm")
_LOAD_TARGET = 1.0
_CHANGE_TARGET = 1.25
"""A change at the largest size over one at the smallest: no dearer, but for the noise of a median."""


class _Taken(NamedTuple):
    """Seconds."""

    load: float
    servers: float
    change: float
    read: float


def rows(sizes: Sequence[int] = SIZES, *, turns: int = 3, changes: int = 30) -> Iterator[Row]:
    """The figures of each size in turn, and how the largest compares with the smallest.

    Raises:
        UnavailableError: the kernel has no IPVS; the message says so.
    """
    found: dict[str, dict[int, _Taken]] = {program: {} for program in _PROGRAMS}
    for size in sizes:
        cluster = Cluster(size, 4)
        ours, theirs = _ours(cluster, turns, changes), _ipvsadm(cluster, turns, changes)
        found["sluice"][size], found["ipvsadm"][size] = ours, theirs
        for what, unit, scale, values in (
            ("full load", "s", 1, (ours.load, theirs.load)),
            ("of it, virtual and real servers", "s", 1, (ours.servers, theirs.servers)),
            ("one endpoint replaced, median", "ms", 1e3, (ours.change, theirs.change)),
            ("everything read", "s", 1, (ours.read, theirs.read)),
        ):
            scaled = (value * scale for value in values)
            yield Row(str(cluster), what, unit, dict(zip(_PROGRAMS, scaled, strict=True)))
        yield Row(str(cluster), "full load, over ipvsadm's", "x", {"sluice": ours.load / theirs.load}, _LOAD_TARGET)
    first, last = min(sizes), max(sizes)
    if first != last:
        ratios = {program: found[program][last].change / found[program][first].change for program in _PROGRAMS}
        yield Row(f"{last:,} over {first:,}", "one endpoint replaced", "x", ratios, _CHANGE_TARGET)


# --- ours ----------------------------------------------------------------------------------------------------


def _frontend(cluster: Cluster, number: int) -> Frontend:
    return Frontend(parse_address(cluster.cluster_ip(number)), Protocol.TCP, PORT)


def _route(number: int, backends: frozenset[Backend]) -> Route:
    return Route(kind=Kind.CLUSTER_IP, backends=backends, label=f"default/service-{number}:http")


def table_of(cluster: Cluster) -> ForwardingTable:
    """What a node holds of a cluster."""
    routes = {
        _frontend(cluster, number): _route(number, cluster.backends(number)) for number in range(cluster.services)
    }
    return ForwardingTable(family=Family.IPV4, node=NodeFacts(bound=True), routes=routes)


def _ours(cluster: Cluster, turns: int, changes: int) -> _Taken:
    table = table_of(cluster)
    with contextlib.closing(IpvsDataplane(Family.IPV4)) as dataplane:
        loads, servers = [], []
        for turn in range(turns):
            dataplane.cleanup()
            report.tell(f"{cluster}: ipvsadm's servers by our batches, {turn + 1}")
            servers.append(_timed(lambda: _servers_alone(cluster)))
            subprocess.run([_ipvsadm_program(), "--clear"], check=True)  # noqa: S603  # found on PATH
            report.tell(f"{cluster}: full load {turn + 1}")
            loads.append(_timed(lambda: dataplane.sync(table)))
        assert dataplane.read() == table, "the kernel holds something else"
        report.tell(f"{cluster}: changes")
        taken = [_timed(lambda delta=delta: dataplane.apply(delta)) for delta in _changes(cluster, changes)]  # type: ignore[misc]  # mypy on defaults of lambdas
        report.tell(f"{cluster}: reading")
        read = _timed(dataplane.read)
        dataplane.cleanup()
    return _Taken(min(loads), min(servers), statistics.median(taken), read)


def _changes(cluster: Cluster, count: int) -> Iterator[Delta]:
    """One endpoint replaced by another in some of all Services, and put back in the same ones."""
    for index in range(count):
        number = index // 2 * cluster.services // max(1, count // 2)
        backends = cluster.backends(number)
        if index % 2 == 0:
            gone = min(backends)
            backends = backends - {gone} | {Backend(parse_address(spare_pod(1)), TARGET_PORT)}
        yield Delta(changed={_frontend(cluster, number): _route(number, backends)})


def _servers_alone(cluster: Cluster) -> None:
    requests = []
    for number in range(cluster.services):
        key = ServerKey(Family.IPV4, Protocol.TCP, parse_address(cluster.cluster_ip(number)), PORT)
        requests.append(add_server(VirtualServer(key)))
        requests += [add_real(key, Target(*backend)) for backend in cluster.backends(number)]
    with Ipvs() as ipvs:
        refused = ipvs.send(requests)
    assert not refused, refused[:3]


# --- ipvsadm -------------------------------------------------------------------------------------------------


def _ipvsadm_program() -> str:
    found = shutil.which("ipvsadm")
    if found is None:
        raise UnavailableError("ipvsadm is not installed: apt-get install ipvsadm")
    return found


def _ipvsadm(cluster: Cluster, turns: int, changes: int) -> _Taken:
    program = _ipvsadm_program()

    def run(*arguments: str, given: str = "") -> None:
        subprocess.run([program, *arguments], check=True, input=given, text=True, stdout=subprocess.DEVNULL)  # noqa: S603  # found on PATH

    lines = []
    for number in range(cluster.services):
        server = f"-t {cluster.cluster_ip(number)}:{PORT}"
        lines.append(f"-A {server} -s rr")
        lines += [f"-a {server} -r {pod}:{TARGET_PORT} -m" for pod in cluster.pods(number)]
    text = "\n".join([*lines, ""])
    loads = []
    for turn in range(turns):
        run("--clear")
        report.tell(f"{cluster}: ipvsadm's full load {turn + 1}")
        loads.append(_timed(lambda: run("--restore", given=text)))
    report.tell(f"{cluster}: ipvsadm's changes")
    taken = []
    spare = f"{spare_pod(1)}:{TARGET_PORT}"
    for index in range(changes // 2):
        number = index * cluster.services // max(1, changes // 2)
        server = f"{cluster.cluster_ip(number)}:{PORT}"
        replaced = f"-a -t {server} -r {spare} -m\n-d -t {server} -r {cluster.pods(number)[0]}:{TARGET_PORT}\n"
        taken.append(_timed(lambda replaced=replaced: run("--restore", given=replaced)))  # type: ignore[misc]  # as above
    read = _timed(lambda: run("--list", "--numeric"))
    run("--clear")
    return _Taken(min(loads), min(loads), statistics.median(taken), read)


def _timed(what: Callable[[], object]) -> float:
    """Seconds that it takes, from a heap without garbage."""
    gc.collect()
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ipvs", description="What mode ipvs costs, beside ipvsadm.")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="Services, of 4 endpoints each")
    parser.add_argument("--turns", type=int, default=3, help="full loads of each size, of which the best counts")
    parser.add_argument("--changes", type=int, default=30, help="changes of each size")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    kernel.enter_own_namespace()
    sizes = [int(size) for size in options.sizes.split(",")]
    try:
        found = report.results(rows(sizes, turns=options.turns, changes=options.changes))
    except UnavailableError as error:
        sys.stderr.write(f"bench.ipvs: {error}\n")
        return 2
    if options.out:
        report.save(found, options.out)
    print(report.table(found, programs=_PROGRAMS))  # noqa: T201  # what the program is for
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
