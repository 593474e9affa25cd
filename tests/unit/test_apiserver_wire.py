"""Bytes of an API server taken apart, for all inputs."""

import asyncio
import contextlib
import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.objects import Key
from proxy.sources import wire
from proxy.sources.apiserver import Reporter
from proxy.sources.base import Resource
from proxy.sources.progress import Progress, Settings, Timing
from proxy.sources.reflector import Event, Listed, Reflector, Target
from tests.fakes.api_source import RecordingSink, service

AWKWARD = [
    *(b"", b"{", b"[" * 100_000, b"null", b"7", b'"x"', b"{}", b'{"type":"ADDED"}', b"\xff\xfe", b"\r", b" "),
    *(b'{"type":"ADDED","object":7}', b'{"type":5,"object":{}}', b'{"type":"ERROR","object":{}}'),
    *(b'{"type":"ERROR","object":"no"}', b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":7}}}'),
    b'{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"not a number"}}}',
    b'{"type":"ADDED","object":{"metadata":{"name":"\\ud800"}}}',
    b'{"type":"ADDED","object":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
]


@given(st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_the_same_however_the_bytes_are_cut(lines, data):
    stream = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    found = wire.Lines()
    out = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        out += found.feed(stream[start:end])
    assert out == [line for line in lines if line.strip()]
    assert found.pending == 0


def test_a_line_that_has_not_ended_is_pending():
    lines = wire.Lines()
    assert lines.feed(b"a\nbc") == [b"a"]
    assert lines.pending == 2
    assert lines.feed(b"d\n") == [b"bcd"]
    assert lines.pending == 0


def test_a_line_without_end_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(wire, "MAX_LINE", 1000)
    lines = wire.Lines()
    for _ in range(10):
        assert lines.feed(b"x" * 100) == []
    with pytest.raises(wire.WireError):
        lines.feed(b"x")


@pytest.mark.parametrize("data", AWKWARD, ids=lambda data: repr(data[:30]))
def test_awkward_bytes_are_a_wire_error_or_a_value(data):
    for decode in (wire.decode_page, wire.decode_event):
        with contextlib.suppress(wire.WireError):
            decode(data)
    wire.decode_status(data, 500)
    wire.head(data)


@given(st.binary())
def test_any_bytes_are_a_wire_error_or_a_value(data):
    for decode in (wire.decode_page, wire.decode_event):
        with contextlib.suppress(wire.WireError):
            decode(data)
    assert wire.decode_status(data, 500).code
    wire.head(data)


def test_the_head_of_a_malformed_object_is_what_can_be_made_out():
    found = wire.head(b'{"metadata":{"name":"web","namespace":"default","resourceVersion":7,"annotations":[]}}')
    assert (found.key, found.version) == (Key("default", "web"), "")


def test_a_status_says_what_it_means():
    too_large = {"code": 504, "details": {"causes": [{"reason": "ResourceVersionTooLarge"}], "retryAfterSeconds": 1}}
    assert wire.decode_status(json.dumps(too_large).encode()).too_large_version
    assert wire.decode_status(b'{"code":410,"reason":"Expired"}').expired
    assert wire.decode_status(b'{"reason":"Expired"}', 500).expired
    assert not wire.decode_status(b'{"code":504,"message":"Timeout"}').too_large_version
    portal = wire.decode_status(b"Bad Gateway\nfrom nginx", 502)
    assert (portal.code, portal.message) == (502, "Bad Gateway")


class Script:
    """A client whose streams are given as bytes; the last one goes on being given."""

    def __init__(self, *streams):
        self.streams = list(streams)

    async def stream(self, *_, **__):
        yield b""
        yield self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]


def line(kind, value):
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


INITIAL_END = {"metadata": {"resourceVersion": "5", "annotations": {"k8s.io/initial-events-end": "true"}}}


def report_until_done(*streams):
    """Follow the streams until a Service `done` is reported; the sink."""
    sink = RecordingSink()

    async def nothing(_seconds):
        await asyncio.sleep(0)

    async def follow():
        timing = Timing(clock=lambda: 0.0, sleep=nothing, random=lambda: 0.5)
        progress = Progress(Resource.SERVICES, Settings(), timing)
        reflector = Reflector(Script(*streams), Target("/", {}), progress)
        reporter = Reporter(Resource.SERVICES, sink, timing)
        async with contextlib.aclosing(reflector.list_then_watch()) as changes:
            async for change in changes:
                match change:
                    case Listed():
                        await reporter.listed(change)
                    case Event():
                        reporter.changed(change)
                if "done" in sink.names():
                    return

    asyncio.run(asyncio.wait_for(follow(), 20))
    return sink


INITIAL = line("ADDED", service("web", resourceVersion="4")) + line("BOOKMARK", INITIAL_END)
DONE = line("ADDED", service("done", resourceVersion="1000000"))


@given(st.binary(max_size=60))
@example(b'{"type":"ADDED","object":{"metadata":{"name":"web"},"spec":5}}')
def test_arbitrary_bytes_in_a_watch_never_end_the_reflector(garbage):
    sink = report_until_done(INITIAL + garbage + b"\n" + DONE, DONE)
    assert "web" in sink.names()


@pytest.mark.parametrize("garbage", AWKWARD, ids=lambda data: repr(data[:30]))
def test_awkward_lines_in_a_watch_never_end_the_reflector(garbage):
    assert "web" in report_until_done(INITIAL + garbage + b"\n" + DONE, DONE).names()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["metadata", "spec", "name"]), inner),
    max_leaves=6,
)


@given(JSON, st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "OTHER"]))
def test_arbitrary_objects_in_a_watch_never_end_the_reflector(value, kind):
    sink = report_until_done(INITIAL + line(kind, value) + DONE, DONE)
    assert "web" in sink.names()


def test_changes_within_a_streaming_list_are_part_of_it():
    stream = (
        line("ADDED", service("web", "10.96.0.1", resourceVersion="2"))
        + line("ADDED", service("gone", resourceVersion="3"))
        + line("MODIFIED", service("web", "10.96.0.9", resourceVersion="4"))
        + line("DELETED", service("gone", resourceVersion="5"))
        + line("BOOKMARK", INITIAL_END)
        + DONE
    )
    sink = report_until_done(stream)
    assert sink.names() == {"web", "done"}
    assert sink.objects[Resource.SERVICES][Key("default", "web")].spec.cluster_ip == "10.96.0.9"


def test_items_of_a_page_stay_undecoded():
    page = wire.decode_page(b'{"metadata":{"resourceVersion":"7","continue":"x"},"items":[{"metadata":5}]}')
    assert page.items == [msgspec.Raw(b'{"metadata":5}')]
    assert (page.metadata.resource_version, page.metadata.continue_) == ("7", "x")
