"""`sluice doctor`: what it finds, how bad that is, the order, the exit codes."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import agent_socket, cli
from proxy.agent_socket import AgentError, NoAgentError
from proxy.config.load import load as configure
from proxy.config.settings import Settings
from proxy.doctor import verb as doctor
from proxy.doctor.finding import WORST_FIRST, Finding
from proxy.doctor.findings import Known, findings, lines
from proxy.explain import obstacles
from proxy.explain.evidence import Cluster
from proxy.explain.gather import Means
from proxy.explain.passing import Condition, ForeignRule
from proxy.explain.surroundings import HOOKS, ForeignChain, Hook, Surroundings
from proxy.offline import standing_of
from proxy.render import render_on
from proxy.report import Contested, Followed, SourceReport, Trouble, Unserved
from proxy.sources.manifest_loading import load
from proxy.verify import Verified
from rules.dataplane import UnavailableError
from rules.diff import compare
from rules.forwarding import (
    Family,
    ForwardingTable,
    Kind,
    NodeFacts,
    Prefix,
    Refusal,
    Route,
    parse_address,
    parse_prefix,
)
from tests.builders import at, backends, endpoint, endpoint_slice, service, view
from tests.fakes.held import HELD, NODE, means
from tests.unit.test_status import HEALTHY, with_syncs

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "data" / "explain" / "cluster.yaml"
IN_ORDER = Known(tables={Family.IPV4: HELD}, surroundings=NODE, status=HEALTHY)


def kinds(known: Known) -> dict[str, str]:
    """The severities by kind."""
    return {each.kind: each.severity for each in findings(known)}


def only(known: Known) -> Finding:
    [found] = findings(known)
    return found


def around(**changes: Any) -> Known:
    return msgspec.structs.replace(IN_ORDER, surroundings=msgspec.structs.replace(NODE, **changes))


def agent(**changes: Any) -> Known:
    return msgspec.structs.replace(IN_ORDER, status=msgspec.structs.replace(HEALTHY, **changes))


def holding(frontend: str, route: Route, **facts: Any) -> Known:
    table = ForwardingTable(family=Family.IPV4, node=NodeFacts(**facts), routes={at(frontend): route})
    return msgspec.structs.replace(IN_ORDER, tables={Family.IPV4: table})


def test_a_healthy_node_is_one_line():
    assert findings(IN_ORDER) == ()
    assert list(lines((), IN_ORDER)) == ["nothing is wrong: 2 frontends looked at"]


def test_without_objects_a_policy_local_is_told_from_no_endpoints_at_all():
    away = Route(
        kind=Kind.NODE_PORT,
        backends=backends("10.244.2.11"),
        local_backends=frozenset(),
        refusal=Refusal.DROP,
        label="default/away:http",
    )
    known = msgspec.structs.replace(holding("*:30003", away), cluster=None)
    assert (only(known).kind, only(known).severity) == ("policy-local", "note")
    assert "by the rules no endpoint that can serve is on this node" in only(known).what


def test_what_writes_its_rules_needs_no_other_check():
    assert doctor.in_doubt(HEALTHY) == {}
    failing = with_syncs(failures=2)
    assert set(doctor.in_doubt(failing).values()) == {each.dataplane for each in failing.families}


def test_stale_flows_are_told_by_service():
    known = msgspec.structs.replace(IN_ORDER, stale={"default/dns:dns": 3, "": 1})
    service, node = findings(known)[::-1]
    assert (service.subject, service.kind, service.severity) == ("Service default/dns", "stale-flows", "warning")
    assert service.what.startswith("3 flows go to endpoints that serve no longer")
    assert service.next == "sluice conntrack --stale --service default/dns:dns"
    assert (node.subject, node.next) == ("node", "sluice conntrack --stale")


# --- the node --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "severity", "command"),
    [
        ({"forwarding": {Family.IPV4: False}}, "ip-forward", "critical", "sysctl -w net.ipv4.ip_forward=1"),
        ({"conntrack": (1000, 1000)}, "conntrack-full", "critical", "sysctl net.netfilter.nf_conntrack_max"),
        ({"conntrack": (960, 1000)}, "conntrack-full", "warning", "sysctl net.netfilter.nf_conntrack_max"),
        ({"strict_rp_filter": ("eth0",)}, "rp-filter", "note", "sysctl -a -r 'ipv4.conf..*.rp_filter'"),
        ({"ipvs": True}, "other-proxy", "warning", "sluice cleanup --of kube-proxy"),
        ({"legacy_tables": ("filter",)}, "legacy-forward", "note", "iptables-legacy -S FORWARD"),
        (
            {"chains": (ForeignChain("ip", "filter", "FORWARD", forwards=True, drops=True),)},
            "forward-drop",
            "warning",
            "nft list chain ip filter FORWARD",
        ),
        (
            {"chains": (ForeignChain("ip", "filter", "FORWARD", forwards=True, drops=True, legacy=True),)},
            "forward-drop",
            "warning",
            "iptables-legacy -t filter -S FORWARD",
        ),
    ],
)
def test_what_stands_in_the_way_on_the_node(changes, kind, severity, command):
    found = only(around(**changes))
    assert (found.subject, found.kind, found.severity, found.next) == ("node", kind, severity, command)


def test_what_a_family_without_frontends_lacks_is_nobodys_trouble():
    assert findings(around(forwarding={Family.IPV4: True, Family.IPV6: False})) == ()


def test_a_node_that_relays_needs_no_forwarding():
    table = ForwardingTable(family=Family.IPV4, node=NodeFacts(relayed=True), routes=HELD.routes)
    known = around(forwarding={Family.IPV4: False})
    assert kinds(known) == {"ip-forward": "critical"}
    assert kinds(msgspec.structs.replace(known, tables={Family.IPV4: table})) == {}


def test_node_ports_on_loopback_need_route_localnet():
    route = Route(kind=Kind.NODE_PORT, backends=backends("10.0.0.1"), label="ns/svc:")
    known = holding("*:30001", route, loopback_node_ports=True)
    closed = msgspec.structs.replace(NODE, route_localnet=False)
    assert kinds(msgspec.structs.replace(known, surroundings=closed)) == {"route-localnet": "critical"}
    assert kinds(known) == {}


def test_drift_is_summed_up_and_names_the_command():
    drift = compare(HELD, ForwardingTable(family=Family.IPV4))
    assert drift
    found = only(msgspec.structs.replace(IN_ORDER, verified=(Verified("nftables", drift, 2),)))
    assert (found.kind, found.subject, found.severity) == ("drift", "IPv4 in nftables", "error")
    assert found.next == "sluice verify"
    same = compare(HELD, HELD)
    assert findings(msgspec.structs.replace(IN_ORDER, verified=(Verified("nftables", same, 2),))) == ()


def test_node_port_addresses_that_cover_nothing():
    route = Route(kind=Kind.NODE_PORT, backends=backends("10.0.0.1"), label="ns/svc:")
    assert only(holding("*:30001", route, node_port_addresses=frozenset())).kind == "node-port-address"
    own = frozenset([parse_address("192.168.0.2")])
    assert findings(holding("*:30001", route, node_port_addresses=own)) == ()
    inside = Route(kind=Kind.CLUSTER_IP, backends=backends("10.0.0.1"), label="ns/svc:")
    assert findings(holding("10.96.0.1:80", inside, node_port_addresses=frozenset())) == ()


# --- the agent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "severity"),
    [
        ({"failures": 3, "error": "no"}, "sync-fails", "critical"),
        ({"count": 0}, "not-written", "error"),
        ({"drift_left": 2}, "drift-left", "error"),
        ({"refused": ("ns/svc:http",)}, "refused", "error"),
    ],
)
def test_syncs_that_do_not_do_what_they_should(changes, kind, severity):
    found = only(msgspec.structs.replace(IN_ORDER, status=with_syncs(**changes)))
    assert (found.kind, found.severity) == (kind, severity)


def test_what_the_kernel_refuses_is_the_services_own_trouble():
    found = only(msgspec.structs.replace(IN_ORDER, status=with_syncs(refused=("ns/svc:http",))))
    assert (found.subject, found.next) == ("Service ns/svc", "sluice explain ns/svc:http")


def test_a_late_sync():
    late = msgspec.structs.replace(HEALTHY.families[0], healthy=False)
    assert kinds(agent(families=(late,))) == {"sync-late": "error"}


def test_an_agent_that_has_listed_nothing():
    assert kinds(agent(synced=False)) == {"not-synced": "critical"}


@pytest.mark.parametrize(
    ("lag", "error", "expected"),
    [
        (4.0, "", {}),
        (4.0, "refused", {"source-error": "warning"}),
        (301.0, "", {"source-behind": "error"}),
        (None, "refused", {"source-behind": "error"}),
    ],
)
def test_a_source_that_is_left_behind(lag, error, expected):
    followed = Followed(what="services", state="watching", lag=lag, error=error)
    assert kinds(agent(source=SourceReport(description="", followed=(followed,)))) == expected


def test_a_family_that_is_not_served_matters_to_who_has_addresses_of_it():
    known = agent(unserved=(Unserved(family="IPv6", reason="IPv6 is disabled"),))
    assert kinds(known) == {"family-unserved": "note"}
    dual = service(cluster_ip=["172.30.0.41", "fd00::41"])
    cluster = Cluster(view=view(), services={dual.key: dual})
    assert kinds(msgspec.structs.replace(known, cluster=cluster)) == {"family-unserved": "error"}


def test_troubles_and_conflicts_of_the_agents():
    known = agent(
        troubles=(Trouble(origin="service", subject="Service ns/bad", reason="spec.clusterIP: no"),),
        contested=(Contested(frontend="10.0.0.9:80/TCP", winner="ns/old", losers=("ns/new",)),),
    )
    assert kinds(known) == {"trouble": "warning", "conflict": "error"}
    conflict = next(each for each in findings(known) if each.kind == "conflict")
    assert conflict.subject == "Service ns/new"
    assert "ns/old has it" in conflict.what


# --- Services --------------------------------------------------------------------------------------------------------


def of_service(condition: str, *, name: str = "", **spec: Any) -> Known:
    """A Service with one endpoint elsewhere, in a condition, and its route."""
    from proxy.compute import compute  # noqa: PLC0415  # one helper alone needs it

    owner = service(**spec)
    slices = (endpoint_slice([endpoint("10.0.1.1", condition=condition)], ports=[{"name": name, "port": 80}]),)
    outcome = compute(owner, slices, view(), Family.IPV4)
    table = ForwardingTable(family=Family.IPV4, node=NodeFacts(), routes=dict(outcome.routes))
    cluster = Cluster(view=view(), services={owner.key: owner}, slices={owner.key: slices})
    return msgspec.structs.replace(IN_ORDER, tables={Family.IPV4: table}, cluster=cluster)


def test_no_endpoint_that_can_serve_and_why():
    assert findings(of_service("R")) == ()
    found = only(of_service("N"))
    assert (found.subject, found.kind, found.severity) == ("Service ns/svc", "none-ready", "error")
    assert "it is not ready" in found.what


def test_a_target_port_name_that_no_slice_has():
    found = only(of_service("R", name="metrics"))
    assert found.kind == "no-such-port"
    assert "'metrics' (TCP)" in found.what


def test_no_pod_here_matters_inside_and_is_usual_outside():
    inside = of_service("R", internalTrafficPolicy="Local")
    assert kinds(inside) == {"policy-local": "warning"}
    outside = of_service("R", type="LoadBalancer", externalTrafficPolicy="Local", vips=["203.0.113.5"])
    assert kinds(outside) == {"policy-local": "note"}


@pytest.mark.parametrize(
    ("ranges", "somebody"),
    [
        (("0.0.0.0/32",), False),
        (("127.0.0.0/8", "203.0.113.5/32"), False),
        (("0.0.0.0/32", "198.51.100.0/24"), True),
        (("10.0.0.0/8",), True),
    ],
)
def test_source_ranges_that_admit_nobody(ranges, somebody):
    parsed: tuple[Prefix, ...] = tuple(map(parse_prefix, ranges))
    route = Route(kind=Kind.LOAD_BALANCER, backends=backends("10.0.0.1"), source_ranges=parsed, label="ns/svc:")
    expected = {} if somebody else {"source-ranges-nobody": "error"}
    assert kinds(holding("203.0.113.5:80", route)) == expected


def test_the_worst_comes_first():
    known = msgspec.structs.replace(
        around(forwarding={Family.IPV4: False}, strict_rp_filter=("eth0",), ipvs=True),
        problems=("Service a/b: bad",),
        verified=(Verified("nftables", compare(HELD, ForwardingTable(family=Family.IPV4)), 2),),
    )
    severities = [WORST_FIRST.index(each.severity) for each in findings(known)]
    assert severities == sorted(severities)
    assert set(severities) == {0, 1, 2, 3}


# --- the verb --------------------------------------------------------------------------------------------------------


def with_status(monkeypatch: pytest.MonkeyPatch, error: AgentError) -> None:
    def status(_run_directory: str) -> Any:
        raise error

    monkeypatch.setattr(agent_socket, "status", status)


def test_without_an_agent_the_kernel_is_looked_at_all_the_same(monkeypatch):
    with_status(monkeypatch, NoAgentError("no agent answers"))
    out = io.StringIO()
    node = msgspec.structs.replace(NODE, ipvs=True)
    assert doctor.main(Settings(), "", "json", out=out, means=means(node)) == 1
    found = json.loads(out.getvalue())
    assert found["healthy"] is False
    assert [each["kind"] for each in found["findings"]] == ["agent-absent", "other-proxy"]


def test_an_agent_that_may_not_be_asked_is_there_and_need_not_be_started(monkeypatch, capsys):
    with_status(monkeypatch, AgentError("the agent's socket /run/sluice/agent.sock is for root alone"))
    out = io.StringIO()
    assert doctor.main(Settings(), "", "json", out=out, means=means()) == 2
    found = json.loads(out.getvalue())
    assert (found["findings"], found["healthy"]) == ([], False)
    assert found["unread"] == ["the agent: the agent's socket /run/sluice/agent.sock is for root alone"]
    assert "sluice run" not in capsys.readouterr().err


def test_what_a_stranger_writes_forges_no_line(monkeypatch):
    known = agent(troubles=(Trouble(origin="service", subject="Service a/b", reason="bad\ncritical node: no\x1b[2J"),))
    monkeypatch.setattr(doctor, "from_agent", lambda *_: known)
    out = io.StringIO()
    assert doctor.main(Settings(), "", "text", out=out, means=means()) == 1
    assert len(out.getvalue().splitlines()) == 1
    assert "\x1b" not in out.getvalue()


def test_a_kernel_that_cannot_be_read_is_code_2(monkeypatch, capsys):
    with_status(monkeypatch, NoAgentError("no agent answers"))

    def refused(_name: str, _family: Family) -> Any:
        raise UnavailableError("nftables needs the capability CAP_NET_ADMIN: run sluice as root")

    out = io.StringIO()
    assert doctor.main(Settings(), "", "text", out=out, means=Means(refused, lambda *_: Surroundings())) == 2
    assert "CAP_NET_ADMIN" in capsys.readouterr().err
    assert "nothing is wrong" not in out.getvalue()


def test_manifests_that_are_not_there_are_code_2(capsys):
    assert cli.main(["doctor", "-f", "/nonexistent"]) == 2
    assert "/nonexistent" in capsys.readouterr().err


def test_how_manifests_are_meant_needs_manifests(capsys):
    assert cli.main(["doctor", "--cluster-cidr=10.0.0.0/8"]) == 2
    assert "it needs -f" in capsys.readouterr().err


def test_of_manifests_every_sick_service_is_named_and_no_other(capsys):
    options = ("--proxy-mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16")
    cli.main(["doctor", "-o", "json", "-f", str(CLUSTER), *options])
    found = json.loads(capsys.readouterr().out)["findings"]
    by_service = {(each["subject"].partition("/")[2], each["kind"]) for each in found if "/" in each["subject"]}
    assert by_service >= {
        ("nobody", "no-slices"),
        ("forgotten", "no-slices"),
        ("misnamed", "no-such-port"),
        ("portless", "no-such-port"),
        ("starting", "none-ready"),
        ("scaled-down", "empty-slices"),
        ("handmade", "no-slices-of-family"),
        ("away", "policy-local"),
        ("sick-here", "policy-local"),
    }
    assert not {name for name, _ in by_service} & {"web", "zonal", "guarded", "headless", "elsewhere"}


# --- all that explain knows ------------------------------------------------------------------------------------------

NEEDS_A_PACKET = {
    "source-ranges": "whom ranges shut out depends on the client; ranges that admit nobody are source-ranges-nobody",
    "loopback": "who may use a loopback address depends on the client",
    "closed-port": "nobody but a client asks for a port that no Service has",
    "no-node-port": "the same for node ports",
    "no-service": "the same for addresses",
    "node-port-protocol": "the same",
    "node-port-elsewhere": "the same for another node's address",
    "endpoint": "the same for a pod's own address",
    "load-balancer-proxy": "nodes are meant to leave such addresses alone",
    "external-ips-off": "the same",
    "flows": "no cause but a hint: stale flows themselves are found as stale-flows",
    "trace": "no cause but a hint",
    "backend": "no cause but a hint: whether a pod listens, only a connection to it shows",
}
"""Likely causes that nobody can find without a packet, and why."""


def causes_that_explain_knows() -> set[str]:
    """By the source: every `Cause(kind=...)`, and for each hook the kinds of obstacles."""
    found = set()
    for file in (ROOT / "proxy" / "explain").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Cause":
                kinds = [each.value for each in node.keywords if each.arg == "kind"]
                found |= {str(each.value) for each in kinds if isinstance(each, ast.Constant)}
    of_obstacles = {f"{hook}-{what}" for hook in HOOKS for what in ("drop", "rule", "rule-perhaps")}
    return {kind for kind in found | of_obstacles if " " not in kind}


def filters(hook: Hook, *rules: ForeignRule, drops: bool = False, priority: int = 0) -> dict[str, Any]:
    """A chain of others at a hook, with these rules."""
    base = ForeignChain("ip", "filter", hook.upper(), forwards=False, drops=drops, rules=rules)
    return {"chains": (base._replace(hook=hook, priority=priority),)}


def on_the_node(**fields: Any) -> Known:
    """A node that one of the backends runs on, with its address."""
    sick = around(**fields)
    assert sick.surroundings is not None
    addresses = sick.surroundings.addresses | {parse_address("10.244.1.11")}
    return msgspec.structs.replace(sick, surroundings=msgspec.structs.replace(sick.surroundings, addresses=addresses))


def forwards(*rules: ForeignRule, drops: bool = False) -> dict[str, Any]:
    """A chain FORWARD of others with these rules."""
    return {"chains": (ForeignChain("ip", "filter", "FORWARD", forwards=True, drops=drops, rules=rules),)}


TO_ONE = (Condition("destination", ("10.244.1.11/32",)),)
TO_EITHER = (Condition("destination", ("10.244.0.0/16", "10.96.0.41/32")),)
"""To backends, or to the frontend where that is seen."""
SICK = {
    "no-slices": lambda: of_manifests("nobody"),
    "empty-slices": lambda: of_manifests("scaled-down"),
    "no-slices-of-family": lambda: of_manifests("handmade"),
    "no-such-port": lambda: of_service("R", name="metrics"),
    "none-ready": lambda: of_service("N"),
    "policy-local": lambda: of_manifests("away"),
    "no-endpoints": lambda: msgspec.structs.replace(
        holding("10.96.0.1:80", Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="ns/svc:")), cluster=None
    ),
    "node-port-address": lambda: holding(
        "*:30001",
        Route(kind=Kind.NODE_PORT, backends=backends("10.0.0.1"), label="ns/svc:"),
        node_port_addresses=frozenset(),
    ),
    "no-rules": lambda: Known(surroundings=NODE, absent="no agent answers"),
    "drift": lambda: msgspec.structs.replace(
        IN_ORDER, verified=(Verified("nftables", compare(HELD, ForwardingTable(family=Family.IPV4)), 2),)
    ),
    "conflict": lambda: agent(contested=(Contested(frontend="10.0.0.9:80/TCP", winner="ns/a", losers=("ns/b",)),)),
    "other-proxy": lambda: around(ipvs=True),
    "conntrack-full": lambda: around(conntrack=(1000, 1000)),
    "route-localnet": lambda: msgspec.structs.replace(
        holding(
            "*:30001",
            Route(kind=Kind.NODE_PORT, backends=backends("10.0.0.1"), label="ns/svc:"),
            loopback_node_ports=True,
        ),
        surroundings=msgspec.structs.replace(NODE, route_localnet=False),
    ),
    "ip-forward": lambda: around(forwarding={Family.IPV4: False}),
    "legacy-forward": lambda: around(legacy_tables=("filter",)),
    "rp-filter": lambda: around(strict_rp_filter=("eth0",)),
    "no-route": lambda: around(unreachable={parse_address("10.244.1.11"): "there is no route"}),
    "damage": lambda: Known(
        tables={Family.IPV4: msgspec.structs.replace(HELD, damage=frozenset({"x"}))}, surroundings=NODE, absent="none"
    ),
    "no-listener": lambda: on_the_node(listening=frozenset({("TCP", 22), ("UDP", 80)})),
    "forward-drop": lambda: around(**forwards(drops=True)),
    "forward-rule": lambda: around(**forwards(ForeignRule(5, "drop", TO_ONE))),
    "forward-rule-perhaps": lambda: around(**forwards(ForeignRule(5, "drop", (Condition("other", ("mark",)),)))),
    **{
        f"{hook}-{kind}": lambda hook=hook, rules=rules, drops=drops: on_the_node(**filters(hook, *rules, drops=drops))  # type: ignore[misc]
        for hook in HOOKS
        if hook != "forward"
        for kind, rules, drops in (
            ("drop", (), True),
            ("rule", (ForeignRule(5, "drop", TO_EITHER),), False),
            ("rule-perhaps", (ForeignRule(5, "drop", (Condition("other", ("mark",)),)),), False),
        )
    },
}
"""For each likely cause a node, or its Services, that have it."""


def of_manifests(name: str) -> Known:
    """A Service of the manifests of tests/data/explain, on node1."""
    loaded = load(CLUSTER)
    settings = configure(
        [("proxy-mode", "nftables"), ("hostname-override", "node1"), ("cluster-cidr", "10.244.0.0/16")]
    ).settings
    loaded = msgspec.structs.replace(loaded, services=tuple(each for each in loaded.services if each.key.name == name))
    standing = standing_of(loaded, settings, "node1", {})
    tables = {table.family: table for table in render_on(standing, loaded.services).tables}
    services = {each.key: each for each in loaded.services}
    cluster = Cluster(view=standing.view, services=services, slices=standing.slices)
    return Known(tables=tables, cluster=cluster, status=HEALTHY, surroundings=NODE)


@pytest.mark.parametrize("kind", sorted(causes_that_explain_knows()))
def test_every_likely_cause_of_explain_is_found_or_takes_a_packet(kind):
    if kind in NEEDS_A_PACKET:
        assert kind not in SICK
        return
    assert kind in kinds(SICK[kind]())


def test_a_rule_of_others_names_the_services_that_it_concerns():
    found = only(SICK["forward-rule"]())
    assert (found.severity, found.subject) == ("error", "Service default/web")
    assert found.what == (
        "rule 5 of the chain FORWARD in the table ip filter drops what goes to 10.244.1.11:80 "
        "(destination 10.244.1.11/32)"
    )
    assert found.next == "nft -a list chain ip filter FORWARD"
    every = only(around(**forwards(ForeignRule(5, "reject"))))
    assert (every.severity, every.subject) == ("critical", "node")
    assert every.what.endswith(
        "refuses what goes to 10.244.1.11:80, 10.244.2.11:80 (whatever comes), for Service default/web"
    )


@pytest.mark.parametrize(
    ("hook", "severity", "subject", "what"),
    [
        ("prerouting", "critical", "node", "what goes to 10.244.1.11:80, 10.244.2.11:80, as"),
        # To the node's own programs comes what is for the backend with its address, and to no other.
        ("input", "error", "Service default/web", "what goes to 10.244.1.11:80, as"),
        ("output", "error", "Service default/web", "what goes to 10.244.1.11:80, 10.244.2.11:80 from the node itself"),
    ],
)
def test_policies_elsewhere_concern_what_comes_there(hook, severity, subject, what):
    found = only(on_the_node(**filters(hook, drops=True)))
    assert (found.kind, found.severity, found.subject) == (f"{hook}-drop", severity, subject)
    assert what in found.what
    assert "as `-m conntrack --ctstate DNAT,ESTABLISHED -j ACCEPT` would" in found.what


@pytest.mark.parametrize(("facts", "severity"), [({"relayed": True}, "critical"), ({"bound": True}, "critical")])
def test_what_goes_through_services_comes_to_input_where_nothing_is_translated(facts, severity):
    """In modes userspace and ipvs: with the frontend's address, and no mark of translation."""
    held = msgspec.structs.replace(HELD, node=NodeFacts(**facts))
    known = msgspec.structs.replace(around(**filters("input", drops=True)), tables={Family.IPV4: held})
    found = only(known)
    assert (found.kind, found.severity) == ("input-drop", severity)
    assert "10.96.0.41:80" in found.what
    assert "as `-p tcp --dport 80 -j ACCEPT` would" in found.what
    accepting = ForeignRule(4, "accept", (Condition("translated"),))
    [still] = findings(
        msgspec.structs.replace(known, surroundings=around(**filters("input", accepting, drops=True)).surroundings)
    )
    assert still.kind == "input-drop"


