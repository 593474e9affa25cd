"""docs/json.md names the fields that verbs print, and no others."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import cli, flows, status, verify
from proxy.counters import Report
from proxy.explain.asked import parse_asked, parse_client
from proxy.explain.watching import Clock, watch
from proxy.output import Shown, to_json
from proxy.report import Contested, Trouble, Unselected, Unserved
from proxy.trace.told import to_data
from rules.dataplane import DataplaneError
from rules.diff import Change, Drift, FrontendDrift, Presence
from rules.forwarding import (
    Family,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    Protocol,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from tests.fakes.held import HELD
from tests.unit.test_flows import LIVE
from tests.unit.test_status import DRIFT, HEALTHY, IPV4, SYNCS
from tests.unit.test_trace import AFTER, BEFORE, Traced, told
from tests.unit.test_traffic import ROW, dump

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "data" / "explain" / "cluster.yaml"
OPTIONS = ("--proxy-mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16")


def section(verb: str) -> str:
    text = (ROOT / "docs" / "json.md").read_text()
    [found] = re.findall(rf"^## {verb}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(found)


def documented(verb: str) -> set[str]:
    """The fields in the left column of a verb's table."""
    rows = [line.split("|")[1] for line in section(verb).splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def untold(verb: str, value: Any, *but: str) -> set[str]:
    """The fields at any depth of a value that a verb's section does not name, but those in the fields `but`."""
    words = {part.removesuffix("[]") for name in re.findall(r"`([^`]+)`", section(verb)) for part in name.split(".")}
    return set(names(value, but)) - words


def names(value: Any, but: Collection[str]) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    members = (each for name, each in value.items() if name not in but) if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        for each in members:
            yield from names(each, but)


def fields(value: dict[str, Any], *inside: str) -> set[str]:
    """The fields of an object; of the lists in it that are named those of what is in them, with their place."""
    found = set()
    for name, each in value.items():
        if name in inside:
            members = {key for one in each for key in fields(one, *inside)}
            found |= {f"{name}[].{member}" for member in members}
        else:
            found.add(name)
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    cli.main([*arguments, "-o", "json"])
    return json.loads(capsys.readouterr().out)


def test_explain(capsys):
    value = printed(capsys, "explain", "default/web", "-f", str(CLUSTER), *OPTIONS)
    assert documented("explain") == fields(value, "answers")
    assert not untold("explain", value)
    for name in ("zonal", "away", "nobody"):
        assert not untold("explain", printed(capsys, "explain", f"default/{name}", "-f", str(CLUSTER), *OPTIONS)), name


def test_explain_again_and_again(capsys):
    evidence = [DataplaneError("not now")]

    def gather() -> Any:
        raise evidence.pop() if evidence else KeyboardInterrupt

    clock = Clock(lambda: "12:00:00", lambda _: None)
    watch(parse_asked("default/web"), parse_client("", ""), gather, (DataplaneError,), as_json=True, clock=clock)
    value = json.loads(capsys.readouterr().out)
    assert value.keys() == {"time", "unanswered"}
    assert not untold("explain", value)


def test_doctor(capsys):
    value = printed(capsys, "doctor", "-f", str(CLUSTER), *OPTIONS)
    assert documented("doctor") == fields(value, "findings")
    assert not untold("doctor", value)


def test_verify():
    difference = Change("hairpin", None, "10.0.0.1:80/TCP")
    frontend = Frontend(parse_address("10.96.0.1"), Protocol.TCP, 80)
    drift = Drift(
        family=Family.IPV4,
        frontends=(FrontendDrift(frontend, Kind.CLUSTER_IP, "a/b:c", Presence.CHANGED, (difference,)),),
        node=(difference,),
        hairpins=(difference,),
        damage=("a chain is missing",),
    )
    out = io.StringIO()
    verify.report([verify.Verified("nftables", drift, 3)], "the agent", "json", out, ["a note"])
    value = json.loads(out.getvalue())
    assert documented("verify") == fields(value, "families")
    assert not untold("verify", value)


def test_status():
    """Of a report in which nothing is empty."""
    syncs = msgspec.structs.replace(SYNCS, last_drift=DRIFT)
    report = msgspec.structs.replace(
        HEALTHY,
        families=(msgspec.structs.replace(IPV4, syncs=syncs),),
        troubles=(Trouble(origin="state", subject="Service a/b", reason="odd"),),
        contested=(Contested(frontend="10.0.0.1:80/TCP", winner="a/b", losers=("a/c",)),),
        unselected=(Unselected(service="a/d", selector="app=d"),),
        unserved=(Unserved(family="IPv6", reason="it is off"),),
        notes=("a note",),
    )
    out = io.StringIO()
    status.main("json", "", out=out, ask=lambda _: report)
    value = json.loads(out.getvalue())
    assert all(value[name] for name in value.keys() - {"pendingChanges", "inTrouble"}), "else fields are not seen"
    assert documented("status") == fields(value, "families", "troubles", "contested", "unselected", "unserved")
    assert not untold("status", value, "capabilities")


def test_conntrack():
    report = flows.Report("the agent", [flows.Found(Family.IPV4, "a/b", LIVE, stale=False)], deleted=0)
    out = io.StringIO()
    flows.show(report, "json", out)
    value = json.loads(out.getvalue())
    assert documented("conntrack") == fields(value, "flows")
    assert not untold("conntrack", value)


def test_trace():
    value = to_data(told(Traced(before=BEFORE, after=AFTER, arrived=True)))
    assert documented("trace") == fields(value)
    assert not untold("trace", value)


@pytest.mark.parametrize(
    "detector", [SourcePrefix(parse_prefix("10.244.0.0/16")), InputInterface("cni0"), InputInterfacePrefix("veth")]
)
def test_dump(detector):
    node = msgspec.structs.replace(HELD.node, detector=detector)
    value = {"tables": [to_json(Shown("nftables", msgspec.structs.replace(HELD, node=node)))]}
    assert documented("dump and render") == fields(value, "tables", "routes")
    assert not untold("dump and render", value)


def test_dump_with_counters(monkeypatch, capsys):
    assert dump(monkeypatch, (Report(on=True), [ROW]), "json") == 0
    value = json.loads(capsys.readouterr().out)
    (route,) = value["tables"][0]["routes"]
    (traffic,) = route["traffic"].pop("backends").values()
    assert traffic == route["traffic"]
    assert not untold("dump and render", value)


def test_render(capsys):
    value = printed(capsys, "render", "-f", str(CLUSTER), *OPTIONS)
    assert documented("dump and render") - {"tables[].dataplane"} == fields(value, "tables", "routes")


def test_config(capsys):
    value = printed(capsys, "config")
    assert documented("config") == fields(value)
    assert not untold("config", list(value["origins"].values()))
