"""What of a node's iptables rules is kube-proxy's, and in which steps it goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.foreign import addresses_json, ipset_text, ipvs_text
from rules.foreign.ipvs_state import State
from rules.foreign.kube_proxy_ipvs_sets import Sets
from rules.foreign.removal import has_server, is_theirs, removal
from rules.forwarding import Family, Protocol, parse_address
from rules.ipvs.messages import Key

DATA = Path(__file__).parents[1] / "data"
RECORDINGS = Path(__file__).parents[1] / "recordings"
OF_IPVS = RECORDINGS / "kube-proxy-v1.20.2-ipvs"
SAVED = [
    *(DATA / "kube-proxy-v1.36.2").glob("*.ip*tables-save"),
    DATA / "kube-proxy-older" / "iptables.iptables-save",
    *RECORDINGS.glob("*/ip*tables-save"),
]


def held_after(saved: str, steps: tuple[str, ...]) -> list[str]:
    """What iptables-save would print after iptables-restore --noflush, refusing what that would refuse."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in saved.splitlines():
        if line.startswith("*"):
            table = tables.setdefault(line[1:], {})
        elif line.startswith(":"):
            table.setdefault(line[1:].split()[0], [])
        elif line.startswith("-A "):
            table.setdefault(line.split()[1], []).append(line.split(" ", 2)[2])
    for line in "\n".join(steps).splitlines():
        if line.startswith("*"):
            table = tables[line[1:]]
        elif line.startswith(":"):
            table[line[1:].split()[0]] = []
        elif line.startswith("-D "):
            table[line.split()[1]].remove(line.split(" ", 2)[2])
        elif line.startswith("-X "):
            name = line[3:]
            assert not table.pop(name), f"{name} has rules"
            users = [rule for rules in table.values() for rule in rules if re.search(rf"-[jg] {name}$", rule)]
            assert not users, f"{name} is in use"
    return [
        f"{table} {chain} {rule}".rstrip()
        for table, chains in tables.items()
        for chain, rules in chains.items()
        for rule in ["", *rules]
    ]


