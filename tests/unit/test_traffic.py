"""`sluice dump --counters` without a kernel, and the same figures in /metrics."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from proxy import cli, traffic
from proxy.agent_socket import AgentError, NoAgentError
from proxy.counters import OTHERS, Report, Row, Traffic
from proxy.dump import Filter
from proxy.output import Shown
from proxy.serving.traffic import TrafficCollector
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Protocol, Route, parse_address
from rules.netlink.counters import Counts
from tests.unit.test_counters import flow

SERVICE = Frontend(parse_address("10.96.0.1"), Protocol.TCP, 80)
POD = Backend(parse_address("10.244.0.1"), 8080)
ROUTES = {SERVICE: Route(kind=Kind.CLUSTER_IP, backends=frozenset({POD}), label="default/web:http")}
COUNTED = Traffic(connections=3, open=1, packets_in=10, bytes_in=1000, packets_out=20, bytes_out=20000)
ROW = Row(
    family="IPv4",
    service="default/web:http",
    protocol="TCP",
    frontend="10.96.0.1:80/TCP",
    backend="10.244.0.1:8080",
    traffic=COUNTED,
)


class Dataplane:
    def __init__(self, name: str, family: Family) -> None:
        self._ours = name == "nftables" and family is Family.IPV4

    def read(self) -> ForwardingTable | None:
        return ForwardingTable(family=Family.IPV4, routes=ROUTES) if self._ours else None

    def close(self) -> None:
        pass


class Kernel:
    def __init__(self, family: Family) -> None:
        pass

    def flows(self, protocol: Protocol, status: int = 0) -> Any:
        return iter([flow(1, Counts(5, 500, 4, 9000))] if protocol is Protocol.TCP else [])


def dump(
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[Report, list[Row]] | Exception,
    format_: Any = "table",
    wanted: Filter = Filter(),  # noqa: B008  # immutable
) -> int:
    class Status:
        network_namespace = traffic.agent_socket.network_namespace()

    def ask(_: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(traffic.agent_socket, "status", lambda _: Status)
    monkeypatch.setattr(traffic.agent_socket, "counters", ask)
    return traffic.main(
        format_, wanted, open_dataplane=Dataplane, open_conntrack=lambda family: contextlib.nullcontext(Kernel(family))
    )


def test_what_the_agent_has_counted(monkeypatch, capsys):
    assert dump(monkeypatch, (Report(on=True), [ROW])) == 0
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.split("  ")[0] == "SERVICE"
    assert line.split() == ["default/web:http", "TCP", "1", "3", "10", "1000", "20", "20000"]
    assert dump(monkeypatch, (Report(on=True), [ROW]), "wide") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:3] == ["default/web:http", "10.96.0.1:80/TCP", "10.244.0.1:8080"]


def test_what_workers_count_is_of_all_frontends_and_backends_of_a_port_and_not_of_some_that_are_gone(
    monkeypatch, capsys
):
    row = msgspec.structs.replace(ROW, frontend="", backend="")
    assert dump(monkeypatch, (Report(on=True), [row]), "wide") == 0
    [line] = [each for each in capsys.readouterr().out.splitlines() if each.startswith(ROW.service)]
    assert line.split()[1:3] == ["(all)", "(all)"]


def test_json_is_that_of_dump_with_traffic(monkeypatch, capsys):
    assert dump(monkeypatch, (Report(on=True, lost=2), [ROW]), "json") == 0
    found = json.loads(capsys.readouterr().out)
    [route] = found["tables"][0]["routes"]
    assert route["service"] == "default/web:http"
    assert route["traffic"]["bytesOut"] == 20000
    assert route["traffic"]["backends"]["10.244.0.1:8080"]["connections"] == 3
    assert (found["counters"]["by"], found["counters"]["lost"]) == ("agent", 2)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (NoAgentError("none"), "no agent runs: "),
        (AgentError("it does not answer"), "it does not answer: "),
        ((Report(on=False), []), "the agent does not count (trafficCounters): "),
    ],
)
def test_open_flows_where_nobody_counts(monkeypatch, capsys, answer, why):
    assert dump(monkeypatch, answer) == 0
    captured = capsys.readouterr()
    assert captured.err == f"sluice dump: {why}this is of the flows that are open, and no others\n"
    assert captured.out.splitlines()[1].split() == ["default/web:http", "TCP", "1", "1", "5", "500", "4", "9000"]


def test_open_flows_of_mode_ipvs_which_no_NAT_has_translated(monkeypatch):
    class Table:
        def flows(self, protocol: Protocol, status: int = 0) -> Any:
            found = [flow(1, Counts(5, 500, 4, 9000), status=0)] if protocol is Protocol.TCP else []
            return iter([each for each in found if each.status & status == status])

    def nobody(_: str) -> Any:
        raise NoAgentError

    monkeypatch.setattr(traffic.agent_socket, "status", nobody)
    shown = [Shown("ipvs", ForwardingTable(family=Family.IPV4, routes=ROUTES))]
    counted, _ = traffic.count(shown, [], "/nowhere", lambda _: contextlib.nullcontext(Table()))
    assert [row.traffic.bytes_out for row in counted.rows] == [9000]


def test_what_is_wrong_with_the_counters_is_told(monkeypatch, capsys):
    assert dump(monkeypatch, (Report(on=True, problems=("packets are not counted",)), [])) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "sluice dump: packets are not counted",
        "sluice dump: nothing has passed any Service that is asked about",
    ]
    assert captured.out == ""


def test_only_what_is_asked_for(monkeypatch, capsys):
    other = Row(family="IPv4", service="a/b:c", protocol="TCP", frontend="10.96.0.9:80/TCP", traffic=COUNTED)
    assert dump(monkeypatch, (Report(on=True), [ROW, other]), wanted=Filter(service="web")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert dump(monkeypatch, (Report(on=True), [ROW]), wanted=Filter(service="none")) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["-f", "x"], ["-o", "raw"], ["--of", "kube-proxy"]])
def test_counters_of_something_else_are_a_mistake(arguments, capsys):
    assert cli.main(["dump", "--counters", *arguments]) == 2
    assert "--counters are of this node" in capsys.readouterr().err


class Counted:
    def __init__(self, *rows: Row) -> None:
        self.told = rows

    def report(self) -> Report:
        return Report(on=True, lost=3, uncounted=4)

    def rows(self) -> list[Row]:
        return list(self.told)

    def watched(self) -> None:
        pass


def exposed(*rows: Row, most: int = 10) -> str:
    registry = CollectorRegistry()
    registry.register(TrafficCollector(Counted(*rows), most))
    return generate_latest(registry).decode()


def test_metrics_have_a_series_for_each_service_port_and_no_backends():
    found = exposed(ROW)
    labels = 'ip_family="IPv4",protocol="TCP",service_port="default/web:http"'
    assert f"sluice_service_connections_total{{{labels}}} 3.0" in found
    assert f"sluice_service_open_connections{{{labels}}} 1.0" in found
    assert f'sluice_service_bytes_total{{direction="to_client",{labels}}} 20000.0' in found
    assert f'sluice_service_packets_total{{direction="to_backend",{labels}}} 10.0' in found
    assert "sluice_service_traffic_losses_total 3.0" in found
    assert "sluice_service_uncounted_connections 4.0" in found
    assert "10.244.0.1" not in found


def test_metrics_are_bounded():
    rows = [
        Row(family="IPv4", service=f"a/s{number}:p", protocol="TCP", frontend=str(number), traffic=COUNTED)
        for number in range(50)
    ]
    found = exposed(*rows, most=5)
    lines = [line for line in found.splitlines() if line.startswith("sluice_service_connections_total")]
    assert len(lines) == 6
    assert f'sluice_service_connections_total{{ip_family="IPv4",protocol="",service_port="{OTHERS}"}} 135.0' in found
