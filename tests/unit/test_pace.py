"""How often an API server is asked: clientConnection.qps and burst (CFG-2)."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sources.pace import Pace


class Time:
    """A clock that only waiting, and the test, move on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


def times(qps, burst, pauses):
    """When requests go that come so many seconds after the ones before have gone."""
    time = Time()
    pace = Pace(qps, burst, clock=time, sleep=time.sleep)
    found = []

    async def ask():
        for pause in pauses:
            time.now += pause
            await pace.turn()
            found.append(time.now)

    asyncio.run(ask())
    return found


@pytest.mark.parametrize(
    ("qps", "burst", "pauses", "expected"),
    [
        (5, 10, [0] * 12, [0] * 10 + [0.2, 0.4]),
        (1, 2, [0, 0, 0, 10, 0, 0], [0, 0, 1, 11, 11, 12]),
        (2, 1, [0, 0.25, 0.25], [0, 0.5, 1.0]),
        (0.5, 1, [0, 0], [0, 2]),
        (-1, 1, [0] * 100, [0] * 100),
        (5, 0, [0, 0], [0, 0.2]),
    ],
)
def test_cfg_2_requests_beyond_the_burst_wait_for_their_second(qps, burst, pauses, expected):
    assert times(qps, burst, pauses) == pytest.approx(expected)


@given(
    st.floats(0.1, 100),
    st.integers(1, 20),
    st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
def test_never_more_than_burst_and_qps_allow(qps, burst, pauses):
    found = times(qps, burst, pauses)
    for first in range(len(found)):
        for last in range(first, len(found)):
            assert last - first + 1 <= burst + (found[last] - found[first]) * qps + 1e-6
