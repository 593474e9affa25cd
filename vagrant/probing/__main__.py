"""The command line of `vagrant/probe`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vagrant.probing.agents import LabAgent
    from vagrant.probing.scenarios import Result
    from vagrant.probing.survival import Event

MODES = ("ipvs", "iptables", "nftables", "userspace")


def main() -> int:
    """0: all is as expected; 1: something is not; 2: the lab is not there."""
    arguments = _arguments()
    # An emulated machine is ten times slower than this one.
    os.environ.setdefault("SLUICE_TIME_SCALE", "8")
    from vagrant.probing.machines import LabError  # noqa: PLC0415  # it reads the time scale

    modes = arguments.mode.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        print(f"probe: no mode is called {unknown[0]}: choose of {', '.join(MODES)}", file=sys.stderr)
        return 2
    try:
        return max(_in_mode(mode, arguments) for mode in modes)
    except (LabError, RuntimeError, OSError) as error:  # the latter two of a machine that goes away meanwhile
        print(f"probe: {error}", file=sys.stderr)
        return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vagrant/probe",
        description="Run scenarios' probes between the lab's machines: sockets and scapy, from pods, node and clients.",
    )
    parser.add_argument(
        "--mode",
        default=os.environ.get("LAB_MODE", "nftables"),
        help="ipvs, iptables, nftables or userspace, several with commas; else LAB_MODE, else nftables",
    )
    parser.add_argument("--survive", action="store_true", help="restart, kill -9 and reboot in place of scenarios")
    parser.add_argument("--verbose", action="store_true", help="say what is going on")
    parser.add_argument("scenario", nargs="*", help="names of tests/scenarios; all of them: the word `all`")
    return parser.parse_args()


def _in_mode(mode: str, arguments: argparse.Namespace) -> int:
    from vagrant.probing import agents, machines, scenarios, survival  # noqa: PLC0415  # they read the time scale

    began = time.monotonic()

    def say(text: str) -> None:
        if arguments.verbose or sys.stderr.isatty():
            print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

    chosen = scenarios.choose(arguments.scenario or scenarios.CHOSEN)
    found = machines.find()
    nodes = {name: agents.LabAgent(found[name], mode) for name in ("node1", "node2")}
    say(f"mode {mode}: {nodes['node1'].version()}")
    with ThreadPoolExecutor() as pool:
        list(pool.map(agents.LabAgent.restore, nodes.values()))
    wrong: list[str] = []
    with machines.LabProbes(found) as probes:
        if arguments.survive:
            [scenario] = scenarios.choose([survival.SCENARIO])
            events = survival.survive(scenario, nodes["node1"], probes, say)
            _print_events(mode, events)
            wrong += [each for event in events for each in event.wrong]
        else:
            results = [scenarios.run(scenario, nodes["node1"], probes, say) for scenario in chosen]
            if not arguments.scenario:
                nodes["node1"].restore()
                mirrored = scenarios.choose(scenarios.MIRRORED)
                results += [scenarios.run(scenario, nodes["node2"], probes, say) for scenario in mirrored]
            wrong += [f"{each.name}: {line}" for each in results for line in each.wrong]
            _print_results(mode, results)
        made = ", ".join(f"{count} from {kind}s" for kind, count in sorted(probes.made.items()) if kind != "scapy")
    with ThreadPoolExecutor() as pool:
        drift = [
            f"{name}: {said}" for name, said in zip(nodes, pool.map(_verified, nodes.values()), strict=True) if said
        ]
    wrong += drift
    for machine in found.values():
        machine.disconnect()
    print(f"connections: {made}; SCTP INITs by scapy: {probes.made.get('scapy', 0)}")
    if not drift:
        print("the kernels hold what is wanted (sluice verify)")
    for each in wrong:
        print(f"WRONG  {each}")
    print(f"mode {mode}: {'NOT as expected' if wrong else 'all as expected'}, {time.monotonic() - began:.0f} s")
    return int(bool(wrong))


def _verified(agent: LabAgent) -> str:
    """What is wrong with what a node's kernel holds, once the lab's own manifests are back."""
    agent.restore()
    agent.settle(marked=False)
    return agent.verify()


def _print_results(mode: str, results: Iterable[Result]) -> None:
    rows: list[tuple[str, ...]] = [("SCENARIO", "AGENT", "POD", "NODE", "CLIENT", "SCTP", "SECONDS", f"MODE {mode}")]
    for each in results:
        counts = each.probes
        verdict = f"skipped: {each.skipped}" if each.skipped else f"{len(each.wrong)} WRONG" if each.wrong else "ok"
        numbers = (*(str(counts[kind]) for kind in ("pod", "node", "client")), str(each.sctp), f"{each.seconds:.0f}")
        rows.append((each.name, each.node, *numbers, verdict))
    _print_table(rows)


def _print_events(mode: str, events: Iterable[Event]) -> None:
    rows = [(f"MODE {mode}", "SECONDS", "UNIT", "RULES", "CONNECTIONS MEANWHILE", "PROBES AFTER")]
    for each in events:
        probes = sum(each.after.probes.values())
        verdict = f"{probes} ok" if not each.after.wrong else f"{len(each.after.wrong)} of {probes} WRONG"
        rows.append((each.what, f"{each.seconds:.0f}", each.unit, each.rules, each.meanwhile, verdict))
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(c.rjust(width) if c.isdigit() else c.ljust(width) for c, width in cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
