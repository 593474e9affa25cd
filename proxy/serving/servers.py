"""The two servers of the agent itself: health for load balancers and kubelets, metrics for everything else.

A server that cannot listen is tried again every 5 s, or ends the agent, as `bindAddressHardFail` says (HC-8, HTTP-3,
CFG-55).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from aiohttp import web

from proxy import logs
from proxy.config.settings import HostPort, Settings
from proxy.serving.health import HEADERS, Answer, ProxyHealth
from proxy.serving.http import Handler, Listener, bind
from proxy.serving.metrics import CONTENT_TYPE, Metrics

RETRY = 5.0
"""Seconds between attempts to listen."""

_log = logs.get_logger("sluice.serving")

Listening = Callable[[str, HostPort], None]


class BindError(Exception):
    """A server cannot listen, and the configuration wants the agent to end then."""


async def serve(
    settings: Settings,
    health: ProxyHealth,
    metrics: Metrics,
    *,
    proxy_mode: str,
    listening: Listening = lambda _name, _address: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Serve health and metrics until cancelled.

    Args:
        settings: where, and whether a failure to listen is the end.
        health: who answers probes.
        metrics: what is measured; answers to probes are counted there.
        proxy_mode: what /proxyMode says.
        listening: told the name of a server (`health`, `metrics`) and where it listens, once it does.
        sleep: how to wait between attempts.

    Raises:
        BindError: a server cannot listen, under `bind_address_hard_fail`.
    """
    servers = (
        ("health", settings.healthz_bind_address, health_handler(health, metrics)),
        ("metrics", settings.metrics_bind_address, metrics_handler(settings, metrics, proxy_mode)),
    )
    try:
        async with asyncio.TaskGroup() as group:
            for name, address, handler in servers:
                if address is not None:
                    server = _Server(name, address, hard_fail=settings.bind_address_hard_fail)
                    group.create_task(server.run(handler, listening, sleep), name=f"serve {name}")
    except ExceptionGroup as errors:
        failed, others = errors.split(BindError)
        if failed is None or others is not None:
            raise
        raise BindError("; ".join(map(str, failed.exceptions))) from None


class _Server:
    """One server, for as long as the agent runs."""

    def __init__(self, name: str, address: HostPort, *, hard_fail: bool) -> None:
        self._name = name
        self._address = address
        self._hard_fail = hard_fail

    async def run(self, handler: Handler, listening: Listening, sleep: Callable[[float], Awaitable[None]]) -> None:
        while True:
            listener = Listener(handler)
            try:
                address = self._address._replace(port=await listener.listen(bind(*self._address, both_families=True)))
                _log.info("serving", server=self._name, address=str(address))
                listening(self._name, address)
                await asyncio.get_running_loop().create_future()
            except OSError as error:
                reason = f"cannot serve {self._name} on {self._address}: {error.strerror or error}"
                if self._hard_fail:
                    raise BindError(reason) from None
                _log.error("server", server=self._name, reason=reason, retry=f"{RETRY:g}s")
            finally:
                await listener.close()
            await sleep(RETRY)


def health_handler(health: ProxyHealth, metrics: Metrics) -> Handler:
    """/healthz and /livez, for any method (HC-1)."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/healthz":
            answer = health.healthz()
            metrics.healthz_answered(answer.status)
        elif request.path == "/livez":
            answer = health.livez()
            metrics.livez_answered(answer.status)
        else:
            return _not_found()
        return _json(answer)

    return handle


def metrics_handler(settings: Settings, metrics: Metrics, proxy_mode: str) -> Handler:
    """/metrics, /healthz, /proxyMode and /configz (HTTP-1)."""
    configz = json.dumps({"kubeproxy.config.k8s.io": settings.configz}, separators=(",", ":"))

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        match request.path:
            case "/metrics":
                # Some milliseconds for a few hundred series, on the loop: a thread would find values half changed.
                return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
            case "/healthz" | "/healthz/ping":
                return _text("ok")
            case "/proxyMode":
                return _text(proxy_mode)
            case "/configz":
                return web.Response(text=configz, content_type="application/json")
            case _:
                return _not_found()

    return handle


def _json(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=HEADERS)


def _text(text: str, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        text=text,
        headers={"X-Content-Type-Options": "nosniff"},
        content_type="text/plain",
        charset="utf-8",
    )


def _not_found() -> web.Response:
    return _text("404 page not found\n", 404)
