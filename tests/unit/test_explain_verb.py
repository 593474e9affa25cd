"""`sluice explain` as a command: questions and options, what it says of the node, JSON, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from proxy import cli
from proxy.agent_socket import AgentError, NoAgentError
from proxy.config.settings import Settings
from proxy.explain import gather, verb
from proxy.explain.agent import Known
from proxy.explain.answer import answer
from proxy.explain.asked import AskedAddress, AskedService, Client, parse_asked, parse_client
from proxy.explain.data import to_data
from proxy.explain.evidence import Cluster, Evidence, of_this_node
from proxy.explain.gather import Means, Where
from proxy.explain.routing import Way
from proxy.explain.surroundings import ForeignChain, Surroundings
from proxy.explain.text import lines
from proxy.logs import get_logger
from proxy.objects import Key
from proxy.sources import manifest_loading as sources
from rules.dataplane import UnavailableError
from rules.explanation import Origin
from rules.forwarding import (
    Family,
    ForwardingTable,
    InputInterface,
    Kind,
    NodeFacts,
    Protocol,
    Route,
    parse_address,
)
from tests import strategies
from tests.builders import at, backends, networks, view
from tests.fakes.held import HELD, NODE, means

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "data" / "explain" / "cluster.yaml"
OPTIONS = ("--proxy-mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16")


def live(capsys, target: str, client: str = "", *, node: Surroundings = NODE) -> tuple[int, dict[str, Any]]:
    """The exit code, and the only answer."""
    where = Where(live=True, run_directory="/nonexistent")
    code = verb.main(target, client, where, Settings(), as_json=True, means=means(node))
    [found] = json.loads(capsys.readouterr().out)["answers"]
    return code, found


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("10.96.0.1:443", AskedAddress(parse_address("10.96.0.1"), 443, Protocol.TCP)),
        ("10.96.0.1:53/udp", AskedAddress(parse_address("10.96.0.1"), 53, Protocol.UDP)),
        ("[fd00::1]:53/SCTP", AskedAddress(parse_address("fd00::1"), 53, Protocol.SCTP)),
        ("010.96.000.1:80", AskedAddress(parse_address("10.96.0.1"), 80, Protocol.TCP)),
        ("default/web", AskedService(Key("default", "web"), "")),
        ("kube-system/kube-dns:dns-tcp", AskedService(Key("kube-system", "kube-dns"), "dns-tcp")),
        ("default/web:80", AskedService(Key("default", "web"), "80")),
        ("10/web", AskedService(Key("10", "web"), "")),
        ("web", AskedService(Key("default", "web"), "")),
        ("web:http", AskedService(Key("default", "web"), "http")),
        ("svc/web", AskedService(Key("default", "web"), "")),
        ("service/web:80", AskedService(Key("default", "web"), "80")),
        ("shop/services/web:http", AskedService(Key("shop", "web"), "http")),
        ("svc/svc/web", AskedService(Key("svc", "web"), "")),  # a namespace may have that name
    ],
)
def test_questions(text, asked):
    assert parse_asked(text) == asked


@pytest.mark.parametrize(
    "text",
    ["", "svc/", "10.96.0.1", "10.96.0.1:0", "10.96.0.1:65536", "10.96.0.1:80/ICMP", "10.96.0:80", "a/b/c", "A/b"],
)
def test_what_is_no_question_is_usage(text, capsys):
    with pytest.raises(ValueError, match=r".+"):
        parse_asked(text)
    assert cli.main(["explain", "-f", str(CLUSTER), "--", text]) == 2
    assert capsys.readouterr().err.startswith("sluice explain: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.96.0.1", "'10.96.0.1' has no port: 10.96.0.1:80, or 10.96.0.1:53/UDP"),
        ("fd00::1", "'fd00::1' has no port: [fd00::1]:80"),
        ("[fd00::1]", "has no port: [fd00::1]:80"),
        ("10.96.0.1:http", "with a port's name ask about the Service"),
        ("Shop/web", "no capital letters"),
        ("10.96.0.0/16", "neither ADDRESS:PORT"),
    ],
)
def test_what_is_nearly_a_question_is_told_how_to_be_one(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_asked(text)


def test_a_namespace_is_for_services_that_are_named_without_one(capsys):
    for arguments in (["-n", "default", "svc/zonal"], ["-n", "nowhere", "default/zonal"], ["zonal"]):
        assert cli.main(["explain", *arguments, "-f", str(CLUSTER), *OPTIONS]) == 0
    assert cli.main(["explain", "-n", "nowhere", "zonal", "-f", str(CLUSTER), *OPTIONS]) == 1
    assert "There is no Service nowhere/zonal; there is default/zonal." in capsys.readouterr().out


def test_of_a_service_that_is_not_there_the_nearest_are_named(capsys):
    for name, near in (("default/wbe", "default/web"), ("kube-system/web", "default/web")):
        verb.main(name, "", Where(live=True, run_directory="/nonexistent"), Settings(), means=means())
        assert f"nothing is labelled {name}; there is {near}." in capsys.readouterr().out


@given(st.text(max_size=40) | st.from_regex(r"(svc/|a/)?(svc/)?[a-c/:]{1,4}", fullmatch=True))
def test_no_question_ends_in_anything_but_an_error(text):
    try:
        asked = parse_asked(text)
    except ValueError:
        return
    assert parse_asked(str(asked)) == asked


@pytest.mark.parametrize(
    ("text", "client"),
    [
        ("", Client()),
        ("pod", Client(origin=Origin.LOCAL_POD)),
        ("node", Client(origin=Origin.NODE)),
        ("outside", Client(origin=Origin.ELSEWHERE)),
        ("10.244.1.11", Client(address=parse_address("10.244.1.11"))),
        ("[fd00::1]", Client(address=parse_address("fd00::1"))),
    ],
)
def test_clients(text, client):
    assert parse_client(text) == client


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["10.96.0.41:80", "--from=somebody", "-f", str(CLUSTER)], "'somebody' is neither an address nor"),
        (["10.96.0.41:80", "--from=fd00::1", "-f", str(CLUSTER)], "--from is IPv6"),
        (["10.96.0.41:80", "--node-addresses=1.2.3.4", "--live"], "--node-addresses are for manifests"),
        (["10.96.0.41:80", "--cluster-cidr=10.0.0.0/8"], "--cluster-cidr says how manifests are meant: it needs -f"),
        (["10.96.0.41:80", "-f", "/nonexistent"], "/nonexistent"),
        (["10.96.0.41:80", "--node-addresses=x", "-f", str(CLUSTER)], "'x' is no IP address"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, part, capsys):
    assert cli.main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert part in captured.err


@pytest.mark.parametrize("verb", [["explain", "10.96.0.41:80"], ["verify"], ["doctor"]])
def test_what_sources_log_is_no_part_of_the_answer(verb, monkeypatch, capsys):
    """A program reads standard output, and nobody asked when something was listed."""
    load, before = sources.load, structlog.get_config()

    def logged(path: str) -> Any:
        log = get_logger("sluice.sources")
        log.info("listed", objects=21)
        log.warning("odd", object="a/b")
        return load(path)

    monkeypatch.setattr(sources, "load", logged)
    cli.main([*verb, "-f", str(CLUSTER), *OPTIONS, "-o", "json"])
    captured = capsys.readouterr()
    assert not captured.out or json.loads(captured.out)
    assert ("listed" in captured.err, "odd" in captured.err) == (False, True)
    assert structlog.get_config() == before


def test_a_kernel_that_cannot_be_read_is_code_2_and_names_the_other_way(capsys):
    def refused(_name: str, _family: Family) -> Any:
        raise UnavailableError("nftables needs the capability CAP_NET_ADMIN: run sluice as root")

    where = Where(run_directory="/nonexistent")
    assert verb.main("10.96.0.41:80", "", where, Settings(), means=Means(refused, lambda *_: NODE)) == 2
    error = capsys.readouterr().err
    assert "CAP_NET_ADMIN" in error
    assert "-f FILE" in error


def test_answers_from_manifests_load_no_netlink_and_live_ones_no_asyncio():
    told = ("pyroute2", "aiohttp", "asyncinotify", "rules.nftables", "asyncio")
    code = (
        "import sys; from proxy.cli import main; main(sys.argv[1:]);"
        f"sys.exit(str([each for each in {told} if each in sys.modules]))"
    )
    command = [sys.executable, "-c", code, "explain", "10.96.0.41:80"]
    ended = subprocess.run([*command, "-f", str(CLUSTER)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "pyroute2" not in ended.stderr
    assert "rules.nftables" not in ended.stderr
    assert "asyncinotify" not in ended.stderr
    ended = subprocess.run(
        [*command, "--live", "--run-directory=/nonexistent"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.stderr.splitlines()[-1] == "['rules.nftables']"


# --- the node --------------------------------------------------------------------------------------------------------


def node(**changes: Any) -> Surroundings:
    return msgspec.structs.replace(NODE, **changes)


FORWARD = ForeignChain("ip", "filter", "FORWARD", forwards=True, drops=True)
OTHERS = ForeignChain("ip", "nat", "KUBE-SVC-X", forwards=False, drops=False)
ACCEPTS = ForeignChain("ip", "filter", "SLUICE-FORWARD", forwards=False, drops=False)


@pytest.mark.parametrize(
    ("around", "kind", "code"),
    [
        (node(forwarding={Family.IPV4: False}), "ip-forward", 1),
        (node(chains=(FORWARD,)), "forward-drop", 0),
        (node(chains=(FORWARD._replace(family="inet", table="mine"),)), "forward-drop", 0),
        (node(chains=(FORWARD._replace(legacy=True),)), "forward-drop", 0),
        (node(legacy_tables=("filter", "nat")), "legacy-forward", 0),
        (node(strict_rp_filter=("eth0",)), "rp-filter", 0),
        (node(conntrack=(960, 1000)), "conntrack-full", 0),
        (node(conntrack=(1000, 1000)), "conntrack-full", 1),
        (node(ipvs=True), "other-proxy", 0),
        (node(chains=(ForeignChain("ip", "kube-proxy", "services", forwards=False, drops=False),)), "other-proxy", 0),
        (node(chains=(OTHERS,)), "other-proxy", 0),
        (node(chains=(OTHERS._replace(legacy=True),)), "other-proxy", 0),
    ],
)
def test_what_stands_in_the_way_beside_our_rules(around, kind, code, capsys):
    found, answered = live(capsys, "10.96.0.41:80", "10.244.1.12", node=around)
    assert [cause["kind"] for cause in answered["causes"]] == [kind]
    assert (found, answered["works"]) == (code, code == 0)
    assert all(cause["next"] for cause in answered["causes"])


@pytest.mark.parametrize(
    "around",
    [
        NODE,
        node(chains=(FORWARD._replace(drops=False),)),
        node(chains=(FORWARD._replace(family="ip6"),)),
        node(chains=(FORWARD._replace(family="ip", name="INPUT", forwards=False),)),
        node(chains=(ForeignChain("ip", "filter", "KUBE-FIREWALL", forwards=False, drops=False),)),
        node(chains=(FORWARD, ACCEPTS)),
        node(chains=(FORWARD._replace(legacy=True), ACCEPTS._replace(legacy=True))),
        node(forwarding={Family.IPV6: False}),
        node(legacy_tables=("nat",)),
    ],
)
def test_what_is_in_nobodys_way(around, capsys):
    code, answered = live(capsys, "10.96.0.41:80", "10.244.1.12", node=around)
    assert (code, answered["causes"]) == (0, [])


def test_what_the_node_sends_itself_is_not_forwarded(capsys):
    around = node(forwarding={Family.IPV4: False}, chains=(FORWARD,), strict_rp_filter=("eth0",))
    code, answered = live(capsys, "10.96.0.41:80", "node", node=around)
    assert (code, answered["causes"], answered["packet"]["source"]) == (0, [], "192.168.0.2")


def test_of_a_named_service_the_node_has_the_source_of_the_way_to_each_frontend(capsys):
    """As it has where the frontend is asked about by its address: source ranges may hang on it."""
    balancer = parse_address("203.0.113.9")
    route = Route(
        kind=Kind.LOAD_BALANCER,
        backends=backends("10.244.1.11"),
        label="default/lb",
        source_ranges=networks("10.9.0.0/16"),
    )
    table = msgspec.structs.replace(HELD, routes={at("203.0.113.9:80"): route})
    own = parse_address("10.9.0.1")

    def look(*addresses: bytes) -> Surroundings:
        ways = {each: Way("eth1", own) for each in addresses if each == balancer}
        return node(addresses=NODE.addresses | {own}, ways=ways)

    by = Means(means(table=table).open_dataplane, look)
    for target in ("203.0.113.9:80", "default/lb"):
        where = Where(live=True, run_directory="/nonexistent")
        assert verb.main(target, "node", where, Settings(), as_json=True, means=by) == 0
        [found] = json.loads(capsys.readouterr().out)["answers"]
        assert found["packet"]["source"] == "10.9.0.1"
    verb.main("default/lb", "", Where(live=True, run_directory="/nonexistent"), Settings(), means=by)
    assert "From the node itself, a connection goes to 10.244.1.11:80" in capsys.readouterr().out


def test_where_addresses_of_services_are_the_nodes_own_it_connects_from_the_one_it_connects_to(capsys):
    """In modes ipvs and userspace; it is no outsider for that."""
    for facts in ({"relayed": True}, {"bound": True}):
        table = msgspec.structs.replace(HELD, node=msgspec.structs.replace(HELD.node, **facts))
        address = parse_address("10.96.0.41")
        around = node(ways={address: Way("lo", address)})
        where = Where(live=True, run_directory="/nonexistent")
        verb.main("10.96.0.41:80", "node", where, Settings(), as_json=True, means=means(around, table))
        [found] = json.loads(capsys.readouterr().out)["answers"]
        assert (found["origin"], found["packet"]["source"]) == ("node", "10.96.0.41")


def test_by_damaged_rules_nothing_works_for_sure(capsys):
    """Whether anybody knows what is wanted, or not."""
    damaged = msgspec.structs.replace(HELD, damage=frozenset({"chain masquerade-marked lacks its rule 1"}))
    where = Where(live=True, run_directory="/nonexistent")
    assert verb.main("10.96.0.41:80", "pod", where, Settings(), means=means(table=damaged)) == 0
    said = capsys.readouterr().out
    assert "    ! chain masquerade-marked lacks its rule 1" in said
    assert "By these rules it works: the connection goes to one of 2 backends" in said
    assert "the kernel's rules are damaged" in said


def test_loopback_is_the_nodes_own_and_asked_about_from_the_node_alone(capsys):
    code, answered = live(capsys, "127.0.0.1:30001")
    assert (code, answered["origin"], answered["others"]) == (1, "node", [])


@pytest.mark.parametrize(
    ("target", "kind", "said"),
    [
        ("10.244.1.11:80", "endpoint", "10.244.1.11:80 is an endpoint of default/web:http"),
        ("10.244.1.11:81", "endpoint", "10.244.1.11 is an endpoint of default/web:http"),
        (
            "192.168.0.9:30001",
            "node-port-elsewhere",
            "30001/TCP is a node port of default/web:http, and 192.168.0.9 is no",
        ),
        ("192.168.0.2:30001/UDP", "node-port-protocol", "the node port 30001 is for TCP only"),
        ("192.168.0.2:30009", "no-node-port", "no Service has the node port 30009/TCP"),
        ("192.168.0.9:30009", "no-service", "no Service has the address 192.168.0.9"),
    ],
)
def test_where_no_service_answers_it_is_said_what_the_address_is(target, kind, said, capsys):
    code, answered = live(capsys, target)
    [cause] = answered["causes"]
    assert (code, cause["kind"]) == (1, kind)
    assert said in cause["words"]
    assert cause["next"]


BALANCED = """
apiVersion: v1
kind: Service
metadata: {name: balanced, namespace: default}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.60
  externalIPs: [192.0.2.60]
  ports: [{port: 80}]
