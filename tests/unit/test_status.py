"""`sluice status`: the words, the exit codes, and that the agent's parts say what is so."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import msgspec
import pytest

from proxy import agent_socket, status
from proxy.agent_socket import AgentError, NoAgentError
from proxy.config.settings import Settings
from proxy.desired import Desired
from proxy.report import (
    Contested,
    DriftSeen,
    FamilyReport,
    Followed,
    LastSync,
    SourceReport,
    Status,
    Syncs,
    Trouble,
    Unselected,
    Unserved,
)
from proxy.runner import Periods
from proxy.selection import Reason
from proxy.serving.agent_server import RefusedError
from proxy.serving.answers import Answers
from proxy.serving.health import ProxyHealth
from proxy.sources.base import Resource
from proxy.state import State
from proxy.sync import FamilySync
from rules.dataplane import Applied, Capabilities
from rules.forwarding import Delta, Family, ForwardingTable
from tests.builders import endpoint, endpoint_slice, service
from tests.fakes.polling import eventually

SYNCS = Syncs(
    count=3,
    pending=False,
    failures=0,
    error="",
    last=LastSync(ago=3.2, seconds=0.0042, full=False, operations=4),
    refused=(),
    drift_repairs=0,
    drift_left=0,
    last_drift=None,
)
DRIFT = DriftSeen(
    ago=300,
    summary="1 frontend missing",
    lines=("b/web:http  ClusterIP 10.96.0.2:80/TCP", "  - is missing"),
    by=("nft (process 4711)",),
    repaired=True,
)
IPV4 = FamilyReport(
    family="IPv4", dataplane="nftables", capabilities=Capabilities(), healthy=True, frontends=240, syncs=SYNCS
)
HEALTHY = Status(
    version="1.2",
    pid=42,
    uptime=7980,
    network_namespace=7,
    node="node1",
    mode="nftables",
    behaviour="nftables",
    drift_policy="repair",
    synced=True,
    source=SourceReport(
        description="https://10.0.0.1:6443",
        followed=(Followed(what="services", state="watching", lag=4.0, changed=90.0),),
    ),
    families=(IPV4,),
    services=120,
    slices=1,
    pending_changes=0,
)


def with_syncs(**changes: Any) -> Status:
    syncs = msgspec.structs.replace(SYNCS, **changes)
    return msgspec.structs.replace(HEALTHY, families=(msgspec.structs.replace(IPV4, syncs=syncs),))


def text(report: Status) -> str:
    return "\n".join(status.lines(report))


def test_a_healthy_agent() -> None:
    assert (
        text(HEALTHY)
        == """\
sluice 1.2 on node1, process 42, up 2 h 13 min
mode       nftables, as configured
source     https://10.0.0.1:6443
           services watching, heard 4 s ago, changed 90 s ago
objects    120 Services, 1 EndpointSlice
IPv4       up to date; 240 frontends in nftables
           last sync 3 s ago: partial, 4 operations in 4.2 ms"""
    )


def test_an_agent_with_everything_that_can_be_wrong() -> None:
    failing = msgspec.structs.replace(
        SYNCS, failures=2, error="the kernel refused a change", pending=True, refused=("b/odd",), last=None
    )
    drifted = msgspec.structs.replace(SYNCS, drift_repairs=1, last_drift=DRIFT)
    left = msgspec.structs.replace(SYNCS, drift_left=1, last_drift=DRIFT, pending=True)
    report = msgspec.structs.replace(
        HEALTHY,
        mode="",
        behaviour="iptables",
        drift_policy="report",
        pending_changes=2,
        source=SourceReport(
            description="manifests /etc/m",
            followed=(
                Followed(what="files", state="watching", lag=12.0, error="no such directory"),
                Followed(what="nodes", state="listing", lag=None),
                Followed(what="servicecidrs", state="watching", lag=400.0),
            ),
        ),
        families=(
            msgspec.structs.replace(IPV4, syncs=failing),
            msgspec.structs.replace(IPV4, family="IPv6", syncs=drifted, frontends=1),
            msgspec.structs.replace(IPV4, family="IPvX", syncs=left),
            msgspec.structs.replace(IPV4, family="IPvY", healthy=False),
        ),
        troubles=(Trouble(origin="compute", subject="Service b/bad", reason="spec.clusterIP: no\naddress"),),
        contested=(Contested(frontend="10.96.0.2:80/TCP", winner="b/old", losers=("b/new", "c/newer")),),
        unselected=(Unselected(service="b/lost", selector="app=x"),),
        unserved=(Unserved(family="IPvZ", reason="this kernel lacks the expression fib"),),
        notes=("something to know",),
    )
    assert (
        text(report)
        == """\
