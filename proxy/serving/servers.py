"""The two servers of the agent itself: health for load balancers and kubelets, metrics for everything else.

A server that cannot listen is tried again every 5 s, or ends the agent, as `bindAddressHardFail` says (HC-8, HTTP-3,
CFG-55).
"""

from __future__ import annotations

import asyncio
import errno
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from proxy import logs
from proxy.config.settings import HostPort, Settings
from proxy.serving import pages, profiles
from proxy.serving.health import Answer, ProxyHealth
from proxy.serving.http import Handler, Server, bind
from proxy.serving.messages import Request, Response, not_found, text
from proxy.serving.messages import json as json_response
from proxy.serving.metrics import CONTENT_TYPE, Metrics

RETRY = 5.0
"""Seconds between attempts to listen."""
VERBOSITY = "/debug/flags/v"
PAGE = "/debug/services"
"""Where the page about Services is, if there is one (`proxy.serving.debug_services`)."""

_BODY_BYTES = 64
"""As much as a new verbosity may have."""

_log = logs.get_logger("sluice.serving")

Listening = Callable[[str, HostPort], None]


class BindError(Exception):
    """A server cannot listen, and the configuration wants the agent to end then."""

    def __init__(self, reason: str, server: str) -> None:
        super().__init__(reason)
        self.server = server
        """Which: `health` or `metrics`."""


