"""What the unit survives: a restart, kill -9 and a reboot of the node, while connections are made through a Service."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from proxy.demo.probes import Probe
from tests.netns.runner import ANSWER, backends
from tests.scenarios.schema import Scenario
from vagrant.probing.agents import PATIENCE, LabAgent
from vagrant.probing.machines import LabError, LabProbes
from vagrant.probing.scenarios import Result, objects_of, probe_again

SCENARIO = "external-policy-local"
"""What is published: every type of frontend, with and without its source kept."""
_STREAMS = {
    "a pod": Probe(host="p3", address="10.96.0.41", port=80, timeout=ANSWER),
    "outside": Probe(host="c", address="192.168.50.11", port=30001, timeout=ANSWER),
}
_INTERVAL = 0.5


class Event(NamedTuple):
    """What came of one of the three."""

    what: str
    seconds: float
    """Until the unit was active again, which is after its first sync; of a reboot, since it was asked for."""
    unit: str
    """What became of the process."""
    rules: str
    """Whether what carries the packets is the same: `same`, or what is not."""
    meanwhile: str
    """Connections that were made in the meantime, and what failed."""
    after: Result
    """The scenario's probes after it."""
    wrong: tuple[str, ...]


def survive(scenario: Scenario, agent: LabAgent, probes: LabProbes, say: Callable[[str], None]) -> list[Event]:
    """All three, one after the other.

    Raises:
        LabError: the lab itself fails.
    """
    say(f"survival: {scenario.name} is published")
    agent.configure({})
    agent.apply(objects_of(scenario))
    events = []
    for what, act in (("systemctl restart", _restart), ("kill -9", _kill), ("reboot", _reboot)):
        say(f"survival: {what}")
        events.append(_event(what, act, scenario, agent, probes))
    probes.shut()
    return events


def _event(
    what: str, act: Callable[[LabAgent, LabProbes], str], scenario: Scenario, agent: LabAgent, probes: LabProbes
) -> Event:
    before_pid, before_rules, before_boot = agent.pid(), agent.rules(), agent.boot()
    probes.open(backends(objects_of(scenario)))
    streams = _STREAMS if act is not _reboot else {}
    for name, probe in streams.items():
        probes.start(name, probe, _INTERVAL)
    began = time.monotonic()
    try:
        at_once = act(agent, probes)
        agent.until_active()
        seconds = time.monotonic() - began
        agent.settle()
    finally:
        outcomes = {name: probes.stop(name) for name in streams}
    pid, rules = agent.pid(), agent.rules()
    wrong = []
    unit = f"process {before_pid} → {pid}"
    if act is _reboot:
        unit = f"started at boot, process {pid}"
        if agent.boot() == before_boot:
            wrong.append(f"{what}: the machine did not boot")
    elif pid == before_pid or not pid:
        wrong.append(f"{what}: the process is still {pid}")
    same = rules == before_rules and at_once in ("", before_rules)
    said = "same" if same else "written anew" if act is _reboot else "changed"
    if not same and act is not _reboot:
        wrong.append(f"{what}: the rules are not what they were")
    failed = [f"{name}: {each}" for name, found in outcomes.items() for each in found if each.kind != "answered"]
    wrong += [f"{what}: a connection from {each}" for each in failed]
    made = sum(len(found) for found in outcomes.values())
    meanwhile = f"{made} made, {len(failed)} failed" if streams else "-"
    after = probe_again(scenario, agent, probes)
    return Event(what, seconds, unit, said, meanwhile, after, (*wrong, *after.wrong))


def _restart(agent: LabAgent, probes: LabProbes) -> str:  # noqa: ARG001  # one of three of a kind
    agent.restart()
    return ""


def _kill(agent: LabAgent, probes: LabProbes) -> str:  # noqa: ARG001  # one of three of a kind
    """Kill the process; the rules right after, before systemd starts the next one."""
    restarts = int(agent.property("NRestarts"))
    # In one command, so that the look at the rules comes before the two seconds of RestartSec are over.
    rules = agent.rules("systemctl kill --kill-whom=main -s KILL sluice")
    deadline = time.monotonic() + PATIENCE
    while int(agent.property("NRestarts")) == restarts:
        if time.monotonic() > deadline:
            raise LabError("systemd has not started the unit again after kill -9")
        time.sleep(0.5)
    return rules


def _reboot(agent: LabAgent, probes: LabProbes) -> str:
    machine = agent.machine
    before = agent.boot()
    probes.disconnect(machine.name)
    machine.run("systemd-run", "--on-active=1", "--quiet", "systemctl", "reboot")
    machine.disconnect()
    deadline = time.monotonic() + 5 * PATIENCE
    while True:
        time.sleep(2)
        try:
            # A connection that began while it went down gets no answer, and none that says so.
            if agent.boot(timeout=20.0) != before:
                break
        except LabError:
            machine.disconnect()
        if time.monotonic() > deadline:
            raise LabError(f"{machine.name} does not answer {5 * PATIENCE:.0f} s after its reboot")
    machine.run("systemctl", "start", "lab-network", timeout=PATIENCE)  # which is under way: wait for its end
    probes.connect(machine.name)
    return ""
