"""Logs: one event, one line, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import logs
from proxy.objects import Key


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    logging.getLogger().handlers[:] = [
        each for each in logging.getLogger().handlers if not isinstance(each, logs._Forward)
    ]
    logging.captureWarnings(capture=False)
    logs.structlog.reset_defaults()


def test_text_is_one_aligned_line_without_colour_in_a_pipe():
    out = io.StringIO()
    logs.configure("text", stream=out)
    log = logs.get_logger("sluice.agent")
    log.info("synced", family="IPv4", seconds=0.00123456, note="two words", names=["a"], empty="")
    log.warning("synced", family="IPv6")
    first, second = out.getvalue().splitlines()
    assert first.endswith('family=IPv4 seconds=0.00123456 note="two words" names=["a"] empty=""')
    assert "\x1b" not in out.getvalue()
    assert first.index("sluice.agent") == second.index("sluice.agent")
    assert first.index("family=") == second.index("family=")


def test_a_terminal_gets_colour():
    out = Terminal()
    logs.configure("text", stream=out)
    logs.get_logger("sluice.agent").error("broken", why="x")
    assert "\x1b[31m" in out.getvalue()


def test_json_has_one_object_a_line():
    out = io.StringIO()
    logs.configure("json", stream=out)
    logs.get_logger("sluice.sync").info("synced", service=Key("ns", "n"), count=3, addresses={"b"})
    value = json.loads(out.getvalue())
    assert value.pop("time").endswith("Z")
    assert value == {
        "level": "info",
        "logger": "sluice.sync",
        "event": "synced",
        "service": "ns/n",
        "count": 3,
        "addresses": "{'b'}",
    }


@pytest.mark.parametrize(("verbosity", "shown"), [(0, False), (3, False), (4, True), (9, True)])
def test_cfg_64_single_events_are_told_from_verbosity_4(verbosity, shown):
    out = io.StringIO()
    logs.configure("text", verbosity, stream=out)
    logs.get_logger("sluice.state").debug("changed")
    assert bool(out.getvalue()) is shown


@pytest.mark.parametrize(("verbosity", "shown"), [(0, False), (1, False), (2, True), (9, True)])
def test_what_is_for_a_higher_verbosity_is_not_told(verbosity, shown):
    told = []
    for first in (verbosity, 5):
        out = io.StringIO()
        logs.configure("json", first, stream=out)
        logs.set_verbosity(verbosity)
        logs.get_logger("sluice.sync").info("synced", from_verbosity=2)
        told.append([json.loads(line).keys() for line in out.getvalue().splitlines()])
    assert told == [[{"time", "level", "logger", "event"}] if shown else []] * 2


def test_another_verbosity_leaves_the_form_and_the_stream():
    out = io.StringIO()
    logs.configure("json", stream=out)
    log = logs.get_logger("sluice.early")
    for verbosity in (4, 0):
        logs.set_verbosity(verbosity)
        log.debug("changed", v=verbosity)
    assert [json.loads(line)["v"] for line in out.getvalue().splitlines()] == [4]


def test_a_logger_made_before_follows_the_configuration():
    log = logs.get_logger("sluice.early")
    out = io.StringIO()
    logs.configure("json", stream=out)
    log.info("hello")
    assert json.loads(out.getvalue())["logger"] == "sluice.early"


def test_libraries_come_out_in_the_same_form_from_warnings_up():
    out = io.StringIO()
    logs.configure("json", stream=out)
    logs.configure("json", stream=out)  # twice, but every record once
    logging.getLogger("aiohttp.server").info("noise")
    logging.getLogger("aiohttp.server").warning("odd %s", "request")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["odd request"]


def test_exceptions_keep_their_trace():
    out = io.StringIO()
    logs.configure("text", stream=out)
    try:
        int("deep")
    except ValueError:
        logs.get_logger("sluice.agent").exception("failed")
    assert "ValueError: invalid literal" in out.getvalue()


def test_a_log_that_cannot_be_written_stops_nobody():
    out = io.StringIO()
    logs.configure("text", stream=out)
    out.close()
    logs.get_logger("sluice.agent").info("unheard")


@given(event=st.text(min_size=1), value=st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
def test_no_event_and_no_value_can_forge_a_line(event, value):
    out = Terminal()
    logs.configure("text", stream=out)
    logs.get_logger("sluice.agent").info(event, value=value)
    line = out.getvalue()
    assert line.endswith("\n")
    for colour in ("\x1b[2m", "\x1b[1m", "\x1b[32m", "\x1b[0m"):
        line = line.replace(colour, "")
    assert line[:-1].isprintable()


def test_the_agent_does_not_carry_rich():
    code = "import sys, proxy.logs; proxy.logs.configure(); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