async def serve(
    settings: Settings,
    health: ProxyHealth,
    metrics: Metrics,
    *,
    proxy_mode: str,
    version: str = "",
    server: Server | None = None,
    configz: Callable[[], Mapping[str, Any]] | None = None,
    page: Handler | None = None,
    listening: Listening = lambda _name, _address: None,
    failed: Callable[[str, str], Awaitable[None]] | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Serve health and metrics until cancelled.

    Args:
        settings: where, and whether a failure to listen is the end.
        health: who answers probes.
        metrics: what is measured; answers to probes are counted there.
        proxy_mode: what /proxyMode says.
        version: Sluice's.
        configz: the configuration of now, if it changes; else that of the settings.
        page: answers what is below `PAGE` on the metrics server.
        server: who serves their sockets, within its budget of time.
        listening: told the name of a server (`health`, `metrics`) and where it listens, once it does.
        failed: told the name of a server for which the agent is about to end, and why.
        sleep: how to wait between attempts.

    Raises:
        BindError: a server cannot listen, under `bind_address_hard_fail`.
    """
    server = server or Server()
    servers = (
        ("health", settings.healthz_bind_address, health_handler(health, metrics)),
        (
            "metrics",
            settings.metrics_bind_address,
            MetricsPages(settings, metrics, proxy_mode, version, configz, page=page).answer,
        ),
    )
    try:
        async with asyncio.TaskGroup() as group:
            for name, address, handler in servers:
                if address is not None:
                    one = _Serving(server, name, address, hard_fail=settings.bind_address_hard_fail)
                    group.create_task(one.run(handler, listening, sleep), name=f"serve {name}")
    except ExceptionGroup as errors:
        fatal, others = errors.split(BindError)
        if fatal is None or others is not None:
            raise
        first = fatal.exceptions[0]
        assert isinstance(first, BindError)
        if failed is not None:
            await failed(first.server, str(first))
        raise BindError("; ".join(map(str, fatal.exceptions)), first.server) from None


class _Serving:
    """One of them, for as long as the agent runs."""

    def __init__(self, server: Server, name: str, address: HostPort, *, hard_fail: bool) -> None:
        self._server = server
        self._name = name
        self._address = address
        self._hard_fail = hard_fail
        self._told = ""
        """Why it could not listen the last time."""

    async def run(self, handler: Handler, listening: Listening, sleep: Callable[[float], Awaitable[None]]) -> None:
        while True:
            listener = None
            try:
                sock = bind(*self._address, both_families=True)
                listener = self._server.listen(sock, handler, body_bytes=_BODY_BYTES if self._name == "metrics" else 0)
                address = self._address._replace(port=listener.port)
                _log.info("serving", server=self._name, address=str(address))
                listening(self._name, address)
                await asyncio.get_running_loop().create_future()
            except OSError as error:
                reason = f"cannot serve {self._name} on {self._address}: {_why(error, self._name)}"
                if self._hard_fail:
                    raise BindError(reason, self._name) from None
                tell = _log.debug if reason == self._told else _log.error
                tell("not served", server=self._name, reason=reason, retry=f"{RETRY:g}s")
                self._told = reason
            finally:
                if listener is not None:
                    listener.close()
            await sleep(RETRY)


def _why(error: OSError, name: str) -> str:
    """Why nobody can be served, and what to do."""
    setting = "metricsBindAddress" if name == "metrics" else "healthzBindAddress"
    reason = error.strerror or str(error)
    match error.errno:
        case errno.EADDRINUSE:
            return f"{reason}: end what listens there (ss -ltnp shows it), or set another {setting}"
        case errno.EADDRNOTAVAIL:
            return f"{reason}: the node has no such address, set another {setting}"
        case errno.EACCES:
            return f"{reason}: a port below 1024 takes CAP_NET_BIND_SERVICE, set another {setting}"
        case _:
            return reason


def health_handler(health: ProxyHealth, metrics: Metrics) -> Handler:
    """/healthz and /livez, for any method (HC-1)."""

    def answer(request: Request) -> Response:
        match request.path:
            case "/healthz":
                answer = health.healthz()
                metrics.healthz_answered(answer.status)
            case "/livez":
                answer = health.livez()
                metrics.livez_answered(answer.status)
            case _:
                return not_found()
        return _probed(answer)

    return answer


class MetricsPages:
    """What the metrics server serves (HTTP-1)."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        proxy_mode: str,
        version: str,
        configz: Callable[[], Mapping[str, Any]] | None = None,
        *,
        page: Handler | None = None,
    ) -> None:
        self._page = page
        self._metrics = metrics
        self._version = version
        self._started, self._monotonic = time.time(), time.monotonic()
        self._configz_now = configz or (lambda: settings.configz)
        self._pages: dict[str, Callable[[Request], Response]] = {
            "/metrics": lambda request: _exposed(*metrics.exposition_for(request.header("Accept"))),
            "/metrics/slis": lambda _: _exposed(CONTENT_TYPE, metrics.slis()),
            "/healthz": self._healthz,
            "/healthz/ping": self._healthz,
            "/proxyMode": lambda _: text(proxy_mode),
            "/configz": self._configz,
        }
        gates = settings.feature_gates
        if gates.get("ComponentStatusz", True):
            self._pages["/statusz"] = self._statusz
        if gates.get("ComponentFlagz", True):
            self._pages["/flagz"] = lambda request: pages.flagz(request, sys.argv[1:])
        self._profiles = profiles.Profiles() if settings.enable_profiling else None

    def answer(self, request: Request) -> Response | Awaitable[Response]:
        """The answer to a request."""
        page = self._pages.get(request.path)
        if page is not None:
            return page(request)
        if self._page is not None and request.path.startswith(PAGE):
            return self._page(request)
        if self._profiles is not None:
            if request.path.startswith(profiles.PREFIX):
                return self._profiles.answer(request)
            if request.path == VERBOSITY:
                return self._set_verbosity(request)
        return not_found()

    def _configz(self, _request: Request) -> Response:
        body = json.dumps({"kubeproxy.config.k8s.io": self._configz_now()}, separators=(",", ":")).encode()
        return Response(200, body, (("Content-Type", "application/json"),))

    def _healthz(self, _request: Request) -> Response:
        self._metrics.pinged()
        return text("ok")

    def _statusz(self, request: Request) -> Response:
        paths = [*self._pages, *([profiles.PREFIX] if self._profiles else []), *([PAGE] if self._page else [])]
        uptime = time.monotonic() - self._monotonic
        return pages.statusz(request, version=self._version, started=self._started, uptime=uptime, paths=paths)

    def _set_verbosity(self, request: Request) -> Response:
        if request.method != "PUT":
            return text("unrecognized http method: PUT a number\n", 405)
        asked = request.body.decode("ascii", "replace").strip()
        if not asked.isdecimal():
            return text(f"failed to set verbosity {asked!r}: it is a number\n", 400)
        logs.set_verbosity(int(asked))
        _log.info("verbosity set", v=int(asked))
        return text(f"successfully set klog.logging.verbosity to {int(asked)}")


def _probed(answer: Answer) -> Response:
    return json_response(answer.body, answer.status)


def _exposed(form: str, body: bytes) -> Response:
    return Response(200, body, (("Content-Type", form),))
