"""Drift in a real kernel: whatever another process does to our rules is found, named and healed, or only told.

The agent here is the real process, fed from manifests, in a network namespace of the test's own.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench.cluster import Cluster
from bench.manifests import write_json
from proxy import agent_socket, verify
from proxy.agent_socket import AgentError
from proxy.config.load import load as configure
from proxy.dump import Filter, raw_lines
from rules.diff import compare, lines
from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    merge_prefixes,
)
from rules.netlink.errors import NetlinkError, TransactionError
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import names
from rules.nftables.dataplane import NftablesDataplane, watch_tables
from rules.nftables.elements import ENDPOINT_MAPS
from rules.nftables.expressions import DROP, RETURN, Decide, Verdict
from rules.nftables.layout import TABLE
from rules.nftables.messages import Element, add_elements, delete_elements, flush_elements
from rules.nftables.objects import (
    ChainSpec,
    RuleSpec,
    SetSpec,
    TableSpec,
    add_chain,
    add_rule,
    add_set,
    add_table,
    decode_rule,
    delete_rule,
    delete_table,
    flush_chain,
    list_rules,
)
from rules.nftables.state import read_elements, read_static
from tests.netns.isolation import own_network_namespace

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "data" / "explain" / "cluster.yaml"
FLAGS = [("proxy-mode", "nftables"), ("cluster-cidr", "10.244.0.0/16"), ("hostname-override", "node1")]
DEADLINE = 20.0

# --- every kind of drift -------------------------------------------------------------------------------------------


def example(family: Family) -> ForwardingTable:
    """A table that has something in every set of the layout."""

    def address(v4: list[int], v6: list[int]) -> bytes:
        return bytes(v4) if family is Family.IPV4 else bytes([0xFD, *v6, *[0] * (14 - len(v6)), v4[-1]])

    def frontend(last: int, port: int, protocol: Protocol = Protocol.TCP) -> Frontend:
        return Frontend(address([10, 96, 0, last], [0, 1]), protocol, port)

    bits = family.address_bytes * 8
    pods = [address([10, 244, 1, host], [0, 2]) for host in range(1, 6)]
    backends = frozenset(Backend(pod, 8080) for pod in pods[:3])
    local = frozenset([Backend(pods[0], 8080)])
    web = "default/web:http"
    routes = {
        frontend(1, 80): Route(kind=Kind.CLUSTER_IP, backends=backends, label=web),
        frontend(2, 80): Route(kind=Kind.CLUSTER_IP, backends=backends, affinity=600, label="default/sticky"),
        frontend(3, 53, Protocol.UDP): Route(kind=Kind.CLUSTER_IP, backends=local, label="kube-system/dns:dns"),
        frontend(4, 1): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="default/none"),
        frontend(5, 9, Protocol.SCTP): Route(kind=Kind.CLUSTER_IP, backends=local, label="default/sctp"),
        frontend(9, 80): Route(kind=Kind.EXTERNAL_IP, backends=backends, label=web),
        frontend(10, 80): Route(
            kind=Kind.LOAD_BALANCER,
            backends=backends,
            local_backends=local,
            source_ranges=merge_prefixes(
                [Prefix(pods[0][:-1] + b"\0", bits - 8), Prefix(address([192, 168, 5, 5], [0, 9]), bits)]
            ),
            label=web,
        ),
        Frontend(b"", Protocol.TCP, 30080): Route(
            kind=Kind.NODE_PORT, backends=backends, local_backends=frozenset(), refusal=Refusal.DROP, label=web
        ),
        Frontend(b"", Protocol.TCP, 30081): Route(
            kind=Kind.NODE_PORT, backends=backends, local_backends=local, label=web
        ),
        Frontend(b"", Protocol.UDP, 30082): Route(kind=Kind.NODE_PORT, refusal=Refusal.REJECT, label="default/none"),
    }
    return ForwardingTable(
        family=family,
        node=NodeFacts(
            detector=SourcePrefix(Prefix(pods[0][:2] + bytes(family.address_bytes - 2), 16)),
            node_port_addresses=frozenset({address([192, 168, 0, 1], [0, 9])}),
            service_cidrs=(Prefix(address([10, 96, 0, 0], [0, 1])[:-1] + b"\0", bits - 8),),
        ),
        routes=routes,
        hairpins=frozenset({Endpoint(pods[0], Protocol.TCP, 8080)}),
    )


class Stranger:
    """Somebody else with a netlink socket, who does to our table what an example says."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.socket = NetfilterSocket()

    def close(self) -> None:
        self.socket.close()

    def elements(self, name: str) -> list[Element]:
        return sorted(read_elements(self.socket, self.family, name), key=lambda each: each.key)

    def do(self, *messages: bytes) -> None:
        self.socket.commit(messages)

    def replace(self, name: str, old: Element, new: Element) -> None:
        self.do(*delete_elements(self.family, TABLE, name, [old.key]), *add_elements(self.family, TABLE, name, [new]))

    def fingerprint(self) -> object:
        """All that there is of the table, as the kernel tells it."""
        static = read_static(self.socket, self.family)
        return static and (static, {name: set(self.elements(name)) for name in static.sets if name != names.STICKY})

    def rules(self) -> list[Any]:
        return [decode_rule(payload)[1] for payload in self.socket.dump(list_rules(self.family, TABLE))]


