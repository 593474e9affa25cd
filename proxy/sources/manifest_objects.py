"""Kubernetes objects from the bytes of manifests: pure, object by object.

A file is YAML or JSON: several documents, each an object or a list of them (`kind: List`, as kubectl prints it, or
`ServiceList`, as an API server does).  Kinds that nobody here reads are passed over in silence.

What is wrong stays where it is:

* A text that is no YAML or JSON is wrong as a whole (`FileError`, with the line).
* An object that is wrong is one `Problem`, and the other objects of its file count.  `Content.broken` remembers which
  ones these were, so that `keep_last_valid` can give them the version that last was right in the same file.  An item
  that cannot be told which object it is (no kind, no name) could be any: then nothing that the file held is dropped.
* An object in two files (or twice in one): the first in file-name order counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from proxy.objects import (
    HEADLESS_LABEL,
    KINDS,
    PROXY_NAME_LABEL,
    Endpoints,
    EndpointSlice,
    Key,
    Node,
    Object,
    ObjectError,
    Service,
    ServiceCIDR,
    decode_json,
)
from proxy.sources.defaults import unallocated, with_defaults
from proxy.sources.mirror import mirror
from proxy.sources.yaml_json import YamlError

ORIGIN = "manifests"
"""Who complains, to a `Sink`."""

_KINDS: Mapping[str, type[Object]] = {kind.KIND: kind for kind in KINDS}
_LISTS = frozenset({"List", *(f"{kind}List" for kind in _KINDS)})
_CLUSTER_SCOPED = (Node, ServiceCIDR)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""A DNS subdomain, the widest form that the API admits for the names here."""
_BYTE = re.compile(r" \(byte (\d+)\)")
_NOT_BLANK = re.compile(rb"\S")
_DEEP = "nested too deeply"


class FileError(Exception):
    """A file as a whole cannot be used; the message begins with the line wherever that is known."""


class Problem(NamedTuple):
    """What is wrong with one thing, for people: `web.yaml: Service default/web`, `spec.ports[0].port: ...`."""

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


class Identity(NamedTuple):
    """Which object an object is."""

    kind: str
    key: Key

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What one file holds."""

    objects: Mapping[Identity, Object] = {}
    problems: tuple[Problem, ...] = ()
    broken: frozenset[Identity] = frozenset()
    """Objects that are there and wrong."""
    unknown: bool = False
    """Whether something is there and wrong that could be any object."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a directory or a file of manifests holds: each tuple is sorted by key.

    Services and slices are those that an API server would show to kube-proxy: none with the label
    service.kubernetes.io/service-proxy-name (SVC-1), no slice with service.kubernetes.io/headless (EPS-1).
    Mirrored slices are among the slices.
    """

    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    nodes: tuple[Node, ...] = ()
    service_cidrs: tuple[ServiceCIDR, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def unusable(self) -> bool:
        """Whether all that there is, is wrong."""
        return bool(self.problems) and not (self.services or self.slices or self.nodes)


def parse(name: str, data: bytes, to_json: Callable[[bytes], bytes]) -> Content:
    """The objects in the bytes of a file.

    `name` is the file's, for complaints; `to_json` turns YAML into one JSON array (`yaml_children.Converter.convert`).
    JSON is recognised by the suffix, or by its opening brace under another name (it is YAML too if it is no JSON).

    Raises:
        FileError: the file is neither YAML nor JSON.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise FileError(f"line {_line(data, error.start)}: not UTF-8") from None
    if name.endswith(".json") or data.lstrip()[:1] == b"{":
        try:
            return _read(name, list(_json_documents(data)))
        except FileError:
            if name.endswith(".json"):
                raise
    try:
        return _read(name, msgspec.json.decode(to_json(data), type=list[msgspec.Raw]))
    except YamlError as error:
        raise FileError(str(error)) from None


