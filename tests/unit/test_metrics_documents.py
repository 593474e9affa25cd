"""docs/metrics.md and the dashboard in deploy/grafana name the metrics that there are, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from proxy.serving.metrics import Metrics
from rules.dataplane import Applied
from rules.forwarding import Family

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text()
MODES = ("nftables", "iptables", "ipvs", "userspace")
OF_PROMETHEUS = {"up"}
_WORDS = {"sum", "max", "by", "le", "rate", "increase", "histogram_quantile", "time", "or", "m", "h"}


def served(mode):
    """The types of all metrics of a mode, by name."""
    metrics = Metrics(mode, "1")
    metrics.started(Family.IPV4)
    metrics.sync_done(Family.IPV4, 0.1, Applied(full=True, rules={"nat": 1}))
    text = metrics.exposition().decode()
    return dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE "))


def series():
    """Every name that a query may use."""
    names = set(OF_PROMETHEUS)
    for mode in MODES:
        for name, kind in served(mode).items():
            names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


def used(query):
    """The metrics that a query names."""
    bare = re.sub(r'"[^"]*"', '""', query)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without)\s*\([^)]*\)", " ", bare)
    return {word for word in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare) if word not in _WORDS}


def queries(value):
    """Every query in a dashboard."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "expr":
                yield each
            elif key == "definition":
                yield re.sub(r"label_values\((.*), \w+\)", r"\1", each)
            else:
                yield from queries(each)
    elif isinstance(value, list):
        for each in value:
            yield from queries(each)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_expression_of_the_dashboard_is_about_metrics_that_exist(path):
    found = list(queries(json.loads(path.read_text())))
    assert len(found) > 20
    for query in found:
        assert used(query), query
        assert used(query) <= series(), query


def test_a_metric_that_does_not_exist_would_be_noticed():
    assert not used("sum(rate(sluice_no_such_total[5m]))") <= series()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_of_the_dashboard_stand_beside_each_other(path):
    taken = set()
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_document_lists_every_metric_with_its_type_and_no_others():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", DOCUMENT, re.MULTILINE))
    there = {name: kind for mode in MODES for name, kind in served(mode).items() if not name.startswith("process_")}
    assert rows == there


def test_the_document_tells_the_modes_of_each_metric():
    for name, modes in re.findall(r"^\| `(kubeproxy_\w+)` \|[^|]*\|[^|]*\| ([a-z, ]+) \|", DOCUMENT, re.MULTILINE):
        expected = {mode for mode in MODES if name in served(mode)}
        assert (set(MODES) if modes == "all" else set(modes.split(", "))) == expected, name


def test_the_alerts_of_the_document_are_about_metrics_that_exist():
    [block] = re.findall(r"```promql\n(.*?)```", DOCUMENT, re.DOTALL)
    found = [line for line in block.splitlines() if not line.startswith("#")]
    assert len(found) == 4
    for query in found:
        assert used(query) <= series(), query
