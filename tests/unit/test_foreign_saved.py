"""What iptables-save prints is read by patterns of what is usual, and comes to what it comes to without them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import kube_proxy
from bench.cluster import Cluster
from rules.foreign import iptables_chains, saved
from rules.foreign.detect import readings
from rules.foreign.gathering import ForeignError, Reading
from rules.forwarding import Family

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
OLDER = Path(__file__).parents[1] / "recordings" / "kube-proxy-v1.20.2-iptables"
NEVER = re.compile(r"(?!)")
BENCH = "made for the bench"
LARGE = "of a large cluster"
FILES = {
    **{path.name: path for path in sorted(RECORDING.glob("iptables*-save"))},
    **{f"1.20: {path.name}": path for path in sorted(OLDER.glob("ip*tables-save"))},
}
NAMES = (*FILES, BENCH, LARGE)
WORDS = st.sampled_from(
    ["-s", "!", "-m", "-j", "--probability", "0.5", "tcp", "6", "10.1.2.3/32", "10.1.2.3:80", "[::1]:80", "99999", '"']
)


@functools.cache
def text_of(name: str) -> str:
    if name == BENCH:
        return kube_proxy.iptables_save(Cluster(3, 4))
    if name == LARGE:  # rules of Services have no comments there (IPT-25)
        return re.sub(
            r'^(-A KUBE-(?:SVC|SEP)\S*(?! ! -s).*) -m comment --comment "[^"]*"',
            r"\1",
            text_of(BENCH),
            flags=re.MULTILINE,
        )
    return FILES[name].read_text()


@contextmanager
def nothing_is_usual() -> Iterator[None]:
    """Every rule is read word by word."""
    with (
        mock.patch.object(saved, "_USUAL", NEVER),
        mock.patch.object(iptables_chains, "_USUAL_PICK", NEVER),
        mock.patch.object(iptables_chains, "_USUAL_ENDPOINT", dict.fromkeys(Family, NEVER)),
    ):
        yield


def read(text: str) -> Sequence[Reading] | str:
    try:
        return readings(text.encode(errors="replace"))
    except ForeignError as error:
        return str(error)


def read_word_by_word(text: str) -> Sequence[Reading] | str:
    with nothing_is_usual():
        return read(text)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_usual_is_read_as_word_by_word(name: str) -> None:
    assert read(text_of(name)) == read_word_by_word(text_of(name))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_what_is_nearly_usual_is_read_as_word_by_word(name: str, data: st.DataObject) -> None:
    lines = text_of(name).split("\n")
    rules = [number for number, line in enumerate(lines) if line.startswith("-A KUBE-S")]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(rules))
        other = data.draw(st.sampled_from(rules))
        words = lines[place].split(" ")
        at = data.draw(st.integers(0, len(words) - 1))
        match data.draw(st.integers(0, 6)):
            case 0:
                lines[place] = ""
            case 1:
                lines[place] += f"\n{lines[other]}"
            case 2:
                lines[place], lines[other] = lines[other], lines[place]
            case 3:
                words[at] = data.draw(WORDS)
            case 4:
                words[at] = data.draw(st.sampled_from(lines[other].split(" ")))
            case 5:
                words[at] = data.draw(st.text(max_size=3))
            case 6:
                words[at : at + 2] = reversed(words[at : at + 2])
        if lines[place].startswith("-A") and "\n" not in lines[place]:
            lines[place] = " ".join(words)
    text = "\n".join(lines)
    assert read(text) == read_word_by_word(text)


@pytest.mark.parametrize("name", [BENCH, LARGE, "iptables.ip6tables-save"])
def test_chains_of_endpoints_and_lists_are_usual(name: str) -> None:
    """Else the tests above compare a thing with itself."""
    for family in saved.split(text_of(name)):
        chains = family.chains["nat"]
        endpoints = [chains.text(each) for each in chains if each.startswith(iptables_chains.SEP)]
        usual = iptables_chains._USUAL_ENDPOINT[family.family]
        assert any(map(usual.fullmatch, endpoints))
        assert any(iptables_chains._USUAL_PICK.search(chains.text(each)) for each in chains)
        if name in {BENCH, LARGE}:
            assert all(map(usual.fullmatch, endpoints))


@pytest.mark.parametrize("name", NAMES)
def test_counters_blanks_and_other_ends_of_lines_change_nothing(name: str) -> None:
    text = text_of(name)
    told = read(text)
    assert read(re.sub("^-A", "[12:3456] -A", text, flags=re.MULTILINE)) == told
    assert read(text.replace("\n", "\r\n")) == told
    assert read(re.sub(r"\n(?!\*)", " \n\n\t", text)) == told


def test_rules_of_a_chain_that_stand_apart_are_read_in_their_order() -> None:
    text = "*nat\n-A KUBE-A -s 10.0.0.1/32 -j ONE\n-A KUBE-B -j TWO\n-A KUBE-A -j THREE\n-A KUBE-AB -j FOUR\nCOMMIT\n"
    [family] = saved.split(text)
    assert {name: [each.target for each in rules] for name, rules in family.chains["nat"].items()} == {
        "KUBE-A": ["ONE", "THREE"],
        "KUBE-B": ["TWO"],
        "KUBE-AB": ["FOUR"],
    }


def test_of_other_chains_those_rules_are_kept_that_lead_to_kube_proxys() -> None:
    text = "*nat\n:DOCKER -\n-A OUTPUT -j KUBE-A\n-A OUTPUT -j DOCKER\n-A DOCKER --comment KUBE-A\nCOMMIT\n"
    [family] = saved.split(text)
    assert {name: [each.target for each in rules] for name, rules in family.chains["nat"].items()} == {
        "OUTPUT": ["KUBE-A"]
    }


def test_a_chain_without_rules_is_there_and_one_that_is_not_declared_is_not() -> None:
    [family] = saved.split("*nat\n:KUBE-A - [0:0]\nCOMMIT\n")
    assert list(family.chains["nat"]["KUBE-A"]) == []
    assert "KUBE-B" not in family.chains["nat"]
    assert not family.chains["nat"].text("KUBE-B")


def test_very_many_empty_lines_are_read_in_no_time_that_grows_with_their_square() -> None:
    """200,000 took an hour where a pattern began at each of them and looked through all that follow."""
    text = text_of(BENCH)
    assert read(text.replace("\nCOMMIT", "\n" * 200_000 + "COMMIT")) == read(text)
    assert read(text.replace("\nCOMMIT", "\n" * 200_000 + "?\nCOMMIT")) == read(text)


@pytest.mark.parametrize(
    "line", ["\n", " \n", "-A KUBE-A -j B\n-A KUBE-B -j A\n", "-A OUTPUT -j DOCKER\n", "*nat\n", "#\n"]
)
def test_long_texts_take_time_by_their_length(line: str) -> None:
    """What is quadratic takes minutes."""
    for head in ("*nat\n", "*nat\n:KUBE-A -\n-A KUBE-A -j B", ""):
        read(head + line * (300_000 // len(line)))
