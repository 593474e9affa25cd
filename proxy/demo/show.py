"""`sluice demo`: a cluster in network namespaces, the agent on one of its nodes, and what Services then do."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from proxy import modes
from proxy.demo import namespaces, plan
from proxy.demo.checks import SECTIONS, Section, read
from proxy.demo.probes import Outcome, Probe, Server, count_answers
from proxy.demo.screen import Screen
from proxy.demo.world import World
from proxy.output import Shown, select, write
from rules.dataplane import DataplaneError
from rules.forwarding import Family, ForwardingTable, Kind

_MANIFESTS = Path(__file__).parent / "manifests"
_MODE = "nftables"
_CONFIG = f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {_MODE}
hostnameOverride: {plan.NODE1.name}
clusterCIDR: {",".join(plan.CLUSTER_CIDRS)}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
"""

_ABOUT = "Pods p1 to p4 on node1, q1 to q4 on node2, clients c and x outside; the agent runs on node1."

_START_DEADLINE = 20.0
_BEFORE, _AFTER = 0.4, 1.2
"""Seconds of connections before and after the endpoints change."""
_INTERVAL = 0.001

_OLD = ("10.244.1.12", "fd00:244:1::12", "node1")
_NEW = ("10.244.2.12", "fd00:244:2::12", "node2")


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def show(out: TextIO, *, plain: bool | None = None, prefix: str = "sluice-demo", ipv6: bool = True) -> int:
    """Run the demo; 0 when everything was as expected, 1 when something was not, 2 when it cannot run here."""
    screen = Screen(out, plain=plain)
    if obstacle := namespaces.obstacle():
        sys.stderr.write(
            f"sluice demo: {obstacle}; without it `sluice render -f FILE` shows what would be programmed\n"
        )
        return 2
    try:
        with _ended_by_signals(), contextlib.ExitStack() as stack:
            screen.title("Sluice demo", _ABOUT)
            with screen.step("two nodes, eight pods, two clients: network namespaces"):
                world = stack.enter_context(World(prefix=prefix, ipv6=ipv6))
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-demo-"))
            wrong = _Demo(screen, world, Path(directory)).run()
    except DemoError as error:
        sys.stderr.write(f"sluice demo: {error}\n")
        return 2
    except KeyboardInterrupt:
        screen.line()
        screen.line("Interrupted. Nothing is left behind.")
        return 130
    screen.line()
    if wrong:
        screen.line(f"{wrong} of the expectations above were not met. Nothing is left behind.", "bold red")
        return 1
    screen.line("Everything was as expected. Nothing is left behind.", "bold green")
    return 0


