"""What `sluice explain` is asked: where to, and from where."""

from __future__ import annotations

import contextlib
import re
from typing import NamedTuple

from proxy.addresses import lenient_address
from proxy.naming import KIND, without_kind
from proxy.objects import Key
from rules.explanation import Origin
from rules.forwarding import Address, Protocol, format_host

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[0-9.]+)):(?P<port>\d{1,5})(?:/(?P<protocol>\w+))?")
_NAME = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_SERVICE = re.compile(rf"(?P<namespace>{_NAME})/(?P<name>{_NAME})(?::(?P<port>[-a-z0-9]+))?")
_ALONE = re.compile(rf"{_NAME}(?::[-a-z0-9]+)?")
_FORMS = "ADDRESS:PORT[/PROTO] (10.96.0.1:443, [fd00::1]:53/UDP) nor [NAMESPACE/]SERVICE[:PORT]"


class AskedAddress(NamedTuple):
    """One frontend, by its address."""

    address: Address
    port: int
    protocol: Protocol

    def __str__(self) -> str:
        return f"{format_host(self.address)}:{self.port}/{self.protocol.name}"


class AskedService(NamedTuple):
    """All frontends of a Service, or of one port of it."""

    key: Key
    port: str
    """The port's name or number; empty: all."""

    def __str__(self) -> str:
        namespace, name = self.key
        # A namespace of such a name would be read as a kind.
        service = f"{namespace}/svc/{name}" if re.fullmatch(KIND, namespace) else str(self.key)
        return f"{service}:{self.port}" if self.port else service


Asked = AskedAddress | AskedService


class Client(NamedTuple):
    """Who connects; neither: whoever usually connects to such a frontend."""

    address: Address | None = None
    origin: Origin | None = None
    interface: str = ""
    """By which interface its packets come in; empty: not known."""


def qualified(text: str, namespace: str = "") -> str:
    """A question with a Service as `NAMESPACE/NAME[:PORT]`, where it is `NAME`, `svc/NAME` or `NAMESPACE/svc/NAME`.

    `namespace` is that of who says none; empty: `default`, as kubectl has it.
    """
    name = without_kind(text)
    if "/" in name or not (name != text or _ALONE.fullmatch(text)):
        return name
    return f"{namespace or 'default'}/{name}"


def parse_asked(text: str) -> Asked:
    """`ADDRESS:PORT[/PROTO]` or a Service, as `qualified` takes it.

    Raises:
        ValueError: it is neither.
    """
    if found := _ADDRESS.fullmatch(text):
        try:
            protocol = Protocol[(found["protocol"] or "TCP").upper()]
        except KeyError:
            raise ValueError(f"{found['protocol']} is none of TCP, UDP and SCTP") from None
        if not 0 < int(found["port"]) < 65536:
            raise ValueError(f"port {found['port']} is not in 1..65535")
        return AskedAddress(lenient_address(found["v6"] or found["v4"]), int(found["port"]), protocol)
    if found := _SERVICE.fullmatch(qualified(text)):
        return AskedService(Key(found["namespace"], found["name"]), found["port"] or "")
    raise ValueError(_not_understood(text))


def _not_understood(text: str) -> str:
    """What is wrong with a question, and how it is meant to be."""
    address, _, rest = text.rpartition(":")
    with contextlib.suppress(ValueError):
        host = format_host(lenient_address(text.removeprefix("[").removesuffix("]")))
        return f"{text!r} has no port: {host}:80, or {host}:53/UDP"
    with contextlib.suppress(ValueError):
        lenient_address(address.removeprefix("[").removesuffix("]"))
        if not rest[:1].isdigit():
            return f"{rest!r} is no port number: with a port's name ask about the Service, NAMESPACE/SERVICE:{rest}"
    if _SERVICE.fullmatch(qualified(text.lower())):
        return f"{text!r}: names of Services and namespaces have no capital letters"
    return f"{text!r} is neither {_FORMS}"


def parse_client(text: str, interface: str = "") -> Client:
    """An address, or `pod`, `node` or `outside`; empty: nobody in particular.

    Raises:
        ValueError: it is none of them.
    """
    if not text:
        return Client(interface=interface)
    try:
        return Client(origin=Origin(text), interface=interface)
    except ValueError:
        pass
    try:
        return Client(address=lenient_address(text.removeprefix("[").removesuffix("]")), interface=interface)
    except ValueError:
        raise ValueError(f"{text!r} is neither an address nor pod, node or outside") from None
