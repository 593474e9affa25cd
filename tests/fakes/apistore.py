"""The store behind the stand-in API server: objects, versions, selectors, history.  Plain values, no I/O.

It keeps what an API server's clients can see of etcd and of the watch cache: one version counter over all resources,
a bounded history of events, consistent pages of an older version, and selectors that turn a change into an addition
or a deletion for whoever watches through them.
"""

from __future__ import annotations

import base64
import copy
import json
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Object = dict[str, Any]
Selector = Callable[[Object], bool]


class ResourceType(NamedTuple):
    """A resource as its URL and its lists name it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool
    empty: Mapping[str, Any]
    """What a bookmark says besides metadata: the zero value of the kind, without omitted fields."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


_NODE_INFO = (
    *("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion"),
    *("kubeletVersion", "kubeProxyVersion", "operatingSystem", "architecture"),
)
RESOURCES = {
    resource.plural: resource
    for resource in (
        ResourceType("", "v1", "services", "Service", True, {"spec": {}, "status": {"loadBalancer": {}}}),
        ResourceType(
            "discovery.k8s.io",
            "v1",
            "endpointslices",
            "EndpointSlice",
            True,
            {"addressType": "", "endpoints": None, "ports": None},
        ),
        ResourceType(
            "",
            "v1",
            "nodes",
            "Node",
            False,
            {
                "spec": {},
                "status": {
                    "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
                    "nodeInfo": dict.fromkeys(_NODE_INFO, ""),
                },
            },
        ),
        ResourceType("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", False, {"spec": {}, "status": {}}),
        ResourceType("events.k8s.io", "v1", "events", "Event", True, {}),
    )
}


class StatusError(Exception):
    """A request is answered with this Status."""

    def __init__(self, code: int, reason: str, message: str, *, metadata: Object | None = None, **more: Any) -> None:
        super().__init__(message)
        self.code = code
        self.headers: dict[str, str] = {}
        details = {"details": more["details"]} if "details" in more else {}
        self.body: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata or {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            **details,
            "code": code,
        }


def not_found() -> StatusError:
    return StatusError(404, "NotFound", "the server could not find the requested resource", details={})


class Change(NamedTuple):
    """One write."""

    version: int
    resource: str
    old: Object | None
    new: Object | None

    def event(self, selector: Selector) -> Object | None:
        """The change as a watcher with that selector sees it (SVC-1: what stops matching is deleted)."""
        before = self.old is not None and selector(self.old)
        after = self.new is not None and selector(self.new)
        if after:
            return {"type": "MODIFIED" if before else "ADDED", "object": self.new}
        if not before or self.old is None:
            return None
        last = {**self.old, "metadata": {**self.old["metadata"], "resourceVersion": str(self.version)}}
        return {"type": "DELETED", "object": last}


class Page(NamedTuple):
    items: list[Object]
    version: int
    next: str
    remaining: int


