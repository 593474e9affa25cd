"""The iptables dataplane with programs in memory: what it does when they refuse, without saying of whom."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Backend, Delta, Family, ForwardingTable, Frontend, Kind, Protocol, Route
from rules.iptables import dataplane as module
from rules.iptables.dataplane import IptablesDataplane
from rules.iptables.programs import RestoreError


class Memory:
    """Programs whose kernel is a dictionary: rules by table and chain."""

    save, restore, backend = "save", "restore", "nft"

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, list[str]]] = {
            "nat": {name: [] for name in ("PREROUTING", "OUTPUT", "POSTROUTING")},
            "filter": {name: [] for name in ("INPUT", "FORWARD", "OUTPUT")},
        }
        self.poison = ""
        """A text that no line may have."""
        self.reason = "something is wrong"
        self.calls = self.failures = 0
        self.waited = ""
        """What the next writes have to say."""

    def saved(self) -> str:
        return "\n".join(line for table in self.tables for line in self._lines(table)) + "\n"

    def _lines(self, table: str) -> Iterator[str]:
        yield f"*{table}"
        yield from (f":{name} - [0:0]" for name in self.tables[table])
        yield from (f"-A {name} {rule}" for name, rules in self.tables[table].items() for rule in rules)
        yield "COMMIT"

    def apply(self, text: str) -> str:
        self.calls += 1
        if self.poison and self.poison in text:
            self.failures += 1
            raise RestoreError(self.reason, None, ours="lock" not in self.reason)
        chains: dict[str, list[str]] = {}
        for line in text.splitlines():
            command, _, rest = line.partition(" ")
            name, _, rule = rest.partition(" ")
            match command[:2]:
                case "*n" | "*f":
                    chains = self.tables[line[1:]]
                case "-A":
                    chains[name].append(rule)
                case "-I":
                    chains[name].insert(0, rule)
                case "-D":
                    chains[name].remove(rule)
                case "-X":
                    del chains[name]
                case "CO":
                    pass
                case _:
                    chains[command[1:]] = []
        return self.waited


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(module, "choose", lambda *_: memory)
    monkeypatch.setattr(module, "missing_features", lambda _: frozenset())
    return memory


def held(memory: Memory) -> dict[str, int]:
    """How many rules there are."""
    return {table: sum(map(len, chains.values())) for table, chains in memory.tables.items()}


def web(host: int) -> Frontend:
    return Frontend(bytes([10, 96, 0, host]), Protocol.TCP, 80)


def route(host: int) -> Route:
    backends = frozenset({Backend(bytes([10, 244, 1, host]), 8080)})
    return Route(kind=Kind.CLUSTER_IP, backends=backends, label=f"default/web-{host}")


TABLE = ForwardingTable(family=Family.IPV4, routes={web(host): route(host) for host in range(1, 21)})


def without(*hosts: int) -> ForwardingTable:
    routes = {frontend: route for frontend, route in TABLE.routes.items() if frontend.address[3] not in hosts}
    return msgspec.structs.replace(TABLE, routes=routes)


def test_a_refusal_that_names_no_line_is_traced_to_its_route(memory: Memory) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    memory.poison = "-d 10.96.0.7/32"
    applied = dataplane.sync(TABLE)
    assert applied.why_refused == {"default/web-7": "something is wrong"}
    assert dataplane.read() == without(7)
    assert memory.calls < 15
    dataplane.apply(Delta(removed=frozenset({web(7), web(8)})))
    assert dataplane.read() == without(7, 8)


@pytest.mark.parametrize("poisoned", [1, 20])
def test_what_is_there_already_is_not_tried_again(memory: Memory, poisoned: int) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    dataplane.sync(without(poisoned))
    memory.poison, memory.calls = f"-d 10.96.0.{poisoned}/32", 0
    assert dataplane.sync(TABLE).refused == {f"default/web-{poisoned}"}
    assert memory.calls <= 4
    assert dataplane.read() == without(poisoned)


def test_trouble_of_the_node_is_no_services_fault(memory: Memory) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    memory.poison, memory.reason = "10.96.0.7", "another app holds the xtables lock"
    with pytest.raises(DataplaneError, match="xtables lock"):
        dataplane.sync(TABLE)
    assert memory.calls == 1
    assert dataplane.read() is None


def test_static_rules_that_are_refused_are_an_error(memory: Memory) -> None:
    memory.poison = "SLUICE-POSTROUTING"
    with pytest.raises(DataplaneError, match="something is wrong"):
        IptablesDataplane(Family.IPV4).sync(TABLE)


def test_a_partial_restore_that_fails_asks_for_a_sync(memory: Memory) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    dataplane.sync(without(3))
    memory.poison = "10.96.0.3"
    with pytest.raises(DataplaneError, match="something is wrong"):
        dataplane.apply(Delta(changed={web(3): route(3)}))
    memory.poison = ""
    with pytest.raises(DataplaneError, match="a sync must come first"):
        dataplane.apply(Delta(removed=frozenset({web(3)})))
    dataplane.sync(TABLE)
    assert dataplane.read() == TABLE


def test_a_node_without_statistic_cannot_run_it_and_one_without_recent_goes_without_affinity(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing_features", lambda _: frozenset({"statistic"}))
    with pytest.raises(UnavailableError, match="needs statistic"):
        IptablesDataplane(Family.IPV4).check()
    monkeypatch.setattr(module, "missing_features", lambda _: frozenset({"recent", "random-fully"}))
    dataplane = IptablesDataplane(Family.IPV4)
    sticky = msgspec.structs.replace(route(1), affinity=600)
    applied = dataplane.sync(msgspec.structs.replace(TABLE, routes={web(1): sticky}))
    assert applied.notes == ("iptables-nft on this node lacks random-fully, recent",)
    assert not dataplane.capabilities.affinity
    table = dataplane.read()
    assert table is not None
    assert table.routes == {web(1): route(1)}
    assert "--random-fully" not in memory.saved()


def test_what_is_masqueraded_gets_random_ports_where_the_node_can(memory: Memory) -> None:
    """TRF-9, B-154."""
    IptablesDataplane(Family.IPV4).sync(TABLE)
    masquerading = [line for line in memory.saved().splitlines() if "-j MASQUERADE" in line]
    assert len(masquerading) == 2
    assert all(line.endswith("-j MASQUERADE --random-fully") for line in masquerading)


def test_raw_names_whom_a_rule_serves(memory: Memory) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    dataplane.sync(TABLE)
    raw = dataplane.raw()
    assert raw is not None
    assert raw.table == TABLE
    [item] = [each for each in raw.items if "-d 10.96.0.7/32" in each.text and "CLUSTER-IP" in each.text]
    assert item.frontends == (web(7),)


def test_rules_and_failed_restores_are_counted(memory: Memory) -> None:
    """MET-12 to MET-15: what kube-proxy counts of its restores."""
    dataplane = IptablesDataplane(Family.IPV4)
    first = dataplane.sync(without(3))
    assert first.rules == held(memory)
    assert first.rules == first.rules_written
    assert (first.failed_restores, first.failed_partial_restores) == (0, 0)
    more = dataplane.apply(Delta(changed={web(3): route(3)}))
    assert more.rules == held(memory)
    assert 0 < more.rules_written["nat"] < more.rules["nat"]
    assert 0 < more.rules_written["filter"] < more.rules["filter"]
    less = dataplane.apply(Delta(removed=frozenset({web(3), web(4)})))
    assert less.rules == held(memory)
    memory.poison = "-d 10.96.0.3/32"
    with pytest.raises(DataplaneError):
        dataplane.apply(Delta(changed={web(3): route(3)}))
    memory.poison = ""
    after = dataplane.sync(TABLE)
    assert (after.failed_restores, after.failed_partial_restores) == (1, 1)
    assert after.rules == held(memory)
    again = dataplane.sync(TABLE)
    assert (again.failed_restores, again.failed_partial_restores, again.rules_written) == (
        0,
        0,
        {"nat": 0, "filter": 0},
    )


def test_a_restore_whose_failure_is_told_is_not_counted_twice(memory: Memory) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    memory.poison, memory.reason = "10.96.0.7", "a lock is held"
    with pytest.raises(DataplaneError):
        dataplane.sync(TABLE)
    memory.reason = "something is wrong"
    refused = dataplane.sync(TABLE)
    assert refused.refused
    assert 0 < refused.failed_restores == memory.failures - 1
    assert not refused.failed_partial_restores


def test_waiting_for_the_lock_is_told_once(memory: Memory) -> None:
    dataplane = IptablesDataplane(Family.IPV4)
    memory.waited = "waited 2.0 s for the xtables lock, which iptables (process 7) held"
    assert memory.waited in dataplane.sync(TABLE).notes
    assert dataplane.apply(Delta(removed=frozenset({web(3)}))).notes == (memory.waited,)
    memory.waited = ""
    assert not dataplane.apply(Delta(removed=frozenset({web(4)}))).notes


def test_other_health_checks_are_written_without_the_services(memory: Memory) -> None:
    """IPT-19."""
    dataplane = IptablesDataplane(Family.IPV4)
    dataplane.sync(TABLE)
    facts = msgspec.structs.replace(TABLE.node, health_check_ports=frozenset({32000, 32001}))
    applied = dataplane.apply(Delta(node=facts))
    assert applied.operations == 2
    assert "-A SLUICE-A -p tcp -m tcp --dport 32000 -j ACCEPT" in memory.saved()
    assert dataplane.read() == msgspec.structs.replace(TABLE, node=facts)
    dataplane.apply(Delta(node=msgspec.structs.replace(facts, masquerade_all=True)))
    table = dataplane.read()
    assert table is not None
    assert table.node == msgspec.structs.replace(facts, masquerade_all=True)
    assert table.routes == TABLE.routes