class _Demo:
    def __init__(self, screen: Screen, world: World, directory: Path) -> None:
        self.screen = screen
        self.world = world
        self.manifests = directory / "manifests"
        self.run_directory = directory / "run"
        self.log = directory / "agent.log"
        self.config = directory / "config.yaml"
        self.agent: subprocess.Popen[Any] | None = None
        self.wrong = 0

    def run(self) -> int:
        """Everything; how many expectations were not met."""
        screen = self.screen
        if not self.world.ipv6:
            screen.line("IPv6 is off here: IPv4 only.", "yellow")
        self._check_kernel()
        with screen.step("servers in the pods"):
            ports = (("TCP", 8080), ("UDP", 5353))
            self.world.probes.open(
                Server(pod.name, protocol, "", port) for pod in plan.PODS for protocol, port in ports
            )
        with screen.step("the agent on node1, from its start to the first rules"):
            self._start_agent()
        for section, results in self._probe():
            self._print(section, results)
        self._change_endpoints()
        self._dump()
        return self.wrong

    def _check_kernel(self) -> None:
        try:
            self._read(Family.IPV4)
        except DataplaneError as error:
            raise DemoError(str(error)) from error

    def _start_agent(self) -> None:
        shutil.copytree(_MANIFESTS, self.manifests)
        self.config.write_text(_CONFIG)
        command = [
            sys.executable,
            "-m",
            "proxy",
            "run",
            "--config",
            str(self.config),
            "--manifests",
            str(self.manifests),
            "--run-directory",
            str(self.run_directory),
        ]
        with self.log.open("wb") as log:
            self.agent = self.world.start(plan.NODE1.name, command, stdout=log, stderr=subprocess.STDOUT)
        families = (Family.IPV4, Family.IPV6) if self.world.ipv6 else (Family.IPV4,)
        deadline = time.monotonic() + _START_DEADLINE
        while not all((table := self._read(family)) and table.routes for family in families):
            if self.agent.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the agent wrote no rules; its log ends:\n{self._log_tail()}")
            time.sleep(0.01)

    def _probe(self) -> Iterator[tuple[Section, list[list[Outcome]]]]:
        """Every section with the checks that can be made here, and their outcomes."""
        sections = [
            section._replace(checks=tuple(check for check in section.checks if self.world.ipv6 or not check.v6))
            for section in SECTIONS
        ]
        probes = [check.probe() for section in sections for check in section.checks]
        with self.screen.step(f"{sum(probe.count for probe in probes)} connections"):
            results = iter(self.world.probes.probe(*probes))
        for section in sections:
            yield section, [next(results) for _ in section.checks]

    def _print(self, section: Section, results: list[list[Outcome]]) -> None:
        readings = [read(check, outcomes) for check, outcomes in zip(section.checks, results, strict=True)]
        self.wrong += sum(not reading.right for reading in readings)
        self.screen.heading(section.service, section.about)
        self.screen.table(
            ("FROM", "THROUGH", "ANSWERED", "SOURCE"),
            [
                (check.who, f"{check.frontend} {check.target}", reading.answers, reading.source)
                for check, reading in zip(section.checks, readings, strict=True)
            ],
            [reading.right for reading in readings],
        )

    def _change_endpoints(self) -> None:
        """Replace an endpoint under load, and tell how long the old one was chosen and how many failed."""
        screen = self.screen
        screen.heading("web", "p2 leaves and q2 comes, while p4 connects every millisecond")
        probe = Probe(host="p4", address="10.96.0.10", port=80)
        with screen.step(f"connections for {_BEFORE + _AFTER} s"):
            self.world.probes.start("change", probe, _INTERVAL)
            time.sleep(_BEFORE)
            changed = self._replace_endpoint()
            time.sleep(_AFTER)
            outcomes = self.world.probes.stop("change")
        before = [outcome for outcome in outcomes if outcome.began < changed]
        after = [outcome for outcome in outcomes if outcome.began >= changed]
        settled = after[len(after) // 2 :]
        failed = sum(outcome.kind != "answered" for outcome in outcomes)
        rights = (set(count_answers(before)) == {"p1", "p2", "q1"}, set(count_answers(settled)) == {"p1", "q1", "q2"})
        screen.table(
            ("WHEN", "CONNECTIONS", "ANSWERED"),
            [
                (
                    when,
                    str(len(part)),
                    "  ".join(f"{host} {count}" for host, count in sorted(count_answers(part).items())),
                )
                for when, part in (("before the change", before), ("after it", after))
            ],
            rights,
        )
        late = [outcome.began - changed for outcome in after if outcome.host == "p2"]
        first = min((outcome.began - changed for outcome in after if outcome.host == "q2"), default=float("nan"))
        last = f"the last one to p2 began {max(late) * 1000:.1f} ms after" if late else "none went to p2 after"
        screen.line(f"  {last} the manifest was replaced, the first one to q2 {first * 1000:.1f} ms after")
        screen.line(f"  {failed} of {len(outcomes)} connections failed", "bold red" if failed else "")
        self.wrong += rights.count(False) + bool(failed)

    def _replace_endpoint(self) -> float:
        """Write the manifest anew, as editors and `kubectl get` in a loop would, and return when."""
        file = self.manifests / "web.yaml"
        text = file.read_text()
        for old, new in zip(_OLD[:2], _NEW[:2], strict=True):
            text = "\n".join(
                line.replace(old, new).replace(_OLD[2], _NEW[2]) if f"{old}]" in line or f'{old}"' in line else line
                for line in text.split("\n")
            )
        new_file = file.with_name(".web.new")
        new_file.write_text(text)
        new_file.replace(file)
        return time.monotonic()

    def _dump(self) -> None:
        """A part of what the kernel holds, read back from its rules."""
        table = self._read(Family.IPV4)
        if table is None:
            self.wrong += 1
            return
        self.screen.heading("sluice dump", "what node1's kernel holds, decompiled from its own rules (load balancers)")
        excerpt = select(table, lambda _, route: route.kind is Kind.LOAD_BALANCER)
        write([Shown(_MODE, excerpt)], "table", self.screen.out)

    def _read(self, family: Family) -> ForwardingTable | None:
        def inside() -> ForwardingTable | None:
            dataplane = modes.open_dataplane(_MODE, family)
            try:
                return dataplane.read()
            finally:
                dataplane.close()

        return self.world.namespaces[plan.NODE1.name].inside(inside)

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-15:])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as ^C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  # the signature of handlers
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