class Store:
    """Objects by resource, with the versions that lists and watches are made of.

    `keep` is how many changes can still be watched from; older versions have expired.
    """

    def __init__(self, *, version: int = 1, keep: int = 10_000) -> None:
        self.version = version
        self.changes: deque[Change] = deque(maxlen=keep)
        self._objects: dict[str, dict[tuple[str, str], Object]] = {plural: {} for plural in RESOURCES}
        self._touched = dict.fromkeys(RESOURCES, version)
        self._snapshots: dict[int, list[Object]] = {}
        self.oldest = 0
        """The oldest version that a watch may begin after."""

    def set(self, value: Object) -> Object:
        """Create or replace an object; what it lacks of metadata is filled in.  Returns it as stored."""
        resource = resource_of(value)
        stored = copy.deepcopy(value)
        stored = {"kind": resource.kind, "apiVersion": resource.api_version, **stored}
        metadata = stored.setdefault("metadata", {})
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        key = metadata.get("namespace", ""), metadata["name"]
        old = self._objects[resource.plural].get(key)
        kept = old["metadata"] if old else {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z"}
        for field in ("uid", "creationTimestamp"):
            metadata.setdefault(field, kept[field])
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        self._objects[resource.plural][key] = stored
        self._changed(resource.plural, old, stored)
        return stored

    def load(self, value: Object) -> None:
        """Put an object as it is, with its own version, without an event."""
        resource = resource_of(value)
        metadata = value["metadata"]
        stored = {"kind": resource.kind, "apiVersion": resource.api_version, **copy.deepcopy(value)}
        self._objects[resource.plural][metadata.get("namespace", ""), metadata["name"]] = stored
        found = int(metadata["resourceVersion"])
        self.version = max(self.version, found)
        self._touched[resource.plural] = max(self._touched[resource.plural], found)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        try:
            return self._objects[plural][namespace, name]
        except KeyError:
            message = f'{plural} "{name}" not found'
            raise StatusError(404, "NotFound", message, details={"name": name, "kind": plural}) from None

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        old = self.get(plural, namespace, name)
        del self._objects[plural][namespace, name]
        self.version += 1
        self._changed(plural, old, None)
        return old

    def _changed(self, plural: str, old: Object | None, new: Object | None) -> None:
        self._touched[plural] = self.version
        if len(self.changes) == self.changes.maxlen:
            self.oldest = self.changes[0].version
        self.changes.append(Change(self.version, plural, old, new))

    def expire(self) -> None:
        """Forget all history: versions before now can be neither watched from nor continued."""
        self.changes.clear()
        self._snapshots.clear()
        self.oldest = self.version

    def objects(self, plural: str) -> list[Object]:
        return [value for _, value in sorted(self._objects[plural].items())]

    def cached_version(self, plural: str) -> int:
        """The version of a list that is served from the watch cache: that of the resource's last event."""
        return self._touched[plural]

    def page(self, plural: str, selector: Selector, limit: int, token: str) -> Page:
        """A page of a consistent list; the whole of it with limit 0."""
        start = ""
        version = self.version
        values = self.objects(plural)
        if token:
            version, start = _untoken(token)
            if version not in self._snapshots:
                fresh = _token(self.version, start)
                self._snapshots[self.version] = values
                raise StatusError(410, "Expired", _TOO_OLD_TOKEN, metadata={"continue": fresh})
            values = self._snapshots[version]
        left = [value for value in values if path_of(value) >= start and selector(value)]
        if not limit or len(left) <= limit:
            return Page(left, version, "", 0)
        self._snapshots[version] = values
        following = path_of(left[limit - 1]) + "\0"
        return Page(left[:limit], version, _token(version, following), len(left) - limit)


_TOO_OLD_TOKEN = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
)


def path_of(value: Object) -> str:
    """Where etcd sorts the object within its resource."""
    metadata = value["metadata"]
    namespace = metadata.get("namespace")
    return f"/{namespace}/{metadata['name']}" if namespace else f"/{metadata['name']}"


def _token(version: int, start: str) -> str:
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": start}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _untoken(token: str) -> tuple[int, str]:
    try:
        value = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        return int(value["rv"]), str(value["start"])
    except (ValueError, KeyError, TypeError):
        raise StatusError(400, "BadRequest", "continue key is not valid") from None


def resource_of(value: Object) -> ResourceType:
    """The resource of an object by its kind."""
    for resource in RESOURCES.values():
        if resource.kind == value.get("kind"):
            return resource
    raise StatusError(400, "BadRequest", f"no resource for kind {value.get('kind')!r}")


def bookmark(plural: str, version: int, *, ends_initial_events: bool = False) -> Object:
    resource = RESOURCES[plural]
    metadata: Object = {"resourceVersion": str(version)}
    if ends_initial_events:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    value = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata, **resource.empty}
    return {"type": "BOOKMARK", "object": value}


# --- selectors ---------------------------------------------------------------------------------------------


def selector(labels: str, fields: str) -> Selector:
    """Whether an object matches both selectors, in the forms that a service proxy and its tests write."""
    tests = [_label_test(term.strip()) for term in labels.split(",") if term.strip()]
    tests += [_field_test(term.strip()) for term in fields.split(",") if term.strip()]
    return lambda value: all(test(value) for test in tests)


def _label_test(term: str) -> Selector:
    def of(value: Object) -> Mapping[str, str]:
        return value["metadata"].get("labels") or {}

    if term.startswith("!"):
        return lambda value: term[1:] not in of(value)
    for operator in ("!=", "==", "="):
        if operator in term:
            key, wanted = (part.strip() for part in term.split(operator, 1))
            return lambda value: (of(value).get(key) == wanted) is (operator != "!=")
    return lambda value: term in of(value)


def _field_test(term: str) -> Selector:
    for operator in ("!=", "==", "="):
        if operator in term:
            path, wanted = (part.strip() for part in term.split(operator, 1))
            return lambda value: (_field(value, path) == wanted) is (operator != "!=")
    raise StatusError(400, "BadRequest", f"invalid field selector {term}")


def _field(value: Any, path: str) -> str:
    for part in path.split("."):
        value = (value or {}).get(part)
    return "" if value is None else str(value)
