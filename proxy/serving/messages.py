"""HTTP/1.1 requests and responses as values: as much of it as probes, scrapers and people with curl speak.

A request is its first line and its header fields; a body is passed over unless somebody wants a short one.  A response
ends its connection.  Nothing here does I/O.
"""

from __future__ import annotations

import re
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

HEAD_BYTES = 8192
"""How long the head of a request may be."""

_END = re.compile(rb"\r?\n\r?\n")
_FIRST_LINE = re.compile(rb"([A-Za-z]{1,20}) ([!-~]+) HTTP/1\.[01]\r?\n")
_BODY = re.compile(
    rb"\n(?:content-length[ \t]*:[ \t]*0*([1-9][0-9]*)[ \t]*\r?\n|transfer-encoding[ \t]*:)", re.IGNORECASE
)


class RequestError(Exception):
    """What came is no request that is answered; `status` says why."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class Request(NamedTuple):
    """The head of a request."""

    method: str
    path: str
    """Decoded, without the query."""
    query: str = ""
    fields: bytes = b""
    """The header, a line for each field."""
    body: bytes = b""

    def header(self, name: str) -> str:
        """A header field; several of one name as one, empty where there is none."""
        pattern = rb"^%b[ \t]*:[ \t]*(.*?)[ \t]*\r?$" % re.escape(name.encode())
        found = re.findall(pattern, self.fields, re.IGNORECASE | re.MULTILINE)
        return b", ".join(found).decode("latin-1")

    def argument(self, name: str) -> str:
        """The last value of a name in the query; empty where there is none."""
        return parse_qs(self.query).get(name, [""])[-1]


class Received(NamedTuple):
    """A request, and whether something follows its head that nobody will read."""

    request: Request
    more: bool


class Response(NamedTuple):
    """What is answered."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def parse(data: bytes | bytearray, body_bytes: int = 0) -> Received | None:
    """The request at the beginning of what a client has sent; None: it is not complete yet.

    A body of at most `body_bytes` is a part of it; a longer one, or one without a length, is not read.

    Raises:
        RequestError: it can become none.
    """
    end = _END.search(data, 0, HEAD_BYTES)
    if end is None:
        if len(data) >= HEAD_BYTES:
            raise RequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return None
    first = _FIRST_LINE.match(data)
    if first is None:
        raise RequestError(HTTPStatus.BAD_REQUEST)
    method, target = (part.decode("ascii") for part in first.groups())
    try:
        # A proxy asks for http://host/path; //path is a path all the same.
        parts = urlsplit(target if not target.startswith("//") else f"http://x{target[1:]}")
    except ValueError:
        raise RequestError(HTTPStatus.BAD_REQUEST) from None
    announced = _BODY.search(data, 0, end.end())
    length = int(announced[1]) if announced and announced[1] and len(announced[1]) < 10 else 0
    stop = end.end()
    if 0 < length <= body_bytes:
        stop += length
        if len(data) < stop:
            return None
        announced = None
    request = Request(
        method,
        unquote(parts.path) or "/",
        parts.query,
        bytes(data[first.end() : end.end()]),
        bytes(data[end.end() : stop]),
    )
    return Received(request, announced is not None or len(data) > stop)


def compose(response: Response, method: str, now: float) -> bytes:
    """The bytes of a response to a request of that method; `now` is seconds since the epoch."""
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = ""
    head = [
        f"HTTP/1.1 {response.status} {phrase}",
        *(f"{name}: {value}" for name, value in response.headers),
        f"Date: {formatdate(now, usegmt=True)}",
        f"Content-Length: {len(response.body)}",
        "Server: sluice",
        "Connection: close",
        "\r\n",
    ]
    return "\r\n".join(head).encode("latin-1") + (b"" if method == "HEAD" else response.body)


def text(body: str, status: int = 200) -> Response:
    """Plain text."""
    headers = (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff"))
    return Response(status, body.encode(), headers)


def json(body: bytes, status: int = 200) -> Response:
    """JSON, as kube-proxy labels it (HC-1, HC-23)."""
    return Response(status, body, (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")))


def not_found() -> Response:
    """As Go's own."""
    return text("404 page not found\n", 404)
