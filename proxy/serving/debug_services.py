"""/debug/services: a page about the Services of a node, for people who would rather look.

    /debug/services/                    the page; beside it static/…, its script and style
    /debug/services/data                all Services, as `debug_services_map` lists them
    /debug/services/events?since=       what changes, as server-sent events
    /debug/services/detail?service=     one Service: its frontends, endpoints, troubles and traffic
    /debug/services/explain?target=&from=&interface=
                                        what becomes of one connection, as `sluice explain` says it

It only reads: other methods than GET and HEAD are refused.  It is off unless `debugPage` says otherwise, and on an
address that others than this node can reach unless `debugPageAnywhere` does.

Whoever can have a page in the browser of an operator must not get at this one: requests by a name that somebody else
may have pointed at this address are refused (DNS rebinding), as are those that another site's page makes; nothing but
the page's own script runs (Content-Security-Policy), and that puts text into text nodes alone.

An answer of `events` is finite, as every answer of this server is: it waits for a change, for `WAIT` seconds at most,
tells it, and ends; the browser's EventSource asks again and says where it was.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from importlib import resources
from typing import Any, NamedTuple

import msgspec

from proxy.config.settings import HostPort, Settings
from proxy.counters import Row, Traffic
from proxy.counting import Counters
from proxy.desired import Desired
from proxy.explain.answer import answer
from proxy.explain.asked import parse_asked, parse_client
from proxy.explain.data import to_data
from proxy.explain.gather import Means, UnanswerableError, Where, gather
from proxy.explain.text import lines
from proxy.logs import get_logger
from proxy.objects import Key
from proxy.report import FamilyReport
from proxy.serving.debug_services_detail import detail
from proxy.serving.debug_services_map import ServiceMap
from proxy.serving.messages import Request, Response, not_found
from proxy.serving.servers import PAGE
from proxy.state import State
from rules.forwarding import Family

PREFIX = PAGE
WAIT = 5.0
"""Seconds for which an answer of `events` waits for a change."""
PAUSE = 1.0
"""The least seconds between two looks at what changed."""
WATCHERS = 2
"""Answers of `events` that wait at once; others are given at once, and asked for less often."""
SOON, LATER = 250, 3000
"""Milliseconds after which a page asks again, as one of those that may wait and as one of the others."""
_SAME_LOOK = 0.1
LONGEST = 300
"""Characters of a question."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = (
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:,\[\]]+))(?::\d+)?")
_STATIC = {
    "": ("services.html", "text/html; charset=utf-8"),
    "static/services.css": ("services.css", "text/css; charset=utf-8"),
    "static/services.js": ("services.js", "text/javascript; charset=utf-8"),
    "static/list.js": ("list.js", "text/javascript; charset=utf-8"),
    "static/panes.js": ("panes.js", "text/javascript; charset=utf-8"),
    "static/icon.svg": ("icon.svg", "image/svg+xml"),
}

_log = get_logger("sluice.page")


class Node(NamedTuple):
    """What the page is about, as the agent knows it."""

    name: str
    version: str
    mode: str
    source: str
    """Where objects come from, in words."""
    families: Callable[[], tuple[FamilyReport, ...]]