sluice 1.2 on node1, process 42, up 2 h 13 min
mode       nftables, chosen for this node as none is configured; it means what iptables mode means
source     manifests /etc/m
           files watching, read 12 s ago: no such directory
           nodes listing, never heard
           servicecidrs watching, heard 6 min ago; the node may be behind
objects    120 Services, 1 EndpointSlice, 2 changes to compute
IPv4       FAILING, 2 times in a row: the kernel refused a change; 240 frontends in nftables
           refused by the kernel: b/odd
IPv6       up to date; 1 frontend in nftables
           last sync 3 s ago: partial, 4 operations in 4.2 ms
           drift repaired 1 time
           last drift 5 min ago after nft (process 4711): 1 frontend missing
             b/web:http  ClusterIP 10.96.0.2:80/TCP
               - is missing
IPvX       a sync is due; 240 frontends in nftables
           last sync 3 s ago: partial, 4 operations in 4.2 ms
           DRIFT: 1 difference left (driftPolicy: report)
           last drift 5 min ago after nft (process 4711): 1 frontend missing
             b/web:http  ClusterIP 10.96.0.2:80/TCP
               - is missing
IPvY       LATE: a sync has been waiting too long; 240 frontends in nftables
           last sync 3 s ago: partial, 4 operations in 4.2 ms
