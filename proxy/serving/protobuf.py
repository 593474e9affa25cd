"""Metrics in Prometheus' protobuf form: the only one in which native histograms can be scraped (MET-32).

A stream of `io.prometheus.client.MetricFamily` messages, each behind its length.  The few kinds of fields that it has
are written by hand: a schema compiler and its runtime would cost the agent more memory than all its metrics.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.samples import Sample

from proxy.serving.native import ZERO, NativeHistogram, Span, Sparse

CONTENT_TYPE = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

_COUNTER, _GAUGE, _UNTYPED, _HISTOGRAM = 0, 1, 3, 4
_TYPES = {"counter": _COUNTER, "gauge": _GAUGE, "histogram": _HISTOGRAM}
_VALUE_FIELD = {_GAUGE: 2, _COUNTER: 3, _UNTYPED: 5}
"""Of a Metric."""


def is_asked_for(accept: str) -> bool:
    """Whether a scraper takes this form; it asks for it before any other."""
    for choice in accept.split(","):
        media, *rest = (part.strip() for part in choice.split(";"))
        wanted = {"proto=io.prometheus.client.MetricFamily", "encoding=delimited"}
        if media == "application/vnd.google.protobuf" and wanted <= set(rest):
            return True
    return False


def exposition(metrics: Iterable[Metric], natives: Mapping[str, NativeHistogram]) -> bytes:
    """All metrics; `natives` are those of the histograms that are native as well, by name."""
    return b"".join(_prefixed(message) for metric in metrics for message in _families(metric, natives.get(metric.name)))


def _families(metric: Metric, native: NativeHistogram | None) -> Iterator[bytes]:
    kind = _TYPES.get(metric.type, _UNTYPED)
    name = f"{metric.name}_total" if kind == _COUNTER else metric.name
    body = [_text(1, name), _text(2, metric.documentation), _number(3, kind)]
    if kind == _HISTOGRAM:
        body += [_message(4, each) for each in _histograms(metric.samples, native)]
    else:
        field = _VALUE_FIELD[kind]
        body += [
            _message(4, _labels(sample.labels) + _message(field, _double(1, sample.value)))
            for sample in metric.samples
            if sample.name == name
        ]
    yield b"".join(body)


class _Series(NamedTuple):
    """The samples of one histogram."""

    labels: Mapping[str, str]
    buckets: list[tuple[float, int]]
    rest: dict[str, float]


def _histograms(samples: Iterable[Sample], native: NativeHistogram | None) -> Iterator[bytes]:
    found: dict[tuple[str, ...], _Series] = {}
    for sample in samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        series = found.setdefault(tuple(labels.values()), _Series(labels, [], {}))
        if "le" in sample.labels:
            if (end := float(sample.labels["le"])) < math.inf:  # the last one follows from the count
                series.buckets.append((end, int(sample.value)))
        else:
            series.rest[sample.name.rpartition("_")[2]] = sample.value
    for values, series in found.items():
        body = [_number(1, int(series.rest.get("count", 0))), _double(2, series.rest.get("sum", 0.0))]
        body += [_message(3, _number(1, count) + _double(2, end)) for end, count in series.buckets]
        child = native.children.get(values) if native is not None and values else native
        if child is not None:
            body.append(_native(child.native))
        yield _labels(series.labels) + _message(7, b"".join(body))


def _native(sparse: Sparse) -> bytes:
    body = [_number(5, _zigzag(sparse.schema)), _double(6, ZERO), _number(7, sparse.zeros)]
    # A span of nothing says that the histogram is native although it is empty.
    spans = sparse.spans() or [Span(0, 0)]
    body += [_message(12, _number(1, _zigzag(each.offset)) + _number(2, each.length)) for each in spans]
    body += [_number(13, _zigzag(delta)) for delta in sparse.deltas()]
    return b"".join(body)


def _labels(labels: Mapping[str, str]) -> bytes:
    return b"".join(_message(1, _text(1, name) + _text(2, value)) for name, value in labels.items())


# --- the encoding --------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _prefixed(body: bytes) -> bytes:
    return _varint(len(body)) + body


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _prefixed(body)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
