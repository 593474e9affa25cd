"""What an API server writes: lists, watch lines and refusals, taken apart without looking into the objects.

An envelope is decoded once; the objects in it stay `msgspec.Raw` until `proxy.objects` decodes each one by itself, so
that one bad object costs that object and no other (DESIGN 4.4).  A watch is a stream of JSON lines that the network
cuts anywhere, and one line may be large: a slice of 1,000 endpoints has 240 KB.  Nothing here does I/O.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from proxy.objects import Key

MAX_LINE = 64 << 20
"""Bytes of one watch line: far above what etcd stores in one object, far below a node's memory."""

INITIAL_EVENTS_END = "k8s.io/initial-events-end"


class WireError(Exception):
    """Bytes that no API server writes: the stream cannot be trusted from here on."""


class _Envelope(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """A part of an answer."""


class ListMetadata(_Envelope, frozen=True):
    resource_version: str | None = None
    # "continue" is a keyword of Python.
    continue_: str | None = msgspec.field(default=None, name="continue")


class ListPage(_Envelope, frozen=True):
    """A list, or one page of it."""

    metadata: ListMetadata = ListMetadata()
    items: list[msgspec.Raw] | None = None


class WatchEvent(_Envelope, frozen=True):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: msgspec.Raw


class Cause(_Envelope, frozen=True):
    reason: str = ""


class Details(_Envelope, frozen=True):
    causes: list[Cause] | None = None
    retry_after_seconds: float | None = None


class Status(_Envelope, frozen=True):
    """meta/v1 Status: a refusal, as body of an answer or as object of an ERROR event."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: Details | None = None

    @property
    def expired(self) -> bool:
        """The version or the continue token asked for is no longer kept: only a new list helps."""
        return self.code == 410 or self.reason in {"Expired", "Gone"}

    @property
    def too_large_version(self) -> bool:
        """The version asked for lies in the server's future: it was restored, or another member of it lags."""
        causes = (self.details and self.details.causes) or []
        return any(cause.reason == "ResourceVersionTooLarge" for cause in causes) or (
            self.code == 504 and "Too large resource version" in self.message
        )


class _HeadMetadata(_Envelope, frozen=True):
    name: str | None = None
    namespace: str | None = None
    resource_version: str | None = None
    annotations: dict[str, str] | None = None


class Head(_Envelope, frozen=True):
    """What every object has, of any kind."""

    metadata: _HeadMetadata = _HeadMetadata()

    @property
    def key(self) -> Key:
        return Key(self.metadata.namespace or "", self.metadata.name or "")

    @property
    def version(self) -> str:
        return self.metadata.resource_version or ""

    @property
    def ends_initial_events(self) -> bool:
        return (self.metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true"


_PAGE = msgspec.json.Decoder(ListPage)
_EVENT = msgspec.json.Decoder(WatchEvent)
_STATUS = msgspec.json.Decoder(Status)
_HEAD = msgspec.json.Decoder(Head)

T = TypeVar("T")


def _decode(decoder: msgspec.json.Decoder[T], data: bytes | msgspec.Raw, what: str) -> T:
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, another shape, nested without end
        raise WireError(f"{what}: {error}") from None


def decode_page(data: bytes) -> ListPage:
    """A list from the body of an answer; WireError where it is none."""
    return _decode(_PAGE, data, "not a list")


def decode_event(line: bytes) -> WatchEvent:
    """A watch event from its line; WireError where it is none."""
    return _decode(_EVENT, line, "not a watch event")


def decode_status(data: bytes | msgspec.Raw, code: int = 0) -> Status:
    """A Status from whatever stands there: proxies and dying servers answer with text or with nothing.

    `code` is the HTTP status, used where the body has none of its own.
    """
    try:
        status = _STATUS.decode(data)
    except (ValueError, RecursionError):
        text = bytes(data).decode(errors="replace").strip()
        return Status(code=code, message=text.splitlines()[0][:200] if text else "")
    return status if status.code else msgspec.structs.replace(status, code=code)


def head(item: msgspec.Raw | bytes) -> Head:
    """Name and version of an object, as far as they can be made out: never an error.

    A malformed object has to be named in a complaint, so this looks twice: strictly, and then at whatever fields of
    `metadata` have the right type.
    """
    try:
        return _HEAD.decode(item)
    except (ValueError, RecursionError):
        return _lenient_head(item)


def _lenient_head(item: msgspec.Raw | bytes) -> Head:
    try:
        value: Any = msgspec.json.decode(item)
    except (ValueError, RecursionError):
        return Head()
    metadata = value.get("metadata") if isinstance(value, dict) else None
    if not isinstance(metadata, dict):
        return Head()

    def text(field: str) -> str | None:
        found = metadata.get(field)
        return found if isinstance(found, str) else None

    return Head(_HeadMetadata(name=text("name"), namespace=text("namespace"), resource_version=text("resourceVersion")))


class Lines:
    """Bytes in, lines out: holds the beginning of a line until its end arrives.

    Only new bytes are searched, so that a line that arrives in many pieces costs no more than one in one piece.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._held = 0

    @property
    def pending(self) -> int:
        """Bytes of a line that has not ended."""
        return self._held

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` ends, without their ends; empty lines are passed over.

        Raises:
            WireError: a line is longer than any object can be.
        """
        parts = data.split(b"\n")
        rest = parts.pop()
        if parts and self._pieces:
            parts[0] = b"".join((*self._pieces, parts[0]))
            self._pieces.clear()
            self._held = 0
        if rest:
            self._pieces.append(rest)
            self._held += len(rest)
            if self._held > MAX_LINE:
                raise WireError(f"a watch line has more than {MAX_LINE >> 20} MiB")
        return [line for line in parts if line and not line.isspace()]
