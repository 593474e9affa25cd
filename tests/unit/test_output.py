"""Tables for people and programs; render, dump and cleanup on top of it."""

from __future__ import annotations

import io
import json
import re

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy import cleanup, dump, render
from proxy.config.load import load
from proxy.config.settings import Settings
from proxy.dump import Filter
from proxy.lock import HeldError
from proxy.output import Shown, facts_lines, table_rows, to_json, write
from proxy.sources.manifest_loading import loads
from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import (
    Family,
    ForwardingTable,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    NodeFacts,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from tests import strategies
from tests.builders import at, backends

TABLE = ForwardingTable(
    family=Family.IPV4,
    node=NodeFacts(
        detector=SourcePrefix(parse_prefix("10.244.0.0/16")),
        node_port_addresses=frozenset([parse_address("192.168.0.1")]),
        service_cidrs=(parse_prefix("10.96.0.0/12"),),
    ),
    routes={
        at("10.96.0.2:80"): Route(
            kind=Kind.CLUSTER_IP,
            backends=backends("10.0.0.10", "10.0.0.9", "10.0.0.2", "10.0.0.1"),
            affinity=60,
            label="b/web:http",
        ),
        at("1.2.3.4:80"): Route(
            kind=Kind.LOAD_BALANCER,
            backends=backends("10.0.0.1"),
            local_backends=frozenset(),
            refusal=Refusal.DROP,
            source_ranges=(parse_prefix("192.0.2.0/24"),),
            label="b/web:http",
        ),
        at("10.96.0.1:443"): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="a/api:https"),
        at("10.96.0.3:1"): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT),
    },
)


NEAR = "10.0.0.1:80, 10.0.0.2:80, 10.0.0.9:80"
LOCAL_NOTES = "from outside: none; without backend: dropped; only from 192.0.2.0/24"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(*shown, format_="table", out=None):
    out = out or io.StringIO()
    write(shown, format_, out)
    return out.getvalue()


def test_text_is_aligned_and_sorted():
    head, rows = printed(Shown("nftables", TABLE)).split("SERVICE", 1)
    assert (
        head
        == """\
IPv4 in nftables: 4 frontends
  mark            0x4000
  local pods      sources in 10.244.0.0/16
  node ports on   192.168.0.1
  service CIDRs   10.96.0.0/12: unallocated addresses are dropped
  closed ports    of a ClusterIP are rejected
"""
    )
    heading, *lines = f"SERVICE{rows}".splitlines()
    starts = [heading.index(word) for word in heading.split()]
    cells = [
        [line[start:end].rstrip() for start, end in zip(starts, [*starts[1:], None], strict=True)] for line in lines
    ]
    assert cells == [
        ["a/api:https", "ClusterIP", "10.96.0.1:443/TCP", "-", "none", "without backend: rejected"],
        ["b/web:http", "ClusterIP", "10.96.0.2:80/TCP", "-", f"{NEAR} +1 more", "affinity 60s"],
        ["b/web:http", "LoadBalancer", "1.2.3.4:80/TCP", "Local", "10.0.0.1:80", LOCAL_NOTES],
        ["-", "ClusterIP", "10.96.0.3:1/TCP", "-", "none", "without backend: rejected"],
    ]
    assert not any(line.endswith(" ") for line in lines)


def test_wide_shows_every_backend():
    assert "10.0.0.1:80, 10.0.0.2:80, 10.0.0.9:80, 10.0.0.10:80" in printed(Shown("", TABLE), format_="wide")


def test_a_terminal_gets_colour_and_the_same_words():
    pytest.importorskip("rich")
    out = Terminal()
    text = printed(Shown("nftables", TABLE), out=out)
    assert "\x1b[" in text
    for word in ("b/web:http", "10.96.0.2:80/TCP", "affinity 60s", "sources in 10.244.0.0/16"):
        assert word in text


