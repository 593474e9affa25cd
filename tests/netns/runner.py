"""Runs a scenario against the agent in a world, and raises AssertionError with everything that was not as expected."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from proxy.demo.probes import Outcome, Probe, Server
from proxy.demo.world import World
from rules.dataplane import Capabilities
from tests.netns.agent import Agent
from tests.netns.judge import first_round, judge, owner_of
from tests.netns.patience import TIME_SCALE
from tests.netns.scapy_probes import probe_sctp
from tests.scenarios.explaining import live, wrong_answer
from tests.scenarios.schema import (
    CLUSTER,
    EVERYTHING,
    Answered,
    Case,
    Manifest,
    Scenario,
    Silent,
    Step,
    after,
    beyond,
    cases,
    key_of,
    manifests,
)

ANSWER = 3.0 * TIME_SCALE
"""Seconds in which an answer or a refusal must come: none is ever this late."""
DROP = 0.7 * TIME_SCALE
"""Seconds of silence that count as dropped: anything else comes within milliseconds."""


def run(scenario: Scenario, agent: Agent) -> None:
    """Apply the scenario's steps and probe after each; then remove everything and expect the table empty.

    Raises:
        AssertionError: a probe's outcome, or what is left in the end, is not as expected.
    """
    base = {key_of(each): each for each in (manifests(CLUSTER) if scenario.header.cluster else [])}
    objects = base | {key_of(each): each for each in scenario.objects}
    agent.configure(scenario.header.config)
    try:
        for number, step in enumerate(scenario.steps, start=1):
            objects = after(objects, step)
            if not agent.capabilities.source_address:
                agent.world.probes.shut()  # a listener of the node's own would keep a Service from its place
            if step.restart:
                agent.stop()
                agent.publish(objects.values())
                agent.start()
                agent.wait()
            else:
                agent.apply(objects.values())
            agent.settle()
            wrong = probe_step(step, objects.values(), agent.world, agent.mode, agent.capabilities)
            wrong += explain_step(step, agent)
            assert not wrong, _report(f"{scenario.name}, step {number} {step.about}".rstrip(), wrong, agent)
    except BaseException:
        agent.publish(base.values())
        raise
    finally:
        agent.world.probes.shut()
    agent.expect_empty(base.values())


def probe_step(
    step: Step,
    objects: Iterable[Manifest],
    world: World,
    mode: str,
    can: Capabilities = EVERYTHING,
    *,
    connect: Callable[[World, list[Probe]], list[list[Outcome]]] | None = None,
) -> list[str]:
    """What is not as expected among the probes of a step, in the objects that it leads to.

    `connect` makes connections in a world of another kind.
    """
    wanted = [case for group in step.probes for case in cases(group, mode, can)]
    relayed, bound = not can.source_address, not can.unbound
    if not world.ipv6:
        wanted = [case for case in wanted if ":" not in case.target.address]
    world.probes.open([*backends(objects), *_owners(wanted, relayed=relayed)])
    outcomes: dict[int, list[Outcome]] = {number: [] for number in range(len(wanted))}
    wrong = []
    due = {number: first_round(case) for number, case in enumerate(wanted)}
    while due:
        probes = [_probe(wanted[number], count) for number, count in due.items()]
        for number, found in zip(due, (connect or _connect)(world, probes), strict=True):
            outcomes[number] += found
        judgements = {number: judge(wanted[number], outcomes[number], relayed=relayed, bound=bound) for number in due}
        wrong += [judgement.wrong for judgement in judgements.values() if judgement.wrong]
        due = {number: judgement.more for number, judgement in judgements.items() if judgement.more}
    return wrong


def explain_step(step: Step, agent: Agent) -> list[str]:
    """What `sluice explain` says otherwise of a step's probes, by what node1's kernel holds and nothing else."""
    tables = [table for family in agent.families if (table := agent.read(family)) is not None]
    wanted = [case for group in step.probes for case in cases(group, agent.mode, agent.capabilities)]
    if not agent.world.ipv6:
        wanted = [case for case in wanted if ":" not in case.target.address]
    evidence = live(tables)
    return [wrong for case in wanted if (wrong := wrong_answer(case, evidence))]


def _report(where: str, wrong: list[str], agent: Agent) -> str:
    tables = [f"kernel: {agent.read(family)}" for family in agent.families]
    return "\n".join([f"{where}:", *wrong, *tables, "log:", agent.tail()])


def _connect(world: World, probes: list[Probe]) -> list[list[Outcome]]:
    """Make all connections at once, SCTP's after the others'."""
    plain = [probe for probe in probes if probe.protocol != "SCTP"]
    found = iter(world.probes.probe(*plain) if plain else [])
    return [probe_sctp(world, probe) if probe.protocol == "SCTP" else next(found) for probe in probes]


def _probe(case: Case, count: int) -> Probe:
    dropped = isinstance(case.expect, Silent) and case.expect.how == "dropped"
    return Probe(
        host=case.host,
        address=case.target.address,
        port=case.target.port,
        protocol=case.target.protocol,
        source=case.source,
        source_port=case.source_port,
        count=1 if case.source_port else count,
        timeout=DROP if dropped else ANSWER,
    )


def backends(objects: Iterable[Manifest]) -> Iterator[Server]:
    """Everything that slices and Endpoints name listens, ready or not: who must not be chosen could answer."""
    for manifest in objects:
        if manifest["kind"] == "EndpointSlice":
            addresses = [address for each in manifest.get("endpoints") or () for address in each.get("addresses", ())]
            groups = [(addresses, manifest.get("ports") or ())]
        elif manifest["kind"] == "Endpoints":
            groups = [
                ([each["ip"] for each in subset.get("addresses") or ()], subset.get("ports") or ())
                for subset in manifest.get("subsets") or ()
            ]
        else:
            continue
        for addresses, ports in groups:
            for address in addresses:
                for port in ports:
                    protocol = port.get("protocol", "TCP")
                    if protocol != "SCTP" and _is_address(address) and port.get("port"):
                        yield Server(owner_of(address), protocol, "", port["port"])


def _owners(wanted: Iterable[Case], *, relayed: bool = False) -> Iterator[Server]:
    """Whoever owns an address listens where a packet must come through untouched.

    So he does where the node is to refuse in a way that others could too.
    """
    for case in wanted:
        if isinstance(case.expect, Answered) or case.target.protocol == "SCTP":
            continue
        loopback = ipaddress.ip_address(case.target.address).is_loopback
        host = case.host if loopback else owner_of(case.target.address)
        if case.expect.how == "untouched":
            # Addresses of Services may be the node's too: there, no program of its own is to answer.
            address = case.target.address if relayed and host == "node1" else ""
            yield Server(host, case.target.protocol, address, case.target.port)
        elif case.expect.how == "refused" and relayed and host != "node1":
            yield Server(host, case.target.protocol, "", case.target.port)


def left_out(scenario: Scenario, agent: Agent) -> Counter[str]:
    """How many probes are not looked at, or not wholly, by the capability that the dataplane lacks for them."""
    groups = (group for step in scenario.steps for group in step.probes)
    return Counter(each for group in groups for each in beyond(group, agent.mode, agent.capabilities))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
