"""`sluice conntrack`: whose flows, which are stale, and what is deleted."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from proxy import agent_socket, flows
from proxy.agent_socket import NoAgentError
from proxy.conntrack import Serving
from rules.dataplane import DataplaneError
from rules.forwarding import Family, ForwardingTable, Frontend, Kind, Protocol, Route, parse_address
from rules.netlink.conntrack import ANSWERED, Flow
from tests.builders import at, backends

DNS, NODE_PORT, WEB = at("10.96.0.10:53", Protocol.UDP), at("*:30053", Protocol.UDP), at("10.96.0.11:80")
PODS = backends("10.244.1.11", "10.244.2.11", port=5300)
TABLE = ForwardingTable(
    family=Family.IPV4,
    routes={
        DNS: Route(kind=Kind.CLUSTER_IP, backends=PODS, label="kube-system/dns:dns"),
        NODE_PORT: Route(kind=Kind.NODE_PORT, backends=PODS, label="kube-system/dns:dns"),
        WEB: Route(kind=Kind.CLUSTER_IP, backends=backends("10.244.1.12 8080"), label="default/web"),
    },
)


def flow(to: str, backend: str, protocol: Protocol = Protocol.UDP, port: int = 4000, status: int = 0) -> Flow:
    """A flow of one client to a destination, where `backend` answers."""
    client, frontend, chosen = parse_address("10.244.1.13"), at(to), at(backend)
    own = client, port
    return Flow(
        *(client, frontend.address, protocol, port, frontend.port),
        chosen.address,
        own[0],
        chosen.port,
        own[1],
        status,
        b"",
    )


LIVE = flow("10.96.0.10:53", "10.244.1.11:5300", status=ANSWERED)
STALE = flow("10.96.0.10:53", "10.244.1.99:5300", port=4001)
NONE_CHOSEN = flow("10.96.0.10:53", "10.96.0.10:53", port=4002)
BY_NODE_PORT = flow("192.168.50.11:30053", "10.244.2.11:5300", port=4003)
THROUGH = flow("8.8.8.8:30053", "8.8.8.8:30053", port=4004)._replace(reply_port=1)
FOREIGN = flow("8.8.8.8:53", "8.8.8.8:53", port=4005)
DRAINING = flow("10.96.0.11:80", "10.244.1.99:8080", Protocol.TCP, port=4006)


class Held:
    """A dataplane, and connection tracking, of one family."""

    def __init__(self) -> None:
        self.all = [LIVE, STALE, NONE_CHOSEN, BY_NODE_PORT, THROUGH, FOREIGN, DRAINING]
        self.deleted: list[Flow] = []
        self.wrong: Exception | None = None

    def open_dataplane(self, name: str, family: Family) -> Any:
        return self if name == "nftables" and family is Family.IPV4 else Empty()

    def open_conntrack(self, family: Family) -> Any:
        assert family is Family.IPV4
        return self

    def read(self) -> ForwardingTable:
        return TABLE

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Likewise."""

    def flows(self, protocol: Protocol) -> Iterator[Flow]:
        if self.wrong:
            raise self.wrong
        return iter([each for each in self.all if each.protocol == protocol])

    def delete(self, chosen: Iterable[Flow]) -> int:
        self.deleted += chosen
        return len(self.deleted)


class Empty:
    def read(self) -> None:
        """Nothing of ours."""

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture
def held() -> Held:
    return Held()


def run(held: Held, tmp_path: Path, **options: Any) -> tuple[int, str]:
    out = io.StringIO()
    code = flows.main(
        options.pop("format_", "json"),
        run_directory=str(tmp_path),
        open_dataplane=held.open_dataplane,
        open_conntrack=held.open_conntrack,
        out=out,
        **options,
    )
    return code, out.getvalue()


def listed(text: str) -> dict[str, tuple[str, str | None, bool]]:
    """Per client's port: Service, backend, and whether stale."""
    found = json.loads(text)["flows"]
    return {each["client"].rpartition(":")[2]: (each["service"], each["backend"], each["stale"]) for each in found}


def test_every_flow_of_a_service_has_its_name_and_no_other_flow_is_listed(held: Held, tmp_path: Path) -> None:
    code, text = run(held, tmp_path)
    assert code == 0
    assert json.loads(text)["judgedBy"] == "the rules"
    assert listed(text) == {
        "4000": ("kube-system/dns:dns", "10.244.1.11:5300", False),
        "4001": ("kube-system/dns:dns", "10.244.1.99:5300", True),
        "4002": ("kube-system/dns:dns", None, True),
        "4003": ("kube-system/dns:dns", "10.244.2.11:5300", False),
        "4006": ("default/web", "10.244.1.99:8080", False),
    }
    assert not held.deleted