status: {loadBalancer: {ingress: INGRESS}}
"""


@pytest.mark.parametrize(
    ("ingress", "said"),
    [
        (
            "[{ip: 203.0.113.60, ipMode: Proxy}]",
            "no frontend at 203.0.113.60: its load balancer has that address with ipMode Proxy",
        ),
        ("[{hostname: lb.example.org}]", "which has a host name alone"),
        ("[]", "is of type LoadBalancer and has no address of one"),
        ("[{ip: 203.0.113.60}]", ""),
    ],
)
def test_svc_9_addresses_at_which_nodes_do_not_answer_are_told_beside_the_frontends(ingress, said, tmp_path, capsys):
    file = tmp_path / "balanced.yaml"
    file.write_text(BALANCED.replace("INGRESS", ingress))
    cli.main(["explain", "default/balanced", "-f", str(file), *OPTIONS])
    error = capsys.readouterr().err
    assert said in error if said else not error


def test_an_address_that_a_service_names_and_nodes_leave_alone_is_no_strangers(tmp_path, capsys):
    file = tmp_path / "balanced.yaml"
    file.write_text(BALANCED.replace("INGRESS", "[{ip: 203.0.113.60, ipMode: Proxy}]"))
    gate = "--feature-gates=AllowServiceExternalIPs=false"
    for target, more, kind in (
        ("203.0.113.60:80", (), "load-balancer-proxy"),
        ("192.0.2.60:80", (gate,), "external-ips-off"),
    ):
        assert cli.main(["explain", target, "-f", str(file), "-o", "json", *OPTIONS, *more]) == 1
        [answered] = json.loads(capsys.readouterr().out)["answers"]
        assert [each["kind"] for each in answered["causes"]] == [kind]
        assert "Service default/balanced" in answered["causes"][0]["words"]


def test_loopback_node_ports_need_route_localnet(capsys):
    facts = msgspec.structs.replace(HELD.node, loopback_node_ports=True)
    table = msgspec.structs.replace(HELD, node=facts)
    for setting, expected in ((False, 1), (True, 0)):
        where = Where(live=True, run_directory="/nonexistent")
        around = node(route_localnet=setting)
        assert verb.main("127.0.0.1:30001", "node", where, Settings(), means=means(around, table)) == expected
        assert ("route_localnet" in capsys.readouterr().out) is not setting


def test_trf_10_the_interface_of_a_client_is_that_of_the_way_back(capsys):
    table = msgspec.structs.replace(HELD, node=NodeFacts(detector=InputInterface("cni0")))
    client = parse_address("10.244.1.12")
    for interface, origin in (("cni0", "pod"), ("eth0", "outside")):
        around = node(ways={client: Way(interface, None)})
        where = Where(live=True, run_directory="/nonexistent")
        verb.main("10.96.0.41:80", "10.244.1.12", where, Settings(), as_json=True, means=means(around, table))
        [found] = json.loads(capsys.readouterr().out)["answers"]
        assert found["origin"] == origin


@pytest.mark.parametrize(("interface", "origin"), [("", "pod"), ("eth0", "outside"), ("pod-p1", "pod")])
def test_trf_10_from_manifests_pods_of_the_node_are_taken_to_come_in_by_its_interface(interface, origin, capsys):
    options = ["--proxy-mode=nftables", "--hostname-override=node1", "--detect-local-mode=InterfaceNamePrefix"]
    options += ["--pod-interface-name-prefix=pod-", f"--interface={interface}", "-o", "json"]
    cli.main(["explain", "10.96.0.41:80", "--from=10.244.1.11", "-f", str(CLUSTER), *options])
    assert json.loads(capsys.readouterr().out)["answers"][0]["origin"] == origin


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_a_contract(capsys):
    """Fields may be added; these never go."""
    assert cli.main(["explain", "10.96.0.41:80", "-o", "json", "-f", str(CLUSTER), *OPTIONS]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data.keys() >= {"version", "asked", "source", "works", "answers", "missing", "problems"}
    assert (data["version"], data["asked"], data["source"]) == (1, "10.96.0.41:80/TCP", "manifests")
    [found] = data["answers"]
    assert found["outcome"] == {
        "is": "reaches",
        "backends": [
            {"backend": "10.244.1.11:8080", "probability": 0.5, "masqueraded": False, "node": "node1"},
            {"backend": "10.244.2.11:8080", "probability": 0.5, "masqueraded": False, "node": "node2"},
        ],
        "affinitySeconds": 10800,
    }
    assert found["unused"][0] == {
        "endpoint": "10.244.2.12:8080",
        "node": "node2",
        "slice": "web-1",
        "words": "it is not ready",
        "clause": "SEL-15",
    }
    assert found["steps"][0] == {
        "kind": "frontend",
        "words": "10.96.0.41:80/TCP is the ClusterIP of default/web:http",
        "clause": "TRF-12",
        "frontend": "10.96.0.41:80/TCP",
        "service": "default/web:http",
    }
    assert [(each["origin"], each["outcome"]["is"]) for each in found["others"]] == [
        ("node", "reaches"),
        ("outside", "reaches"),
    ]


def test_a_client_of_another_family_has_nowhere_to_go(capsys):
    assert cli.main(["explain", "default/web", "--from=fd00::1", "-f", str(CLUSTER), *OPTIONS]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "default/web has no frontend of IPv6, which --from is of."


def test_works_in_json_is_the_exit_code(capsys):
    for target, code in (("default/web", 0), ("default/away", 1), ("default/nothing", 1), ("10.96.0.44:80", 1)):
        assert cli.main(["explain", target, "-o", "json", "-f", str(CLUSTER), *OPTIONS]) == code
        assert json.loads(capsys.readouterr().out)["works"] is (code == 0)


def test_standard_input_is_a_file_too():
    command = [sys.executable, "-m", "proxy", "explain", "default/web:http", "-f", "-", *OPTIONS]
    with CLUSTER.open() as file:
        ended = subprocess.run(command, cwd=ROOT, stdin=file, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (
        0,
        "According to standard input, as node node1 would have it:",
    )


# --- whatever the evidence -------------------------------------------------------------------------------------------


@given(st.data())
def test_every_table_has_answers_in_words_and_in_json(data):
    family = data.draw(st.sampled_from(list(Family)))
    table = data.draw(strategies.tables(family))
    evidence: Evidence = of_this_node({family: table}, NODE)
    ports = sorted({frontend.port for frontend in table.routes} | {80})
    addresses = sorted({frontend.address for frontend in table.routes if frontend.address} | NODE.addresses)
    asked = data.draw(
        st.one_of(
            st.builds(
                AskedAddress, st.sampled_from(addresses), st.sampled_from(ports), st.sampled_from(list(Protocol))
            ),
            st.builds(AskedService, st.just(Key("default", "web")), st.sampled_from(["", "http", "80"])),
        )
    )
    client = data.draw(st.builds(Client, st.none(), st.none() | st.sampled_from(list(Origin))))
    answers = answer(asked, client, evidence)
    assert list(lines(answers))
    assert json.loads(json.dumps(to_data(answers)))["works"] is (verb.exit_code(answers) == 0)


# --- the agent, and the kernel beside it -----------------------------------------------------------------------------


@pytest.fixture
def agent(monkeypatch):
    """Stands in for the agent's socket; what is put there is what the agent knows."""
    known: list[Known | AgentError] = []

    def ask(*_: object) -> Known:
        if isinstance(known[0], AgentError):
            raise known[0]
        return known[0]

    monkeypatch.setattr(gather, "ask", ask)
    return known


