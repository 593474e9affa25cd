"""A stand-in API server that sends bytes made beforehand, so that what it costs is not measured with the agent.

It knows one way of following a resource, the streaming list of today's servers: every object as an ADDED event, a
bookmark that says that these were all, and then what `emit` says.  Each event is a chunk of its own, as an API server
flushes each.  What is sent, and how fast, is up to the threads here; the agent decides nothing but when to connect.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from bench.cluster import Cluster, node

SERVICES = "/api/v1/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
NODES = "/api/v1/nodes"

_KINDS = {SERVICES: ("v1", "Service"), SLICES: ("discovery.k8s.io/v1", "EndpointSlice"), NODES: ("v1", "Node")}
_HEAD = (
    b"HTTP/1.1 200 OK\r\nCache-Control: no-cache, private\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_NOT_FOUND = b'{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}'
_PATIENCE = 60.0


def event(kind: str, value: bytes) -> bytes:
    """A watch event, as a chunk."""
    line = b'{"type":"%b","object":%b}\n' % (kind.encode(), value)
    return b"%x\r\n%b\r\n" % (len(line), line)


def streaming_list(path: str, objects: Iterable[bytes], version: int) -> bytes:
    """Everything there is, as a watch begins with it."""
    api_version, kind = _KINDS[path]
    end = (
        b'{"kind":"%b","apiVersion":"%b","metadata":{"resourceVersion":"%d","creationTimestamp":null,'
        b'"annotations":{"k8s.io/initial-events-end":"true"}}}' % (kind.encode(), api_version.encode(), version)
    )
    return b"".join([*(event("ADDED", each) for each in objects), event("BOOKMARK", end)])


def lists_of(cluster: Cluster) -> Mapping[str, bytes]:
    """What the server sends of a cluster, by path."""
    version = cluster.services + 1
    return {
        SERVICES: streaming_list(SERVICES, cluster.all_services(), version),
        SLICES: streaming_list(SLICES, cluster.all_slices(), version),
        NODES: streaming_list(NODES, [node()], version),
    }


class Server:
    """Serves one agent at a time."""

    def __init__(self, lists: Mapping[str, bytes]) -> None:
        self._lists = lists
        self._watches: dict[str, socket.socket] = {}
        self._opened = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, name="server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A shutdown ends the accept of the thread; closing alone would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.forget()

    def emit(self, path: str, events: bytes) -> None:
        """Send events on the watch of a resource, which has been opened."""
        with self._opened:
            if not self._opened.wait_for(lambda: path in self._watches, _PATIENCE):
                raise TimeoutError(f"the agent does not watch {path}")
            watch = self._watches[path]
        watch.sendall(events)

    def forget(self) -> None:
        """Close the watches of an agent that is gone."""
        with self._opened:
            for watch in self._watches.values():
                watch.close()
            self._watches.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            received = connection.recv(65536)
            if not received:
                connection.close()
                return
            request += received
        path = urlsplit(request.split(b" ", 2)[1].decode()).path
        found = self._lists.get(path)
        with contextlib.suppress(OSError):  # the agent was stopped while it read
            if found is None:
                head = f"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: {len(_NOT_FOUND)}"
                connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + _NOT_FOUND)
                connection.close()
                return
            connection.sendall(_HEAD)
            connection.sendall(found)
        with self._opened:
            if (before := self._watches.pop(path, None)) is not None:
                before.close()
            self._watches[path] = connection
            self._opened.notify_all()