@pytest.mark.parametrize("columns", ["20", "60", "100"])
def test_no_name_and_no_address_is_broken_however_narrow_a_terminal_is(columns, monkeypatch):
    """They are copied from there."""
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", columns)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(Shown("nftables", TABLE), out=Terminal()))
    for word in ("b/web:http", "LoadBalancer", "10.96.0.2:80/TCP", "10.0.0.1:80,", "10.0.0.9:80", "192.0.2.0/24"):
        assert word in text
    assert "  service CIDRs   10.96.0.0/12: unallocated addresses are dropped\n" in text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colour_gets_none(name, value, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv(name, value)
    text = printed(Shown("nftables", TABLE), out=Terminal())
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)
    assert "b/web:http" in text


def test_damage_is_shown():
    table = msgspec.structs.replace(TABLE, damage=frozenset(["rule 3 is missing"]))
    assert "DAMAGE          rule 3 is missing" in printed(Shown("", table))
    assert "rule 3 is missing" in printed(Shown("", table), out=Terminal())
    assert to_json(Shown("", table))["damage"] == ["rule 3 is missing"]


def test_json_is_stable_and_has_addresses_as_text():
    value = json.loads(printed(Shown("nftables", TABLE), format_="json"))
    (table,) = value["tables"]
    assert table["dataplane"] == "nftables"
    assert table["node"] == {
        "mark": 0x4000,
        "masqueradeAll": False,
        "detector": {"sourcePrefix": "10.244.0.0/16"},
        "nodePortAddresses": ["192.168.0.1"],
        "loopbackNodePorts": False,
        "rejectClosedPorts": True,
        "serviceCIDRs": ["10.96.0.0/12"],
        "healthCheckPorts": [],
    }
    assert table["routes"][2] == {
        "service": "b/web:http",
        "kind": "LoadBalancer",
        "address": "1.2.3.4",
        "protocol": "TCP",
        "port": 80,
        "policy": "Local",
        "backends": ["10.0.0.1:80"],
        "localBackends": [],
        "refusal": "drop",
        "affinitySeconds": 0,
        "sourceRanges": ["192.0.2.0/24"],
        "scheduler": None,
        "proxyProtocol": False,
        "masquerade": "the node",
    }


def test_how_a_backend_is_chosen_and_told_its_client_is_shown():
    [(frontend, route)] = [(each, route) for each, route in TABLE.routes.items() if str(each) == "1.2.3.4:80/TCP"]
    route = msgspec.structs.replace(route, scheduler="least-connections", proxy_protocol=True)
    table = msgspec.structs.replace(TABLE, routes={frontend: route})
    assert "scheduler least-connections; PROXY protocol" in printed(Shown("", table))
    [shown] = to_json(Shown("", table))["routes"]
    assert (shown["scheduler"], shown["proxyProtocol"]) == ("least-connections", True)


def test_yaml_says_the_same_as_json():
    assert yaml.safe_load(printed(Shown("n", TABLE), format_="yaml")) == json.loads(
        printed(Shown("n", TABLE), format_="json")
    )


@given(st.sampled_from(Family).flatmap(strategies.tables), st.text(max_size=8))
def test_every_table_is_yaml_that_says_the_same(table, label):
    routes = {frontend: msgspec.structs.replace(route, label=label) for frontend, route in table.routes.items()}
    for each in (table, msgspec.structs.replace(table, routes=routes)):
        assert yaml.safe_load(printed(Shown("", each), format_="yaml")) == {"tables": [to_json(Shown("", each))]}


def test_wide_says_whose_source_is_rewritten():
    lines = printed(Shown("", TABLE), format_="wide").splitlines()
    assert [line.rpartition("masqueraded: ")[2] for line in lines if "masqueraded" in line] == [
        "who is no local pod",
        "the node",
    ]


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        (None, "not told apart"),
        (InputInterface("cni0"), "what comes in by cni0"),
        (InputInterfacePrefix("veth"), "what comes in by veth*"),
    ],
)
def test_detectors_have_words(detector, words):
    table = ForwardingTable(family=Family.IPV4, node=NodeFacts(detector=detector))
    assert any(words in line for line in facts_lines(table))