class ServicesPage:
    """Answers requests below `PREFIX`; on the event loop."""

    def __init__(
        self,
        settings: Settings,
        node: Node,
        state: State,
        desired: Desired,
        *,
        families: tuple[Family, ...],
        counters: Counters,
        means: Means = Means(),  # noqa: B008  # immutable
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of an agent's parts as they are at each request.

        Args:
            settings: the agent's.
            node: what is said at the head of the page.
            state: the objects.
            desired: the tables.
            families: those that are served.
            counters: what has passed Services.
            means: how the kernel is read to explain what becomes of a connection.
            clock: monotonic seconds.
        """
        self._settings = settings
        self._node = node
        self._state = state
        self._desired = desired
        self._families = families
        self._counters = counters
        self._means = means
        self._clock = clock
        self._map = ServiceMap(state, desired, families)
        self._epoch = secrets.token_hex(4)
        self._started = clock()
        self._looked = -PAUSE
        self._looking = asyncio.Lock()
        self._counted = -1.0
        """The time of the look at open flows that the map's traffic is of, in seconds since counting began."""
        self._watchers = 0
        self._explaining = False
        self._static = {path: _File.load(*each) for path, each in _STATIC.items()}

    def answer(self, request: Request) -> Response | Awaitable[Response]:
        """The answer to a request."""
        if (refusal := refuse(request, self._node.name)) is not None:
            return refusal
        answers: dict[str, Callable[[Request], Response | Awaitable[Response]]] = {
            # What the page asks for is beside it, also where a proxy has put it below another path.
            "": lambda _: Response(308, b"", (*_HEADERS, ("Location", "services/"))),
            "/data": self._data,
            "/events": self._events,
            "/detail": self._detail,
            "/explain": self._explain,
        }
        name = request.path.removeprefix(PREFIX)
        file = self._static.get(name.removeprefix("/"))
        found = answers.get(name) or (file.answer if file is not None else None)
        return found(request) if found is not None else not_found()

    # --- what changes ------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Take over what changed, not more often than every `PAUSE` seconds."""
        async with self._looking:
            if self._clock() - self._looked < PAUSE:
                return
            await self._map.update()
            report = self._counters.report()
            if abs(report.since - report.looked - self._counted) > _SAME_LOOK:
                # Between looks sums grow by what ends alone: rates would jump.
                self._counted = report.since - report.looked
                self._map.count(self._counters.rows())
            self._looked = self._clock()

    async def _data(self, request: Request) -> Response:
        self._counters.watched()
        await self._look()
        head = msgspec.json.encode(
            {
                "epoch": self._epoch,
                "revision": self._map.revision,
                "head": self._head(),
                "traffic": self._passed(self._map.traffic().items()),
            }
        )
        body = head[:-1] + b',"services":[' + self._map.everything() + b"]}"
        if "gzip" not in request.header("Accept-Encoding"):
            return _json(body)
        # Megabytes become some hundred kilobytes, for those who look from afar; compressing lets others run meanwhile.
        answer = _json(await asyncio.to_thread(gzip.compress, body, 1))
        return answer._replace(headers=(*answer.headers, ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")))

    async def _events(self, request: Request) -> Response:
        """What is other than at a revision, once something is, or after a while."""
        self._counters.watched()
        epoch, _, known = (request.header("Last-Event-ID") or request.argument("since")).partition(".")
        waits = self._watchers < WATCHERS
        if epoch != self._epoch or not known.isdecimal() or len(known) > 15:
            return self._told(["event: reload\ndata: {}\n\n"], waits=waits)
        self._watchers += 1
        try:
            # Who comes for the first time hears at once that it is heard.
            until = self._clock() + (WAIT if waits and request.header("Last-Event-ID") else 0.0)
            while True:
                await self._look()
                found = self._map.since(int(known))
                if found is None or any(found) or self._clock() >= until:
                    break
                await asyncio.sleep(PAUSE / 4)
        finally:
            self._watchers -= 1
        if found is None:
            return self._told(["event: reload\ndata: {}\n\n"], waits=waits)
        events = [_event("head", msgspec.json.encode(self._head()))]
        if found.rows or found.gone:
            gone = msgspec.json.encode(found.gone)
            events.append(_event("services", b'{"services":[' + b",".join(found.rows) + b'],"gone":' + gone + b"}"))
        if self._counted >= 0:
            # Also where nothing moved: that is news to a page that shows rates.
            events.append(_event("traffic", msgspec.json.encode(self._passed(found.traffic))))
        return self._told(events, waits=waits)

    def _told(self, events: list[str], *, waits: bool) -> Response:
        body = f"retry: {SOON if waits else LATER}\nid: {self._epoch}.{self._map.revision}\n{''.join(events)}"
        kinds = (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store"))
        return Response(200, body.encode(), (*_HEADERS, *kinds))

    def _passed(self, moved: Iterable[tuple[str, Traffic]]) -> dict[str, Any]:
        return {"at": self._counted, "moved": [_traffic(*each) for each in moved]}

    def _head(self) -> dict[str, Any]:
        """How the node is."""
        known = self._state.statistics()
        troubles = sorted(self._state.troubles.items())
        return {
            "node": self._node.name,
            "version": self._node.version,
            "mode": self._node.mode,
            "source": self._node.source,
            "uptime": self._clock() - self._started,
            "synced": self._state.synced,
            "pending": known.service_changes_pending + known.endpoint_changes_pending,
            "slices": known.slices,
            "families": [msgspec.to_builtins(each) for each in self._node.families()],
            "troubles": [{"subject": subject, "reason": reason} for (_, subject), reason in troubles[:100]],
            "allTroubles": len(troubles),
            "counters": msgspec.to_builtins(self._counters.report()),
        }

    # --- one Service, and one connection -----------------------------------------------------------------------

    def _detail(self, request: Request) -> Response:
        namespace, _, name = request.argument("service")[:LONGEST].partition("/")
        rows: list[Row] = self._counters.rows()
        found = detail(Key(namespace, name), self._state, self._desired, self._families, rows)
        if found is None:
            return _json(msgspec.json.encode({"error": f"there is no Service {namespace}/{name}"}), 404)
        return _json(msgspec.json.encode(found))

    async def _explain(self, request: Request) -> Response:
        """What the verb says; in a thread, as it asks this agent's socket and reads the kernel."""
        target, client, interface = (request.argument(each)[:LONGEST] for each in ("target", "from", "interface"))
        if self._explaining:
            return _failure("another question is being answered: ask again", 503)
        self._explaining = True
        try:
            return _json(await asyncio.to_thread(self._explained, target, client, interface))
        except (ValueError, UnanswerableError) as error:
            return _failure(str(error), 400)
        finally:
            self._explaining = False

    def _explained(self, target: str, client: str, interface: str) -> bytes:
        asked, who = parse_asked(target.strip()), parse_client(client.strip(), interface.strip())
        where = Where(run_directory=self._settings.run_directory)
        answers = answer(asked, who, gather(where, self._settings, asked, who, self._means))
        told = {**to_data(answers), "words": answers.evidence.words, "text": [each.rstrip() for each in lines(answers)]}
        return msgspec.json.encode(told)


class _File(NamedTuple):
    """A static file."""

    body: bytes
    kind: str
    tag: str

    @classmethod
    def load(cls, name: str, kind: str) -> _File:
        body = resources.files("proxy.serving").joinpath("static", name).read_bytes()
        return cls(body, kind, f'"{hashlib.sha256(body).hexdigest()[:20]}"')

    def answer(self, request: Request) -> Response:
        headers = (*_HEADERS, ("Content-Type", self.kind), ("Cache-Control", "no-cache"), ("ETag", self.tag))
        if request.header("If-None-Match") == self.tag:
            return Response(304, b"", headers)
        return Response(200, self.body, headers)


# --- who may ask -------------------------------------------------------------------------------------------------


def not_served(settings: Settings) -> str:
    """Why the page is not served although it was asked for; empty: it is."""
    address = settings.metrics_bind_address
    if address is None:
        return "the metrics server, of which it is a part, is off (metricsBindAddress)"
    if is_loopback(address) or settings.debug_page_anywhere:
        return ""
    return f"others than this node can reach {address} (metricsBindAddress): debugPageAnywhere: true serves it anyway"


def is_loopback(address: HostPort) -> bool:
    """Whether none but this node can reach a server there."""
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False


def refuse(request: Request, node_name: str) -> Response | None:
    """Why a request is not answered; None: it may be.

    An address cannot be pointed elsewhere as a name can, so that a page of another site never has this server's address
    for its own: addresses are fine, and so are the names that mean this node.
    """
    if request.method not in {"GET", "HEAD"}:
        refusal = _failure("this page only reads: GET it", 405)
        return refusal._replace(headers=(*refusal.headers, ("Allow", "GET, HEAD")))
    host = host_of(request.header("Host"))
    if host not in {"localhost", node_name.lower()} and not _is_address(host):
        return _failure(f"ask by an address or as localhost, not as {host[:100]!r}", 403)
    # Browsers say who asks; a link to the page itself may stand anywhere.
    elsewhere = request.header("Sec-Fetch-Site") in {"cross-site", "same-site"}
    followed = request.header("Sec-Fetch-Dest") == "document" and request.path.removeprefix(PREFIX) in {"", "/"}
    return _failure("another site's page asks for this", 403) if elsewhere and not followed else None


def host_of(header: str) -> str:
    """The host in a Host header, in lower case, without port and brackets; empty: there is none, or no one."""
    found = _HOST.fullmatch(header.strip().lower())
    return (found[1] or found[2]) if found else ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- answers -----------------------------------------------------------------------------------------------------


def _event(name: str, data: bytes) -> str:
    # JSON has no line breaks of its own.
    return f"event: {name}\ndata: {data.decode()}\n\n"


def _traffic(name: str, traffic: Traffic) -> tuple[Any, ...]:
    return (
        name,
        traffic.connections,
        traffic.open,
        traffic.bytes_in,
        traffic.bytes_out,
        traffic.packets_in,
        traffic.packets_out,
    )


def _json(body: bytes, status: int = 200) -> Response:
    headers = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
    return Response(status, body, (*_HEADERS, *headers))


def _failure(reason: str, status: int) -> Response:
    return _json(msgspec.json.encode({"error": reason}), status)
