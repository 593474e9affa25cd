"""What dump, explain and verify cost when their answer comes from files, each in a process of its own.

The files are of one large node: kube-proxy's rules as iptables-save, `nft list ruleset` and `nft -j list ruleset`
print them, what ipvsadm and ipset print in mode ipvs, its objects, and a bundle, which an agent that carries the same
Services makes beside kube-proxy's rules.  What is decoded is what the objects come to: verify says so, or there are no
figures.

    python -m bench.sources [--baseline CHECKOUT]

With a second checkout each command is run in turns in both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from bench import kernel, kube_proxy, manifests, report, rounds, verbs
from bench.agent import Agent, Source
from bench.cluster import NODE, PORT, Cluster
from bench.report import Row
from bench.rounds import Place
from bench.verbs import Cost
from proxy.config.load import load as load_settings
from proxy.render import render
from proxy.sources.manifest_loading import load as load_manifests
from rules.foreign.nft_model import TABLE
from tests.kube_proxy_ipvs import lay_out

TARGET = 2.0
"""Seconds from the start of the command to its end, at 10,000 Services."""
_NODE = ("--hostname-override", NODE)


class Files(NamedTuple):
    """Where everything of a cluster was written."""

    rules: Mapping[str, str]
    """By the program that prints them."""
    objects: Mapping[str, str]
    """By their format."""


def write(cluster: Cluster, directory: Path) -> Files:
    """Rules and objects of a cluster."""
    objects = {"json": manifests.write_json(cluster, directory), "yaml": manifests.write_yaml(cluster, directory)}
    rules = {
        "iptables-save": kube_proxy.iptables_save(cluster).encode(),
        "nft": kube_proxy.nft_text(cluster).encode(),
        "nft -j": kube_proxy.nft_json(cluster),
        "ipvs": ipvs_texts(objects["json"]),
    }
    for name, data in rules.items():
        (directory / name).write_bytes(data)
    return Files({name: str(directory / name) for name in rules}, {name: str(path) for name, path in objects.items()})


def ipvs_texts(objects: Path) -> bytes:
    """What ipvsadm, ipset, iptables-save and `ip -j addr` print together where mode ipvs serves these objects."""
    settings = load_settings([("proxy-mode", "ipvs"), ("hostname-override", NODE)]).settings
    tables = render(load_manifests(str(objects)), settings, NODE).tables
    return b"".join(lay_out(each).all for each in tables if each.routes)


def commands(cluster: Cluster, files: Files) -> dict[str, list[str]]:
    """What is measured with files of rules and objects, by what it is called."""
    address = f"{cluster.cluster_ip(cluster.services // 2)}:{PORT}"
    explain = ["explain", address, "--from", "node"]
    found = {f"explain objects.{name}": [*explain, "-f", path, *_NODE] for name, path in files.objects.items()}
    for program, rules in files.rules.items():
        found[f"dump {program}"] = ["dump", "-f", rules]
        found[f"explain {program}"] = [*explain, "-f", rules]
        for name, objects in files.objects.items():
            both = ["-f", rules, "-f", objects, *_NODE]
            found[f"explain {program}, objects.{name}"] = [*explain, *both]
            found[f"verify {program}, objects.{name}"] = ["verify", *both]
    return found


def of_bundle(cluster: Cluster, bundle: str) -> dict[str, list[str]]:
    """What is measured with a bundle, which has Sluice's rules and kube-proxy's."""
    address = f"{cluster.cluster_ip(cluster.services // 2)}:{PORT}"
    found = {}
    for whose, more in (("", []), (" --of kube-proxy", ["--of", "kube-proxy"])):
        for verb in (["dump"], ["explain", address, "--from", "node"], ["verify"]):
            found[f"{verb[0]} bundle.tgz{whose}"] = [*verb, "-f", bundle, *more]
    return found


def rows(
    places: Mapping[str, Place], cluster: Cluster, times: int, *, only: str = "", bundle: bool = True
) -> Iterator[Row]:
    """The figures of each checkout, of the commands that have `only` in their names.

    Raises:
        RuntimeError: a verb failed, or verify found a difference.
    """
    place = next(iter(places.values()))
    files = write(cluster, place.directory)
    wanted = commands(cluster, files)
    if bundle:
        path = make_bundle(place, cluster, files)
        wanted |= of_bundle(cluster, path)
    target = TARGET if cluster.services <= 10_000 else None
    for what, arguments in wanted.items():
        if only not in what:
            continue
        costs: dict[str, list[Cost]] = {name: [] for name in places}
        for turn in range(times + 1):
            for name, each in places.items():
                cost = verbs.run(each, arguments)
                if turn:  # the first one compiles
                    costs[name].append(cost)
        for title, of in ((what, attrgetter("wall")), (f"{what}: CPU", attrgetter("cpu"))):
            medians = {name: statistics.median(map(of, found)) for name, found in costs.items()}
            yield Row(str(cluster), title, "s", medians, target if title == what else None)


def make_bundle(place: Place, cluster: Cluster, files: Files) -> str:
    """The archive of a node on which kube-proxy's rules of nftables stand beside those of a running agent."""
    path = place.directory / "bundle.tgz"
    path.unlink(missing_ok=True)
    run_directory = place.directory / "run"
    source = Source(Path(files.objects["json"]))
    kernel.remove_tables()
    with rounds.synced(place, cluster, Agent(place.checkout, place.directory, source, run_directory=run_directory)):
        # Only now: an agent that starts removes them.
        _nft("-f", files.rules["nft"])
        verbs.run(place, ["bundle", "-o", str(path), "--run-directory", str(run_directory)])
        _nft("delete", "table", "ip", TABLE)
    return str(path)


def _nft(*arguments: str) -> None:
    subprocess.run(["nft", *arguments], check=True)  # noqa: S603, S607  # ours, and wherever nft is


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sources", description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", default="", metavar="WORDS", help="commands that have these in their names")
    parser.add_argument(
        "--baseline", type=Path, metavar="CHECKOUT", help="another one, measured in turns with this one"
    )
    parser.add_argument("--bundle", action=argparse.BooleanOptionalAction, default=True, help="a bundle too (root)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sources.json")
    options = parser.parse_args(arguments)
    kernel.enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        checkouts = {"now": Path(__file__).parents[1]}
        if options.baseline:
            checkouts["before"] = options.baseline.resolve()
        listener = kernel.Listener()
        places = {}
        for name, checkout in checkouts.items():
            own = Path(directory) / name
            own.mkdir()
            places[name] = Place(checkout, own, listener)
        cluster = Cluster(options.services, 4)
        made = rows(places, cluster, options.times, only=options.only, bundle=options.bundle)
        found = report.results(made)
    report.save(found, options.out)
    print(report.table(found))  # noqa: T201  # what the program is for
    return 0


if __name__ == "__main__":
    sys.exit(main())