@given(st.sampled_from(Family).flatmap(strategies.tables))
def test_equal_tables_print_alike_and_different_ones_do_not(table):
    def shuffled(routes):
        return dict(reversed(routes.items()))

    again = msgspec.structs.replace(table, routes=shuffled(table.routes))
    assert to_json(Shown("", table)) == to_json(Shown("", again))
    assert len(table_rows(table)) == len(table.routes)
    for frontend in table.routes:
        fewer = {each: route for each, route in table.routes.items() if each != frontend}
        assert to_json(Shown("", msgspec.structs.replace(table, routes=fewer))) != to_json(Shown("", table))
    json.dumps(to_json(Shown("", table)))
    printed(Shown("", table))


# --- render ----------------------------------------------------------------------------------------------------

MANIFEST = b"""
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  externalTrafficPolicy: Local
  healthCheckNodePort: 30999
  ports: [{port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 192.0.2.7}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
- {addresses: [10.244.1.5], nodeName: node1}
- {addresses: [10.244.2.5], nodeName: node2}
---
apiVersion: v1
kind: Node
metadata: {name: node1}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: Hostname, address: node1}]}
"""
OTHER_NODE = MANIFEST + b"---\napiVersion: v1\nkind: Node\nmetadata: {name: node2}\n"


def rendered(manifest, settings=None, hostname="laptop"):
    return render.render(loads("m.yaml", manifest), settings or Settings(), hostname)


def test_render_computes_for_the_only_node():
    result = rendered(MANIFEST, load([("proxy-mode", "nftables")]).settings)
    table = result.tables[0]
    assert result.problems == ()
    assert table.routes[at("192.0.2.7:80")].local_backends == backends("10.244.1.5", port=8080)
    assert table.node.node_port_addresses == {parse_address("192.168.0.1")}
    assert result.tables[1].routes == {}


def test_render_wants_to_know_which_node_of_several():
    result = rendered(OTHER_NODE)
    assert result.problems == ("no Node is called laptop: choose one of node1, node2 with --hostname-override",)
    assert result.tables[0].routes[at("192.0.2.7:80")].local_backends == frozenset()
    chosen = rendered(OTHER_NODE, Settings(hostname_override="node2"))
    assert chosen.problems == ()
    assert chosen.tables[0].routes[at("192.0.2.7:80")].local_backends == backends("10.244.2.5", port=8080)
    assert rendered(OTHER_NODE, hostname="node1").problems == ()


def test_render_tells_who_loses_a_contested_frontend():
    rival = b"---\n" + MANIFEST.partition(b"---")[0].replace(b"name: web", b"name: rival").replace(b".10", b".11")
    result = rendered(MANIFEST + rival)
    assert any("192.0.2.7:80/TCP is claimed by several Services: shop/rival has it" in each for each in result.problems)


def test_render_prints_and_names_what_it_left_out(tmp_path, capsys):
    path = tmp_path / "m.yaml"
    path.write_bytes(MANIFEST + b"---\napiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {ports: 5}\n")
    assert render.main(Settings(), str(path), "json") == 0
    out, err = capsys.readouterr()
    assert [table["family"] for table in json.loads(out)["tables"]] == ["IPv4", "IPv6"]
    assert "bad" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"a: b: c", None])
def test_render_of_nothing_usable_fails(tmp_path, capsys, content):
    path = tmp_path / "m.yaml"
    if content is not None:
        path.write_bytes(content)
    assert render.main(Settings(), str(path), "table") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "m.yaml" in err


# --- dump and cleanup ------------------------------------------------------------------------------------------


class FakeDataplane:
    """A dataplane that holds a table, or fails."""

    def __init__(self, held):
        self.held = held
        self.closed = False

    def read(self):
        if isinstance(self.held, Exception):
            raise self.held
        return self.held

    def cleanup(self):
        return self.read() is not None

    def close(self):
        self.closed = True


