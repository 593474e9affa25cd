"""Requests to an API server over HTTP/1.1: connections, TLS, credentials, and errors that say one line.

Every failure that a request can have ends as one of three exceptions, so that the layers above know what it means
without knowing aiohttp: `RefusedError` (the server answered, and not with 200), `UnreachableError` (there was no
answer, or it broke off) and its special case `SilentError` (the connection stands and nothing comes).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import ssl
import time
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Self

import aiohttp

from proxy.sources.credentials import Credentials, CredentialsError, Keyring
from proxy.sources.pace import Pace
from proxy.sources.wire import Status, decode_status

CONNECT_TIMEOUT = 10.0
"""Seconds for a TCP connection to one address; a dead server must not hold up the next of its addresses."""

PROBE_AFTER, PROBE_EVERY, PROBES = 30, 5, 3
"""Seconds of silence after which the kernel asks whether the server is still there, seconds between such probes, and
how many without an answer break the connection: a server without power, or whose address has moved to another one, is
found out in the 45 s that client-go takes, where a watch by itself may well be silent for minutes."""

READ_BUFFER = 1 << 18
"""Bytes read ahead: a watch line of a large slice in one or two reads."""

LONGEST_WAIT = 300.0
"""Seconds for which a server is left alone at most, whatever it asks for: a wrong answer is no reason to wait long."""

MOST_OF_A_REFUSAL = 1 << 16
"""Bytes read of an answer that is no success."""


OnAnswer = Callable[[str, int | None, float | None], None]


def _ignore(_method: str, _status: int | None, _seconds: float | None) -> None:
    """Nobody counts."""


class ApiError(Exception):
    """A request failed; the message is one line."""

    retry_after: float = 0.0
    """Seconds that the server wants to be left alone."""
    usual: bool = False
    """Whether it happens to every client of a healthy server now and then."""


class RefusedError(ApiError):
    """The server answered with an error: an HTTP status, or an ERROR event in a watch."""

    def __init__(self, status: Status, *, retry_after: float = 0.0) -> None:
        text = status.message or status.reason or "no reason given"
        super().__init__(f"{' '.join(text.split())[:300]} ({status.code})")
        self.status = status
        asked = retry_after or (status.details and status.details.retry_after_seconds) or 0.0
        self.retry_after = min(asked, LONGEST_WAIT)


class UnreachableError(ApiError):
    """There was no answer, or it broke off, or it is none that an API server gives."""


class UntrustedError(UnreachableError):
    """The server's certificate is not signed by who should have signed it, or is another server's."""


class SilentError(UnreachableError):
    """The connection stands, and nothing has come for too long."""


class Client:
    """A client of one API server; an async context manager.

    Several requests may run at a time, each on a connection of its own while it lasts.  A watch that runs goes on
    with the credentials that it began with.
    """

    def __init__(self, keyring: Keyring, *, user_agent: str = "sluice", pace: Pace | None = None) -> None:
        self.keyring = keyring
        self._pace = pace or Pace()
        self._user_agent = user_agent
        self._session: aiohttp.ClientSession | None = None
        self._tls: tuple[Credentials, ssl.SSLContext | None] | None = None
        self.on_answer: OnAnswer = _ignore
        """Told of each request its method, its status (None: no answer) and its seconds (None: of a watch)."""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            headers={"User-Agent": self._user_agent, "Accept": "application/json"},
            read_bufsize=READ_BUFFER,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, query: Mapping[str, str], *, patience: float) -> bytes:
        """The body of an answer; `patience` is how many seconds may pass without a byte.

        Raises:
            RefusedError: the server says no.
            UnreachableError: it says nothing, or not all of it.
        """
        chunks = self.stream(path, query, answer=patience, silence=lambda: patience)
        async with contextlib.aclosing(chunks):
            return b"".join([chunk async for chunk in chunks])

    async def post(self, path: str, body: bytes, *, patience: float) -> None:
        """Create an object from its JSON; `patience` is how many seconds that may take.

        Raises:
            RefusedError: the server says no.
            UnreachableError: it says nothing.
        """
        try:
            async with asyncio.timeout(patience):
                response = await self._ask(path, {}, body)
        except (*FAILURES, CredentialsError) as error:
            raise _unreachable(error) from None
        response.close()

    async def stream(
        self,
        path: str,
        query: Mapping[str, str],
        *,
        answer: float,
        silence: Callable[[], float],
    ) -> AsyncGenerator[bytes, None]:
        """The body of an answer as it comes; an empty chunk first, when the server has accepted the request.

        `answer` is how many seconds it may take to accept; `silence` is asked before each read how many that may take.
        Close the generator to close the connection.

        Raises:
            RefusedError: the server says no.
            UnreachableError: it says nothing, or the stream broke off.
            SilentError: the connection stands, but nothing came within the time that `silence` gave.
        """
        try:
            async with asyncio.timeout(answer):
                response = await self._ask(path, query)
        except (*FAILURES, CredentialsError) as error:
            raise _unreachable(error) from None
        _have_probed(response)
        try:
            yield b""
            while chunk := await _read(response, silence()):
                yield chunk
        finally:
            response.close()

    async def _ask(self, path: str, query: Mapping[str, str], body: bytes | None = None) -> aiohttp.ClientResponse:
        """An answer of success, after a second try with other credentials where the first were refused.

        With a body it is asked to create an object.
        """
        if "continue" not in query:  # the pages of a list count as one request
            await self._pace.turn()
        credentials = await self.keyring.current()
        response = await self._send(credentials, path, query, body)
        if response.status == 401:
            fresh = await self.keyring.refused(credentials)
            if fresh is not credentials:
                response.close()
                response = await self._send(fresh, path, query, body)
        if response.status == (200 if body is None else 201):
            return response
        try:
            body = await response.content.read(MOST_OF_A_REFUSAL)
        finally:
            response.close()
        status = decode_status(body, response.status)
        raise RefusedError(status, retry_after=_seconds(response.headers.get("Retry-After", "")))

    async def _send(
        self, credentials: Credentials, path: str, query: Mapping[str, str], body: bytes | None
    ) -> aiohttp.ClientResponse:
        method = "GET" if body is None else "POST"
        start = time.monotonic()
        status = None
        try:
            response = await self._request(method, credentials, path, query, body)
            status = response.status
        finally:
            self.on_answer(method, status, None if query.get("watch") else time.monotonic() - start)
        return response

    async def _request(
        self, method: str, credentials: Credentials, path: str, query: Mapping[str, str], body: bytes | None
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("the client is not open")
        headers = {"Authorization": credentials.authorization} if credentials.authorization else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        proxy, for_proxy = _proxy(credentials.proxy_url)
        context = self._context(credentials)
        return await self._session.request(
            method,
            credentials.server + path,
            params=query,
            data=body,
            # Of a request in the clear the proxy sees the headers; for TLS it gets a CONNECT with some of its own.
            headers=headers if context else {**headers, **for_proxy},
            ssl=context or True,
            server_hostname=credentials.tls_server_name or None,
            proxy=proxy,
            proxy_headers=for_proxy if context else None,
            # A redirect would carry the token to somebody else.
            allow_redirects=False,
        )

    def _context(self, credentials: Credentials) -> ssl.SSLContext | None:
        """TLS of the credentials, made once for each: connections are shared by context."""
        if self._tls is None or not _same_tls(self._tls[0], credentials):
            self._tls = credentials, credentials.ssl_context()
        return self._tls[1]


def _have_probed(response: aiohttp.ClientResponse) -> None:
    """Have the kernel see that the other end of a response's connection is still there, as long as it says nothing."""
    connection = response.connection
    sock = connection.transport.get_extra_info("socket") if connection and connection.transport else None
    if sock is None:
        return  # all of the answer has come
    with contextlib.suppress(OSError):  # it has just ended: the next read tells
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)