def _json_documents(data: bytes) -> Iterator[msgspec.Raw]:
    """The JSON values that stand one after the other in `data`."""
    whole = memoryview(data)
    start = 0
    while (found := _NOT_BLANK.search(data, start)) is not None:
        start = found.start()
        try:
            yield msgspec.json.decode(whole[start:], type=msgspec.Raw)
        except RecursionError:
            raise FileError(_DEEP) from None
        except msgspec.DecodeError as error:
            place = _BYTE.search(str(error))
            at = start + int(place[1]) if place else len(data)
            if "trailing characters" in str(error):
                end = at - 1  # the decoder counts the first character behind the value
                yield msgspec.json.decode(whole[start:end], type=msgspec.Raw)
                start = end
                continue
            column = at - data.rfind(b"\n", 0, at)
            reason = _BYTE.sub("", str(error)).removeprefix("JSON is malformed: ")
            reason = "it ends too early" if "truncated" in reason else reason
            raise FileError(f"line {_line(data, at)}, column {column}: not JSON: {reason}") from None
        return


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


# --- Documents to objects ------------------------------------------------------------------------------------


class _Item(NamedTuple):
    raw: msgspec.Raw
    where: str
    kind: str
    api_version: str


class _Header(msgspec.Struct, frozen=True, rename="camel"):
    kind: Any = None
    api_version: Any = None
    items: msgspec.Raw = msgspec.Raw(b"null")


class _Names(msgspec.Struct, frozen=True):
    name: str = ""
    namespace: str | None = None


class _Named(msgspec.Struct, frozen=True):
    metadata: _Names = _Names()


def _read(file: str, documents: Iterable[msgspec.Raw]) -> Content:
    try:
        return _content(file, documents)
    except RecursionError:  # lists in lists
        raise FileError(_DEEP) from None


def _content(file: str, documents: Iterable[msgspec.Raw]) -> Content:
    objects: dict[Identity, Object] = {}
    problems: list[Problem] = []
    broken: set[Identity] = set()
    other_versions: Counter[tuple[str, str]] = Counter()
    twice: list[Identity] = []
    unknown = False
    for number, document in enumerate(documents, 1):
        for item in _items(document, f"document {number}"):
            if isinstance(item, Problem):
                problems.append(Problem(f"{file}: {item.subject}", item.reason))
                unknown = True
                continue
            kind = _KINDS[item.kind]
            if item.api_version != kind.API_VERSION:
                other_versions[item.kind, item.api_version] += 1
                _remember(broken, item)
                continue
            try:
                value = _decode(kind, item.raw)
            except ObjectError as error:
                identity = _remember(broken, item)
                problems.append(Problem(f"{file}: {identity or f'{item.kind} in {item.where}'}", str(error)))
                unknown = unknown or identity is None
                continue
            identity = Identity(item.kind, value.key)
            if identity in objects:
                twice.append(identity)
                continue
            objects[identity] = value
            if isinstance(value, Service) and (missing := unallocated(value)) is not None:
                problems.append(Problem(f"{file}: {identity}", missing))
    problems += (
        Problem(
            f"{file}: {kind} of {version or 'no apiVersion'}",
            f"{_counted(count)} passed over: only {_KINDS[kind].API_VERSION} is read",
        )
        for (kind, version), count in other_versions.items()
    )
    if twice:
        problems.append(_duplicates(file, file, twice))
    return Content(
        objects=objects, problems=tuple(problems), broken=frozenset(broken - objects.keys()), unknown=unknown
    )


def _items(raw: msgspec.Raw, where: str, kind: str = "", api_version: str = "") -> Iterator[_Item | Problem]:
    """The objects of our kinds in a document, or the reason why it cannot be told which they are.

    `kind` and `api_version` are those of an enclosing typed list, whose items need not say theirs.
    """
    try:
        header = msgspec.json.decode(raw, type=_Header)
    except (ValueError, RecursionError):
        if bytes(raw) != b"null":
            yield Problem(where, "not a Kubernetes object")
        return
    found, version = header.kind or kind, header.api_version or api_version
    if not isinstance(found, str) or not found:
        yield Problem(where, "no kind: not a Kubernetes object")
    elif found in _LISTS:
        of_items = found.removesuffix("List")
        for number, item in enumerate(_list_items(header), 1):
            yield from _items(item, f"{where} item {number}", of_items, version if of_items else "")
    elif found in _KINDS:
        yield _Item(raw, where, found, version if isinstance(version, str) else str(version))


def _list_items(header: _Header) -> list[msgspec.Raw]:
    try:
        return msgspec.json.decode(header.items, type=list[msgspec.Raw] | None) or []
    except ValueError:
        return [header.items]


