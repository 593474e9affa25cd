"""HTTP messages: what is a request, and what an answer looks like."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.serving.messages import HEAD_BYTES, Request, RequestError, Response, compose, parse


@pytest.mark.parametrize(
    ("data", "path", "query"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", "/healthz", ""),
        (b"GET /healthz HTTP/1.0\n\n", "/healthz", ""),
        (b"GET /a%20b?x=1&y HTTP/1.1\r\n\r\n", "/a b", "x=1&y"),
        (b"GET http://node1:10256/livez?v HTTP/1.1\r\n\r\n", "/livez", "v"),
        (b"GET //livez HTTP/1.1\r\n\r\n", "/livez", ""),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", "*", ""),
        (b"GET ? HTTP/1.1\r\n\r\n", "/", ""),
    ],
)
def test_what_is_asked_for(data, path, query):
    found = parse(data)
    assert found is not None
    assert (found.request.path, found.request.query, found.more) == (path, query, False)


def test_fields_are_found_whatever_their_case():
    found = parse(b"GET / HTTP/1.1\r\nHost: x\r\naccept:  a/b \r\nACCEPT: c/d\r\nX-Accept: no\r\n\r\n")
    assert found.request.header("Accept") == "a/b, c/d"
    assert found.request.header("accep") == ""


def test_arguments_of_a_query():
    request = Request("GET", "/", "seconds=1&seconds=2.5&x=")
    assert (request.argument("seconds"), request.argument("x"), request.argument("y")) == ("2.5", "", "")


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length : 99999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\nGET",
    ],
)
def test_what_follows_is_known_to_follow(data):
    assert parse(data).more


def test_no_body_follows_a_length_of_zero():
    assert not parse(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n").more


def test_a_short_body_is_waited_for_where_it_is_wanted():
    data = b"PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    assert parse(data[:-1], 8) is None
    assert parse(data, 8).request.body == b"abc"
    assert not parse(data, 8).more
    assert parse(data, 2).request.body == b""
    assert parse(data, 2).more


@given(st.binary(max_size=300), st.integers(0, 64))
def test_any_bytes_are_a_request_or_none_or_refused(data, body_bytes):
    with contextlib.suppress(RequestError):
        found = parse(data, body_bytes)
        assert found is None or found.request.path


@pytest.mark.parametrize("data", [b"X" * HEAD_BYTES, b"GET / HTTP/1.1\r\nA: " + b"b" * HEAD_BYTES])
def test_a_head_without_end_is_refused(data):
    assert parse(data[: HEAD_BYTES - 1]) is None
    with pytest.raises(RequestError, match="Too Large"):
        parse(data)


def test_an_answer_is_complete():
    answer = compose(Response(503, b"no", (("X-A", "b"),)), "GET", 0.0)
    assert answer == (
        b"HTTP/1.1 503 Service Unavailable\r\nX-A: b\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
        b"Content-Length: 2\r\nServer: sluice\r\nConnection: close\r\n\r\nno"
    )