def _same_tls(one: Credentials, other: Credentials) -> bool:
    fields = ("server", "ca", "certificate", "key", "insecure")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def _proxy(url: str) -> tuple[str | None, dict[str, str]]:
    """A proxy without its user and password, and these as a header: the address may stand in an error message."""
    if not url:
        return None, {}
    parts = urllib.parse.urlsplit(url)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if not parts.username:
        return address, {}
    login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return address, {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


def _seconds(retry_after: str) -> float:
    """Retry-After in seconds; API servers give no dates."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


FAILURES = (aiohttp.ClientError, OSError, ValueError)
"""What aiohttp raises: ValueError for what no header may hold; TimeoutError is an OSError."""


async def _read(response: aiohttp.ClientResponse, silence: float) -> bytes:
    """The next bytes of a body, none at its end."""
    try:
        async with asyncio.timeout(silence):
            return await response.content.readany()
    except TimeoutError:
        raise SilentError(f"nothing heard for {silence:g} s") from None
    except FAILURES as error:
        raise _unreachable(error) from None


def _unreachable(error: Exception) -> UnreachableError:
    untrusted = isinstance(error, aiohttp.ClientConnectorCertificateError)
    return (UntrustedError if untrusted else UnreachableError)(_why(error))


def _why(error: Exception) -> str:
    """One line, in the words of an operator."""
    match error:
        case CredentialsError():
            text = str(error)
        case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
            text = f"the server's certificate is not trusted: {getattr(cause, 'verify_message', '') or cause}"
        case aiohttp.ClientConnectorError(host=host, port=port, os_error=cause):
            text = f"cannot connect to {f'[{host}]' if ':' in host else host}:{port}: {_system(cause)}"
        case aiohttp.ClientHttpProxyError(status=status):
            text = f"the HTTP proxy answered {status}"
        case OSError() if not isinstance(error, (TimeoutError, aiohttp.ServerConnectionError)):
            text = f"the connection broke: {_system(error)}"
        case _:
            text = next((words for kind, words in WORDS.items() if isinstance(error, kind)), type(error).__name__)
    return text


WORDS: Mapping[type[Exception], str] = {
    aiohttp.ConnectionTimeoutError: "cannot connect: timed out",
    TimeoutError: "no answer in time",
    aiohttp.ServerDisconnectedError: "the server closed the connection",
    aiohttp.ClientPayloadError: "the answer broke off",
    aiohttp.InvalidURL: "the server's address is no URL",
    aiohttp.ClientResponseError: "the answer is no HTTP",
}


def _system(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return (error.strerror or str(error)).lower()  # of a name that cannot be resolved the numbers are others