def test_the_agent_knows_who_serves_beyond_the_rules(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving: dict[Frontend, Serving] = {DNS: PODS | backends("10.244.1.99 5300"), NODE_PORT: PODS}
    status = type("Status", (), {"network_namespace": agent_socket.network_namespace()})
    monkeypatch.setattr(agent_socket, "status", lambda _directory: status)
    monkeypatch.setattr(agent_socket, "serving", lambda _family, _directory: serving)
    _, text = run(held, tmp_path)
    assert json.loads(text)["judgedBy"] == "the agent"
    assert listed(text)["4001"] == ("kube-system/dns:dns", "10.244.1.99:5300", False)
    # An agent of another network namespace knows nothing of these flows.
    status.network_namespace += 1
    assert json.loads(run(held, tmp_path)[1])["judgedBy"] == "the rules"


@pytest.mark.parametrize(
    ("chosen", "ports"),
    [
        ({"service": "dns"}, {"4000", "4001", "4002", "4003"}),
        ({"service": "kube-system/dns"}, {"4000", "4001", "4002", "4003"}),
        ({"service": "kube-system/dns:dns", "stale": True}, {"4001", "4002"}),
        ({"service": "web"}, {"4006"}),
        ({"service": "kube-system"}, set()),
        ({"address": parse_address("10.244.1.99")}, {"4001", "4006"}),
        ({"address": parse_address("10.96.0.11")}, {"4006"}),
        ({"address": parse_address("10.244.1.13"), "stale": True}, {"4001", "4002"}),
    ],
)
def test_flows_are_chosen(chosen: dict[str, Any], ports: set[str], held: Held, tmp_path: Path) -> None:
    assert listed(run(held, tmp_path, chosen=flows.Chosen(**chosen))[1]).keys() == ports


def test_none_but_the_chosen_stale_flows_are_deleted(held: Held, tmp_path: Path) -> None:
    chosen = flows.Chosen(address=parse_address("10.244.1.99"))
    run(held, tmp_path, delete_stale=True, chosen=chosen)
    assert held.deleted == [STALE]


def test_a_count_by_service_and_backend(held: Held, tmp_path: Path) -> None:
    _, text = run(held, tmp_path, format_="count")
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "SERVICE BACKEND FLOWS UNANSWERED STALE",
        "default/web 10.244.1.99:8080 1 1 0",
        "kube-system/dns:dns 10.244.1.11:5300 1 0 0",
        "kube-system/dns:dns 10.244.1.99:5300 1 1 1",
        "kube-system/dns:dns 10.244.2.11:5300 1 1 0",
        "kube-system/dns:dns none 1 1 1",
        "2 flows of 5 stale, judged by the rules: sluice conntrack --delete-stale deletes them",
    ]


def test_a_connection_to_an_endpoint_that_gets_no_new_ones_drains(held: Held, tmp_path: Path) -> None:
    drained = [each for each in json.loads(run(held, tmp_path)[1])["flows"] if each["draining"]]
    assert [each["client"] for each in drained] == ["10.244.1.13:4006"]
    assert "unanswered, draining" in run(held, tmp_path, format_="table")[1]


def test_no_flow_is_a_line_too(held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held.all = [LIVE]
    assert run(held, tmp_path, format_="table", chosen=flows.Chosen(service="web")) == (0, "")
    assert capsys.readouterr().err == "sluice conntrack: there is no such flow\n"


@pytest.mark.parametrize("name", ["nobody", "kube-system/web", "dns:metrics", "default/web:http"])
def test_a_service_that_nothing_is_known_of_is_no_service_without_flows(
    name: str, held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(held, tmp_path, format_="table", chosen=flows.Chosen(service=name)) == (1, "")
    assert f"no Service {name} has a frontend here" in capsys.readouterr().err


def test_flows_of_workers_are_not_connection_trackings(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    relayed = msgspec.structs.replace(TABLE, node=msgspec.structs.replace(TABLE.node, relayed=True))
    monkeypatch.setattr(held, "read", lambda: relayed)
    for more in ({}, {"delete_stale": True}):
        code, text = run(held, tmp_path, **more)
        told = capsys.readouterr().err
        assert (code, json.loads(text)["flows"], held.deleted) == (0, [], [])
        assert "mode userspace" in told
        assert "sluice dump --counters" in told
        assert json.loads(text)["notes"] == [told.removeprefix("sluice conntrack: ").rstrip()]


def test_only_stale_flows_are_deleted_and_they_are_shown(held: Held, tmp_path: Path) -> None:
    code, text = run(held, tmp_path, delete_stale=True)
    assert code == 0
    assert held.deleted == [STALE, NONE_CHOSEN]
    assert json.loads(text)["deleted"] == 2
    assert listed(text).keys() == {"4001", "4002"}


def test_a_table_for_people(held: Held, tmp_path: Path) -> None:
    _, text = run(held, tmp_path, format_="table", delete_stale=True)
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "SERVICE CLIENT FRONTEND BACKEND STATE",
        "kube-system/dns:dns 10.244.1.13:4001 10.96.0.10:53/UDP 10.244.1.99:5300 unanswered, stale",
        "kube-system/dns:dns 10.244.1.13:4002 10.96.0.10:53/UDP none unanswered, stale",
        "2 stale flows deleted, judged by the rules",
    ]


@pytest.mark.parametrize("error", [OSError(1, "Operation not permitted"), ValueError("malformed")])
def test_what_cannot_be_read_is_one_line_and_2(
    error: Exception, held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held.wrong = error
    code, text = run(held, tmp_path)
    assert code == 2
    assert json.loads(text)["flows"] == []
    assert capsys.readouterr().err.startswith("sluice conntrack: connection tracking of IPv4: ")


def test_without_rules_of_ours_there_are_no_flows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    code = flows.main("table", run_directory=str(tmp_path), open_dataplane=lambda *_: Empty(), out=out)  # type: ignore[arg-type,return-value]
    assert (code, out.getvalue()) == (0, "")
    assert "nothing of sluice" in capsys.readouterr().err


def test_rules_that_cannot_be_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> Any:
        raise DataplaneError("the kernel says no")

    assert flows.main("table", run_directory=str(tmp_path), open_dataplane=refuse, out=io.StringIO()) == 2
    assert capsys.readouterr().err == "sluice conntrack: the kernel says no\n"


def test_there_is_no_agent_in_these_tests(tmp_path: Path) -> None:
    with pytest.raises(NoAgentError):
        agent_socket.serving(Family.IPV4, str(tmp_path))
