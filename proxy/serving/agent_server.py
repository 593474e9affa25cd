"""The agent's end of its socket; `proxy.agent_socket` is the other end and describes what crosses it.

Whoever connects is root and may all the same be a script gone wrong: a request is one line of limited length that must
come soon, connections are few at a time, and a client that does not read its answer is left.  Long answers are made
and sent in parts, so that syncs and health are not kept waiting.

A socket that cannot be made (a full disk, a read-only /run, another agent's socket in the same place) is one warning;
the agent goes on without and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec

from proxy.agent_socket import LONGEST_REQUEST, NAME, UNREADABLE, VERSION, Line, Request
from proxy.logs import get_logger
from proxy.peers import is_ours, peer

REQUEST_SECONDS = 10.0
"""In which a request must have come."""
ANSWER_SECONDS = 30.0
"""In which a client must take each part of an answer."""
CONNECTIONS = 16
"""At a time."""
REST = 1.0
"""Seconds without new connections after one could not be taken."""
RETRY = 30.0
"""Seconds between attempts to make the socket."""

_log = get_logger("sluice.socket")

Answer = AsyncGenerator[tuple[str, Any], None]
"""Parts and, last, the result: pairs of `part` or `result` and a value that msgspec can encode."""


class RefusedError(Exception):
    """A request makes no sense; the message is the answer."""


class AgentServer:
    """Answers requests for as long as the agent runs."""

    def __init__(self, directory: str, answer: Callable[[str, dict[str, str]], Answer]) -> None:
        """In a run directory.

        Args:
            directory: where the socket is made; the directory is, too, if need be.
            answer: what to answer to a verb with its arguments; its iterator may raise RefusedError.
        """
        self._path = Path(directory) / NAME
        self._answer = answer
        self._connections = 0
        self._encoder = msgspec.json.Encoder()

    async def run(self, *, retry: float = RETRY) -> None:
        """Serve until cancelled."""
        complaint = ""
        while True:
            try:
                listener = _listen(self._path)
            except OSError as error:
                reason = f"{error.filename or self._path}: {error.strerror or error}"
                if reason != complaint:
                    _log.warning("the agent's socket cannot be made: status and others will not work", reason=reason)
                    complaint = reason
                await asyncio.sleep(retry)
                continue
            mine = os.stat(self._path).st_ino  # noqa: PTH116  # of the socket itself
            try:
                await self._serve(listener)
            finally:
                listener.close()
                with contextlib.suppress(OSError):
                    if os.stat(self._path).st_ino == mine:  # noqa: PTH116  # likewise
                        self._path.unlink()

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        told = False
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:  # out of descriptors, for one
                    tell = _log.debug if told else _log.warning
                    tell("connections to the agent's socket wait", reason=error.strerror)
                    told = True
                    await asyncio.sleep(REST)
                    continue
                told = False
                group.create_task(self._converse(connection), name="agent socket")

    async def _converse(self, connection: socket.socket) -> None:
        """One request and its answer; nothing that a client does comes out of here."""
        self._connections += 1
        try:
            connection.setblocking(False)
            await self._respond(connection)
        except (OSError, TimeoutError):
            pass  # the client left, or is stuck
        finally:
            self._connections -= 1
            connection.close()

    async def _respond(self, connection: socket.socket) -> None:
        try:
            if not is_ours(peer(connection)[1]):
                raise RefusedError("this socket is for root alone")  # noqa: TRY301  # the one way to answer no
            if self._connections > CONNECTIONS:
                raise RefusedError("too many ask at once: try again")  # noqa: TRY301  # likewise
            request = await _receive(connection)
            async with contextlib.aclosing(self._answer(request.verb, request.arguments)) as answer:
                async for kind, value in answer:
                    encoded = msgspec.Raw(self._encoder.encode(value))
                    await self._send(connection, Line(part=encoded) if kind == "part" else Line(result=encoded))
        except RefusedError as error:
            await self._send(connection, Line(error=str(error)))
        except (OSError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001  # a bug in an answer must not end the agent
            _log.exception("an answer failed")
            await self._send(connection, Line(error=f"internal error: {type(error).__name__}: {error}"))

    async def _send(self, connection: socket.socket, line: Line) -> None:
        async with asyncio.timeout(ANSWER_SECONDS):
            await asyncio.get_running_loop().sock_sendall(connection, self._encoder.encode(line) + b"\n")


async def _receive(connection: socket.socket) -> Request:
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(REQUEST_SECONDS):
        while b"\n" not in data:
            if len(data) > LONGEST_REQUEST:
                raise RefusedError(f"a request has at most {LONGEST_REQUEST} bytes")
            more = await loop.sock_recv(connection, LONGEST_REQUEST)
            if not more:
                raise RefusedError("a request is one line, and this one has no end")
            data += more
    return decode_request(data.partition(b"\n")[0])


def decode_request(line: bytes) -> Request:
    """What is asked.

    Raises:
        RefusedError: it cannot be understood.
    """
    try:
        request = msgspec.json.decode(line, type=Request)
    except UNREADABLE as error:
        raise RefusedError(f"a request is one line of JSON with version, verb and arguments: {error}") from None
    if request.version != VERSION:
        raise RefusedError(f"this agent speaks version {VERSION} of the protocol, not {request.version}")
    return request


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, for root alone, in the place of one that nobody serves any more.

    Raises:
        OSError: it cannot be made there.
    """
    _make_directory(path.parent)
    if _is_served(path):
        raise OSError(
            errno.EADDRINUSE, "another agent serves it; give this one a --run-directory of its own", str(path)
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        # It gets its mode before it has its name.
        listener.bind(str(new))
        new.chmod(0o600)
        listener.listen(CONNECTIONS)
        new.rename(path)
    except BaseException as error:
        listener.close()
        with contextlib.suppress(OSError):
            new.unlink()
        if isinstance(error, OSError) and "too long" in str(error):
            raise OSError(errno.ENAMETOOLONG, "the path is too long for a socket", str(path)) from None
        raise
    return listener


def _make_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    # Whoever may write there could put a socket of their own in our socket's place.
    if not is_ours(found.st_uid) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(errno.EPERM, "others than root may write there", str(directory))


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # its queue is full
        except OSError:
            return False
    return True
