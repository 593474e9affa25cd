"""Work in a copy of the process."""

import os
import threading

import pytest

from proxy.beside import DiedError, beside
from rules.foreign.gathering import ForeignError


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

    with beside(work, worth_it=True) as result:
        os.write(tell, b"x")
        said, pid = result()
    assert (said, pid != os.getpid()) == (b"x", True)


def test_what_the_work_raises_is_raised_where_it_is_waited_for():
    with beside(refuse, worth_it=True) as result, pytest.raises(ForeignError, match="rules: there are none"):
        result()


def test_a_copy_that_dies_is_an_error():
    with (
        beside(lambda: os.kill(os.getpid(), 9), worth_it=True) as result,
        pytest.raises(DiedError, match="ended with status -9: is memory short"),
    ):
        result()


def test_a_copy_that_nobody_waits_for_is_ended():
    pids, tell = os.pipe()

    def work():
        os.write(tell, str(os.getpid()).encode())
        threading.Event().wait()

    with beside(work, worth_it=True):
        pid = int(os.read(pids, 20))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("attribute", "value"), [("sched_getaffinity", lambda _: {0}), ("active_count", lambda: 2), ("", None)]
)
def test_work_that_is_not_worth_a_copy_is_done_here(attribute, value, monkeypatch):
    if attribute:
        monkeypatch.setattr(os if attribute == "sched_getaffinity" else threading, attribute, value)
    with beside(os.getpid, worth_it=bool(attribute)) as result:
        assert result() == os.getpid()
