"""The ledger has no gaps and names nothing that isn't there."""

from __future__ import annotations

import msgspec
import pytest

from tests.scenarios import ledger, schema


def test_every_clause_is_shown_or_explained():
    assert ledger.problems(ledger.read(), schema.load_all()) == []


def test_a_gap_and_a_wrong_name_are_noticed():
    scenarios = schema.load_all()
    entries = {clause: ledger.Entry(why="said so") for clause in ledger.clauses()}
    del entries["B-10"]
    entries["TRF-8"] = ledger.Entry(scenarios=("no-such-scenario",))
    entries["TRF-5"] = ledger.Entry(scenarios=("hairpin",))
    entries["SEL-1"] = ledger.Entry(tests=("tests/unit/test_no_such_thing.py",))
    entries["XYZ-1"] = ledger.Entry(why="invented")
    assert sorted(ledger.problems(entries, scenarios)) == [
        "SEL-1: there is no file tests/unit/test_no_such_thing.py",
        "TRF-5: hairpin does not cite it",
        "TRF-8: there is no scenario no-such-scenario",
        "nothing shows B-10, and nothing says why",
        "there is no clause XYZ-1",
    ]


def test_a_citation_of_an_unknown_clause_is_noticed():
    [first, *_] = schema.load_all()
    header = msgspec.structs.replace(first.header, clauses=["TRF-999"])
    scenario = first._replace(header=header)
    assert f"{scenario.name} cites TRF-999, which does not exist" in ledger.problems({}, [scenario])


def test_refreshing_adds_citations_and_keeps_what_people_wrote():
    old = {"TRF-1": ledger.Entry(why="said by hand")}
    tests = {"tests/unit/test_x.py": '"""TRF-1 and B-T2."""'}
    new = ledger.refreshed(old, [], tests)
    assert new["TRF-1"] == ledger.Entry(tests=("tests/unit/test_x.py",), why="said by hand")
    assert new["B-T2"].tests == ("tests/unit/test_x.py",)
    assert "NFT-1" not in new


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ('"""NOD-6, B-T2."""', {"NOD-6", "B-T2"}),
        ("HC-20 to HC-22, SYN-2 to 4", {"HC-20", "HC-21", "HC-22", "SYN-2", "SYN-3", "SYN-4"}),
        ("def test_cfg_1_2_every_flag():", {"CFG-1", "CFG-2"}),
        ("def test_met_20_and_21_answers_of_6_kinds():", {"MET-20", "MET-21"}),
        ("def test_met_1_to_3_and_7_syncs():", {"MET-1", "MET-2", "MET-3", "MET-7"}),
        ("async def test_SYN_13_requests():", {"SYN-13"}),
        ("def test_eps13_triggers():", {"EPS-13"}),
        ("def test_a_hc_3_in_the_middle():", set()),
    ],
)
def test_tests_cite_by_their_text_and_by_their_names(text, clauses):
    assert ledger.cited(text) == clauses


def test_scenarios_say_what_is_wrong_with_them(tmp_path):
    file = tmp_path / "wrong.yaml"
    for text, complaint in [
        ("about: x\nprobe: []\n", "unknown field `probe`"),
        ("about: x\nprobes:\n- {from: p1, to: '10.0.0.1', expect: refused}\n", "not host:port"),
        ("about: x\nprobes:\n- {from: p1, to: '10.0.0.1:80', expect: lost}\n", "expect: lost"),
        ("about: x\nprobes:\n- {from: p1, to: '10.0.0.1:80/DCCP', expect: refused}\n", "DCCP"),
        ("about: [\n", "wrong.yaml"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=r"^wrong\.yaml: ") as caught:
            schema.load(file)
        assert complaint in str(caught.value)


def test_steps_change_objects_as_they_say():
    service = {"kind": "Service", "metadata": {"name": "a", "namespace": "n"}, "spec": {"x": 1, "y": [1]}}
    objects = {"Service/n/a": service}
    patch = schema.Patch(object="Service/n/a", merge={"spec": {"x": None, "y": [2], "z": {"w": 3}}})
    assert schema.after(objects, schema.Step(patch=[patch]))["Service/n/a"]["spec"] == {"y": [2], "z": {"w": 3}}
    assert schema.after(objects, schema.Step(delete=["Service/n/a"])) == {}
    with pytest.raises(ValueError, match="no Service/n/b to delete"):
        schema.after(objects, schema.Step(delete=["Service/n/b"]))
    assert objects == {"Service/n/a": service}