def test_before_destination_nat_rules_are_about_frontends():
    to_frontend = Condition("destination", ("10.96.0.41/32",))
    early = filters("prerouting", ForeignRule(5, "drop", (to_frontend,)), priority=-300)
    found = only(around(**early))
    assert (found.kind, found.severity) == ("prerouting-rule", "error")
    assert "drops what goes to 10.96.0.41:80" in found.what
    assert findings(around(**filters("prerouting", ForeignRule(5, "drop", (to_frontend,))))) == ()


def test_rules_that_accept_services_are_no_trouble():
    accepting = ForeignRule(4, "accept", (Condition("translated"),))
    assert findings(around(**forwards(accepting, ForeignRule(5, "drop"), drops=True))) == ()
    assert findings(around(**forwards(ForeignRule(4, "drop", (Condition("state", ("invalid",)),))))) == ()


def test_a_backend_that_is_the_node_itself_needs_a_process_that_listens():
    found = only(SICK["no-listener"]())
    assert (found.severity, found.subject) == ("error", "Service default/web")
    assert found.what == "no process of this node listens at 10.244.1.11:80/TCP, which is the node itself (hostNetwork)"
    assert found.next == "ss -lntp 'sport = :80'"
    assert findings(on_the_node(listening=frozenset({("TCP", 80)}))) == ()
    assert findings(on_the_node(listening=frozenset())) == ()  # nobody could say


