"""What is wrong in kube-proxy's rules is told, and what is right beside it is read all the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from rules.foreign.detect import readings
from rules.foreign.gathering import ForeignError, Reading
from rules.forwarding import Backend, Endpoint, Frontend, Protocol, Refusal, SourcePrefix, parse_address
from tests.builders import networks

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
OLDER = RECORDING.parent / "kube-proxy-older"
"""Written by hand, after the layouts of versions before 1.24 (iptables) and 1.34 (nftables)."""
IPTABLES, NFTABLES = "iptables.iptables-save", "nftables.nft"


def read(name: str, *edits: tuple[str, str]) -> Reading:
    """The IPv4 rules of a recording with edits by regular expressions, each of which must hit something."""
    text = (RECORDING / name).read_text()
    for pattern, replacement in edits:
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count, pattern
    return next(iter(readings(text.encode())))


class Edit(NamedTuple):
    """A change of the rules, and a part of the sentence that tells it."""

    file: str
    pattern: str
    replacement: str
    told: str


EDITS = [
    Edit(
        IPTABLES, r"--probability 0.33333333349(.*ELX6)", r"--probability 0.25000000000\1", "takes 0.2500 of what gets"
    ),
    Edit(
        IPTABLES, r"^(-A KUBE-SVC-CDGG.*) -m statistic .* -j KUBE-SEP-BQ6C", r"\1 -j KUBE-SEP-BQ6C", "nothing gets past"
    ),
    Edit(IPTABLES, r"^-A KUBE-SVC-CDGG.* -j KUBE-SEP-YYQCU.*\n", "", "KUBE-SVC-CDGGSHYLG3RE2FKL does not share"),
    Edit(IPTABLES, r"-j KUBE-SEP-BQ6CYJXGREWSNKJL$", "-j KUBE-SEP-ELX6N4Z5RGB67TLC", "an endpoint more than once"),
    Edit(IPTABLES, r"^(:|-A )KUBE-SEP-BQ6C.*\n", "", "leads to KUBE-SEP-BQ6CYJXGREWSNKJL, which leads nowhere"),
    Edit(IPTABLES, r"^-A KUBE-SVC-CDGG.* KUBE-MARK-MASQ\n", "", "from outside are not masqueraded"),
    Edit(IPTABLES, r"^-A KUBE-EXT-LDATH.* KUBE-MARK-MASQ\n", "", "*:31080/TCP (default/np): connections from the node"),
    Edit(IPTABLES, r"^-A KUBE-EXT-H2C2.* LOCAL -j KUBE-MARK-MASQ\n", "", "from the node itself are not masqueraded"),
    Edit(IPTABLES, r"^-A KUBE-EXT-H2C2.* LOCAL -j KUBE-SVC.*\n", "", "node itself are not sent to all backends"),
    Edit(IPTABLES, r"^-A KUBE-EXT-H2C2.* 10.244.0.0/16 .*\n", "", "local pods are not sent to all backends"),
    Edit(IPTABLES, r"^(-A KUBE-EXT-H2C2\S+ -s )10.244.0.0/16", r"\g<1>10.9.0.0/16", "other sources for local pods"),
    Edit(IPTABLES, r"^-A KUBE-PROXY-FIREWALL.*\n", "", "sources outside its ranges are not dropped"),
    Edit(IPTABLES, r"^-A KUBE-FW-.* -s .*\n", "", "KUBE-PROXY-FIREWALL drops what goes to 203.0.113.30:80/TCP"),
    Edit(IPTABLES, r"^-A KUBE-EXTERNAL-SERVICES -d.*\n", "", "that find no backend are not refused"),
    Edit(IPTABLES, r"^-A KUBE-MARK-MASQ.*\n", "", "KUBE-MARK-MASQ does not set a mark"),
    Edit(IPTABLES, r"^(-A KUBE-MARK-MASQ.*)0x4000/0x4000", r"\g<1>0x8000/0x8000", "what is marked with 0x8000"),
    Edit(IPTABLES, r"^-A KUBE-POSTROUTING.*MASQUERADE.*\n", "", "KUBE-POSTROUTING does not masquerade"),
    Edit(IPTABLES, r"^-A PREROUTING.*\n", "", "PREROUTING of table nat has no rule that leads to KUBE-SERVICES"),
    Edit(IPTABLES, r"^(-A OUTPUT) -m conntrack --ctstate NEW (.*KUBE-SERVICES)", r"\1 \2", "under other conditions"),
    Edit(IPTABLES, r"^-A KUBE-FIREWALL.*\n", "", "KUBE-FIREWALL does not keep others"),
    Edit(
        IPTABLES, r"^-A INPUT -j KUBE-FIREWALL\n", "", "INPUT of table filter has no rule that leads to KUBE-FIREWALL"
    ),
    Edit(IPTABLES, r"^-A KUBE-FORWARD.*0x4000.*\n", "", "KUBE-FORWARD does not accept what is marked"),
    Edit(
        IPTABLES,
        r"--rcheck --seconds 600 --reap --name KUBE-SEP-C3HX\S+",
        "--rcheck --seconds 600 --reap --name X",
        "asks for",
    ),
    Edit(IPTABLES, r"--seconds 600 (.*-j KUBE-SEP-C3HX)", r"--seconds 60 \1", "for different times"),
    Edit(IPTABLES, r"^-A KUBE-SVC-BJWR.*rcheck.*-j KUBE-SEP-C3HX.*\n", "", "not remember the clients of all"),
    Edit(
        IPTABLES,
        r"^(-A KUBE-SEP-QWYO.*-s )10.244.1.11/32",
        r"\g<1>10.244.1.12/32",
        "masquerades the connections of others",
    ),
    Edit(
        IPTABLES,
        r"^(-A KUBE-SVC-NQPY.*-j KUBE-SEP)",
        r"-A KUBE-SVC-NQPYVI3STVRYAZH3 -j LOG\n\1",
        "not understood: -j LOG",
    ),
    Edit(IPTABLES, r"^(-A KUBE-SERVICES -d 10.96.30.1/32.*)", r"\1\n\1", "has rules twice: the first ones act"),
    Edit(
        IPTABLES,
        r"^(-A KUBE-SERVICES.*KUBE-NODEPORTS)$",
        r"\1\n-A KUBE-SERVICES -d 10.0.0.1/32 -p tcp --dport 80 -j KUBE-SVC-4N67WYWLK3EYICH5",
        "behind those that lead",
    ),
    Edit(
        IPTABLES, r"^-A KUBE-SERVICES -d 10.96.30.13/32.*\n", "", "no rule leads to KUBE-SEP-QWYOXYJCZ4F67YVV, KUBE-SVC"
    ),
    Edit(
        IPTABLES,
        r"^(-A KUBE-SERVICES -d 10.96.30.13/32 -p) tcp(.* -m) tcp",
        r"\1 udp\2 udp",
        "backends of another protocol",
    ),
    Edit(
        IPTABLES,
        r"-A KUBE-NODEPORTS -d 127.0.0.0/8 (.* 31080 .*) -j KUBE-EXT-LDATH\S+",
        r"-A KUBE-NODEPORTS -d 127.0.0.0/8 \1 -j KUBE-EXT-H2C2CO744X7I7274",
        "something else for loopback",
    ),
    Edit(IPTABLES, r"(?s)\n-A KUBE-SVC-CDGG.*", "\n", "table nat has no end: the text is cut off"),
    Edit(NFTABLES, r"numgen random mod 3 map", "numgen random mod 4 map", "does not share its connections evenly"),
    Edit(NFTABLES, r"1 : 10.244.1.12 . 8080, 2 :", "1 : 10.244.1.11 . 8080, 2 :", "an endpoint more than once"),
    Edit(NFTABLES, r"^\t\tip saddr @affinity-UL.*\n", "", "not remember the clients of all its endpoints"),
    Edit(NFTABLES, r"(?s)(affinity-ULC[^}]*)timeout 10m", r"\1timeout 20m", "for different times"),
    Edit(NFTABLES, r"^\t\tupdate @affinity-UL.*\n", "", "asks for clients of endpoint-ULCOWIUC"),
    Edit(NFTABLES, r"(services \{\n)\t\tip daddr @cluster-ips .*\n", r"\1", "from outside are not masqueraded"),
    Edit(
        NFTABLES, r"(external-L54O.*\n)\t\tmeta mark.*\n", r"\1", "*:31080/TCP (default/np): connections from the node"
    ),
    Edit(NFTABLES, r"^\t\tip saddr 10.244.0.0/16 goto service-V65.*\n", "", "local pods are not sent to all backends"),
    Edit(NFTABLES, r"^\t\tip saddr != \{.*\n", "", "does not say whom it lets through"),
    Edit(NFTABLES, r"^\t\tct state new jump firewall-check\n", "", "hook prerouting leads to firewall-check"),
    Edit(NFTABLES, r"^\t\tjump services\n", "", "no nat chain of the hook prerouting leads to services"),
    Edit(NFTABLES, r"hook output priority -110", "hook output priority 0", "hook output leads to firewall-check"),
    Edit(NFTABLES, r"^\t\tmeta mark & .*\n", "", "does not masquerade what is marked"),
    Edit(NFTABLES, r"^\t\tct status dnat .*\n", "", "does not masquerade hairpin connections"),
    Edit(NFTABLES, r"\^ 0x00004000", "^ 0x00008000", "does not masquerade what is marked"),
    Edit(
        NFTABLES, r"(external-L54O.*\n\t\tmeta mark set meta mark \| )0x00004000", r"\g<1>0x00008000", "several marks"
    ),
    Edit(NFTABLES, r"10.96.0.1, 10.96.30.1,", "10.96.0.1,", "10.96.30.1:80/TCP is not among the cluster-ips"),
    Edit(NFTABLES, r"10.96.0.1, 10.96.30.1,", "10.96.0.1, 10.96.30.1, 10.96.99.9,", "cluster-ips has 10.96.99.9"),
    Edit(
        NFTABLES,
        r"10.96.30.3 . tcp . 80 comment",
        "10.96.30.3 . tcp . x comment",
        "not understood: 10.96.30.3 . tcp . x",
    ),
    Edit(NFTABLES, r", ?\n.*203.0.113.31 . tcp . 443 comment .*\}", " }", "find no backend are not refused"),
    Edit(NFTABLES, r"goto service-YFDG3N4L-default/zoned/tcp/,", "goto service-gone,", "service-gone is missing"),
    Edit(NFTABLES, r"(chain reject-chain \{\n.*\n)\t\treject\n", r"\1\t\taccept\n", "reject-chain does not reject"),
    Edit(
        NFTABLES, r"(chain services \{\n)", r"\1\t\tip daddr 10.0.0.1 drop\n", "not understood: ip daddr 10.0.0.1 drop"
    ),
    Edit(NFTABLES, r"^.*vmap @service-nodeports\n", "", "chain services does not look up all that it should"),
    Edit(
        NFTABLES,
        r"^(\t\tip daddr )@nodeport-ips( .*no-endpoint-nodeports)",
        r"\1!= 127.0.0.0/8\2",
        "at different addresses",
    ),
    Edit(NFTABLES, r"(?s)\n\tchain service-2YY5.*", "\n", "the text is cut off"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.file[:2]} {edit.told[:40]}")
def test_damage_is_told(edit: Edit) -> None:
    reading = read(edit.file, (edit.pattern, edit.replacement))
    told = "\n".join(sorted(reading.table.damage))
    assert edit.told in told, told
    assert len(reading.table.routes) >= 10, "the rest is still read"


@pytest.mark.parametrize("name", [IPTABLES, "iptables.ip6tables-save", NFTABLES])
def test_no_rule_can_go_unnoticed(name: str) -> None:
    """Whatever line is deleted: the table is another, or has damage."""
    text = (RECORDING / name).read_text()
    lines = text.split("\n")
    whole = list(readings(text.encode()))
    idle = re.compile(
        # Words for people, and what nft needs and packets don't notice.
        r"#.*|:.*|\*.*|COMMIT|\s*(?:comment .*|type (?!.*hook).*|size .*|flags .*|\})?"
        # A copy that only counts (IPT-9), a note (IPT-13), a rule that depends on a sysctl (IPT-15), one that guards
        # loopback where nothing needs it (IPT-14).
        r"|-A KUBE-NODEPORTS -d 127.*|-A KUBE-FW-.*will be dropped.*|-A KUBE-FORWARD .*INVALID.*"
        + (r"|-A (?:IN|OUT)PUT -j KUBE-FIREWALL" if "ip6" in name else "")
    )
    checked = 0
    for number, line in enumerate(lines):
        if not idle.fullmatch(line):
            checked += 1
            less = "\n".join(lines[:number] + lines[number + 1 :])
            assert list(readings(less.encode())) != whole, line
    assert checked > 30


def test_rules_of_a_list_that_come_too_late_are_told() -> None:
    late = read(IPTABLES, (r"^(-A KUBE-SVC-NQPY.*MASQ)\n(-A KUBE-SVC-NQPY.*)", r"\2\n\1"))
    assert "has a rule behind those that pick a backend" in "\n".join(late.table.damage)


def test_a_rule_that_went_is_a_difference_and_nothing_else() -> None:
    frontend = Frontend(parse_address("10.96.30.1"), Protocol.TCP, 80)
    edits = (
        (r"^-A KUBE-SVC-CDGG.*-j KUBE-SEP-YYQCU.*\n", ""),
        (r"^(-A KUBE-SVC-CDGG.*)0.33333333349", r"\g<1>0.50000000000"),
        (r"^(-A KUBE-SVC-CDGG.*) -m statistic --mode random --probability 0.50000000000 (-j KUBE-SEP-BQ)", r"\1 \2"),
        (r"^(-A|:)( ?)KUBE-SEP-YYQCU.*\n", ""),
    )
    table = read(IPTABLES, *edits).table
    assert not table.damage
    assert {str(each) for each in table.routes[frontend].backends} == {"10.244.1.11:8080", "10.244.1.12:8080"}


# --- facts of the node -------------------------------------------------------------------------------------------


def test_masquerade_all_and_no_detector_are_read() -> None:
    every = read(IPTABLES, (r"! -s 10.244.0.0/16 ", "")).table
    assert every.node.masquerade_all
    assert every.node.detector == SourcePrefix(networks("10.244.0.0/16")[0])
    assert not every.damage
    nobody = read(
        IPTABLES,
        (r"^-A KUBE-(?:SVC|SVL)-.* KUBE-MARK-MASQ\n", ""),
        (r"^-A KUBE-EXT-\S+ -s 10.244.0.0/16 .*\n", ""),
    )
    assert (nobody.table.node.masquerade_all, nobody.table.node.detector) == (False, None)
    assert not nobody.table.damage
    assert not nobody.untold
    nft = read(NFTABLES, (r"(@cluster-ips) ip saddr != 10.244.0.0/16", r"\1"), (r"^\t\tip saddr 10.244.*\n", "")).table
    assert nft.node.masquerade_all
    assert not nft.damage


@pytest.mark.parametrize(
    ("name", "edits", "words"),
    [
        (IPTABLES, [(r"! -s 10.244.0.0/16", "! -i cni0"), (r"-s 10.244.0.0/16", "-i cni0")], "cni0"),
        (IPTABLES, [(r"! -s 10.244.0.0/16", "! -i cali+"), (r"-s 10.244.0.0/16", "-i cali+")], "prefix='cali'"),
        (
            NFTABLES,
            [(r"ip saddr != 10.244.0.0/16", 'iifname != "cni0"'), (r"ip saddr 10.244.0.0/16", 'iifname "cni0"')],
            "cni0",
        ),
        (
            NFTABLES,
            [(r"ip saddr != 10.244.0.0/16", 'iifname != "cali*"'), (r"ip saddr 10.244.0.0/16", 'iifname "cali*"')],
            "prefix='cali'",
        ),
    ],
)
def test_detectors_by_interface_are_read(name: str, edits: list[tuple[str, str]], words: str) -> None:
    table = read(name, *edits).table
    assert words in str(table.node.detector)
    assert not table.damage


def test_node_ports_on_some_addresses_are_read() -> None:
    tail = r'-m comment --comment "kubernetes service nodeports; NOTE.*" -m addrtype --dst-type LOCAL '
    chosen = read(IPTABLES, (tail, "-d 192.168.50.11/32 "), (r"^-A KUBE-NODEPORTS -d 127.*\n", "")).table
    assert chosen.node.node_port_addresses == {parse_address("192.168.50.11")}
    assert not chosen.node.loopback_node_ports
    assert not chosen.damage
    every = read(
        NFTABLES,
        (r"ip daddr @nodeport-ips (.*@service-nodeports)", r"fib daddr type local ip daddr != 127.0.0.0/8 \1"),
        (r"ip daddr @nodeport-ips (.*@no-endpoint-nodeports)", r"ip daddr != 127.0.0.0/8 \1"),
    ).table
    assert every.node.node_port_addresses is None
    assert not every.damage


def test_without_services_nothing_tells_what_is_masqueraded_in_iptables_mode() -> None:
    reading = read(IPTABLES, (r"^(?::|-A )KUBE-(?:SVC|SVL|EXT|FW|SEP)-.*\n", ""), (r"^-A KUBE-SERVICES -d.*\n", ""))
    assert {"masquerade_all", "detector"} <= reading.untold


# --- older versions ----------------------------------------------------------------------------------------------


def test_the_older_layout_of_iptables_mode_is_read() -> None:
    (reading,) = readings((OLDER / "iptables.iptables-save").read_bytes())
    table = reading.table
    assert not table.damage
    shown = {str(frontend): route for frontend, route in table.routes.items()}
    both = {Backend(parse_address(each), 8080) for each in ("10.244.1.11", "10.244.2.11")}
    here = {Backend(parse_address("10.244.1.11"), 8080)}
    assert shown["10.96.0.8:80/TCP"].backends == both
    assert shown["203.0.113.8:80/TCP"].source_ranges == networks("198.51.100.0/24")
    for local in ("203.0.113.8:80/TCP", "*:30080/TCP"):
        assert (shown[local].backends, shown[local].local_backends) == (both, here)
    assert (shown["*:30081/TCP"].backends, shown["*:30081/TCP"].local_backends) == (both, None)
    assert shown["10.96.0.9:53/UDP"].refusal is Refusal.REJECT
    assert table.node.detector == SourcePrefix(networks("10.244.0.0/16")[0])
    assert len(shown) == 5


def test_the_older_layout_of_nftables_mode_is_read() -> None:
    (reading,) = readings((OLDER / "nftables.nft").read_bytes())
    table = reading.table
    assert not table.damage
    backends = frozenset(Backend(parse_address(each), 8080) for each in ("10.244.1.11", "10.244.2.11"))
    web = table.routes[Frontend(parse_address("10.96.0.8"), Protocol.TCP, 80)]
    assert (web.backends, web.label) == (backends, "default/web")
    assert table.routes[Frontend(b"", Protocol.TCP, 30081)].backends == backends
    assert table.hairpins == {Endpoint(each.address, Protocol.TCP, each.port) for each in backends}
    assert table.node.detector == SourcePrefix(networks("10.244.0.0/16")[0])
    assert (table.node.mark, table.node.reject_closed_ports, table.node.service_cidrs) == (1 << 14, True, ())


# --- what is no file of rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "it is not what iptables-save"),
        (b"apiVersion: v1\nkind: List\n", "it is not what iptables-save"),
        (b"{", "it is not the JSON that nft prints"),
        (b'{"kind": "List"}', "it has no list `nftables`"),
        (b'{"nftables": []}', "there is no table kube-proxy"),
        (b"*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n", "kube-proxy has no rules in it"),
        (b"table ip sluice {\n}\n", "there is no table kube-proxy"),
        (b"table ip nat {\n\tchain KUBE-SERVICES {\n\t}\n}\n", "which iptables-save prints"),
        (
            b"*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -m set --match-set KUBE-LOOP-BACK dst -j X\nCOMMIT\n",
            "ipvs mode",
        ),
    ],
)
def test_what_has_no_rules_is_one_error(data: bytes, told: str) -> None:
    with pytest.raises(ForeignError, match=re.escape(told)):
        readings(data)


def test_the_kubelets_own_chains_are_no_proxy() -> None:
    kubelet = (
        "*nat\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-MARK-DROP - [0:0]\nCOMMIT\n*filter\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n"
    )
    with pytest.raises(ForeignError, match="no rules"):
        readings(kubelet.encode())
