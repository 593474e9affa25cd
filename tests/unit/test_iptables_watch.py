"""What is taken for the write of another process, and what is not."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable

from rules.dataplane import DataplaneError
from rules.iptables.watch import OwnWrites


class Rules:
    """Rules whose signature is a number."""

    def __init__(self) -> None:
        self.now = 0
        self.opened = self.closed = 0
        self.error: Exception | None = None

    def open(self) -> Rules:
        self.opened += 1
        return self

    def take(self) -> Hashable:
        if self.error is not None:
            raise self.error
        return self.now

    def close(self) -> None:
        self.closed += 1


def test_another_write_than_ours_disturbs_once() -> None:
    rules = Rules()
    writes = OwnWrites(rules.open)
    assert not writes.disturbed(), "nothing is known before the first look"
    rules.now = 1
    assert writes.disturbed()
    assert not writes.disturbed()
    assert rules.opened == 1


def test_what_we_write_disturbs_nobody_and_what_comes_after_it_does() -> None:
    rules = Rules()
    writes = OwnWrites(rules.open)
    writes.disturbed()
    with writes.writing():
        rules.now = 1
        assert not writes.disturbed(), "we are at it"
    assert not writes.disturbed()
    rules.now = 2
    assert writes.disturbed()


def test_nobody_looks_while_the_sockets_are_at_work() -> None:
    rules = Rules()
    writes = OwnWrites(rules.open)
    writes.disturbed()
    rules.now = 1
    with writes.unwatched():
        assert not writes.disturbed()
    assert writes.disturbed(), "it is seen afterwards"


def test_after_a_write_that_failed_nothing_is_expected() -> None:
    rules = Rules()
    writes = OwnWrites(rules.open)
    writes.disturbed()
    with contextlib.suppress(DataplaneError), writes.writing():
        rules.now = 1
        raise DataplaneError("refused")
    assert not writes.disturbed()
    rules.now = 2
    assert writes.disturbed()


def test_what_cannot_be_looked_at_disturbs_nobody() -> None:
    rules = Rules()
    writes = OwnWrites(rules.open)
    writes.disturbed()
    for rules.error in (OSError("no"), DataplaneError("no")):
        assert not writes.disturbed()
        with writes.writing():
            pass
    rules.error = None
    rules.now = 1
    assert not writes.disturbed(), "what it was after the last write nobody knows"


def test_after_its_end_nobody_looks() -> None:
    rules = Rules()
    writes = OwnWrites(rules.open)
    writes.disturbed()
    writes.close()
    rules.now = 1
    assert not writes.disturbed()
    assert (rules.opened, rules.closed) == (1, 1)