def test_a_node_port_at_which_a_process_waits():
    found = only(around(listening=frozenset({("TCP", 30001), ("TCP", 22)})))
    assert (found.kind, found.severity, found.subject) == ("node-port-listener", "warning", "Service default/web")
    assert found.next == "ss -lntp 'sport = :30001'"


def test_trf_22_a_kube_proxy_that_listens_at_every_node_port_reserves_them_and_is_no_stranger():
    """It did before it gave that up."""
    two = msgspec.structs.replace(HELD, routes={**HELD.routes, at("*:30002"): HELD.routes[at("*:30001")]})
    for listening, expected in (((30001, 30002), {"agent-absent"}), ((30001,), {"agent-absent", "node-port-listener"})):
        node = msgspec.structs.replace(NODE, listening=frozenset(("TCP", port) for port in listening))
        known = Known(tables={Family.IPV4: two}, surroundings=node, absent="no agent answers", carrier="kube-proxy")
        assert set(kinds(known)) == expected
        assert "node-port-listener" in kinds(msgspec.structs.replace(known, carrier=""))


@pytest.mark.parametrize("carrier", ["", "kube-proxy"])
def test_without_an_agent_damage_is_told_by_the_rules_themselves(carrier):
    """Beside one it is drift."""
    damaged = msgspec.structs.replace(HELD, damage=frozenset({"chain masquerade-marked lacks its rule 1"}))
    known = Known(tables={Family.IPV4: damaged}, surroundings=NODE, absent="no agent answers", carrier=carrier)
    [found] = [each for each in findings(known) if each.kind == "damage"]
    assert (found.severity, found.subject) == ("error", "IPv4")
    assert found.what.endswith("are damaged: chain masquerade-marked lacks its rule 1")
    assert found.next == ("sluice dump --of kube-proxy" if carrier else "sluice dump")
    assert "damage" not in kinds(msgspec.structs.replace(known, absent="", status=HEALTHY))


