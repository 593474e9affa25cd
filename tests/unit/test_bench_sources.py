"""The rules that `bench.kube_proxy` makes: those of its objects, in the shape of the recordings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import kube_proxy, manifests, sources
from bench.cluster import NODE, Cluster
from proxy import cli
from rules.foreign import saved
from rules.foreign.detect import readings

CLUSTER = Cluster(130, 4)
FORMS = {
    "iptables-save": lambda _: kube_proxy.iptables_save(CLUSTER).encode(),
    "nft": lambda _: kube_proxy.nft_text(CLUSTER).encode(),
    "nft -j": lambda _: kube_proxy.nft_json(CLUSTER),
    "ipvs": sources.ipvs_texts,
}


@pytest.mark.parametrize("form", FORMS)
def test_generated_rules_are_what_the_objects_come_to(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules"
    objects = manifests.write_json(CLUSTER, tmp_path)
    rules.write_bytes(FORMS[form](objects))
    (reading,) = readings(rules.read_bytes())
    assert len(reading.table.routes) == CLUSTER.services
    assert not reading.table.damage
    arguments = ["verify", "-f", str(rules), "-f", str(objects), "--hostname-override", NODE]
    assert cli.main(arguments, name="sluice") == 0, capsys.readouterr().out


def test_rules_that_are_printed_otherwise_are_read_the_same() -> None:
    text = (kube_proxy.RECORDING / "iptables.iptables-save").read_text()
    # With one more match in it, a line is read word by word.
    slow = re.sub(r"^(-A KUBE-.*) -j ", r"\1 -m limit -j ", text, flags=re.MULTILINE)
    assert slow != text
    usual, others = (saved.split(each) for each in (text, slow))
    for one, other in zip(usual, others, strict=True):
        assert one.chains.keys() == other.chains.keys()
        for table, chains in one.chains.items():
            for name, rules in chains.items():
                there = other.chains[table][name]
                assert [(rule.options, rule.comment) for rule in rules] == [
                    (rule.options, rule.comment) for rule in there
                ]


def test_a_rule_is_told_in_the_words_in_which_it_was_printed() -> None:
    (family,) = saved.split('*nat\n-A KUBE-SVC-A -p tcp -m comment --comment "a b" -m tcp --dport 80 -j KUBE-SEP-B\n')
    (rule,) = family.chains["nat"]["KUBE-SVC-A"]
    assert rule.text == "-p tcp -m tcp --dport 80 -j KUBE-SEP-B"
    assert rule.comment == "a b"