WANTED = Cluster(view=view(), wanted={Family.IPV4: HELD})


def ask_agent(capsys, *, table: ForwardingTable | None = HELD, **where: Any) -> tuple[int, dict[str, Any]]:
    code = verb.main("10.96.0.41:80", "", Where(**where), Settings(), as_json=True, means=means(NODE, table))
    return code, json.loads(capsys.readouterr().out)


def test_the_agents_table_comes_first_and_agrees_with_the_kernel(agent, capsys):
    agent.append(Known(WANTED, here=True, pending=False))
    code, data = ask_agent(capsys)
    assert (code, data["source"], data["problems"]) == (0, "agent", [])
    assert data["answers"][0]["disagreements"] == []


def test_what_is_wanted_and_not_held_does_not_work(agent, capsys):
    agent.append(Known(WANTED, here=True, pending=False))
    held = msgspec.structs.replace(HELD, routes={})
    code, data = ask_agent(capsys, table=held)
    [found] = data["answers"]
    assert (code, data["source"], found["outcome"]["is"]) == (1, "agent", "reaches")
    assert found["disagreements"] == ["10.96.0.41:80/TCP is wanted, and the kernel does not have it"]
    assert [(cause["kind"], cause["certain"]) for cause in found["causes"]] == [("drift", True)]
    code, data = ask_agent(capsys, table=held, live=True)
    assert (code, data["source"], data["answers"][0]["outcome"]["is"]) == (1, "kernel", "untouched")
    assert [cause["kind"] for cause in data["answers"][0]["causes"]] == ["drift"]
    assert data["answers"][0]["disagreements"]


