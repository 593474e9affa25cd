"""Made-up clusters on the wire: packets meet what the clauses say of objects that share all that they can share.

Steps follow each other as changes of one cluster, so that most of what a step writes is a difference.  Some clusters
are tried in each run; `SEEDS="100 140"` has others made up, as many as somebody has patience for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from random import Random

import pytest

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe, Server
from tests.made_up import by_host, cases_of, situation
from tests.netns.agent import DEADLINE, Agent
from tests.netns.judge import backend_name, owner_of
from tests.netns.patience import TIME_SCALE
from tests.netns.runner import DROP, backends, run
from tests.reference import SETTINGS, Asked, Reference
from tests.scenarios.schema import CLUSTER, Case, Header, Manifest, ProbeGroup, Scenario, Step, key_of, manifests

SEEDS = range(*map(int, os.environ.get("SEEDS", "0 2").split()))
STEPS = 3
PROBES = 30
"""Of each step."""
CLIENTS = ("p4", "c", "x")
FIRST_PORT = 20000
IN_FLIGHT = 1.0 * TIME_SCALE
"""Seconds after which stale flows are deleted.  None must have an answer on its way then: that would begin a flow the
other way round, which nobody translates."""


@pytest.mark.parametrize("seed", SEEDS)
def test_packets_meet_what_the_clauses_say(seed: int, agent: Agent) -> None:
    run(made_up(seed, agent.mode), agent)


def made_up(seed: int, mode: str) -> Scenario:
    """A scenario of some steps."""
    random = Random(seed)
    setting = SETTINGS[seed % len(SETTINGS)]
    steps: list[Step] = []
    known: set[str] = set()
    for number in range(STEPS):
        objects = situation(random)
        names = {key_of(each) for each in objects}
        every = list(cases_of(Reference([*manifests(CLUSTER), *objects], mode, setting)))
        steps.append(
            Step(
                about=f"(made up, seed {seed})",
                apply=objects,
                delete=sorted(known - names),
                restart=number > 0 and random.random() < 0.2,
                probes=[_group(case) for case in random.sample(every, min(PROBES, len(every)))],
            )
        )
        known = names
    header = Header(about="Objects that share what they can share.", config=setting.config, steps=steps)
    return Scenario(f"made-up-{seed}", header, [])


def _group(case: Case) -> ProbeGroup:
    client = f"{case.host}@{case.source}" if case.source else case.host
    expect = case.expect.how if hasattr(case.expect, "how") else case.expect
    return ProbeGroup(from_=client, to=str(case.target), expect=expect)


# --- UDP clients that keep their sockets -------------------------------------------------------------------------

Flow = tuple[str, str, int]
"""A client, and the address and port that it sends to."""


class Clients:
    """Who has sent where from a socket that stays, and who answered."""

    def __init__(self, seed: int) -> None:
        # Ports of their own: entries of connection tracking outlive a test.
        self._first = FIRST_PORT + seed % 60 * 500
        self._ports: dict[Flow, int] = {}
        self._answers: dict[Flow, str] = {}

    def expected(self, reference: Reference, mode: str) -> dict[Flow, set[str]]:
        """What may become of the next packet of every flow (CT-2 to CT-5)."""
        for address, port, _ in reference.frontends():
            for client in CLIENTS:
                self._ports.setdefault((client, address, port), self._first + len(self._ports))
        expected = {}
        for flow in self._ports:
            if allowed := self._allowed(flow, reference, mode):
                expected[flow] = allowed
            else:
                self._answers.pop(flow, None)
        return expected

    def _allowed(self, flow: Flow, reference: Reference, mode: str) -> set[str]:
        client, address, port = flow
        host = plan.HOSTS[client]
        asked = Asked(host.ipv6[0] if ":" in address else host.ipv4[0], address, port, "UDP")
        answer = reference.answer(asked)
        fresh = {answer} if isinstance(answer, str) else by_host(answer)
        if fresh == {"untouched"} and address in plan.NODE1.addresses:
            return set()  # a matter of the node's own sockets
        before = self._answers.get(flow, "dropped")
        if before in ("dropped", "refused"):
            return fresh  # there is no entry
        if mode == "ipvs":
            return fresh  # it lets no flow be where no new one would come (IPVS-23), whatever conntrack holds
        serving = by_host(reference.serving(asked) or ())
        if before == "untouched":
            return fresh if serving else {before}
        return {before} if before in serving else fresh

    def probes(self, flows: Iterator[Flow]) -> list[Probe]:
        return [
            Probe(
                host=flow[0], address=flow[1], port=flow[2], protocol="UDP", source_port=self._ports[flow], timeout=DROP
            )
            for flow in flows
        ]

    def answered(self, flow: Flow, answer: str) -> None:
        self._answers[flow] = answer


def answer_of(outcome: Outcome, address: str) -> str:
    """Who answered, as a probe's expectation has it."""
    if outcome.kind == "answered":
        own = (outcome.host, outcome.address, outcome.peer) == (owner_of(address), address, outcome.local)
        return "untouched" if own else backend_name(outcome)
    return "refused" if outcome.refused else {"silent": "dropped"}.get(outcome.kind, str(outcome))


@pytest.mark.parametrize("seed", SEEDS)
def test_ct_2_to_5_udp_clients_that_keep_their_sockets_stay_or_move_on(seed: int, agent: Agent) -> None:
    if agent.mode == "userspace":
        pytest.skip("flows are the workers' own")
    random, clients, base = Random(seed), Clients(seed), manifests(CLUSTER)
    agent.configure({})
    for _ in range(STEPS):
        objects = [*base, *by_udp_alone(situation(random))]
        expected = clients.expected(Reference(objects, agent.mode), agent.mode)
        own = [Server("upstream", "UDP", "", port) for _, address, port in expected if owner_of(address) == "upstream"]
        agent.world.probes.open([*backends(objects), *own])
        agent.apply(objects)
        time.sleep(IN_FLIGHT)
        deadline = time.monotonic() + DEADLINE
        while expected:
            outcomes = agent.world.probes.probe(*clients.probes(iter(expected)))
            wrong = {}
            for flow, [outcome] in zip(list(expected), outcomes, strict=True):
                answer = answer_of(outcome, flow[1])
                if answer in expected[flow]:
                    clients.answered(flow, answer)
                    del expected[flow]
                else:
                    wrong[flow] = answer
            assert not wrong or time.monotonic() < deadline, f"{wrong}, expected {expected}\nlog:\n{agent.tail()}"
    agent.world.probes.shut()
    agent.expect_empty(base)


def by_udp_alone(objects: list[Manifest]) -> list[Manifest]:
    """The same objects with every port a UDP port; node ports have numbers of their own, which flows go by (CT-3)."""
    for each in objects:
        if each["kind"] == "EndpointSlice":
            each["ports"] = [port | {"protocol": "UDP"} for port in each["ports"]]
            continue
        ports = {port["name"]: port | {"protocol": "UDP"} for port in each["spec"]["ports"]}
        each["spec"]["ports"] = [
            port | ({"nodePort": port["nodePort"] + 1000} if "nodePort" in port else {}) for port in ports.values()
        ]
    return objects
