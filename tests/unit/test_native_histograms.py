"""The gate NativeHistograms: metrics in protobuf, with native histograms among them (MET-32)."""

from __future__ import annotations

import asyncio
import math
import struct
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.load import load
from proxy.serving.messages import Request
from proxy.serving.metrics import CONTENT_TYPE, Metrics
from proxy.serving.native import MOST, SCHEMA, Sparse, bucket
from proxy.serving.protobuf import is_asked_for
from proxy.serving.servers import MetricsPages
from rules.dataplane import Applied
from rules.forwarding import Family

SCRAPER = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,"
    "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
)
SYNC = "kubeproxy_sync_proxy_rules_duration_seconds"


# --- buckets ---------------------------------------------------------------------------------------------------


@given(st.floats(1e-30, 1e30), st.integers(-4, SCHEMA))
def test_a_value_is_in_the_bucket_that_it_does_not_exceed(value, schema):
    index = bucket(value, schema)
    step = 2.0**-schema
    assert 2.0 ** ((index - 1) * step) * (1 - 1e-12) <= value <= 2.0 ** (index * step) * (1 + 1e-12)


@pytest.mark.parametrize("schema", range(-4, SCHEMA + 1))
@pytest.mark.parametrize("power", range(-20, 21))
def test_powers_of_two_end_buckets(power, schema):
    assert bucket(2.0**power, schema) == math.ceil(power * 2.0**schema)
    assert bucket(math.nextafter(2.0**power, math.inf), schema) == math.floor(power * 2.0**schema) + 1


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_nothing_is_lost(values):
    sparse = Sparse()
    for value in values:
        sparse.add(value)
    assert counted(sparse) == len(values)
    assert sum(span.length for span in sparse.spans()) == len(list(sparse.deltas())) == len(sparse.counts)


def test_with_too_many_buckets_pairs_of_them_become_one():
    sparse = Sparse()
    values = [2.0 ** (index / 8 + 0.01) for index in range(-MOST, MOST)]
    for value in values:
        sparse.add(value)
    assert sparse.schema == SCHEMA - 1
    assert counted(sparse) == len(values)
    expected = defaultdict(int)
    for value in values:
        expected[bucket(value, sparse.schema)] += 1
    assert sparse.counts == expected


def test_what_is_no_bucket():
    sparse = Sparse()
    for value in (0.0, 1e-300, math.nan, math.inf):
        sparse.add(value)
    assert (sparse.zeros, sparse.counts) == (2, {})


def counted(sparse):
    total, count = sparse.zeros, 0
    for delta in sparse.deltas():
        count += delta
        total += count
    return total


# --- the form: read by a reader that knows wire types and nothing else -------------------------------------------


def fields(data):
    """The fields of a message: number, and a whole number, eight bytes or bytes."""
    found, position = [], 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        elif tag & 7 == 1:
            value = struct.unpack("<d", data[position : position + 8])[0]
            position += 8
        else:
            assert tag & 7 == 2
            length = varint()
            value = data[position : position + length]
            assert len(value) == length
            position += length
        found.append((tag >> 3, value))
    return found


def families(data):
    """The messages of a stream, each as its fields, by the metric's name."""
    # A stream of lengths and messages has the form of one message's packed fields behind a tag each.
    found, position = {}, 0
    while position < len(data):
        length = shift = 0
        while True:
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        message = fields(data[position : position + length])
        found[dict(message)[1].decode()] = message
        position += length
    return found


def zigzag(value):
    return value >> 1 if not value & 1 else -(value >> 1) - 1


def metric_of(family, **labels):
    """A Metric's fields, by its labels."""
    for number, message in family:
        if number == 4:
            found = fields(message)
            pairs = {dict(fields(each))[1].decode(): dict(fields(each))[2].decode() for tag, each in found if tag == 1}
            if pairs == labels:
                return {tag: each for tag, each in found if tag != 1}
    raise AssertionError(f"no metric with {labels}")


def test_histograms_are_native_ones_too():
    metrics = Metrics("nftables", "1", native=True)
    for seconds in (0.001, 0.001, 0.3, 5.0):
        metrics.sync_done(Family.IPV4, seconds, Applied(full=True))
    form, body = metrics.exposition_for(SCRAPER)
    assert form.startswith("application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily")
    family = families(body)[SYNC]
    assert dict(family)[3] == 4
    histogram = fields(metric_of(family, ip_family="IPv4")[7])
    single = dict(histogram)
    assert single[1] == 4
    assert single[2] == pytest.approx(5.302)
    assert (zigzag(single[5]), single[6], single[7]) == (SCHEMA, 2.0**-128, 0)
    ends = [dict(fields(each)) for tag, each in histogram if tag == 3]
    assert len(ends) == 15  # MET-1; the one of infinity follows from the count
    assert next(each[1] for each in ends if each[2] == 0.512) == 3
    counts, index, count = {}, 0, 0
    deltas = iter([zigzag(each) for tag, each in histogram if tag == 13])
    for span in (dict(fields(each)) for tag, each in histogram if tag == 12):
        index += zigzag(span[1])
        for _ in range(span[2]):
            count += next(deltas)
            counts[index] = count
            index += 1
    assert counts == {bucket(0.001, SCHEMA): 2, bucket(0.3, SCHEMA): 1, bucket(5.0, SCHEMA): 1}


def test_everything_that_is_in_the_text_is_in_the_other_form():
    metrics = Metrics("iptables", "1", native=True)
    for family in Family:
        metrics.started(family)
        metrics.sync_done(family, 0.1, Applied(full=True, rules={"nat": 3}))
    metrics.healthz_answered(200)
    text = metrics.exposition().decode()
    found = families(metrics.exposition_for(SCRAPER)[1])
    kinds = {"counter": 0, "gauge": 1, "histogram": 4, "untyped": 3}
    told = dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE "))
    assert {name: dict(message).get(3) for name, message in found.items()} == {
        name: kinds[kind] for name, kind in told.items()
    }
    assert fields(metric_of(found["kubeproxy_proxy_healthz_total"], code="200")[3]) == [(1, 1.0)]
    rules = metric_of(found["kubeproxy_sync_proxy_rules_iptables_total"], ip_family="IPv6", table="nat")
    assert fields(rules[2]) == [(1, 3.0)]


# --- who gets it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (SCRAPER, True),
        ("application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited", True),
        ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text", False),
        ("text/plain", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_who_asks_for_it(accept, expected):
    assert is_asked_for(accept) is expected


@pytest.mark.parametrize("gate", ["true", "false"])
def test_met_32_it_is_served_to_who_asks_for_it_with_the_gate_and_to_nobody_without(gate):
    loaded = load([("feature-gates", f"NativeHistograms={gate}")])
    assert loaded.warnings == ()
    native = loaded.settings.feature_gates["NativeHistograms"]
    pages = MetricsPages(loaded.settings, Metrics("nftables", "1", native=native), "nftables", "1")

    async def asked(accept):
        response = pages.answer(Request("GET", "/metrics", "", f"Accept: {accept}\r\n".encode()))
        return dict(response.headers)["Content-Type"]

    assert asyncio.run(asked("text/plain")) == CONTENT_TYPE
    assert asyncio.run(asked(SCRAPER)).startswith("application/vnd") is (gate == "true")
