"""Small HTTP servers that strangers may reach: aiohttp behind a guard.

The ports for health stand open to the world, so a client must not be able to hold what others need.  Every connection
serves one request and is closed; it ends after `DEADLINE` seconds however slowly it talks; and when `CONNECTIONS` are
open the oldest makes room for the new one, as an honest probe is done in milliseconds.  Bodies of requests are never
read.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

DEADLINE = 10.0
"""Seconds that a connection may last."""
CONNECTIONS = 128
"""Connections of one server at a time."""
CLOSING = 0.1
"""Seconds that a server waits for answers under way when it is closed."""
HEAD_BYTES = 8190
"""How long a request's line or a header of it may be."""

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class GuardedServer(web.Server):
    """An aiohttp server that bounds how many connections it has, and how long each lasts."""

    def __init__(self, handler: Handler, *, connections: int = CONNECTIONS, deadline: float = DEADLINE) -> None:
        self._handler = handler
        self._limit = connections
        self._deadline = deadline
        self._open: dict[web.RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}
        logger = logging.getLogger("sluice.http")
        logger.addFilter(_is_ours)  # the same one again changes nothing
        super().__init__(
            self._serve,
            logger=logger,
            access_log=None,
            max_line_size=HEAD_BYTES,
            max_field_size=HEAD_BYTES,
            lingering_time=0.0,
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        while len(self._open) >= self._limit:
            oldest, (victim, timer) = next(iter(self._open.items()))
            timer.cancel()
            del self._open[oldest]
            victim.abort()
        timer = asyncio.get_running_loop().call_later(self._deadline, transport.abort)
        self._open[handler] = transport, timer

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        _, timer = self._open.pop(handler, (None, None))
        if timer is not None:
            timer.cancel()
        super().connection_lost(handler, exc)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._handler(request)
        response.force_close()
        response.headers["Server"] = "sluice"  # without it aiohttp tells its version and Python's
        return response


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record is about us: what strangers send wrong is theirs, and must not fill the log."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)


class Listener:
    """A server on its sockets."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._runner: web.ServerRunner | None = None

    async def listen(self, sock: socket.socket) -> int:
        """Serve on one more bound socket, which belongs to this object from now on; its port.

        Raises:
            OSError: another socket listens there already.
        """
        try:
            if self._runner is None:
                self._runner = web.ServerRunner(GuardedServer(self._handler), shutdown_timeout=CLOSING)
                await self._runner.setup()
            await web.SockSite(self._runner, sock, backlog=CONNECTIONS).start()
        except BaseException:
            sock.close()
            raise
        return int(sock.getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end what is open."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


def bind(host: str, port: int, *, both_families: bool = False) -> socket.socket:
    """A TCP socket bound to an address, of its family alone.

    With `both_families` an unspecified address of either family stands for all addresses of both, as it does to Go
    programs: kube-proxy at its default 0.0.0.0:10256 answers probes by IPv6 too.

    Raises:
        OSError: it cannot be bound.
    """
    if both_families and host in {"0.0.0.0", "::"}:  # noqa: S104  # only compared
        try:
            return _bind(socket.AF_INET6, "::", port, only=False)
        except OSError as error:
            if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                raise
            return _bind(socket.AF_INET, "0.0.0.0", port, only=True)  # noqa: S104  # as configured
    return _bind(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port, only=True)


def _bind(family: socket.AddressFamily, host: str, port: int, *, only: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
