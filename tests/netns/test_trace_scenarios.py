"""Scenarios while `sluice trace` runs: of every connection it says what the probe saw.

The widest ones, or with SLUICE_TRACE_ALL=1 all, in the mode of SLUICE_TEST_MODE.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe
from proxy.demo.world import World
from rules.dataplane import Capabilities
from tests.netns import runner
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import eventually
from tests.netns.test_scenarios import SMOKE, load_each
from tests.scenarios.schema import Answered, Case, Manifest, Scenario, Step, cases, join

_OUTCOMES = {"refused": "rejected", "dropped": "dropped", "untouched": "untouched"}


def _runs(name: str) -> bool:
    return name in SMOKE or bool(os.environ.get("SLUICE_TRACE_ALL"))


class Recorded:
    """The connections of a step, and what the trace said meanwhile."""

    def __init__(self, world: World, directory: Path) -> None:
        self.probed: list[tuple[Probe, Outcome]] = []
        self.overrun = False
        """Whether the kernel told more than could be read."""
        self._world = world
        self._output, self._errors = directory / "trace.out", directory / "trace.err"

    def start(self) -> None:
        command = [sys.executable, "-m", "proxy", "trace", "-o", "json", "--seconds", "3600", "-n", "1000"]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = self._world.start("node1", command, stdout=output, stderr=errors)
        eventually(lambda: self._process.poll() is not None or "at work" in self._errors.read_text(), "the trace")

    def end(self) -> list[dict[str, Any]]:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGINT)
        try:
            code = self._process.wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        assert code in (0, 1), self._errors.read_text()
        self.overrun = "packets are missing" in self._errors.read_text()
        return [json.loads(line) for line in self._output.read_text().splitlines()]


def wrong_answers(recorded: Recorded, packets: list[dict[str, Any]]) -> Iterable[str]:
    """Where the trace says otherwise than a connection that was answered."""
    told = {(each["before"]["source"], each["before"]["destination"], each["protocol"]): each for each in packets}
    for probe, outcome in recorded.probed:
        if outcome.kind != "answered" or not outcome.local[1] or probe.protocol == "SCTP":
            continue
        own, target = join(*outcome.local), join(probe.address, probe.port)
        packet = told.get((own, target, probe.protocol))
        if packet is None:
            if outcome.address != probe.address and not recorded.overrun:
                yield f"{probe.host} from {own} to {target} was answered by {outcome}, and is not in the trace"
            continue
        if recorded.overrun and packet["outcome"]["is"] == "unseen":
            continue
        after = packet["after"]
        if after != {"source": join(*outcome.peer), "destination": join(outcome.address, outcome.port)}:
            yield f"{probe.host} from {own} to {target}: {outcome}, and the trace says {after}"
        if not packet["expected"]:
            yield f"{own} to {target}: the trace finds it unexpected: {packet}"


def wrong_refusals(wanted: list[Case], packets: list[dict[str, Any]]) -> Iterable[str]:
    """Where the trace says otherwise than what becomes of connections that get no answer."""
    for case in wanted:
        if isinstance(case.expect, Answered):
            continue
        host = plan.HOSTS[case.host]
        addresses = [case.source] if case.source else list(host.addresses)
        for packet in packets:
            source = packet["before"]["source"].rpartition(":")[0].strip("[]")
            same = packet["before"]["destination"] == join(case.target.address, case.target.port)
            if not same or source not in addresses or packet["protocol"] != case.target.protocol:
                continue
            if packet["outcome"]["is"] != _OUTCOMES[case.expect.how] or not packet["expected"]:
                yield f"{case}: the trace says {packet}"


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(each, id=name) for name, each in load_each() if isinstance(each, Scenario) and _runs(name)],
)
def test_a_trace_says_what_the_probes_of_a_scenario_saw(
    scenario: Scenario, agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scenario.header.only_modes and agent.mode not in scenario.header.only_modes:
        pytest.skip(f"the situation exists in mode {' or '.join(scenario.header.only_modes)} only")
    connect, probe_step = runner._connect, runner.probe_step
    seen = 0

    def traced_step(step: Step, objects: Iterable[Manifest], world: World, mode: str, can: Capabilities) -> list[str]:
        nonlocal seen
        recorded = Recorded(world, tmp_path)

        def recording(world: World, probes: list[Probe]) -> list[list[Outcome]]:
            found = connect(world, probes)
            recorded.probed += [(probe, one) for probe, each in zip(probes, found, strict=True) for one in each]
            return found

        monkeypatch.setattr(runner, "_connect", recording)
        recorded.start()
        try:
            wrong = probe_step(step, list(objects), world, mode, can)
        finally:
            packets = recorded.end()
        seen += len(packets)
        # What a worker never sees, a trace of workers does not tell.
        wanted = [case for group in step.probes for case in cases(group, mode, can) if can.source_address]
        return [*wrong, *wrong_answers(recorded, packets), *wrong_refusals(wanted, packets)]

    monkeypatch.setattr(runner, "probe_step", traced_step)
    runner.run(scenario, agent)
    assert seen or not any(isinstance(group.expect, Answered) for step in scenario.steps for group in step.probes)
