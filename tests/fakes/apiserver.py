"""A stand-in API server: lists, pages, selectors, watches with bookmarks, and faults to order.

It answers as the recordings of a real server do (tests/unit/test_fake_apiserver.py replays them), for the resources
that a service proxy reads, over HTTP or HTTPS, with tokens and client certificates where wanted.

In a test, on its event loop:

    async with FakeApiServer() as server:
        server.set({"kind": "Service", "metadata": {"name": "web"}, "spec": {...}})
        ...                                     # server.url
        server.faults.append(Fault(status=503, verb="list"))
        server.streams[0].write(b"garbage\\n")

From synchronous code, and as a program of its own: serve_api.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Self

from aiohttp import web

from tests.fakes.apirequests import (
    EVENT_FILLERS,
    Fault,
    Request,
    Stream,
    Version,
    forbidden,
    invalid_watch,
    json_answer,
    route,
    selector_of,
    verb_of,
)
from tests.fakes.apistore import (
    RESOURCES,
    Object,
    ResourceType,
    Selector,
    StatusError,
    Store,
    bookmark,
    not_found,
)

VERSION = {
    "major": "1",
    "minor": "36",
    "emulationMajor": "1",
    "emulationMinor": "36",
    "minCompatibilityMajor": "1",
    "minCompatibilityMinor": "35",
    "gitVersion": "v1.36.2",
    "gitCommit": "0" * 40,
    "gitTreeState": "clean",
    "buildDate": "2026-01-01T00:00:00Z",
    "goVersion": "go1.27.3",
    "compiler": "gc",
    "platform": "linux/amd64",
}
BOOKMARK_TICK = 1.25
"""Seconds within which the real server gets round to a first bookmark."""


class FakeApiServer:
    """The server; an async context manager.  Its methods belong on its event loop.

    tokens: bearer token → user; with none and no client CA, everybody may do everything.
    allowed: (user, verb, resource) → may they.
    second: how long a second of timeoutSeconds and of bookmarks takes, so that tests needn't wait.
    streaming: "yes", "refused" as by servers without streaming lists, or "ignored".
    bookmark_every: seconds between bookmarks of a watch that asks for them; 0: none but that of a streaming list.
    older: versions that are served besides, as older servers do: how an object of the store looks in each.
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        tokens: Mapping[str, str] | None = None,
        allowed: Callable[[str, str, str], bool] = lambda *_: True,
        tls: ssl.SSLContext | None = None,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        second: float = 1.0,
        streaming: str = "yes",
        bookmark_every: float = 60.0,
        served: frozenset[str] = frozenset(RESOURCES),
        chunk: int = 0,
        older: Mapping[Version, Callable[[Object], Object]] = MappingProxyType({}),
    ) -> None:
        self.store = store or Store()
        self.tokens = dict(tokens or {})
        self.allowed = allowed
        self.second = second
        self.streaming = streaming
        self.bookmark_every = bookmark_every
        self.served = served
        self.chunk = chunk
        """Write watches in pieces of so many bytes; 0: line by line."""
        self.older = dict(older)
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.streams: list[Stream] = []
        self._selectors: dict[Stream, Selector] = {}
        self._tls = tls
        self._listen = listen
        self._runner: web.AppRunner | None = None
        self.url = ""

    # --- what tests do ---

    def set(self, value: Object) -> Object:
        """Create or replace an object, and tell the watches."""
        stored = self.store.set(value)
        self._tell()
        return stored

    def delete(self, plural: str, name: str, namespace: str = "default") -> None:
        """Delete an object, and tell the watches."""
        self.store.delete(plural, namespace if RESOURCES[plural].namespaced else "", name)
        self._tell()

    def bookmark(self) -> None:
        """Send a bookmark to every watch that asked for them."""
        for stream in self.streams:
            if stream.query.get("allowWatchBookmarks") == "true" and not stream.stalled:
                stream.event(bookmark(stream.resource, self.store.version))

    def verbs(self, resource: str) -> list[str]:
        """The verbs of the requests for a resource, in order."""
        return [request.verb for request in self.requests if request.resource == resource]

    def _tell(self) -> None:
        change = self.store.changes[-1]
        for stream in self.streams:
            if stream.resource != change.resource or stream.stalled:
                continue
            event = change.event(self._selectors[stream])
            if event is not None:
                stream.event(event)

    # --- the server ---

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, handle_signals=False, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            for stream in self.streams:
                stream.abort()
            await self._runner.cleanup()

    async def start(self) -> None:
        """Listen (again, on the same port)."""
        assert self._runner is not None
        host, port = self._listen
        site = web.TCPSite(self._runner, host, port, ssl_context=self._tls, reuse_address=True)
        await site.start()
        self._listen = host, self._runner.addresses[0][1]
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://{host if ':' not in host else f'[{host}]'}:{self._listen[1]}"

    async def stop(self) -> None:
        """Stop listening and break what is open; objects stay."""
        assert self._runner is not None
        for stream in list(self.streams):
            stream.abort()
        for site in list(self._runner.sites):
            await site.stop()
        server = self._runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except StatusError as error:
            return await json_answer(request, error.body, status=error.code, headers=error.headers)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        resource, namespace, name = route(request.path, self.older)
        verb = verb_of(request, name)
        plural = resource.plural if resource else ""
        user = self._user(request)
        self.requests.append(
            Request(verb, plural, request.path, dict(request.query), user or "", dict(request.headers))
        )
        fault = next((fault for fault in self.faults if fault.matches(verb, plural)), None)
        if fault is not None:
            fault.times -= 1
            refusal = await self._faulty(request, fault)
            if refusal is not None:
                return refusal
        if user is None:
            raise StatusError(401, "Unauthorized", "Unauthorized")
        if resource is None or plural not in self.served:
            if request.path == "/version":
                return await json_answer(request, VERSION)
            if request.path in {"/healthz", "/livez", "/readyz"}:
                return web.Response(text="ok")
            raise not_found()
        if not self.allowed(user, verb, plural):
            raise forbidden(user, verb, resource)
        if verb == "watch":
            return await self._watch(request, resource, namespace)
        if verb == "list":
            found = self._list(request.query, resource, namespace)
            return await json_answer(request, found, truncate=fault.truncate if fault else 0)
        return await self._single(request, verb, resource, namespace, name)

    def _user(self, request: web.Request) -> str | None:
        """Who asks; None: nobody known."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.tokens.get(token)
        certificate = request.transport.get_extra_info("peercert") if request.transport else None
        for part in (certificate or {}).get("subject", ()):
            for key, value in part:
                if key == "commonName":
                    return str(value)
        wants_certificate = self._tls is not None and self._tls.verify_mode != ssl.CERT_NONE
        return None if self.tokens or wants_certificate else "system:anonymous"

    async def _faulty(self, request: web.Request, fault: Fault) -> web.StreamResponse | None:
        if fault.hang:
            await asyncio.get_running_loop().create_future()
        if fault.close:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault.status and fault.body is not None:
            return web.Response(status=fault.status, body=fault.body, headers=dict(fault.headers))
        if fault.status:
            error = StatusError(fault.status, "Injected", f"injected fault {fault.status}")
            error.headers = dict(fault.headers)
            raise error
        return None

    # --- lists ---

    def _list(self, query: Mapping[str, str], resource: ResourceType, namespace: str) -> Object:
        chosen = selector_of(query, namespace)
        wanted = query.get("resourceVersion", "")
        self._check_reached(wanted)
        # With version 0 the cache answers, which knows no limits.
        limit = 0 if wanted == "0" else int(query.get("limit", "0"))
        page = self.store.page(resource.plural, chosen, limit, query.get("continue", ""))
        version = self.store.cached_version(resource.plural) if wanted == "0" else page.version
        metadata: Object = {"resourceVersion": str(version)}
        if page.next:
            metadata["continue"] = page.next
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                metadata["remainingItemCount"] = page.remaining
        found = [self._as(resource, item) for item in page.items]
        items = [{key: item[key] for key in item if key not in {"kind", "apiVersion"}} for item in found]
        kind = f"{resource.kind}List"
        return {"kind": kind, "apiVersion": resource.api_version, "metadata": metadata, "items": items}

    def _as(self, resource: ResourceType, value: Object) -> Object:
        """An object of the store in the version that was asked for."""
        convert = self.older.get(_version(resource))
        return convert(value) if convert else value

    def _check_reached(self, wanted: str) -> None:
        if wanted and int(wanted) > self.store.version:
            message = f"Timeout: Too large resource version: {wanted}, current: {self.store.version}"
            cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
            error = StatusError(504, "Timeout", message, details={"causes": [cause], "retryAfterSeconds": 1})
            error.headers["Retry-After"] = "1"
            raise error

    # --- watches ---

    async def _watch(self, request: web.Request, resource: ResourceType, namespace: str) -> web.StreamResponse:
        query = request.query
        initial = query.get("sendInitialEvents") == "true" and self.streaming != "ignored"
        if "sendInitialEvents" in query and self.streaming == "refused":
            raise invalid_watch()
        wanted = query.get("resourceVersion", "")
        if initial:
            self._check_reached(wanted)
        stream = Stream(resource.plural, dict(query), self.chunk, self.older.get(_version(resource)))
        self._selectors[stream] = selector_of(query, namespace)
        if self._begin(stream, wanted, initial=initial):
            self.streams.append(stream)
        else:
            stream.end()
        response = web.StreamResponse(
            headers={"Cache-Control": "no-cache, private", "Content-Type": "application/json"}
        )
        response.enable_chunked_encoding()
        ticker = asyncio.ensure_future(self._tick(stream, initial=initial))
        try:
            await response.prepare(request)
            while (piece := await stream.pieces.get()) is not None:
                await response.write(piece)
            if stream.broken and request.transport is not None:
                await asyncio.sleep(0)  # what was written goes out first
                request.transport.close()
        finally:
            ticker.cancel()
            with contextlib.suppress(ValueError):
                self.streams.remove(stream)
            del self._selectors[stream]
        return response

    def _begin(self, stream: Stream, wanted: str, *, initial: bool) -> bool:
        """Send what a watch from that version begins with; False: it ends there."""
        chosen = self._selectors[stream]
        if initial or wanted in {"", "0"}:
            for value in self.store.objects(stream.resource):
                if chosen(value):
                    stream.event({"type": "ADDED", "object": value})
            if initial and stream.query.get("allowWatchBookmarks") == "true":
                stream.event(bookmark(stream.resource, self.store.version, ends_initial_events=True))
            return True
        if int(wanted) < self.store.oldest:
            message = f"too old resource version: {wanted} ({self.store.oldest})"
            stream.event({"type": "ERROR", "object": StatusError(410, "Expired", message).body})
            return False
        for change in self.store.changes:
            if change.version > int(wanted) and change.resource == stream.resource:
                event = change.event(chosen)
                if event is not None:
                    stream.event(event)
        return True

    async def _tick(self, stream: Stream, *, initial: bool) -> None:
        """Bookmarks as time passes, the last one two seconds before the end; then the end."""
        seconds = float(stream.query.get("timeoutSeconds", "3600"))
        now = BOOKMARK_TICK if initial else 0.0
        passed = 0.0
        while self.bookmark_every and stream.query.get("allowWatchBookmarks") == "true":
            due = min(now + self.bookmark_every, seconds - 2)
            if due < now:
                break
            await asyncio.sleep((due - passed) * self.second)
            passed, now = due, due + 0.001
            if not stream.stalled:
                stream.event(bookmark(stream.resource, self.store.version))
        await asyncio.sleep((seconds - passed) * self.second)
        if not stream.stalled:
            stream.end()

    # --- single objects ---

    async def _single(
        self,
        request: web.Request,
        verb: str,
        resource: ResourceType,
        namespace: str,
        name: str,
    ) -> web.StreamResponse:
        if verb == "get":
            return await json_answer(request, self._as(resource, self.store.get(resource.plural, namespace, name)))
        if verb == "delete":
            self.delete(resource.plural, name, namespace)
            details = {"name": name, "kind": resource.plural}
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
            return await json_answer(request, status)
        try:
            value = json.loads(await request.read())
        except ValueError:
            raise StatusError(400, "BadRequest", "the body of the request is not JSON") from None
        value["kind"] = resource.kind
        value.setdefault("metadata", {})
        if resource.namespaced:
            value["metadata"]["namespace"] = namespace
        if verb == "update":
            value["metadata"]["name"] = name
        if resource.plural == "events":
            value = {**value, **EVENT_FILLERS}
        return await json_answer(request, self.set(value), status=200 if verb == "update" else 201)


def _version(resource: ResourceType) -> Version:
    return resource.group, resource.version, resource.plural