def test_a_difference_that_still_works_is_told_and_works(agent, capsys):
    agent.append(Known(WANTED, here=True, pending=True))
    route = msgspec.structs.replace(HELD.routes[at("10.96.0.41:80")], backends=backends("10.244.1.11"))
    code, data = ask_agent(capsys, table=msgspec.structs.replace(HELD, routes={at("10.96.0.41:80"): route}))
    [found] = data["answers"]
    assert code == 0
    assert found["disagreements"] == ["10.96.0.41:80/TCP: backend: wanted 10.244.2.11:80, the kernel has none"]
    assert [(cause["kind"], cause["certain"]) for cause in found["causes"]] == [("drift", False)]
    assert data["problems"] == ["the agent is about to write changes: where it differs from the kernel, ask again"]


@pytest.mark.parametrize(("live", "source"), [(False, "agent"), (True, "kernel")])
def test_an_agent_of_another_namespace_is_not_compared(agent, capsys, live, source):
    agent.append(Known(WANTED, here=False, pending=False))
    _, data = ask_agent(capsys, table=msgspec.structs.replace(HELD, routes={}), live=live)
    assert (data["source"], data["answers"][0]["disagreements"]) == (source, [])
    assert "another network namespace" in data["problems"][0]


@pytest.mark.parametrize(
    ("error", "problems"),
    [
        (NoAgentError("no agent answers"), []),
        (AgentError("the agent does not answer"), ["the agent does not answer: the kernel alone is explained"]),
    ],
)
def test_without_an_answer_of_the_agent_it_is_the_kernel(agent, capsys, error, problems):
    agent.append(error)
    code, data = ask_agent(capsys)
    assert (code, data["source"], data["problems"]) == (0, "kernel", problems)


def test_an_agent_whose_kernel_cannot_be_read_is_explained_alone(agent, capsys):
    agent.append(Known(WANTED, here=True, pending=False))

    def refused(_name: str, _family: Family) -> Any:
        raise UnavailableError("run sluice as root")

    code = verb.main("10.96.0.41:80", "", Where(), Settings(), as_json=True, means=Means(refused, lambda *_: NODE))
    data = json.loads(capsys.readouterr().out)
    assert (code, data["source"]) == (0, "agent")
    assert "run sluice as root" in data["problems"][0]