def test_next_to_another_proxy_no_agent_is_needed():
    known = Known(tables={Family.IPV4: HELD}, surroundings=NODE, absent="no agent answers", carrier="kube-proxy")
    assert kinds(known) == {"agent-absent": "note"}


def many(services: int) -> ForwardingTable:
    """As many Services, with a backend each."""
    routes = {
        at(f"10.96.{n >> 8}.{n & 255}:80"): Route(
            kind=Kind.CLUSTER_IP, backends=backends(f"10.244.{n >> 8}.{n & 255}"), label=f"ns/s{n}:"
        )
        for n in range(services)
    }
    return ForwardingTable(family=Family.IPV4, routes=routes)


def test_of_many_backends_the_one_that_a_rule_is_about_is_found():
    rules = [ForeignRule(n, "drop", (Condition("destination", (f"10.9.{n >> 8}.{n & 255}/32",)),)) for n in range(500)]
    rules.append(ForeignRule(501, "drop", (Condition("destination", ("10.244.19.0/32",)), Condition("port", ("80",)))))
    found = findings(msgspec.structs.replace(around(**forwards(*rules)), tables={Family.IPV4: many(5000)}))
    assert [(each.kind, each.subject) for each in found] == [("forward-rule", f"Service ns/s{19 << 8}")]


