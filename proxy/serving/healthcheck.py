"""Health-check node ports: what load balancers ask about a Service on this node (HC-20 to HC-25).

There is one HTTP server per Service with a healthCheckNodePort, in each family.  `sync` brings the servers to what is
wanted, by differences; a port that cannot be listened on is reported and tried again by the next `sync`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from aiohttp import web

from proxy import logs
from proxy.objects import Key
from proxy.serving.health import HEADERS, Answer
from proxy.serving.http import Handler, Listener, bind
from rules.forwarding import Address, Family, format_address

_log = logs.get_logger("sluice.serving")

_ANY = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104  # node ports are for anybody

Report = Callable[[Key, str | None], None]


class _Server:
    """One Service's server."""

    def __init__(self, port: int, count: int) -> None:
        self.port = port
        self.count = count
        self.listener: Listener | None = None
        """None: it could not be listened on."""


class HealthCheckServers:
    """The health-check node ports of one family."""

    def __init__(
        self,
        family: Family,
        healthy: Callable[[], bool],
        *,
        addresses: Iterable[Address] | None = None,
        report: Report | None = None,
    ) -> None:
        """Nothing is listened on before `sync`.

        Args:
            family: whose addresses are listened on.
            healthy: whether the proxy is healthy (HC-3); the node's eligibility does not count (HC-23).
            addresses: the addresses that answer node ports; None: all of the family.
            report: told of a Service whose port cannot be listened on, and why; with None, that this is over.
                Without it failures are logged.
        """
        self._family = family
        self._healthy = healthy
        self._addresses = None if addresses is None else tuple(addresses)
        self._report = report or self._log_failure
        self._servers: dict[Key, _Server] = {}

    @property
    def ports(self) -> Mapping[Key, int]:
        """The ports that are listened on."""
        return {key: server.port for key, server in self._servers.items() if server.listener is not None}

    async def set_addresses(self, addresses: Iterable[Address] | None) -> None:
        """Listen on these addresses: what stands on others is closed, and opened anew by the next `sync`."""
        wanted = None if addresses is None else tuple(sorted(addresses))
        if wanted != self._addresses:
            await self.close()
            self._addresses = wanted

    async def sync(self, wanted: Mapping[Key, tuple[int, int]]) -> None:
        """Serve exactly these Services, each at a port and with a count of local ready endpoints (HC-21, HC-22)."""
        for key in [key for key, server in self._servers.items() if wanted.get(key, (0, 0))[0] != server.port]:
            await self._close(key)
        for key, (port, count) in wanted.items():
            server = self._servers.setdefault(key, _Server(port, count))
            server.count = count
            if server.listener is None:
                await self._open(key, server)

    async def close(self) -> None:
        """Close them all."""
        for key in tuple(self._servers):
            await self._close(key)

    async def _open(self, key: Key, server: _Server) -> None:
        listener = Listener(self._handler(key, server))
        hosts = [_ANY[self._family]] if self._addresses is None else map(format_address, self._addresses)
        try:
            for host in hosts:
                await listener.listen(bind(host, server.port))
        except OSError as error:
            await listener.close()
            reason = f"cannot serve health checks on port {server.port}: {error.strerror or error}"
            self._report(key, reason)
            return
        except BaseException:
            await listener.close()
            raise
        server.listener = listener
        self._report(key, None)

    async def _close(self, key: Key) -> None:
        server = self._servers.pop(key)
        if server.listener is not None:
            await server.listener.close()
        else:
            self._report(key, None)

    def _log_failure(self, key: Key, reason: str | None) -> None:
        if reason is not None:
            _log.warning("health-check port", service=str(key), family=self._family.label, reason=reason)

    def _handler(self, key: Key, server: _Server) -> Handler:
        async def handle(_request: web.BaseRequest) -> web.StreamResponse:
            answer = check(key, server.count, healthy=self._healthy())
            headers = {**HEADERS, "X-Load-Balancing-Endpoint-Weight": str(server.count)}
            return web.Response(status=answer.status, body=answer.body, headers=headers)

        return handle


def check(key: Key, count: int, *, healthy: bool) -> Answer:
    """What is answered about a Service with `count` local ready endpoints (HC-23, HC-24)."""
    body = {
        "service": {"namespace": key.namespace, "name": key.name},
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    }
    return Answer(200 if count > 0 and healthy else 503, json.dumps(body, indent="\t").encode())
