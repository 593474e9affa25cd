"""Health-check node ports: what load balancers ask about a Service on this node (HC-20 to HC-25).

There is one HTTP server per Service with a healthCheckNodePort, in each family.  `sync` brings the servers to what is
wanted, by differences; a port that cannot be listened on is reported and tried again by the next `sync`.
"""

from __future__ import annotations

import errno
import json
import resource
import socket
import sys
from collections.abc import Callable, Iterable, Mapping

from proxy import logs
from proxy.objects import Key
from proxy.serving.health import Answer
from proxy.serving.http import Handler, Listener, Server, bind
from proxy.serving.messages import Request, Response
from proxy.serving.messages import json as json_response
from rules.forwarding import Address, Family, format_address

_log = logs.get_logger("sluice.serving")

_ANY = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104  # node ports are for anybody

_SHARE = 0.75
"""The part of all descriptors that may be in use where a health check takes one."""

Report = Callable[[Key, str | None], None]
Failed = Callable[[Key, int, str], None]


class _Server:
    """One Service's server."""

    def __init__(self, port: int, count: int) -> None:
        self.port = port
        self.count = count
        self.listeners: list[Listener] = []
        self.refused = False
        """Whether it could not be listened on."""


class HealthCheckServers:
    """The health-check node ports of one family."""

    def __init__(
        self,
        family: Family,
        healthy: Callable[[], bool],
        *,
        addresses: Iterable[Address] | None = None,
        report: Report | None = None,
        failed: Failed | None = None,
        server: Server | None = None,
        descriptors: int | None = None,
    ) -> None:
        """Nothing is listened on before `sync`.

        Args:
            family: whose addresses are listened on.
            healthy: whether the proxy is healthy (HC-3); the node's eligibility does not count (HC-23).
            addresses: the addresses that answer node ports; None: all of the family.
            report: told of a Service whose port cannot be listened on, and why; with None, that this is over.
                Without it failures are logged.
            failed: told of each attempt to listen that fails: the Service, the port and the system's words (HC-21).
            server: who serves the sockets, within its budget of time.
            descriptors: no socket has a descriptor of this number or above; None: three quarters of the limit, as
                a process that has none left can do nothing else either.
        """
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = sys.maxsize if limit == resource.RLIM_INFINITY else int(limit * _SHARE)
        self._descriptors = most if descriptors is None else descriptors
        self._family = family
        self._healthy = healthy
        self._addresses = None if addresses is None else tuple(addresses)
        self._report = report or self._log_failure
        self._failed = failed
        self._server = server or Server()
        self._servers: dict[Key, _Server] = {}

    @property
    def ports(self) -> Mapping[Key, int]:
        """The ports that are listened on."""
        return {key: server.port for key, server in self._servers.items() if server.listeners}

    @property
    def refused(self) -> bool:
        """Whether there is a port that could not be listened on: the next `sync` tries it again."""
        return any(server.refused for server in self._servers.values())

    def set_addresses(self, addresses: Iterable[Address] | None) -> None:
        """Listen on these addresses: what stands on others is closed, and opened anew by the next `sync`."""
        wanted = None if addresses is None else tuple(sorted(addresses))
        if wanted != self._addresses:
            self.close()
            self._addresses = wanted

    def sync(self, wanted: Mapping[Key, tuple[int, int]]) -> None:
        """Serve exactly these Services, each at a port and with a count of local ready endpoints (HC-21, HC-22)."""
        for key in [key for key, server in self._servers.items() if wanted.get(key, (0, 0))[0] != server.port]:
            self._close(key)
        for key, (port, count) in wanted.items():
            server = self._servers.setdefault(key, _Server(port, count))
            server.count = count
            if not server.listeners:
                self._open(key, server)

    def close(self) -> None:
        """Close them all."""
        for key in tuple(self._servers):
            self._close(key)

    def _open(self, key: Key, server: _Server) -> None:
        handler = self._handler(key, server)
        hosts = [_ANY[self._family]] if self._addresses is None else map(format_address, self._addresses)
        opened: list[Listener] = []
        try:
            for host in hosts:
                opened.append(self._server.listen(self._bind(host, server.port), handler))  # noqa: PERF401  # kept
        except OSError as error:
            for listener in opened:
                listener.close()
            server.refused = True
            why = error.strerror or str(error)
            self._report(key, f"cannot serve health checks on port {server.port}: {why}")
            if self._failed is not None:
                self._failed(key, server.port, why)
            return
        server.listeners, server.refused = opened, False
        self._report(key, None)

    def _bind(self, host: str, port: int) -> socket.socket:
        sock = bind(host, port)
        # The system always gives the least number that is free.
        if sock.fileno() >= self._descriptors:
            sock.close()
            raise OSError(errno.EMFILE, f"more than {self._descriptors} files are open: raise the limit of open files")
        return sock

    def _close(self, key: Key) -> None:
        server = self._servers.pop(key)
        for listener in server.listeners:
            listener.close()
        if not server.listeners:
            self._report(key, None)

    def _log_failure(self, key: Key, reason: str | None) -> None:
        if reason is not None:
            _log.warning("health-check port", service=str(key), family=self._family.label, reason=reason)

    def _handler(self, key: Key, server: _Server) -> Handler:
        weight = "X-Load-Balancing-Endpoint-Weight"

        def handle(_request: Request) -> Response:
            answer = check(key, server.count, healthy=self._healthy())
            response = json_response(answer.body, answer.status)
            return response._replace(headers=(*response.headers, (weight, str(server.count))))

        return handle


def check(key: Key, count: int, *, healthy: bool) -> Answer:
    """What is answered about a Service with `count` local ready endpoints (HC-23, HC-24)."""
    body = {
        "service": {"namespace": key.namespace, "name": key.name},
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    }
    return Answer(200 if count > 0 and healthy else 503, json.dumps(body, indent="\t").encode())