def test_what_many_rules_do_with_many_backends_is_bounded_and_said(monkeypatch):
    monkeypatch.setattr(obstacles, "_MOST_MET", 5000)
    rules = [
        ForeignRule(n, "drop", (Condition("destination", (f"10.244.0.{n}/32",)), Condition("other", ("mark",))))
        for n in range(100)
    ]
    found = findings(msgspec.structs.replace(around(**forwards(*rules)), tables={Family.IPV4: many(1000)}))
    assert {each.kind for each in found} == {"forward-rule-perhaps", "not-looked-at"}
    told = {each.kind: each.what for each in found}
    assert "11 rules in the table ip filter" in told["forward-rule-perhaps"]
    assert "89 of 1000 backends" in told["not-looked-at"]


def test_a_policy_of_drop_shuts_out_what_mode_iptables_does_not_masquerade():
    """IPT-15: node ports are masqueraded mostly, ClusterIPs are not; so it is no trouble of all connections."""
    ours = ForeignChain("ip", "filter", "SLUICE-FORWARD", forwards=False, drops=False, rules=())
    base = forwards(ForeignRule(1, "jump", target="SLUICE-FORWARD"), drops=True)["chains"]
    found = only(around(chains=(*base, ours)))
    assert (found.kind, found.severity, found.subject) == ("forward-drop", "error", "Service default/web")
    assert "as `-m conntrack --ctstate DNAT,ESTABLISHED -j ACCEPT` would" in found.what
    everybody = msgspec.structs.replace(HELD, node=NodeFacts(masquerade_all=True))
    known = msgspec.structs.replace(around(chains=(*base, ours)), tables={Family.IPV4: everybody})
    assert only(known).severity == "warning"


def test_with_ipvs_answers_alone_are_forwarded():
    bound = msgspec.structs.replace(HELD, node=NodeFacts(bound=True))
    sick = around(**forwards(ForeignRule(5, "drop")))
    assert kinds(sick) == {"forward-rule": "critical"}
    assert kinds(msgspec.structs.replace(sick, tables={Family.IPV4: bound})) == {}
    dropping = msgspec.structs.replace(around(**forwards(drops=True)), tables={Family.IPV4: bound})
    assert kinds(dropping) == {"forward-drop": "warning"}