# Sets of our own elements; the kernel's own map is no business of ours, and intervals come in pairs.
SETS = (
    names.CLUSTER_IP,
    names.EXTERNAL,
    names.EXTERNAL_LOCAL,
    names.EXTERNAL_POLICY_LOCAL,
    names.EXTERNAL_IPS,
    names.LOAD_BALANCER_IPS,
    names.NODE_PORT,
    names.NODE_PORT_LOCAL,
    names.NODE_PORT_POLICY_LOCAL,
    names.NODE_PORT_ADDRESSES,
    *ENDPOINT_MAPS.values(),
    names.MEMBERS,
    names.SLOTS,
    names.affinity(600),
    names.LOCAL_ENDPOINT_PAIRS,
    names.CLUSTER_IPS,
    names.REJECT_FRONTENDS,
    names.DROP_NODE_PORTS,
    names.REJECT_NODE_PORTS,
    names.SOURCE_RANGED,
)
MAPS = (names.CLUSTER_IP, names.EXTERNAL, names.EXTERNAL_LOCAL, names.NODE_PORT, *ENDPOINT_MAPS.values(), names.MEMBERS)
LABELLED = (names.CLUSTER_IP, names.EXTERNAL, names.NODE_PORT)
# An element of a list that nobody refers to is garbage, not drift, and goes with the next change.
LISTS = {*ENDPOINT_MAPS.values(), names.MEMBERS, names.SLOTS, names.affinity(600)}
GROWING = tuple(name for name in SETS if name not in LISTS)


class NothingThereError(Exception):
    """What an edit would work on is gone already."""


class Choice(NamedTuple):
    """What an edit works on."""

    number: int
    """Which of many things."""
    byte: int
    """What is flipped in it."""
    any_set: str
    map: str
    growing: str
    labelled: str
    verdict: int

    def of(self, things: list[Any]) -> Any:
        if not things:
            raise NothingThereError
        return things[self.number % len(things)]


def delete_element(stranger: Stranger, choice: Choice) -> None:
    element = choice.of(stranger.elements(choice.any_set))
    stranger.do(*delete_elements(stranger.family, TABLE, choice.any_set, [element.key]))


def change_data(stranger: Stranger, choice: Choice) -> None:
    old = choice.of(stranger.elements(choice.map))
    # The last two bytes of a backend are padding.
    place = choice.number % (len(old.data) - 2) if choice.map in ENDPOINT_MAPS.values() else 0
    data = bytearray(old.data)
    data[place] ^= choice.byte
    stranger.replace(choice.map, old, old._replace(data=bytes(data)))


def change_label(stranger: Stranger, choice: Choice) -> None:
    old = choice.of(stranger.elements(choice.labelled))
    stranger.replace(choice.labelled, old, old._replace(comment="somebody/else"))


def add_element(stranger: Stranger, choice: Choice) -> None:
    old = choice.of(stranger.elements(choice.growing))
    key = bytearray(old.key)
    key[-1 if len(key) in (4, 16) else -3] ^= choice.byte  # the end of an address, or of a port
    if bytes(key) in {each.key for each in stranger.elements(choice.growing)}:
        raise NothingThereError
    stranger.do(*add_elements(stranger.family, TABLE, choice.growing, [old._replace(key=bytes(key))]))


def flush_set(stranger: Stranger, choice: Choice) -> None:
    stranger.do(flush_elements(stranger.family, TABLE, choice.any_set))


