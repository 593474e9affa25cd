"""Where lines of the log go, and what becomes of them when nobody takes them."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest
import structlog

from proxy import log_output, logs
from proxy.log_output import Output


def pipe() -> tuple[int, TextIO]:
    reading, writing = os.pipe()
    return reading, os.fdopen(writing, "w")


def journal() -> tuple[int, TextIO]:
    """As systemd gives a service its standard error."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ours.detach(), os.fdopen(theirs.detach(), "w")


def read(descriptor: int) -> str:
    os.set_blocking(descriptor, False)
    found = bytearray()
    try:
        while piece := os.read(descriptor, 1 << 20):
            found += piece
    except BlockingIOError:
        pass
    return found.decode()


@pytest.fixture(params=[pipe, journal])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    monkeypatch.setattr(log_output, "PATIENCE", 0.01)
    reading, stream = request.param()
    with stream:
        yield reading, stream
    os.close(reading)


@pytest.mark.parametrize("length", [10, 100_000])
def test_who_stops_reading_holds_up_nobody_and_is_told_how_much_was_lost(ends: tuple[int, TextIO], length: int) -> None:
    reading, stream = ends
    told: list[int] = []
    output = Output(stream, told.append)
    lines = [f"{number} {'x' * length}" for number in range(2_000_000 // (length + 7))]

    def write() -> None:
        for line in lines:
            output.write(line)

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(60)
    assert not writing.is_alive(), "it waits for the reader"
    *whole, last = read(reading).splitlines()
    assert whole == lines[: len(whole)]
    assert lines[len(whole)].startswith(last)
    assert told == []
    output.write("again")
    # Of the line that was cut, the rest is lost.
    assert read(reading).splitlines()[-1] == "again"
    assert told in ([len(lines) - len(whole)], [len(lines) - len(whole) - 1])
    output.write("and again")
    assert read(reading) == "and again\n"
    assert len(told) == 1


def test_the_log_says_what_is_missing(ends: tuple[int, TextIO]) -> None:
    reading, stream = ends
    try:
        logs.configure("json", stream=stream)
        log = logs.get_logger("sluice.agent")
        for _ in range(20):
            log.info("x" * 50_000)
        before = read(reading).count('"event": "xxx')
        log.info("again")
        again, missing = read(reading).splitlines()[-2:]
        assert '"event": "again"' in again
        assert f'"event": "nobody took the log for a while", "lost_lines": {20 - before + 1}' in missing or (
            f'"lost_lines": {20 - before}' in missing
        )
    finally:
        structlog.reset_defaults()


def test_a_reader_who_left_a_stream_that_is_closed_and_one_in_memory(tmp_path: object) -> None:
    reading, stream = pipe()
    os.close(reading)
    output = Output(stream, lambda _: None)
    output.write("to nobody")
    stream.close()
    held, other = os.pipe()  # it has the number of the stream by now, likely
    output.write("to nobody")
    os.close(other)
    assert os.read(held, 100) == b""
    os.close(held)
    memory = io.StringIO()
    Output(memory, lambda _: None).write("kept")
    assert memory.getvalue() == "kept\n"
