"""What legacy iptables tells of traced packets: lines from bytes, and which rule ended a packet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import Family, Protocol, parse_address
from rules.iptables.trace import (
    LOGGER,
    Line,
    chains_of,
    decode_line,
    decode_lines,
    end_of,
    logging_to_sockets,
)
from rules.netlink.attributes import DecodeError, attribute, message, text
from rules.netlink.conntrack_events import decode_passages
from rules.netlink.headers import Headers, headers_of_packet
from tests.fakes.polling import eventually

CLIENT, SERVICE = parse_address("10.244.1.13"), parse_address("10.96.0.1")
HEADERS = Headers(CLIENT, 40000, SERVICE, 80, Protocol.TCP)
IPV4 = bytes((0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0)) + CLIENT + SERVICE
TCP = struct.pack("!HH", 40000, 80) + bytes(16)
SAVED = """# Generated
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [12:720]
:SLUICE-R - [0:0]
:SLUICE-DROP-CLUSTER-IP - [0:0]
-A FORWARD -p tcp -m comment --comment "never -j DROP" -j SLUICE-R
-A FORWARD -p tcp -j REJECT --reject-with icmp-port-unreachable
-A SLUICE-DROP-CLUSTER-IP -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
COMMIT
"""


def payload(prefix: str, packet: bytes = IPV4 + TCP) -> bytes:
    return bytes((2, 0, 0, 0)) + attribute(9, packet) + text(10, prefix)


def line(table: str, chain: str, kind: str, number: int) -> Line:
    return Line(table, chain, kind, number, HEADERS)


def test_a_line_has_the_rule_and_the_headers():
    assert decode_line(payload("TRACE: filter:SLUICE-R:rule:3 ")) == line("filter", "SLUICE-R", "rule", 3)


@pytest.mark.parametrize("prefix", ["", "TRACE: filter", "dropped: ", "TRACE: filter:INPUT:rules:3 "])
def test_what_others_log_is_no_line(prefix):
    assert decode_line(payload(prefix)) is None


def test_options_before_the_ports_are_passed_over():
    longer = bytes((0x46,)) + IPV4[1:] + bytes(4)
    assert headers_of_packet(longer + TCP) == HEADERS
    assert headers_of_packet(bytes((0x4F,)) + IPV4[1:] + TCP) is None
    assert headers_of_packet(b"") is None


@pytest.mark.parametrize(
    ("told", "end"),
    [
        (line("filter", "FORWARD", "rule", 1), ("", 1)),
        (line("filter", "FORWARD", "rule", 2), ("REJECT", 2)),
        (line("filter", "FORWARD", "policy", 3), ("DROP", 0)),
        (line("filter", "INPUT", "policy", 1), ("", 0)),
        # A rule that matches everything is told as if it were the end of the chain.
        (line("filter", "SLUICE-DROP-CLUSTER-IP", "return", 1), ("DROP", 1)),
        (line("filter", "SLUICE-DROP-CLUSTER-IP", "return", 2), ("", 0)),
        (line("filter", "GONE", "rule", 7), ("", 7)),
    ],
)
def test_which_rule_ended_a_packet(told, end):
    assert end_of(told, chains_of(SAVED)) == end


@given(st.binary(max_size=300), st.text(max_size=60))
def test_arbitrary_bytes_are_lines_or_raise_decode_error_alone(data, prefix):
    for each in (data, payload("TRACE: ", data), bytes(4) + attribute(10, prefix.encode())):
        with contextlib.suppress(DecodeError):
            decode_line(each)
        assert isinstance(decode_lines(each), list)
        assert isinstance(decode_lines(message(4 << 8, 0, each)), list)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_new_connections_or_nothing(data):
    assert isinstance(decode_passages(data), list)
    assert isinstance(decode_passages(message(1 << 8, 0, bytes((2, 0, 0, 0)) + data)), list)


@given(st.text(alphabet='*:-A \n"jDROPREJECT[]0', max_size=200))
def test_arbitrary_text_has_chains_or_none(saved):
    chains = chains_of(saved)
    for table, chain in chains:
        end_of(line(table, chain, "policy", 1), chains)


@pytest.fixture
def loggers(tmp_path: Path) -> Path:
    (tmp_path / "2").write_text("nf_log_ipv4\n")
    (tmp_path / "10").write_text("NONE\n")
    return tmp_path


def test_the_logger_is_given_back(loggers):
    with logging_to_sockets(Family, loggers):
        assert [(loggers / each).read_text() for each in ("2", "10")] == [LOGGER, LOGGER]
    assert [(loggers / each).read_text() for each in ("2", "10")] == ["nf_log_ipv4", "NONE"]


def test_the_logger_is_given_back_when_the_process_is_killed(loggers):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with logging_to_sockets([Family.IPV4], loggers):
            os.write(writing, b"x")
            os.kill(os.getpid(), 9)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.waitpid(child, 0)
    os.close(reading)
    asyncio.run(eventually(lambda: (loggers / "2").read_text() == "nf_log_ipv4"))
    assert (loggers / "10").read_text() == "NONE\n"


def test_what_somebody_else_set_meanwhile_stays(loggers):
    with logging_to_sockets([Family.IPV4], loggers):
        (loggers / "2").write_text("nf_log_syslog")
    assert (loggers / "2").read_text() == "nf_log_syslog"


def test_without_the_setting_it_says_so(tmp_path):
    with pytest.raises(OSError, match="No such file"), logging_to_sockets([Family.IPV4], tmp_path):
        raise AssertionError
