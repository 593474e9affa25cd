"""Work in a copy of the process."""

import os
import threading
from pathlib import Path

import pytest

from proxy.beside import DiedError, beside
from proxy.foreign.sources import Found
from rules.foreign.detect import readings
from rules.foreign.gathering import ForeignError, Reading
from rules.forwarding import Family, ForwardingTable

RULES = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2" / "nftables.nft"


@pytest.fixture(autouse=True)
def two_processors_and_one_thread(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threading, "active_count", lambda: 1)


def refuse():
    raise ForeignError("rules: there are none")


def test_the_copy_works_while_this_process_goes_on():
    told, tell = os.pipe()

    def work():
        return os.read(told, 1), os.getpid()

    with beside(work, tuple[bytes, int], worth_it=True) as result:
        os.write(tell, b"x")
        said, pid = result()
    assert (said, pid != os.getpid()) == (b"x", True)


def test_the_copy_gives_way_to_this_process_and_its_children():
    with beside(lambda: os.nice(0), int, worth_it=True) as result:
        assert result() == min(os.nice(0) + 5, 19)


@pytest.mark.parametrize(
    "found",
    [
        [Found("rules", "iptables", reading) for reading in readings(RULES.read_bytes())],
        [Found(os.fsdecode(b"\xff"), "ipvs", Reading(mode="ipvs", table=ForwardingTable(family=Family.IPV6)))],
    ],
)
def test_all_that_is_known_of_rules_crosses_over(found):
    with beside(lambda: found, list[Found], worth_it=True) as result:
        assert result() == found


def test_what_the_work_raises_is_raised_where_it_is_waited_for():
    with beside(refuse, int, worth_it=True) as result, pytest.raises(ForeignError, match="rules: there are none"):
        result()


def test_a_copy_that_dies_is_an_error():
    with (
        beside(lambda: os.kill(os.getpid(), 9), int, worth_it=True) as result,
        pytest.raises(DiedError, match="ended with status -9: is memory short"),
    ):
        result()


def test_a_copy_that_nobody_waits_for_is_ended():
    pids, tell = os.pipe()

    def work():
        os.write(tell, str(os.getpid()).encode())
        threading.Event().wait()

    with beside(work, int, worth_it=True):
        pid = int(os.read(pids, 20))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("attribute", "value"), [("sched_getaffinity", lambda _: {0}), ("active_count", lambda: 2), ("", None)]
)
def test_work_that_is_not_worth_a_copy_is_done_here(attribute, value, monkeypatch):
    if attribute:
        monkeypatch.setattr(os if attribute == "sched_getaffinity" else threading, attribute, value)
    with beside(os.getpid, int, worth_it=bool(attribute)) as result:
        assert result() == os.getpid()
