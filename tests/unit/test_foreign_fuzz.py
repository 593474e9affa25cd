"""Rules that were damaged at random are a table with damage, or one error; `make fuzz` looks longer."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.foreign.comparison import as_held_by, capabilities_of
from rules.foreign.detect import looks_like_rules, readings
from rules.foreign.gathering import ForeignError
from rules.forwarding import check_route

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
IPVS = Path(__file__).parents[1] / "recordings" / "kube-proxy-v1.20.2-ipvs"
ALL_OF_IPVS = "of ipvs mode"
FILES = ("iptables.iptables-save", "iptables.ip6tables-save", "nftables.nft", "nftables.nft.json")
WORDS = st.sampled_from(
    [
        "KUBE-SEP-X",
        "KUBE-SVC-CDGGSHYLG3RE2FKL",
        "-j",
        "-s",
        "!",
        "--",
        "0",
        "99999",
        "::1",
        "1.2.3.4",
        "}",
        "{",
        '"',
        "\\",
        "*nat",
        "COMMIT",
        "fe80::1%eth0",
        "10.0.0.0/99",
        "-m",
        "dnat",
        "elements = {",
        "\x00",
        "\ud7ff",
        "٣",
        "\r",
        "4" * 5000,
        "-A",
        "-t",
        "-r",
        "[::]:0",
        "10.96.30.1:80",
        "10.96.30.1,tcp:80",
        "10.96.30.1,udp:0,0.0.0.0/0",
        "create",
        "add",
        "KUBE-CLUSTER-IP",
        "hash:ip,port,net",
        "family",
        '[{"ifindex":',
    ]
)


@functools.cache
def lines(name: str) -> list[str]:
    if name == ALL_OF_IPVS:
        return ipvs_lines()
    return (RECORDING / name).read_text().split("\n")


@functools.cache
def ipvs_lines() -> list[str]:
    """Of ipvs mode: what was recorded of 1.20.2, all programs' texts one after the other."""
    names = ("ipvsadm-save", "ipset-save", "iptables-save", "ip6tables-save", "addresses.json")
    return "\n".join((IPVS / name).read_text() for name in names).split("\n")


def must_read(data: bytes) -> None:
    """It ends in routes that a table can hold, or in a ForeignError."""
    looks_like_rules(data)
    with contextlib.suppress(ForeignError):
        for reading in readings(data):
            table = reading.table
            for frontend, route in table.routes.items():
                assert check_route(table.family, frontend, route) is None
            assert reading.vague <= table.routes.keys()
            assert capabilities_of(reading.mode)
            assert (
                as_held_by(reading, table, configured=True).routes
                == as_held_by(reading, table, configured=False).routes
            )
            assert all("\n" not in sentence for sentence in table.damage)


@pytest.mark.parametrize("name", [*FILES[:3], ALL_OF_IPVS])
@given(data=st.data())
def test_mutilated_lines_are_read_or_refused(name: str, data: st.DataObject) -> None:
    text = list(lines(name))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.integers(0, 4)):
            case 0:
                del text[place]
            case 1:
                text.insert(place, text[data.draw(st.integers(0, len(text) - 1))])
            case 2:
                words = text[place].split(" ")
                words[data.draw(st.integers(0, len(words) - 1))] = data.draw(WORDS)
                text[place] = " ".join(words)
            case 3:
                cut = data.draw(st.integers(0, len(text[place])))
                text[place] = text[place][:cut]
            case 4:
                text.insert(place, data.draw(st.text(max_size=40)))
    must_read("\n".join(text).encode(errors="replace"))


@pytest.mark.parametrize("name", [*FILES, ALL_OF_IPVS])
@given(data=st.data())
def test_mutilated_bytes_are_read_or_refused(name: str, data: st.DataObject) -> None:
    whole = bytearray("\n".join(lines(name)).encode())
    end = data.draw(st.integers(0, len(whole)))
    del whole[end:]
    for _ in range(data.draw(st.integers(0, 8)) if whole else 0):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    must_read(bytes(whole))


STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        [[], {}, [[]], [{}], {"set": []}, {"concat": [1]}, {"elem": 1}, {"goto": {}}, {"prefix": {"addr": 1}}]
    ),
)


@given(data=st.data())
def test_arbitrary_values_in_json_are_read_or_refused(data: st.DataObject) -> None:
    document = json.loads("\n".join(lines("nftables.nft.json")))
    for _ in range(data.draw(st.integers(1, 5))):
        place: Any = document["nftables"]
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            inner = place[key]
            if not isinstance(inner, dict | list) or data.draw(st.integers(0, 3)) == 0:
                place[key] = copy.deepcopy(data.draw(STRANGE))
                break
            place = inner
    must_read(json.dumps(document).encode())


@given(data=st.data())
def test_arbitrary_addresses_in_json_are_read_or_refused(data: st.DataObject) -> None:
    document = json.loads((IPVS / "addresses.json").read_text())
    for _ in range(data.draw(st.integers(1, 5))):
        place: Any = document
        while isinstance(place, dict | list) and place:
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], dict | list) or data.draw(st.integers(0, 2)) == 0:
                place[key] = copy.deepcopy(data.draw(STRANGE))
                break
            place = place[key]
    rest = "\n".join(ipvs_lines()[:-2])
    must_read(f"{rest}\n{json.dumps(document)}".encode())


def test_addresses_that_are_nested_too_deeply() -> None:
    must_read(b'[{"ifindex": ' + b"[" * 100_000)
    must_read(b'[{"ifindex": 1, "addr_info": 2}]\n' * 1000)


def test_json_that_is_nested_too_deeply() -> None:
    deep = b'{"nftables": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}"
    must_read(deep)
    expression: Any = "10.0.0.1"
    for _ in range(200):
        expression = {"concat": [expression]}
    rule = {
        "family": "ip",
        "table": "kube-proxy",
        "chain": "services",
        "expr": [{"vmap": {"key": expression, "data": "@x"}}],
    }
    must_read(json.dumps({"nftables": [{"rule": rule}]}).encode())


@given(
    st.binary(max_size=300),
    st.sampled_from(
        [
            b"",
            b'{"nftables": [',
            b"*nat\n:KUBE-SERVICES - [0:0]\n",
            b"table ip kube-proxy {\n",
            b"-A -t 10.96.0.1:80 -s ",
            b"create KUBE-CLUSTER-IP hash:ip,port family inet\nadd KUBE-CLUSTER-IP ",
            b'[{"ifindex": 1, "ifname": "kube-ipvs0", "addr_info": [',
        ]
    ),
)
def test_arbitrary_bytes_are_read_or_refused(data: bytes, head: bytes) -> None:
    must_read(head + data)


def test_an_empty_object_among_expressions_is_no_rule_that_is_known() -> None:
    text = (RECORDING / "nftables.nft.json").read_text()
    changed = text.replace('[[0, {"goto"', '[{}, [0, {"goto"', 1)
    assert changed != text
    must_read(changed.encode())
