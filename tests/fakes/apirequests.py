"""What goes in and out of the stand-in API server: requests, open watches, refusals, and the faults to order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from aiohttp import web

from tests.fakes.apistore import RESOURCES, Object, ResourceType, Selector, StatusError, selector

CHUNKED_FROM = 2048
"""Bytes from which Go's server answers in chunks rather than with a length."""


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match."""

    verb: str = ""
    """list, watch, get, create, update or delete; empty: any."""
    resource: str = ""
    times: int = 1
    status: int = 0
    """Answer with this status and `body`, or a Status where there is none."""
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False
    """Close the connection without an answer."""
    hang: bool = False
    """Never answer."""
    truncate: int = 0
    """Close the connection after so many bytes of the answer's body."""

    def matches(self, verb: str, resource: str) -> bool:
        return self.times > 0 and self.verb in {"", verb} and self.resource in {"", resource}


@dataclass(frozen=True)
class Request:
    """One request that was made, whatever became of it."""

    verb: str
    resource: str
    path: str
    query: Mapping[str, str]
    user: str
    headers: Mapping[str, str]


class Stream:
    """One watch that is open; tests may write to it, stop it and break it."""

    def __init__(
        self, resource: str, query: Mapping[str, str], chunk: int, convert: Callable[[Object], Object] | None = None
    ) -> None:
        self.resource = resource
        self.query = query
        self.stalled = False
        """Set: nothing more is sent, though the connection stays."""
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._chunk = chunk
        self._convert = convert
        self.broken = False

    def write(self, data: bytes) -> None:
        """Send these bytes as they are."""
        step = self._chunk or len(data) or 1
        for start in range(0, len(data), step):
            self.pieces.put_nowait(data[start : start + step])

    def event(self, value: Object) -> None:
        if self._convert is not None and value["type"] != "ERROR":
            value = {**value, "object": self._convert(value["object"])}
        self.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    def end(self) -> None:
        """The server's orderly end."""
        self.pieces.put_nowait(None)

    def abort(self) -> None:
        """The connection breaks after what was written."""
        self.broken = True
        self.pieces.put_nowait(None)


EVENT_FILLERS: dict[str, Any] = {
    "deprecatedSource": {},
    "deprecatedFirstTimestamp": None,
    "deprecatedLastTimestamp": None,
}


Version = tuple[str, str, str]
"""Group, version and plural of a resource as a URL names them."""


def route(path: str, older: Container[Version] = ()) -> tuple[ResourceType | None, str, str]:
    """Resource, namespace and name of a path; `older` are versions that are served besides those of the store."""
    parts = path.strip("/").split("/")
    if parts[:1] == ["api"]:
        group, version, rest = "", parts[1] if len(parts) > 1 else "", parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 2:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None, "", ""
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    resource = RESOURCES.get(rest[0]) if rest else None
    if resource is not None and (group, version, resource.plural) in older:
        resource = resource._replace(group=group, version=version)
    if resource is None or (resource.group, resource.version) != (group, version) or len(rest) > 2:
        return None, "", ""
    return resource, namespace, rest[1] if len(rest) == 2 else ""


def verb_of(request: web.Request, name: str) -> str:
    if request.method == "GET":
        watch = request.query.get("watch") in {"true", "1"}
        return "watch" if watch else "get" if name else "list"
    return {"POST": "create", "PUT": "update", "DELETE": "delete"}.get(request.method, request.method.lower())


def selector_of(query: Mapping[str, str], namespace: str) -> Selector:
    chosen = selector(query.get("labelSelector", ""), query.get("fieldSelector", ""))
    if not namespace:
        return chosen
    return lambda value: value["metadata"].get("namespace") == namespace and chosen(value)


def forbidden(user: str, verb: str, resource: ResourceType) -> StatusError:
    message = (
        f'{resource.plural} is forbidden: User "{user}" cannot {verb} resource "{resource.plural}" '
        f'in API group "{resource.group}" at the cluster scope'
    )
    details = {"group": resource.group} if resource.group else {}
    error = StatusError(403, "Forbidden", message, details={**details, "kind": resource.plural})
    error.headers["X-Content-Type-Options"] = "nosniff"
    return error


def invalid_watch() -> StatusError:
    message = (
        'ListOptions.meta.k8s.io "" is invalid: [resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden '
        "for watch, sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList "
        "feature gate is enabled]"
    )
    return StatusError(422, "Invalid", message, details={"group": "meta.k8s.io", "kind": "ListOptions"})


async def json_answer(
    request: web.Request,
    value: Any,
    *,
    status: int = 200,
    truncate: int = 0,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> web.StreamResponse:
    body = json.dumps(value, separators=(",", ":")).encode() + b"\n"
    response = web.StreamResponse(
        status=status,
        headers={"Cache-Control": "no-cache, private", "Content-Type": "application/json", **headers},
    )
    if len(body) > CHUNKED_FROM or truncate:
        response.enable_chunked_encoding()
    else:
        response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: truncate or len(body)])
    if truncate and request.transport is not None:
        await asyncio.sleep(0)
        request.transport.close()
        return response
    await response.write_eof()
    return response
