"""The counters of connection tracking's entries, and the events of flows that end, without a kernel."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import Protocol
from rules.netlink.attributes import DecodeError, attribute, be32, be64, message, nested, u8
from rules.netlink.conntrack import DESTINATION_NAT, Flow, decode
from rules.netlink.counters import Counts, Measured, _ended, measure

# Linux 6.18, the end of 127.0.0.1:… -> 10.96.0.1:80/TCP, translated to 127.0.0.1:8080, with its header.
TCP_TUPLES = (
    "34000180 14000180 08000100 0a600001 08000200 0a600001 1c000280 05000100 06000000 06000200 d3280000 "
    "06000300 00500000"
    "34000280 14000180 08000100 7f000001 08000200 0a600001 1c000280 05000100 06000000 06000200 1f900000 "
    "06000300 d3280000"
)
ENDED = bytes.fromhex(
    f"02000000 {TCP_TUPLES} 08000c00 373ef50b 08000300 000003ae"
    "1c000980 0c000100 0000000000000004 0c000200 00000000000000d8"
    "1c000a80 0c000100 0000000000000002 0c000200 0000000000000458"
    "10000480 0c000180 05000100 08000000"
)
# The same flow, as it was listed while it was open.
OPEN = bytes.fromhex(
    f"02000000 {TCP_TUPLES} 08000300 000001ae 08000800 00000000 08000c00 373ef50b 08000b00 00000001 08000700 0006977f"
    "30000480 2c000180 05000100 03000000 05000200 0a000000 05000300 0a000000 06000400 23000000 06000500 23000000"
    "1c000980 0c000100 0000000000000003 0c000200 00000000000000a4"
    "1c000a80 0c000100 0000000000000002 0c000200 0000000000000458"
)


def flow(rest: bytes = b"", **fields: object) -> Flow:
    client, service, pod = bytes([10, 1, 0, 9]), bytes([10, 96, 0, 1]), bytes([10, 244, 0, 2])
    made = Flow(client, service, Protocol.TCP, 1019, 80, pod, client, 8080, 1019, DESTINATION_NAT, rest)
    return made._replace(**fields)


def rest(identity: int | None = 7, counts: Counts | None = None, state: int | None = None) -> bytes:
    """What follows an entry's status."""
    found = b"" if identity is None else be32(12, identity)
    if counts is not None:
        found += nested(9, be64(1, counts.packets_in), be64(2, counts.bytes_in))
        found += nested(10, be64(1, counts.packets_out), be64(2, counts.bytes_out))
    if state is not None:
        found += nested(4, nested(1, u8(1, state)))
    return found


def test_a_recorded_entry_tells_number_and_counters():
    found = decode(OPEN, 0, len(OPEN))
    assert found is not None
    assert measure(found) == Measured(0x373EF50B, Counts(3, 164, 2, 1112), closed=False)


def test_a_recorded_end_tells_the_same_flow_with_its_last_counters():
    opened, ended = decode(OPEN, 0, len(OPEN)), decode(ENDED, 0, len(ENDED), event=True)
    assert opened is not None
    assert ended is not None
    assert opened[:9] == ended[:9]
    assert ended.status & DESTINATION_NAT
    assert measure(ended) == Measured(0x373EF50B, Counts(4, 216, 2, 1112), closed=True)


def test_an_event_in_another_order_is_read_all_the_same():
    """Older kernels tell the number after the status, newer ones may tell more."""
    body = ENDED[: 4 + 2 * 52] + bytes.fromhex("08000300 000003ae") + bytes.fromhex("08000c00 373ef50b") + ENDED[124:]
    found = decode(body, 0, len(body), event=True)
    assert found is not None
    assert measure(found) == Measured(0x373EF50B, Counts(4, 216, 2, 1112), closed=True)


def test_datagrams_of_several_events_and_of_none():
    event = message(0x0102, 0, ENDED)
    assert [each.port for each in _ended(event * 3)] == [80, 80, 80]
    assert list(_ended(b"")) == []
    assert len(list(_ended(event + event[:40]))) == 1


def test_a_flow_that_the_kernel_did_not_count():
    assert measure(flow(rest(9))) == Measured(9, None, closed=False)
    assert measure(flow(b"")) == Measured(None, None, closed=False)


@pytest.mark.parametrize(("state", "closed"), [(3, False), (4, False), (7, True), (8, True)])
def test_which_tcp_states_are_closed(state, closed):
    assert measure(flow(rest(1, Counts(1, 1, 1, 1), state))).closed is closed
    assert not measure(flow(rest(1, Counts(1, 1, 1, 1), state), protocol=Protocol.UDP)).closed


def test_counters_in_another_order():
    swapped = nested(9, be64(2, 100), be64(1, 3)) + nested(10, attribute(9, b"more"), be64(1, 1), be64(2, 2))
    assert measure(flow(swapped)).counts == Counts(3, 100, 1, 2)


@pytest.mark.parametrize("broken", [nested(9, be64(1, 3)), nested(9, be32(1, 3), be64(2, 1)), attribute(12, b"abc")])
def test_counters_that_make_no_sense(broken):
    with pytest.raises(DecodeError):
        measure(flow(broken))


@given(st.binary(max_size=200))
def test_arbitrary_rests_and_events_raise_nothing_else(data):
    for decoder in (
        lambda: measure(flow(data)),
        lambda: decode(data, 0, len(data), event=True),
        lambda: list(_ended(data)),
    ):
        with contextlib.suppress(DecodeError):
            decoder()


@given(st.integers(0, len(ENDED) - 1), st.integers(0, 255))
def test_mutated_events_raise_nothing_else(place, value):
    data = bytearray(ENDED)
    data[place] = value
    with contextlib.suppress(DecodeError):
        found = decode(bytes(data), 0, len(data), event=True)
        if found is not None:
            measure(found)