def flush_one_chain(stranger: Stranger, choice: Choice) -> None:
    stranger.do(flush_chain(stranger.family, TABLE, choice.of(stranger.rules()).chain))


def delete_one_rule(stranger: Stranger, choice: Choice) -> None:
    rule = choice.of(stranger.rules())
    stranger.do(delete_rule(stranger.family, TABLE, rule.chain, rule.handle))


def append_rule(stranger: Stranger, choice: Choice) -> None:
    chain = choice.of(stranger.rules()).chain
    stranger.do(add_rule(stranger.family, TABLE, chain, RuleSpec((Decide(Verdict(choice.verdict)),))))


def insert_rule(stranger: Stranger, choice: Choice) -> None:
    keyword = "ip" if stranger.family is Family.IPV4 else "ip6"
    chain = choice.of(stranger.rules()).chain
    verdict = "drop" if choice.verdict == DROP else "return"
    subprocess.run(["nft", "insert", "rule", keyword, TABLE, chain, verdict], check=True)


def add_one_chain(stranger: Stranger, choice: Choice) -> None:
    stranger.do(add_chain(stranger.family, TABLE, ChainSpec(f"intruder-{choice.number}")))


def add_one_set(stranger: Stranger, choice: Choice) -> None:
    stranger.do(add_set(stranger.family, TABLE, SetSpec(f"intruder-{choice.number}", 7, 4)))


def switch_off(stranger: Stranger, _: Choice) -> None:
    stranger.do(add_table(stranger.family, TableSpec(TABLE, flags=1)))


def delete_all(stranger: Stranger, _: Choice) -> None:
    stranger.do(delete_table(stranger.family, TABLE))


Edit = Callable[[Stranger, Choice], None]
EDITS: tuple[Edit, ...] = (
    delete_element,
    change_data,
    change_label,
    add_element,
    flush_set,
    flush_one_chain,
    delete_one_rule,
    append_rule,
    insert_rule,
    add_one_chain,
    add_one_set,
    switch_off,
    delete_all,
)
choices = st.builds(
    Choice,
    number=st.integers(0, 1 << 16),
    byte=st.integers(1, 255),
    any_set=st.sampled_from(SETS),
    map=st.sampled_from(MAPS),
    growing=st.sampled_from(GROWING),
    labelled=st.sampled_from(LABELLED),
    verdict=st.sampled_from([DROP, RETURN]),
)


@contextlib.contextmanager
def opened(family: Family) -> Iterator[tuple[NftablesDataplane, Stranger]]:
    with (
        own_network_namespace(),
        contextlib.closing(NftablesDataplane(family)) as dataplane,
        contextlib.closing(Stranger(family)) as stranger,
    ):
        yield dataplane, stranger


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("family", list(Family))
def test_every_drift_is_found_told_and_healed(family: Family, edit: Edit, root: None) -> None:
    wanted = example(family)
    with opened(family) as (dataplane, stranger), contextlib.closing(watch_tables([dataplane])) as watch:
        dataplane.sync(wanted)

        @settings(max_examples=8 if family is Family.IPV4 else 3)
        @given(choices, st.lists(st.tuples(st.sampled_from(EDITS), choices), max_size=2))
        def check(choice: Choice, more: list[tuple[Edit, Choice]]) -> None:
            before = stranger.fingerprint()
            for each, chosen in ((edit, choice), *more):
                with contextlib.suppress(NothingThereError, NetlinkError, TransactionError):
                    each(stranger, chosen)
            assume(stranger.fingerprint() != before)  # nothing to work on, or one edit undid the other
            drift = compare(wanted, dataplane.read(), dataplane.capabilities)
            assert drift
            assert list(lines(drift))
            assert family in {touch.family for touch in watch.touched()}, "nobody was told"
            dataplane.sync(wanted)
            held = dataplane.read()
            assert not compare(wanted, held, dataplane.capabilities), "not healed"
            assert held == wanted
            assert not watch.touched(), "a repair is not a stranger's doing"

        check()


def test_one_element_is_one_element_to_repair(root: None) -> None:
    wanted = example(Family.IPV4)
    with opened(Family.IPV4) as (dataplane, stranger):
        dataplane.sync(wanted)
        for name in (names.CLUSTER_IPS, names.LOCAL_ENDPOINT_PAIRS, names.EXTERNAL_IPS, names.SOURCE_RANGED):
            stranger.do(*delete_elements(Family.IPV4, TABLE, name, [stranger.elements(name)[0].key]))
            applied = dataplane.sync(wanted)
            assert applied.operations == 1, name
            assert applied.found is not None
            assert applied.found != wanted


