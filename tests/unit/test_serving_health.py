"""Health of the proxy: HC-1 to HC-9."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.node import eligible
from proxy.serving.health import ProxyHealth, format_time
from rules.forwarding import Family
from tests.builders import node

DATA = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
V4, V6 = Family.IPV4, Family.IPV6


class Clock:
    """Time that passes when told to; the date can be set apart from the seconds that passed."""

    def __init__(self):
        self.seconds = 0.0
        self.offset = 1_795_202_886

    def sleep(self, seconds):
        self.seconds += seconds

    def now(self):
        return int((self.offset + self.seconds) * 1_000_000_000)

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    found = ProxyHealth(10.0, now=clock.now, monotonic=clock.monotonic)
    found.set_eligible(True)
    return found


def statuses(health):
    return health.healthz().status, health.livez().status


def family_health(health):
    return {family: each["healthy"] for family, each in json.loads(health.livez().body)["status"].items()}


def test_hc_9_script(health, clock):
    assert statuses(health) == (200, 200)
    for family in Family:
        health.updated(family)
    assert statuses(health) == (200, 200)
    clock.sleep(25)  # idle: nothing waits
    assert statuses(health) == (200, 200)

    health.queued(V4)
    clock.sleep(25)
    assert statuses(health) == (503, 503)
    assert family_health(health) == {"IPv4": False, "IPv6": True}
    health.updated(V4)
    assert statuses(health) == (200, 200)

    health.queued(V6)
    clock.sleep(25)
    assert family_health(health) == {"IPv4": True, "IPv6": False}
    health.updated(V4)  # does not help the other
    assert statuses(health) == (503, 503)
    health.updated(V6)
    assert statuses(health) == (200, 200)

    health.set_eligible(eligible(node(taints=("ToBeDeletedByClusterAutoscaler",))))
    body = json.loads(health.healthz().body)
    assert (body["healthy"], body["nodeEligible"]) == (True, False)
    assert statuses(health) == (503, 200)
    health.set_eligible(eligible(node(taints=("other",))))
    assert statuses(health) == (200, 200)
    health.set_eligible(eligible(node(deleted=True)))
    assert statuses(health) == (503, 200)


def test_hc_3_a_wait_of_exactly_the_timeout_is_unhealthy(health, clock):
    health.started(V4)
    health.queued(V4)
    clock.sleep(9.99)
    assert health.healthy()
    clock.sleep(0.01)
    assert not health.healthy()


def test_hc_2_the_oldest_request_counts(health, clock):
    health.started(V4)
    health.queued(V4)
    clock.sleep(6)
    health.queued(V4)
    clock.sleep(6)
    assert not health.healthy(V4)


def test_hc_3_a_family_that_has_not_started_makes_nobody_unhealthy(health, clock):
    health.queued(V6)
    clock.sleep(60)
    assert health.healthy()
    assert "status" not in json.loads(health.healthz().body)


def test_hc_5_a_node_never_seen_is_not_eligible(clock):
    found = ProxyHealth(10.0, now=clock.now, monotonic=clock.monotonic)
    assert not eligible(None)
    assert statuses(found) == (503, 200)
    assert json.loads(found.healthz().body)["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_setting_the_date_makes_nobody_unhealthy(health, clock):
    health.started(V4)
    health.queued(V4)
    clock.offset += 86400
    assert health.healthy()


def test_hc_6_bodies_have_the_shape_that_was_recorded(health, clock):
    health.started(V4)
    health.started(V6)
    clock.sleep(0.25)
    recorded = (DATA / "nftables.healthz.json").read_text()
    times = re.compile(r'"\d{4}-\d\d-\d\dT[0-9:.]+Z"')
    assert times.sub("T", health.healthz().body.decode()) == times.sub("T", recorded)
    assert times.sub("T", health.livez().body.decode()) == times.sub("T", recorded).replace('"nodeEligible":true,', "")


def test_hc_6_the_top_date_is_now_when_well_and_the_newest_success_otherwise(health, clock):
    health.started(V4)
    clock.sleep(1)
    health.started(V6)
    clock.sleep(1)
    body = json.loads(health.healthz().body)
    assert body["lastUpdated"] == body["currentTime"] == format_time(clock.now())
    health.queued(V4)
    clock.sleep(20)
    body = json.loads(health.healthz().body)
    assert body["currentTime"] == format_time(clock.now())
    assert body["lastUpdated"] == body["status"]["IPv6"]["lastUpdated"] > body["status"]["IPv4"]["lastUpdated"]


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (1_795_202_869_445_109_700, "2026-11-20T19:27:49.4451097Z"),
        (1_795_202_869_000_000_000, "2026-11-20T19:27:49Z"),
        (1_795_202_869_000_000_001, "2026-11-20T19:27:49.000000001Z"),
        (None, "0001-01-01T00:00:00Z"),
    ],
)
def test_hc_6_times_are_gos(nanoseconds, text):
    assert format_time(nanoseconds) == text


steps = st.sampled_from(["queued", "updated"]).flatmap(
    lambda step: st.tuples(st.just(step), st.sampled_from(Family), st.floats(0, 15))
)


@given(st.lists(steps, max_size=20))
def test_hc_3_healthy_is_no_request_waiting_for_the_timeout(script):
    clock = Clock()
    found = ProxyHealth(10.0, now=clock.now, monotonic=clock.monotonic)
    waiting, started = {}, set()
    for step, family, pause in script:
        getattr(found, step)(family)
        if step == "updated":
            started.add(family)
            waiting.pop(family, None)
        else:
            waiting.setdefault(family, clock.seconds)
        clock.sleep(pause)
        late = {family for family, since in waiting.items() if clock.seconds - since >= 10.0}
        assert found.healthy() is not bool(late & started)
        assert found.livez().status == (503 if late & started else 200)


def test_hc_3_the_timeout_may_become_another(health, clock):
    health.started(V4)
    health.queued(V4)
    clock.sleep(12)
    assert not health.healthy()
    health.set_timeout(20.0)
    assert health.healthy()