IPvZ       not served: this kernel lacks the expression fib
trouble    Service b/bad: spec.clusterIP: no\\naddress
contested  10.96.0.2:80/TCP belongs to Service b/old; b/new, c/newer would be next
no slices  Service b/lost selects pods by app=x, and nothing says which they are: add an EndpointSlice with the label \
kubernetes.io/service-name: lost, or Endpoints of its name
note       something to know"""
    )


def test_long_lists_are_cut_in_text_and_say_where_the_rest_is() -> None:
    troubles = tuple(Trouble(origin="x", subject=f"Service {number}", reason="bad") for number in range(25))
    lines = text(msgspec.structs.replace(HEALTHY, troubles=troubles)).splitlines()
    assert sum("bad" in line for line in lines) == status.SHOWN
    assert "and 5 more: see -o json" in lines[-1]


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (HEALTHY, 0),
        (msgspec.structs.replace(HEALTHY, troubles=(Trouble(origin="x", subject="y", reason="z"),)), 0),
        (msgspec.structs.replace(HEALTHY, synced=False), 1),
        (with_syncs(failures=1), 1),
        (with_syncs(count=0), 1),
        (with_syncs(drift_left=1), 1),
        (with_syncs(drift_repairs=5), 0),
        (msgspec.structs.replace(HEALTHY, families=(msgspec.structs.replace(IPV4, healthy=False),)), 1),
    ],
)
@pytest.mark.parametrize("format_", ["text", "json"])
def test_the_exit_code_says_whether_the_kernel_is_as_it_should_be(report: Status, code: int, format_: Any) -> None:
    assert status.main(format_, "/run/x", out=io.StringIO(), ask=lambda _: report) == code


def test_json_is_the_report() -> None:
    out = io.StringIO()
    status.main("json", "/run/x", out=out, ask=lambda _: HEALTHY)
    value = json.loads(out.getvalue())
    assert value["inTrouble"] is False
    assert value["families"][0]["syncs"]["last"]["operations"] == 4
    assert msgspec.convert(value, Status) == HEALTHY


@pytest.mark.parametrize("error", [NoAgentError("no agent answers at /x"), AgentError("for root alone")])
def test_no_agent_is_one_line_and_2(error: AgentError, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(_: str) -> Status:
        raise error

    assert status.main("text", "/x", ask=ask) == 2
    assert capsys.readouterr().err == f"sluice status: {error}\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0001, "0.1 ms"),
        (0.0042, "4.2 ms"),
        (0.25, "250 ms"),
        (1, "1 s"),
        (119.4, "119 s"),
        (600, "10 min"),
        (7980, "2 h 13 min"),
        (270000, "3 d 3 h"),
    ],
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert status.duration(seconds) == words


# --- what the agent's parts say ------------------------------------------------------------------------------------


class Kernel:
    name = "memory"
    family = Family.IPV4
    capabilities = Capabilities()

    def sync(self, table: ForwardingTable) -> Applied:
        return Applied(full=True, operations=len(table.routes))

    def apply(self, delta: Delta) -> Applied:
        return Applied(operations=len(delta.changed))


class Nobody:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Source:
    description = "a test"

    def followed(self) -> list[Followed]:
        return [Followed(what="files", state="watching", lag=1.0)]


class Rig:
    def __init__(self) -> None:
        settings = Settings(mode="nftables")
        self.state = State("node1")
        self.desired = Desired(settings, "node1", self.state, [Family.IPV4])
        self.sync = FamilySync(
            Kernel(),
            self.desired,
            self.state,
            Periods(minimum=0.0, retry=1.0),
            Nobody(),  # type: ignore[arg-type]
        )
        self.state.on_change = self.sync.request
        self.answers = Answers(
            settings=settings,
            node_name="node1",
            source=Source(),  # type: ignore[arg-type]
            state=self.state,
            desired=self.desired,
            syncs=[self.sync],
            health=ProxyHealth(60.0),
        )

    async def ask(self, verb: str, **arguments: str) -> tuple[list[Any], Any]:
        """Parts and result, as they are after the socket."""
        parts, result = [], None
        async for kind, value in self.answers.answer(verb, arguments):
            plain = msgspec.json.decode(msgspec.json.encode(value))
            if kind == "part":
                parts.append(plain)
            else:
                result = plain
        return parts, result


def asked(verb: str, **arguments: str) -> tuple[Rig, list[Any], Any]:
    """What is answered by an agent that has synced a few Services."""

    async def main() -> tuple[Rig, list[Any], Any]:
        rig = Rig()
        loop = asyncio.create_task(rig.sync.run())
        slices = [endpoint_slice([endpoint("10.244.1.1", "node1"), endpoint("10.244.2.1", condition="N")], owner="web")]
        rig.state.replace(Resource.SLICES, slices)
        rig.state.replace(
            Resource.SERVICES,
            [
                service("web", cluster_ip="172.30.0.1", created="2026-01-01T00:00:00Z"),
                service("twin", cluster_ip="172.30.0.1", created="2026-02-01T00:00:00Z"),
                service("lost", cluster_ip="172.30.0.2", selector={"b": "2", "app": "x"}),
                service("headless", cluster_ip="None", selector={"app": "x"}),
                service("manual", cluster_ip="172.30.0.3"),
                service("bad", cluster_ip="nonsense"),
            ],
        )
        try:
            await eventually(lambda: not rig.sync.statistics().pending)
            return rig, *await rig.ask(verb, **arguments)
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)

    return asyncio.run(main())


def test_status_tells_what_is_so() -> None:
    _, _, result = asked("status")
    report = msgspec.convert(result, Status)
    assert not report.in_trouble
    assert (report.services, report.slices, report.pending_changes) == (6, 1, 0)
    (family,) = report.families
    assert (family.family, family.dataplane, family.frontends) == ("IPv4", "memory", 3)
    assert family.syncs.last is not None
    assert (family.syncs.last.full, family.syncs.last.operations) == (True, 3)
    assert [(each.subject, each.origin) for each in report.troubles] == [("Service ns/bad", "compute")]
    assert report.contested == (Contested(frontend="172.30.0.1:80/TCP", winner="ns/web", losers=("ns/twin",)),)
    assert report.unselected == (Unselected(service="ns/lost", selector="app=x,b=2"),)
    (note,) = report.notes
    assert "no service CIDRs are known (IPv4)" in note
    assert report.network_namespace == agent_socket.network_namespace()


def test_table_tells_the_wanted_table() -> None:
    rig, parts, result = asked("table", family="IPv4")
    assert sum(len(part.get("routes", ())) for part in parts) == rig.desired.size(Family.IPV4) == 3
    assert (result["syncs"], result["pending"], result["dataplane"]) == (1, False, "memory")


def test_decisions_tell_what_became_of_each_endpoint() -> None:
    _, _, result = asked("decisions", service="ns/web")
    assert {(each["endpoint"], each["cluster"]) for each in result} == {
        ("10.244.1.1:80", Reason.USED.name),
        ("10.244.2.1:80", Reason.NOT_READY.name),
    }


def test_objects_are_spelt_as_in_the_api() -> None:
    _, parts, _ = asked("objects")
    kinds = [each["kind"] for part in parts for each in part]
    assert kinds.count("Service") == 6
    assert kinds.count("EndpointSlice") == 1
    _, [objects], _ = asked("objects", service="ns/web")
    assert [(each["kind"], each["apiVersion"]) for each in objects] == [
        ("Service", "v1"),
        ("EndpointSlice", "discovery.k8s.io/v1"),
    ]
    assert objects[0]["spec"]["clusterIP"] == "172.30.0.1"


def test_troubles_are_told() -> None:
    _, _, result = asked("troubles")
    assert {each["subject"] for each in result} == {"Service ns/bad", "Service ns/twin"}


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("dance", {}, "no verb 'dance'"),
        ("table", {}, "must be IPv4 or IPv6"),
        ("table", {"family": "IPv6"}, "IPv6 is not served"),
        ("decisions", {"service": "web"}, "namespace/name"),
        ("decisions", {"service": "ns/nobody"}, "no Service ns/nobody"),
    ],
)
def test_what_cannot_be_answered_is_refused(verb: str, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        asyncio.run(Rig().ask(verb, **arguments))