def test_the_kernel_names_who_did_it(root: None) -> None:
    with opened(Family.IPV4) as (dataplane, _), contextlib.closing(watch_tables([dataplane])) as watch:
        dataplane.sync(example(Family.IPV4))
        process = subprocess.Popen(["nft", "flush", "set", "ip", TABLE, names.CLUSTER_IPS])
        assert process.wait() == 0
        (touch,) = watch.touched()
        assert (touch.family, touch.by and touch.by.name) == (Family.IPV4, "nft")
        assert touch.by is not None
        assert touch.by.pid == process.pid, "in the first process namespace, where tests run"


def test_a_flood_of_changes_to_others_tables_is_nothing_to_us(root: None) -> None:
    with opened(Family.IPV4) as (dataplane, stranger), contextlib.closing(watch_tables([dataplane])) as watch:
        dataplane.sync(example(Family.IPV4))
        stranger.do(add_table(Family.IPV4, TableSpec("others")), add_set(Family.IPV4, "others", SetSpec("many", 7, 4)))
        for _ in range(20):
            elements = [Element(number.to_bytes(4)) for number in range(1000)]
            stranger.do(*add_elements(Family.IPV4, "others", "many", elements))
            stranger.do(flush_elements(Family.IPV4, "others", "many"))
        lost = False
        while touches := watch.touched():
            lost = lost or any(touch.by is None for touch in touches)
            assert all(touch.by is None for touch in touches), "only what was lost may count"
        del lost
        assert not watch.touched()


# --- raw -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(Family))
def test_raw_has_every_element_and_whom_it_serves(family: Family, root: None) -> None:
    wanted = example(family)
    with opened(family) as (dataplane, stranger):
        assert dataplane.raw() is None
        dataplane.sync(wanted)
        raw = dataplane.raw()
        assert raw is not None
        static = read_static(stranger.socket, family)
        assert static is not None
        count = sum(len(stranger.elements(name)) for name in static.sets if name != names.STICKY)
        assert sum(item.depth == 2 and item.text[0] not in "0123456789" for item in raw.items) <= count
        rules = sum(len(chain.rules) for chain in static.chains.values())
        assert len(raw.items) == 1 + len(static.chains) + rules + len(static.sets) + count
    assert raw.table == wanted
    served = {frontend for item in raw.items for frontend in item.frontends}
    assert served == wanted.routes.keys()
    text = "\n".join(raw_lines(raw, Filter()))
    assert len(text.splitlines()) == len(raw.items)
    for words in ("hook prerouting", "masquerade", "list 1 index 0", "goto", '"default/web:http"', "of 3", "slot"):
        assert words in text
    only = list(raw_lines(raw, Filter(service="sticky")))
    assert only
    assert all("default/sticky" in line.partition("  # ")[2] for line in only if line.startswith("    "))
    assert not any("dns" in line for line in only)


# --- the agent itself ------------------------------------------------------------------------------------------------

MANIFESTS: list[dict[str, Any]] = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "clusterIP": "10.96.0.10",
            "clusterIPs": ["10.96.0.10"],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        },
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.244.1.5"]}, {"addresses": ["10.244.1.6"]}],
    },
]


