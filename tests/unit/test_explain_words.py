"""The words of `sluice explain`: whole answers, as people get them.

Each file of tests/data/explain was read and approved by a person.  No test writes them: when words change on purpose,
run the command (the options are here), read what it says, and put it there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy import cli

DATA = Path(__file__).parents[1] / "data" / "explain"
OPTIONS = ("--proxy-mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16")

ANSWERS = {
    "service-that-works": (0, "default/web:http"),
    "pod-that-reaches-itself": (0, "10.96.0.41:80", "--from=10.244.1.11"),
    "zones": (0, "default/zonal"),
    "udp-node-port": (0, "192.168.50.11:30053/UDP", "--from=outside"),
    "policies-local-none-here": (1, "default/away"),
    "policy-local-from-the-node": (0, "192.168.50.11:30003", "--from=node"),
    "no-slices": (1, "default/nobody"),
    "no-such-target-port": (1, "default/misnamed"),
    "none-ready": (1, "10.96.0.46:80", "--from=10.244.1.12"),
    "slices-of-the-other-family": (1, "default/handmade"),
    "source-range-blocks": (1, "203.0.113.47:80", "--from=203.0.113.200"),
    "source-range-blocks-a-pod": (1, "203.0.113.47:80", "--from=10.244.1.11"),
    "source-range-somebody": (0, "203.0.113.47:80"),
    "older-service-has-it": (1, "default/late"),
    "closed-port": (1, "10.96.0.41:8080"),
    "other-protocol": (1, "10.96.0.41:53"),
    "unallocated": (1, "10.96.7.7:80"),
    "node-port-address-not-covered": (1, "192.168.51.11:30001", "--node-addresses=192.168.50.11,192.168.51.11"),
    "node-port-on-loopback": (1, "127.0.0.1:30001", "--from=node"),
    "no-frontend": (1, "198.51.100.7:443"),
    "headless": (1, "default/headless"),
    "no-such-service": (1, "default/nothing"),
    "no-such-port": (1, "default/web:8080"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_words(name, capsys, monkeypatch):
    monkeypatch.chdir(DATA)
    code, *arguments = ANSWERS[name]
    assert cli.main(["explain", *arguments, "-f", "cluster.yaml", *OPTIONS]) == code
    assert capsys.readouterr().out == (DATA / f"{name}.txt").read_text()


def test_every_file_is_an_answer():
    assert {path.stem for path in DATA.glob("*.txt")} == set(ANSWERS)