def _decode(kind: type[Object], raw: msgspec.Raw) -> Object:
    """An object in the form in which an API server would hand it out.

    Raises:
        ObjectError: a field is of the wrong type, or the name is none.
    """
    value = with_defaults(decode_json(kind, raw))
    metadata = value.metadata
    if not _NAME.fullmatch(metadata.name):
        raise ObjectError(f"metadata.name: {_quoted(metadata.name)} is no DNS name" if metadata.name else _NAMELESS)
    namespace = "" if kind in _CLUSTER_SCOPED else metadata.namespace or "default"
    if namespace and not _NAME.fullmatch(namespace):
        raise ObjectError(f"metadata.namespace: {_quoted(namespace)} is no DNS name")
    if namespace == metadata.namespace:
        return value
    return msgspec.structs.replace(value, metadata=msgspec.structs.replace(metadata, namespace=namespace))


_NAMELESS = "metadata.name: missing"


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= 64 else f"{text[:64]}...")


def _remember(broken: set[Identity], item: _Item) -> Identity | None:
    """Note which object a wrong one is, as far as its metadata can be read."""
    try:
        names = msgspec.json.decode(item.raw, type=_Named).metadata
    except (ValueError, RecursionError):
        return None
    namespace = "" if _KINDS[item.kind] in _CLUSTER_SCOPED else names.namespace or "default"
    if not _NAME.fullmatch(names.name) or (namespace and not _NAME.fullmatch(namespace)):
        return None
    identity = Identity(item.kind, Key(namespace, names.name))
    broken.add(identity)
    return identity


def _counted(count: int, what: str = "object") -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def _duplicates(file: str, first: str, twice: list[Identity]) -> Problem:
    which = f"{twice[0]} and {_counted(len(twice) - 1, 'other')} stand" if twice[1:] else f"{twice[0]} stands"
    where = "twice" if file == first else f"in {first} too"
    return Problem(f"{file}: duplicates", f"{which} {where}: the first one counts")


# --- Files to what they say together ---------------------------------------------------------------------------


def keep_last_valid(content: Content, before: Content) -> Content:
    """`content`, where objects that are wrong keep the version they had in `before`, the same file's last content."""
    kept = {
        identity: value
        for identity, value in before.objects.items()
        if identity not in content.objects and (content.unknown or identity in content.broken)
    }
    return msgspec.structs.replace(content, objects={**content.objects, **kept}) if kept else content


def merge(
    contents: Mapping[str, Content], *, troubles: Mapping[str, str] | None = None, node_name: str | None = None
) -> Loaded:
    """What the files, by their names, say together.

    `troubles` are those of whole files, by name.  With `node_name` the nodes are that one alone.
    """
    source: dict[Identity, str] = {}
    objects: dict[Identity, Object] = {}
    problems = [Problem(file, reason) for file, reason in sorted((troubles or {}).items())]
    for file in sorted(contents):
        content = contents[file]
        problems += content.problems
        twice: dict[str, list[Identity]] = {}
        for identity, value in content.objects.items():
            if identity in objects:
                twice.setdefault(source[identity], []).append(identity)
            else:
                objects[identity] = value
                source[identity] = file
        problems += (_duplicates(file, first, found) for first, found in twice.items())

    found = sorted(objects.values(), key=lambda value: value.key)
    slices = [value for value in found if isinstance(value, EndpointSlice)]
    mirrored = mirror((value for value in found if isinstance(value, Endpoints)), slices)
    for key, reason in mirrored.problems.items():
        identity = Identity(Endpoints.KIND, key)
        problems.append(Problem(f"{source[identity]}: {identity}", reason))
    shown = [value for value in (*slices, *mirrored.slices) if HEADLESS_LABEL not in value.metadata.labels]
    return Loaded(
        services=tuple(
            value for value in found if isinstance(value, Service) and PROXY_NAME_LABEL not in value.metadata.labels
        ),
        slices=tuple(sorted(shown, key=lambda value: value.key)),
        nodes=tuple(value for value in found if isinstance(value, Node) and node_name in {None, value.metadata.name}),
        service_cidrs=tuple(value for value in found if isinstance(value, ServiceCIDR)),
        problems=tuple(problems),
    )