class FakeLock:
    """The lock of the agent, as far as this process is concerned."""

    def release(self):
        pass


def opener(held):
    """What opens dataplanes: nftables holds `held`, by family; all that were opened are in its `opened`."""

    def open_dataplane(name, family):
        found = FakeDataplane(held.get(family) if name == "nftables" else None)
        if isinstance(found.held, UnavailableError):
            raise found.held
        open_dataplane.opened.append(found)
        return found

    open_dataplane.opened = []
    return open_dataplane


def test_dump_prints_what_every_family_holds(capsys):
    source = opener({Family.IPV4: TABLE})
    assert dump.main("json", Filter(), open_dataplane=source) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert (table["dataplane"], len(table["routes"])) == ("nftables", 4)
    assert all(each.closed for each in source.opened)


@pytest.mark.parametrize(
    ("wanted", "frontends"),
    [
        (Filter(namespace="b"), {"1.2.3.4", "10.96.0.2"}),
        (Filter(service="web"), {"1.2.3.4", "10.96.0.2"}),
        (Filter(service="a/api"), {"10.96.0.1"}),
        (Filter(service="a/api:https"), {"10.96.0.1"}),
        (Filter(namespace="a", service="web"), set()),
        (Filter(address=parse_address("10.0.0.9")), {"10.96.0.2"}),
        (Filter(address=parse_address("10.96.0.3")), {"10.96.0.3"}),
        (Filter(port=443), {"10.96.0.1"}),
    ],
)
def test_dump_filters(capsys, wanted, frontends):
    code = dump.main("json", wanted, open_dataplane=opener({Family.IPV4: TABLE}))
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert {route["address"] for route in table["routes"]} == frontends
    assert code == (0 if frontends else 1)


def test_dump_says_that_there_is_nothing(capsys):
    assert dump.main("table", Filter(), open_dataplane=opener({})) == 0
    assert "nothing of sluice" in capsys.readouterr().err


def test_dump_says_what_is_missing_once(capsys):
    missing = UnavailableError("needs root (CAP_NET_ADMIN)")
    assert dump.main("table", Filter(), open_dataplane=opener(dict.fromkeys(Family, missing))) == 2
    assert capsys.readouterr().err == "sluice dump: needs root (CAP_NET_ADMIN)\n"


def test_dump_shows_one_family_though_the_other_fails(capsys):
    source = opener({Family.IPV4: TABLE, Family.IPV6: DataplaneError("broken")})
    assert dump.main("table", Filter(), open_dataplane=source) == 2
    out, err = capsys.readouterr()
    assert "b/web:http" in out
    assert err == "sluice dump: broken\n"
    assert all(each.closed for each in source.opened)


def test_cfg_52_cleanup_says_what_was_removed(capsys):
    source = opener({Family.IPV6: ForwardingTable(family=Family.IPV6)})
    assert cleanup.main(open_dataplane=source, take_lock=FakeLock) == 0
    assert capsys.readouterr().out == "removed what nftables held for IPv6\n"
    assert all(each.closed for each in source.opened)
    assert cleanup.main(open_dataplane=opener({}), take_lock=FakeLock) == 0
    assert capsys.readouterr().out == "nothing of sluice was there\n"


def test_cfg_52_cleanup_goes_on_after_a_failure(capsys):
    source = opener({Family.IPV4: DataplaneError("busy"), Family.IPV6: ForwardingTable(family=Family.IPV6)})
    assert cleanup.main(open_dataplane=source, take_lock=FakeLock) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("removed what nftables held for IPv6\n", "sluice cleanup: busy\n")


def test_cleanup_leaves_a_running_agent_alone(capsys):
    def held():
        raise HeldError("another sluice runs in this network namespace (process 7)")

    source = opener({Family.IPV4: TABLE})
    assert cleanup.main(open_dataplane=source, take_lock=held) == 2
    assert source.opened == []
    assert "(process 7): stop it first" in capsys.readouterr().err