class Agent:
    """`sluice run` in the namespace of the calling thread, and verbs that ask it."""

    def __init__(self, directory: Path, policy: str, manifests: Path | None = None, more: Sequence[str] = ()) -> None:
        self.run_directory = str(directory / "run")
        self.log = directory / "log"
        self.manifests = manifests or directory / "objects.json"
        if manifests is None:
            self.manifests.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": MANIFESTS}))
        self.flags = [f"--{name}={value}" for name, value in FLAGS]
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        own = ["--manifests", str(self.manifests), "--run-directory", self.run_directory, "--drift-policy", policy]
        # Nothing but a doubt makes it sync before the tests are over.
        periods = ["--iptables-sync-period", "600s", "--iptables-min-sync-period", "300s"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy", "run", *self.flags, *own, *periods, *more],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.until(
            lambda: not self.status().in_trouble and not any(each.syncs.pending for each in self.status().families)
        )

    def status(self) -> Any:
        return agent_socket.status(self.run_directory)

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """Keep it from doing anything, and from noticing time."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def healed(self, repairs: int) -> bool:
        """Whether it has repaired drift so many times, and has nothing left to do."""
        syncs = self.syncs()
        return bool(syncs.drift_repairs == repairs and not syncs.pending)

    def syncs(self, family: str = "IPv4") -> Any:
        return next(each.syncs for each in self.status().families if each.family == family)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(AgentError):
                if holds():
                    return
            assert time.monotonic() < deadline, f"it did not come to hold; the log:\n{self.log.read_text()}"
            time.sleep(0.01)

    def verb(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "proxy", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    def verify(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.verb("verify", "--run-directory", self.run_directory, *arguments)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=DEADLINE)


@pytest.fixture
def policy() -> str:
    return "repair"


@pytest.fixture
def agent(root: None, policy: str, tmp_path: Path) -> Iterator[Agent]:
    with own_network_namespace():
        agent = Agent(tmp_path, policy)
        try:
            yield agent
        finally:
            agent.stop()


def nft(*arguments: str) -> None:
    subprocess.run(["nft", *arguments], check=True)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_verify_finds_every_drift_and_the_agent_heals_it(edit: Edit, root: None, tmp_path: Path) -> None:
    with own_network_namespace(), contextlib.ExitStack() as stack:
        subprocess.run(["ip", "address", "add", "192.168.50.11/32", "dev", "lo"], check=True)
        agent = Agent(tmp_path, "repair", CLUSTER)
        stack.callback(agent.stop)
        dataplane = stack.enter_context(contextlib.closing(NftablesDataplane(Family.IPV4)))
        stranger = stack.enter_context(contextlib.closing(Stranger(Family.IPV4)))
        wanted = agent_socket.table(Family.IPV4, agent.run_directory).table
        options = configure(FLAGS).settings
        repairs = 0

        # Fewer than the agent answers without a pause.
        @settings(max_examples=4, database=None)
        @given(choices, st.lists(st.tuples(st.sampled_from(EDITS), choices), max_size=2))
        def check(choice: Choice, more: list[tuple[Edit, Choice]]) -> None:
            nonlocal repairs
            before = stranger.fingerprint()
            with agent.held_still():
                for each, chosen in ((edit, choice), *more):
                    with contextlib.suppress(NothingThereError, NetlinkError, TransactionError):
                        each(stranger, chosen)
                changed = stranger.fingerprint() != before
                told = io.StringIO()
                code = verify.main(options, str(CLUSTER), "text", out=told)
                assert code == int(changed), told.getvalue()
            assume(changed)
            repairs += 1
            agent.until(lambda: agent.healed(repairs))
            assert dataplane.read() == wanted
            assert verify.main(options, str(CLUSTER), "text", out=io.StringIO()) == 0

        check()
        assert repairs


def test_drift_among_ten_thousand_services_is_healed_by_what_it_takes(root: None, tmp_path: Path) -> None:
    """The time it takes is a row of `make bench`."""
    cluster = Cluster(10_000, 4)
    with own_network_namespace(), contextlib.ExitStack() as stack:
        agent = Agent(tmp_path, "repair", write_json(cluster, tmp_path))
        stack.callback(agent.stop)
        dataplane = stack.enter_context(contextlib.closing(NftablesDataplane(Family.IPV4)))
        stranger = stack.enter_context(contextlib.closing(Stranger(Family.IPV4)))
        wanted = agent_socket.table(Family.IPV4, agent.run_directory).table
        assert len(wanted.routes) == cluster.services
        element, intruder = stranger.elements(names.CLUSTER_IPS)[5000], Element(bytes([10, 9, 9, 9]))
        backends = next(iter(ENDPOINT_MAPS.values()))
        backend = stranger.elements(backends)[5000]
        other = backend._replace(data=bytes([backend.data[0] ^ 1]) + backend.data[1:])
        removal = delete_elements(Family.IPV4, TABLE, names.CLUSTER_IPS, [element.key])
        addition = add_elements(Family.IPV4, TABLE, names.CLUSTER_IPS, [intruder])
        drifts: dict[str, tuple[Callable[[], None], range]] = {
            "removed": (lambda: stranger.do(*removal), range(1, 2)),
            "added": (lambda: stranger.do(*addition), range(1, 2)),
            "changed": (lambda: stranger.replace(backends, backend, other), range(1, 3)),
            "everything": (lambda: stranger.do(delete_table(Family.IPV4, TABLE)), range(3 * cluster.services, 1 << 20)),
        }
        for number, (what, (drift, operations)) in enumerate(drifts.items(), 1):
            drift()
            agent.until(lambda number=number: agent.healed(number))  # type: ignore[misc]
            assert dataplane.read() == wanted, what
            assert agent.syncs().last.operations in operations, what


# As many as the agent repairs without a pause.
BY_NFT = {
    "an element removed": ["delete", "element", "ip", TABLE, "cluster-ips", "{ 10.96.0.10 }"],
    "an element added": ["add", "element", "ip", TABLE, "reject-frontends", "{ 10.9.9.9 . tcp . 1 }"],
    "a set flushed": ["flush", "map", "ip", TABLE, "endpoints-tcp"],
    "a rule added": ["add", "rule", "ip", TABLE, "filter-forward", "drop"],
    "a rule before all others": ["insert", "rule", "ip", TABLE, "services", "return"],
    "a chain flushed": ["flush", "chain", "ip", TABLE, "nat-postrouting"],
    "the table deleted": ["delete", "table", "ip", TABLE],
    "everything flushed": ["flush", "ruleset"],
}


def test_the_agent_heals_what_nft_does_and_names_it(agent: Agent) -> None:
    wanted = agent_socket.table(Family.IPV4, agent.run_directory).table
    assert wanted.routes
    with contextlib.closing(NftablesDataplane(Family.IPV4)) as dataplane:
        for number, (what, command) in enumerate(BY_NFT.items(), 1):
            nft(*command)
            agent.until(lambda number=number: agent.syncs().drift_repairs == number)  # type: ignore[misc]
            assert dataplane.read() == wanted, what
            seen = agent.syncs().last_drift
            assert seen.repaired
            assert any(by.startswith("nft (process ") for by in seen.by), what
    agent.until(lambda: not agent.status().in_trouble)
    assert agent.verify().returncode == 0
    assert 'by=["nft (process' in agent.log.read_text()


@pytest.mark.parametrize("policy", ["report"])
def test_set_to_report_only_the_agent_tells_and_leaves(agent: Agent) -> None:
    assert agent.verify().returncode == 0
    nft("delete", "element", "ip", TABLE, "cluster-ip", "{ 10.96.0.10 . tcp . 80 }")
    agent.until(lambda: agent.syncs().drift_left > 0)
    with contextlib.closing(NftablesDataplane(Family.IPV4)) as dataplane:
        held = dataplane.read()
        assert held is not None
        assert not any(route.kind is Kind.CLUSTER_IP for route in held.routes.values()), "it was repaired"
    assert agent.syncs().drift_repairs == 0
    done = agent.verify()
    assert done.returncode == 1
    assert "default/web:http  ClusterIP 10.96.0.10:80/TCP\n    - is missing" in done.stdout
    shown = agent.verb("status", "--run-directory", agent.run_directory)
    assert shown.returncode == 1
    assert "left (driftPolicy: report)" in shown.stdout
    nft("flush", "ruleset")
    agent.until(lambda: agent.syncs().last_drift.summary == "the whole table is missing")
    value = json.loads(agent.verify("-o", "json").stdout)
    assert value["equal"] is False
    assert {family["family"]: family["absent"] for family in value["families"]} == {"IPv4": True, "IPv6": True}


def test_verify_goes_by_manifests_where_no_agent_runs(agent: Agent, tmp_path: Path) -> None:
    agent.stop()
    manifests = ["-f", str(agent.manifests), *agent.flags]
    nothing = agent.verify()
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
    assert "no agent answers" in nothing.stderr
    equal = agent.verify(*manifests)
    assert equal.returncode == 0, equal.stdout + equal.stderr
    assert f"equal to what {agent.manifests} wants, 2 frontends" in equal.stdout
    nft("flush", "chain", "ip", TABLE, "nat-postrouting")
    drifted = agent.verify(*manifests)
    assert drifted.returncode == 1
    assert "chain nat-postrouting lacks its rule 1" in drifted.stdout
    missing = agent.verify("-f", str(tmp_path / "nowhere"))
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1


def test_verify_does_not_compare_one_namespaces_kernel_with_anothers_agent(agent: Agent) -> None:
    with own_network_namespace():
        done = agent.verify()
    assert done.returncode == 2
    assert "serves another network namespace" in done.stderr
    assert f"/proc/{agent.process.pid}/ns/net" in done.stderr
