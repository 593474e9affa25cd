"""Scenarios between the lab's machines: which of them, which probes of them, and what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import msgspec

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe, Server
from proxy.demo.world import World
from rules.dataplane import Capabilities
from tests.netns.runner import probe_step
from tests.scenarios.schema import (
    CLUSTER,
    DIRECTORY,
    Manifest,
    ProbeGroup,
    Scenario,
    Step,
    after,
    cases,
    files,
    in_order,
    key_of,
    load,
    manifests,
)
from vagrant.probing.agents import LabAgent
from vagrant.probing.machines import LabError, LabProbes
from vagrant.probing.mirrored import NODE1_ALONE, MirroredProbes, turned_round

CHOSEN = (
    "affinity",
    "cluster-ip",
    "external-policy-cluster",
    "external-policy-local",
    "hairpin",
    "internal-policy",
    "no-endpoints",
    "protocols",
    "source-ranges-kinds",
)
"""What is probed unless scenarios are named: every type of Service, policy, protocol and family, from everywhere, in
the lab's own configuration."""
MIRRORED = ("cluster-ip", "hairpin")
"""What is probed of node2's agent as well."""


class Connects(Protocol):
    """Servers and clients in the hosts of the lab."""

    def open(self, servers: Iterator[Server]) -> None: ...
    def shut(self) -> None: ...
    def probe(self, *probes: Probe) -> list[list[Outcome]]: ...
    def sctp(self, probes: list[Probe]) -> list[list[Outcome]]: ...


class _LabWorld(NamedTuple):
    """What `probe_step` asks of a world."""

    probes: Connects
    ipv6: bool = True


class Result(NamedTuple):
    """What came of one scenario."""

    name: str
    node: str
    probes: Mapping[str, int]
    """How many, by the kind of host they came from: pod, node, client."""
    sctp: int
    """How many of them were made by scapy."""
    seconds: float
    wrong: Sequence[str]
    skipped: str = ""


def choose(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names, those of one configuration side by side; `all` is the name of all.

    Raises:
        LabError: there is none of a name.
    """
    if "all" in names:
        names = [path.stem for path in files()]
    found = []
    for name in names:
        path = DIRECTORY / f"{name}.yaml"
        if not path.exists():
            raise LabError(f"there is no scenario {name} in {DIRECTORY}")
        found.append(load(path))
    return in_order(found)


def run(scenario: Scenario, agent: LabAgent, probes: LabProbes, say: Callable[[str], None] = lambda _: None) -> Result:
    """Apply a scenario's steps to a node's agent and probe after each; what is wrong is told, not raised."""
    began = time.monotonic()
    mirrored = agent.machine.name != "node1"
    turn = turned_round if mirrored else lambda value: value
    connects: Connects = MirroredProbes(probes) if mirrored else probes
    counts: dict[str, int] = {"pod": 0, "node": 0, "client": 0}
    sctp = 0
    wrong: list[str] = []
    if scenario.header.only_modes and agent.mode not in scenario.header.only_modes:
        skipped = f"exists in mode {' or '.join(scenario.header.only_modes)} only"
        return Result(scenario.name, agent.machine.name, counts, 0, 0.0, (), skipped)
    objects = {key_of(each): each for each in objects_of(scenario)}
    try:
        agent.configure(turn(dict(scenario.header.config)))
        for number, step in enumerate(scenario.steps, start=1):
            say(f"{scenario.name}, step {number} of {len(scenario.steps)}")
            objects = after(objects, step)
            if agent.mode == "userspace":
                connects.shut()  # a listener of the node's own would keep a Service from its place
            if step.restart:
                agent.machine.run("systemctl", "stop", "sluice")
                agent.publish(turn(list(objects.values())))
                agent.restart()
                can = agent.settle()
            else:
                can = agent.apply(turn(list(objects.values())))
            kept = msgspec.structs.replace(step, probes=[*chosen_groups(step, mirrored=mirrored)])
            for kind, of_sctp in _counted(kept, agent.mode, can):
                counts[kind] += 1
                sctp += of_sctp
            world = cast("World", _LabWorld(connects))
            found = probe_step(kept, objects.values(), world, agent.mode, can, connect=_connect)
            wrong += [f"step {number}: {each}" for each in found]
    except (LabError, AssertionError) as error:
        wrong.append(str(error))
    finally:
        connects.shut()
    return Result(scenario.name, agent.machine.name, counts, sctp, time.monotonic() - began, wrong)


def objects_of(scenario: Scenario) -> list[Manifest]:
    """The objects at a scenario's beginning, with those that every scenario has."""
    base = manifests(CLUSTER) if scenario.header.cluster else []
    return list(({key_of(each): each for each in base} | {key_of(each): each for each in scenario.objects}).values())


def probe_again(scenario: Scenario, agent: LabAgent, probes: LabProbes) -> Result:
    """The probes of a scenario's first step, of what is published already."""
    first = msgspec.structs.replace(scenario.header, probes=[], steps=scenario.steps[:1], config={})
    return run(scenario._replace(header=first), agent, probes)


def chosen_groups(step: Step, *, mirrored: bool) -> Iterator[ProbeGroup]:
    """The probes of a step that are about the agent of node1, where both nodes have one.

    Pods of the other node and that node itself are served by their own agent.  Of a mirrored scenario, what is left is
    what the node's own pods and the node itself ask of addresses that both nodes have: clients' packets pass node1.
    """
    for group in step.probes:
        hosts = [group.from_] if isinstance(group.from_, str) else group.from_
        kept = [host for host in hosts if _asks_node1(host.partition("@")[0], mirrored=mirrored)]
        targets = [group.to] if isinstance(group.to, str) else group.to
        if mirrored:
            targets = [each for each in targets if not any(address in each for address in NODE1_ALONE)]
            kept = [host for host in kept if not any(address in host for address in NODE1_ALONE)]
        if kept and targets:
            yield msgspec.structs.replace(group, from_=kept, to=targets)


def _asks_node1(host: str, *, mirrored: bool) -> bool:
    own = plan.HOSTS[host]
    if own.node:
        return own.node == "node1"
    return host == "node1" or (not mirrored and host != "node2")


def _counted(step: Step, mode: str, can: Capabilities) -> Iterator[tuple[str, bool]]:
    """The kind of host that each probe comes from, and whether it is SCTP's."""
    for group in step.probes:
        for case in cases(group, mode, can):
            kind = "pod" if plan.HOSTS[case.host].node else "node" if case.host == "node1" else "client"
            yield kind, case.target.protocol == "SCTP"


def _connect(world: World, probes: list[Probe]) -> list[list[Outcome]]:
    """Make all connections at once, SCTP's after the others'."""
    connects: Any = world.probes
    plain = [probe for probe in probes if probe.protocol != "SCTP"]
    sctp = [probe for probe in probes if probe.protocol == "SCTP"]
    found = iter(connects.probe(*plain) if plain else [])
    found_sctp = iter(connects.sctp(sctp) if sctp else [])
    return [next(found_sctp) if probe.protocol == "SCTP" else next(found) for probe in probes]
