"""docs/json.md names the fields that verbs print, and no others."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from proxy import cli, flows
from proxy.output import Shown, to_json
from proxy.trace.told import to_data
from rules.forwarding import Family
from tests.fakes.held import HELD
from tests.unit.test_flows import LIVE
from tests.unit.test_trace import AFTER, BEFORE, Traced, told

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "data" / "explain" / "cluster.yaml"
OPTIONS = ("--proxy-mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16")


def documented(verb: str) -> set[str]:
    """The fields in the left column of a verb's table."""
    text = (ROOT / "docs" / "json.md").read_text()
    [section] = re.findall(rf"^## {verb}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


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


def explained(capsys: pytest.CaptureFixture[str]) -> set[str]:
    cli.main(["explain", "default/web", "-f", str(CLUSTER), *OPTIONS, "-o", "json"])
    return fields(json.loads(capsys.readouterr().out), "answers")


def test_explain(capsys):
    assert documented("explain") == explained(capsys)


def test_doctor(capsys):
    cli.main(["doctor", "-f", str(CLUSTER), *OPTIONS, "-o", "json"])
    assert documented("doctor") == fields(json.loads(capsys.readouterr().out), "findings")


def test_conntrack():
    report = flows.Report("the agent", [flows.Found(Family.IPV4, "a/b", LIVE, stale=False)], deleted=0)
    out = io.StringIO()
    flows.show(report, "json", out)
    assert documented("conntrack") == fields(json.loads(out.getvalue()), "flows")


def test_trace():
    assert documented("trace") == fields(to_data(told(Traced(before=BEFORE, after=AFTER, arrived=True))))


def test_dump():
    assert documented("dump") == fields({"tables": [to_json(Shown("nftables", HELD))]}, "tables", "routes")
