"""Judgements of probes: a set of backends, all of them and no other; and the three ways of not being answered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.demo.probes import Outcome
from tests.netns.judge import enough, judge
from tests.scenarios.schema import Answered, Case, Silent, Target

TARGET = Target("10.96.0.1", 80, "TCP")
NODE = ("192.168.50.11", 40000)


def case(expect, host="p3") -> Case:
    return Case(host, "", 0, TARGET, expect)


def answered(host="p1", address="10.244.1.11", port=8080, peer=("10.244.1.13", 5), local=("10.244.1.13", 5)):
    return Outcome(
        kind="answered", began=0, seconds=0, host=host, address=address, port=port, peer=peer, local=local
    )  # fmt: skip


def outcome(kind, **fields):
    return Outcome(kind=kind, began=0, seconds=0, **fields)


BOTH = Answered(backends=["p1:8080", "q1:8080"], source="kept")
P1, Q1 = answered(), answered("q1", "10.244.2.11")


def test_all_backends_and_no_other():
    assert judge(case(BOTH), [P1, Q1]) == ("", 0)
    assert "expected one of" in judge(case(BOTH), [P1, Q1, answered("p2", "10.244.1.12")]).wrong
    assert "expected one of" in judge(case(BOTH), [P1, Q1, outcome("silent")]).wrong
    assert "expected one of" in judge(case(BOTH), [P1, answered("q1", "10.244.2.11", port=81)]).wrong


def test_a_backend_not_seen_yet_needs_more_connections_up_to_the_cap():
    assert judge(case(BOTH), [P1] * 12).more > 0
    assert "q1:8080 never answered" in judge(case(BOTH), [P1] * enough(2)).wrong


@given(st.integers(2, 50))
def test_the_cap_leaves_a_chance_of_less_than_one_in_a_thousand_million(backends):
    assert backends * (1 - 1 / backends) ** enough(backends) <= 1e-9


def test_kept_means_address_and_port():
    assert not judge(case(Answered(backends=["p1:8080"], source="kept")), [P1]).wrong
    other_port = answered(peer=("10.244.1.13", 6))
    for answers in [P1, answered(peer=NODE)], [other_port, other_port]:
        wrong = judge(case(Answered(backends=["p1:8080"], source="kept")), answers).wrong
        assert "expected the source kept" in wrong
    # Connection tracking gives another port to what would clash with another connection.
    assert not judge(case(Answered(backends=["p1:8080"], source="kept")), [P1, other_port]).wrong


def test_masqueraded_means_the_nodes_address():
    expect = Answered(backends=["p1:8080"], source="masqueraded")
    assert not judge(case(expect), [answered(peer=NODE)]).wrong
    assert "masqueraded" in judge(case(expect), [P1]).wrong
    assert "masqueraded" in judge(case(expect), [answered(peer=("192.168.50.12", 5))]).wrong


def test_the_nodes_own_connection_tells_by_its_port():
    expect = Answered(backends=["p1:8080"], source="masqueraded")
    changed = answered(peer=NODE, local=("192.168.50.11", 7))
    same = answered(peer=NODE, local=NODE)
    assert not judge(case(expect, "node1"), [changed, same, changed]).wrong
    assert "masqueraded" in judge(case(expect, "node1"), [same, same, same]).wrong


def test_sources_may_differ_by_backend():
    expect = Answered(backends=["p1:8080", "q1:8080"], source={"p1": "masqueraded", "q1": "kept"})
    assert not judge(case(expect), [answered(peer=NODE), Q1]).wrong
    assert judge(case(expect), [P1, Q1]).wrong


def test_sticky_is_one_backend_whichever():
    expect = Answered(backends=["p1:8080", "q1:8080"], source="kept", sticky=True)
    assert judge(case(expect), [Q1, Q1]) == ("", 0)
    assert "expected one backend" in judge(case(expect), [Q1, P1]).wrong


def test_refused_dropped_and_untouched_exclude_each_other():
    results = {
        "refused": outcome("icmp", icmp=(3, 3), sender="192.168.50.11"),
        "dropped": outcome("silent"),
        "untouched": answered("upstream", "10.96.0.1", 80),
    }
    for expected in results:
        for got, result in results.items():
            assert bool(judge(case(Silent(how=expected)), [result]).wrong) == (expected != got)


def test_a_refusal_is_the_nodes_own_and_of_the_right_code():
    refused = case(Silent(how="refused"))
    assert judge(refused, [outcome("icmp", icmp=(3, 1), sender="192.168.50.11")]).wrong
    assert judge(refused, [outcome("icmp", icmp=(3, 3), sender="10.96.0.1")]).wrong
    assert judge(refused, [outcome("reset")]).wrong


def test_untouched_means_the_address_and_the_source_too():
    untouched = case(Silent(how="untouched"))
    assert judge(untouched, [answered("upstream", "10.96.0.1", 80, peer=NODE)]).wrong
    assert judge(untouched, [P1]).wrong