@pytest.mark.parametrize("file", SAVED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_ipt_32_b_161_of_the_recordings_the_kubelets_part_stays(file):
    saved = file.read_text()
    found = removal(saved)
    assert found
    assert not found.kept
    left = [line for line in held_after(saved, found.steps) if "KUBE-" in line]
    kubelets = re.compile(r"filter (\S+ .*)?KUBE-FIREWALL|KUBE-KUBELET-CANARY|KUBE-MARK-DROP")
    assert all(kubelets.search(line) for line in left)


def test_no_packet_is_torn_what_leads_in_goes_before_what_masquerades():
    saved = (DATA / "kube-proxy-v1.36.2" / "iptables.iptables-save").read_text()
    first, second = removal(saved).steps
    assert sorted(line.split()[:2] for line in first.splitlines() if line.startswith("-")) == [
        ["-D", "OUTPUT"],
        ["-D", "PREROUTING"],
    ]
    assert "-D POSTROUTING" in second
    assert "-X KUBE-POSTROUTING" in second


def test_others_are_no_part_of_it():
    saved = """*nat
:PREROUTING ACCEPT [0:0]
:KUBE-ROUTER-SERVICES - [0:0]
:KUBE-SERVICES-OF-MINE - [0:0]
:KUBE-MARK-DROP - [0:0]
-A PREROUTING -m comment --comment "not -j KUBE-SERVICES" -j KUBE-ROUTER-SERVICES
COMMIT
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-POD-FW-XPGD46QRK7WJZT7O - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
-A INPUT -j KUBE-FIREWALL
COMMIT
"""
    found = removal(saved)
    assert not found
    assert found.steps == ()
    assert removal("").steps == ()


def test_chains_that_others_lead_to_stay_and_do_nothing_but_the_mark():
    saved = """*nat
:POSTROUTING ACCEPT [0:0]
:CNI-HOSTPORT - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
-A CNI-HOSTPORT -j KUBE-MARK-MASQ
-A CNI-HOSTPORT -g KUBE-SERVICES
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 10.0.0.1/32 -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-SVC-XPGD46QRK7WJZT7O -j KUBE-MARK-MASQ
COMMIT
"""
    found = removal(saved)
    assert found.kept == (
        "the chain KUBE-MARK-MASQ of the table nat stays: CNI-HOSTPORT leads there",
        "the chain KUBE-SERVICES of the table nat stays, empty: CNI-HOSTPORT leads there",
    )
    assert str(found) == "1 chain and 0 jumps"
    assert held_after(saved, found.steps) == [
        "nat POSTROUTING",
        "nat CNI-HOSTPORT",
        "nat CNI-HOSTPORT -j KUBE-MARK-MASQ",
        "nat CNI-HOSTPORT -g KUBE-SERVICES",
        "nat KUBE-MARK-MASQ",
        "nat KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
        "nat KUBE-SERVICES",
    ]


CHAINS = st.sampled_from(
    [
        "PREROUTING",
        "POSTROUTING",
        "OUTPUT",
        "MINE",
        "KUBE-MARK-DROP",
        "KUBE-SERVICES",
        "KUBE-MARK-MASQ",
        "KUBE-SVC-XPGD46QRK7WJZT7O",
        "KUBE-SEP-SXIVWICOYRO3J4NJ",
        "KUBE-PROXY-CANARY",
    ]
)


@given(st.lists(st.tuples(CHAINS, CHAINS, st.booleans())))
def test_whatever_leads_where_theirs_goes_and_all_else_stays(rules):
    """Half removed, edited or doubled: no step is refused."""
    names = {"PREROUTING", "POSTROUTING", "OUTPUT", *(name for rule in rules for name in rule[:2])}
    built_in = {"PREROUTING", "POSTROUTING", "OUTPUT"}
    lines = [f":{name} {'ACCEPT' if name in built_in else '-'} [0:0]" for name in sorted(names)]
    lines += [f"-A {chain} -{'g' if goto else 'j'} {target}" for chain, target, goto in rules if target not in built_in]
    saved = "\n".join(["*nat", *lines, "COMMIT", ""])
    found = removal(saved)
    after = held_after(saved, found.steps)
    borrowed = {target for chain, target, _ in rules if chain in {"MINE", "KUBE-MARK-DROP"}}
    assert {line.split()[1] for line in after} == {
        name for name in names if not is_theirs("nat", name) or name in borrowed
    }
    mine = [line for line in held_after(saved, ()) if not is_theirs("nat", line.split()[1])]
    kept = [line for line in after if not is_theirs("nat", line.split()[1])]
    jumps = [line for line in mine if line.split()[1] in built_in and is_theirs("nat", line.split()[-1])]
    assert kept == [line for line in mine if line not in jumps]


def recorded() -> State:
    """What a real kube-proxy 1.20.2 holds in mode ipvs."""
    servers, _ = ipvs_text.parse((OF_IPVS / "ipvsadm-save").read_text().splitlines())
    sets, _ = ipset_text.parse((OF_IPVS / "ipset-save").read_text().splitlines())
    found = addresses_json.parse_at((OF_IPVS / "addresses.json").read_text(), 0)
    assert found
    return State(servers, sets, found[0])


def named(key: Key, held: State) -> bool:
    own = {address for name, each in (held.addresses or {}).items() if name != "kube-ipvs0" for address in each}
    return has_server(key, Sets(held.sets or {}, key.family), held.bound or (), own)


def test_ipvs_30_every_virtual_server_that_a_real_kube_proxy_made_is_known_for_its_own():
    held = recorded()
    assert len(held.servers or ()) > 30
    assert all(named(key, held) for key in held.servers or ())


@pytest.mark.parametrize("lacking", ["kube-ipvs0", "sets"])
def test_half_of_what_names_a_virtual_server_of_a_cluster_ip_is_enough(lacking):
    held = recorded()
    kept = {name: each for name, each in (held.addresses or {}).items() if name != lacking}
    held = held._replace(addresses=kept, sets={} if lacking == "sets" else held.sets)
    assert named(Key(Family.IPV4, Protocol.TCP, parse_address("10.96.30.1"), 80), held)
    assert named(Key(Family.IPV6, Protocol.UDP, parse_address("fd00:10:96::3002"), 53), held)


@pytest.mark.parametrize(
    "key",
    [
        Key(Family.IPV4, Protocol.TCP, parse_address("192.168.50.11"), 80),
        Key(Family.IPV4, Protocol.UDP, parse_address("192.168.50.11"), 31080),
        Key(Family.IPV4, Protocol.TCP, parse_address("198.51.100.1"), 31080),
        Key(Family.IPV4, Protocol.TCP, parse_address("10.97.0.1"), 80),
        Key(Family.IPV6, Protocol.TCP, parse_address("fd00:50::11"), 31080),
        Key(Family.IPV4, mark=1),
    ],
    ids=["another port", "another protocol", "no address of the node's", "no ClusterIP", "another family", "by mark"],
)
def test_ipvs_30_virtual_servers_of_others_are_not_taken_for_its_own(key):
    assert not named(key, recorded())
