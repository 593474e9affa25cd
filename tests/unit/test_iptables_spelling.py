"""Rules as other versions of iptables-save print them are read as ours."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.forwarding import Family, ForwardingTable
from rules.iptables.decode import decode
from rules.iptables.layout import JUMPS, Options
from rules.iptables.model import Model
from rules.iptables.spelling import respell, respell_slowly
from rules.iptables.text import TABLES, parse, parse_rule
from tests.iptables_tables import tables


@pytest.mark.parametrize("family", list(Family))
def test_our_own_spelling_is_the_one_that_others_are_brought_to(family: Family) -> None:
    @settings(max_examples=25)
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        chains = Model(table, Options()).chains()
        for each in chains.values():
            for rules in each.values():
                for rule in rules:
                    assert respell_slowly(rule.text) == rule.text
                    assert respell(rule.text) == rule.text

    check()
    assert all(respell_slowly(jump.rule.text) == jump.rule.text for jump in JUMPS)


DNAT = "-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.244.1.11:8080"
MARKED = "-m mark --mark 0x4000/0x4000 -j ACCEPT"
SET = "-j MARK --set-xmark 0x4000/0x4000"
TAKEN = "-j MARK --set-xmark 0x4000/0x0"
NEW = "-m conntrack --ctstate NEW -m conntrack ! --ctstate DNAT -j SLUICE-R"
ESTABLISHED = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
DRAWN = "-p udp -m statistic --mode random --probability 0.33333333349 -j DNAT --to-destination 10.244.1.11:53"
STICKY = (
    "-p tcp -m recent --update --seconds 600 --reap --name SLUICE-A-B --mask 255.255.255.255 --rsource "
    "-j DNAT --to-destination 10.244.1.11:53"
)


@pytest.mark.parametrize(
    ("printed", "ours"),
    [
        ("-d 10.96.0.1/32 -p 6 -m tcp --dport 80 -j DNAT --to-destination 10.244.1.11:8080", DNAT),
        ("-d 10.96.0.1 -p tcp --dport 80 -j DNAT --to-destination 10.244.1.11:8080", DNAT),
        (DNAT.replace("/32", "/255.255.255.255").replace("--dport 80", "--destination-port 80:80"), DNAT),
        ("-p tcp -d 10.96.0.1/32 -m tcp --dport 80 -j DNAT --to-destination 10.244.1.11:8080", DNAT),
        ("-m mark --mark 0x00004000/0x00004000 -j ACCEPT", MARKED),
        ("-m mark --mark 16384/16384 --jump ACCEPT", MARKED),
        ("-j MARK --or-mark 0x4000", SET),
        ("-j MARK --set-xmark 0x00004000/0x00004000", SET),
        ("-j MARK --xor-mark 0x4000", TAKEN),
        ("-m state --state NEW -m conntrack ! --ctstate DNAT -j SLUICE-R", NEW),
        ("-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT", ESTABLISHED),
        (DRAWN.replace("0.33333333349", "0.3333333335"), DRAWN),
        (DRAWN.replace("-p udp", "-p 17").replace(" --mode random", "", 1).replace("349", "349 --mode random"), DRAWN),
        (
            STICKY.replace("--name SLUICE-A-B --mask 255.255.255.255", "--mask 255.255.255.255 --name SLUICE-A-B"),
            STICKY,
        ),
        (STICKY.replace(" --rsource", ""), STICKY),
        ("-s 0.0.0.0/0 -d 10.0.0.0/255.0.0.0 -p all -j DROP", "-d 10.0.0.0/8 -j DROP"),
        ("! -s 127.0.0.0/255.0.0.0 -d 127.0.0.0/8 -j DROP", "! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP"),
        ("-s fd00:0:0:10::/64 -d 0::0/0 -j RETURN", "-s fd00:0:0:10::/64 -j RETURN"),
    ],
)
def test_what_versions_print_otherwise_is_read_as_one(printed: str, ours: str) -> None:
    assert respell(printed) == ours
    assert respell(ours) == ours


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (MARKED, "-m mark ! --mark 0x4000/0x4000 -j ACCEPT"),
        (MARKED, "-m mark --mark 0x4000 -j ACCEPT"),
        (SET, "-j MARK --and-mark 0x4000"),
        (SET, TAKEN),
        (DNAT, DNAT.replace("-p tcp -m tcp", "-p udp -m udp")),
        (DNAT, DNAT.replace("-d ", "! -d ")),
        (ESTABLISHED, "-m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT"),
        (DRAWN, DRAWN.replace("0.333", "0.334")),
        (STICKY, STICKY.replace("--update", "--rcheck")),
        # Whoever is drawn is remembered, or whoever is asked: the order says which.
        ("-m statistic --mode random --probability 0.5 -m recent --set --name A --rsource -j X",
         "-m recent --set --name A --rsource -m statistic --mode random --probability 0.5 -j X"),
    ],
)  # fmt: skip
def test_rules_that_do_other_things_stay_apart(one: str, other: str) -> None:
    assert respell(one) != respell(other)


@given(st.text(alphabet='-! "\\adgijmpst0123456789./:xX', max_size=60) | st.text(max_size=30))
def test_any_rule_can_be_read_and_is_read_the_same_twice(text: str) -> None:
    once = respell_slowly(text)
    assert respell_slowly(once) == once


def test_a_comment_may_stand_anywhere_and_with_or_without_quotes() -> None:
    before = '-d 10.96.0.1/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j SLUICE-CLUSTER-IP'
    behind = "-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j SLUICE-CLUSTER-IP -m comment --comment default/web:http"
    assert parse_rule(before) == parse_rule(behind)
    assert parse_rule(before).comment == "default/web:http"


NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
RESPELLINGS: list[Callable[[str], str]] = [
    lambda line: re.sub(r"-p (tcp|udp|sctp)\b", lambda hit: f"-p {NUMBERS[hit[1]]}", line),
    lambda line: re.sub(r"0x([0-9a-f]+)/0x([0-9a-f]+)", lambda hit: f"0x{hit[1]:0>8}/0x{hit[2]:0>8}", line),
    lambda line: line.replace("/32 ", "/255.255.255.255 "),
    lambda line: line.replace("-m tcp --dport", "--dport"),
    lambda line: line.replace("RELATED,ESTABLISHED", "ESTABLISHED,RELATED"),
    lambda line: line.replace(" --rsource", ""),
    lambda line: re.sub(r"^(-A \S+)(.*?)( -m comment --comment .*)$", r"\1\3\2", line),
]


@settings(max_examples=30)
@given(tables(Family.IPV4), st.sets(st.sampled_from(RESPELLINGS), min_size=1))
def test_a_table_is_read_from_rules_in_another_spelling(
    table: ForwardingTable, respellings: set[Callable[[str], str]]
) -> None:
    chains = Model(table, Options()).chains()
    lines = []
    for name in TABLES:
        lines += [f"*{name}", *(f":{chain} - [0:0]" for chain in chains[name])]
        lines += [jump.rule.line(jump.chain) for jump in JUMPS if jump.table == name]
        lines += [rule.line(chain) for chain, rules in chains[name].items() for rule in rules]
        lines += ["COMMIT"]
    for change in respellings:
        lines = [change(line) for line in lines]
    saved = parse("\n".join([*lines, ""]))
    assert saved.chains == chains
    assert saved.jumps == JUMPS or set(saved.jumps) == set(JUMPS)
    reading = decode(saved, Family.IPV4)
    assert reading is not None
    assert reading.table == table
