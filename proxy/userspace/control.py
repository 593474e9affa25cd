r"""What the agent and a worker process say to each other.

Theory of operation
-------------------
A worker listens on an abstract Unix stream socket, `\0sluice-worker/INDEX`.  Abstract names belong to a network
namespace, as the worker's listeners do, and vanish with the process: there is no stale file.  Both ends ask the kernel
who the other one is: only the same user or root may talk.

A frame is a length of 4 bytes in network order and as many bytes of msgpack: one tagged struct.  Each request has
exactly one answer, in order; `Hello` comes first.  The values are those of `rules.forwarding`, so a route crosses as it
stands in the table.  Unknown fields are ignored and missing ones have defaults, so that an agent and a worker of
neighbouring releases understand each other while `VERSION` is the same.

A worker lives on when the connection ends, and its table with it.  `serial` is the agent's own word for the state that
it has applied: the next agent finds it in `Welcome` and knows what the worker serves.
"""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

import msgspec

from proxy.peers import is_ours, peer
from rules.forwarding import Address, Backend, Detector, Endpoint, Family, Frontend, Prefix, Route

VERSION = 1
MAX_FRAME = 256 << 20
"""Bytes; a table of 50,000 Services has some 30 MB."""
CONNECT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the histogram of connect times, in seconds."""

_HEAD = struct.Struct("!I")
HEAD_BYTES = _HEAD.size


class WireNode(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker must know of the node, for one family."""

    node_port_addresses: frozenset[Address] = frozenset()
    """The addresses on which node ports are opened, one by one; loopback among them where it is to answer (TRF-21)."""
    local_addresses: frozenset[Address] = frozenset()
    """All addresses of the node: their connections count as the node's own (TRF-4).  Loopback needn't be named."""
    detector: Detector | None = None
    """Who counts as a local pod."""
    every_address: bool = False
    """For those who read it: that `node_port_addresses` are all that the node has but loopback, whichever these are."""
    workers: int = 0
    """For those who read it: how many workers are to serve this table."""
    networks: tuple[Prefix, ...] = ()
    """For those who read it: the networks of ClusterIPs, which are addresses of the node as a whole."""
    drain: float = 30.0
    """For those who end the workers: how many seconds flows may go on then."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first request; answered by `Welcome`, or by `Failed` if the versions differ."""

    version: int = VERSION


class Apply(msgspec.Struct, frozen=True, kw_only=True, tag="apply"):
    """Change the table of one family; answered by `Applied`, once every listener is open or its trouble known."""

    family: Family
    serial: str = ""
    node: WireNode | None = None
    """The node's facts, if they are others than before."""
    reset: bool = False
    """Whether `put` and `hairpins_added` are the whole table, and everything else goes."""
    put: list[tuple[Frontend, Route]] = []
    removed: list[Frontend] = []
    hairpins_added: list[Endpoint] = []
    """Kept for `Table` only: a proxy is the source of every connection, so none reaches itself."""
    hairpins_removed: list[Endpoint] = []

    def fault(self) -> str | None:
        """What makes no sense in it; None: it can be applied."""
        size = self.family.address_bytes
        for frontend in (*self.removed, *(frontend for frontend, _ in self.put)):
            if len(frontend.address) not in (0, size) or not 0 < frontend.port < 1 << 16:
                return f"a frontend is no {self.family.label} address and a port"
        for _, route in self.put:
            for address, port in (*route.backends, *(route.local_backends or ())):
                if len(address) != size or not 0 < port < 1 << 16:
                    return f"a backend is no {self.family.label} address and a port"
        return None


class Table(msgspec.Struct, frozen=True, tag="table"):
    """Answered by `TableAnswer`."""

    family: Family


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """Answered by `StatsAnswer`."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Give up the control name and stop accepting; end when all flows have, at the latest after `seconds`.

    Answered by `Done` at once.  Connections that wait to be accepted are still served.
    """

    seconds: float


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End now, and reset what flows are left; answered by `Done`."""


class Trace(msgspec.Struct, frozen=True, kw_only=True, tag="trace"):
    """Tell of new connections of one family from now on, until the connection ends; answered by `Done`."""

    family: Family
    most: int
    """No more than so many are told."""
    frontends: frozenset[Frontend] | None = None
    """To these; None: to whatever has the address and the port."""
    address: Address = b""
    port: int = 0
    source: Address = b""
    """From whom; empty: from anybody."""


class Traces(msgspec.Struct, frozen=True, tag="traces"):
    """Answered by `TracesAnswer`."""


Request = Hello | Apply | Table | Stats | Drain | Stop | Trace | Traces


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    version: int
    pid: int
    index: int
    serials: dict[Family, str] = {}
    """The serial of the last `Apply` of each family that has had one."""


class Applied(msgspec.Struct, frozen=True, kw_only=True, tag="applied"):
    trouble: list[tuple[Frontend, str]] = []
    """All frontends of the family that have a listener that could not be opened, and why; the worker retries."""


class TableAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="table-answer"):
    serial: str = ""
    node: WireNode = WireNode()
    routes: list[tuple[Frontend, Route]] = []
    hairpins: list[Endpoint] = []
    trouble: list[tuple[Frontend, str]] = []


class FrontendStats(msgspec.Struct, frozen=True, kw_only=True):
    """What has passed one frontend since the worker began to serve it; one that nothing has passed is not told.

    A frontend that is removed is told as long as flows of it are left, once more with them gone, and then forgotten.
    """

    frontend: Frontend
    family: Family
    label: str
    open: int
    """TCP connections, or UDP flows, that exist now."""
    total: int
    bytes_in: int
    """From clients to backends."""
    bytes_out: int
    failures: int
    """Connections or flows that found no backend, and backends that could not be reached."""
    connect_seconds: float
    """The sum of all connect times."""
    connects: list[int]
    """How many connects took up to each of CONNECT_BUCKETS, not cumulated; the last one is for all longer ones."""


class StatsAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="stats-answer"):
    frontends: list[FrontendStats] = []
    draining: bool = False
    tcp_connections: int = 0
    udp_flows: int = 0
    exhausted: int = 0
    """How often there was no file descriptor left for a connection."""
    evicted: int = 0
    """UDP flows that had to go for newer ones."""


class Relayed(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one new connection, or UDP flow."""

    frontend: Frontend
    client: tuple[Address, int]
    address: tuple[Address, int]
    """Where it connected to."""
    backend: Backend | None = None
    """None: it got none."""
    own: tuple[Address, int] = (b"", 0)
    """From where the worker connected to the backend."""
    tried: list[Backend] = []
    """Backends before that, which could not be reached."""
    seconds: float = 0.0
    """How long the backend took to accept."""
    why: str = ""
    """It got none."""


class TracesAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="traces-answer"):
    connections: list[Relayed] = []
    """Those since the last time."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request was not understood, or could not be done."""

    why: str


Answer = Welcome | Applied | TableAnswer | StatsAnswer | TracesAnswer | Done | Failed

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class ControlError(OSError):
    """The worker is not there, ended the connection, or said something else than an answer."""


def control_name(index: int) -> str:
    """The abstract address of a worker's control socket."""
    return f"\0sluice-worker/{index}"


def frame(message: Request | Answer) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return _HEAD.pack(len(body)) + body


def body_length(head: bytes) -> int:
    """How long the body is that follows the 4 bytes of `head`.

    Raises:
        ControlError: it is longer than any message.
    """
    length: int = _HEAD.unpack(head)[0]
    if length > MAX_FRAME:
        raise ControlError(f"a message of {length} bytes is none of ours")
    return length


def decode_request(body: bytes) -> Request:
    """Raises msgspec.MsgspecError on anything else."""
    return _decode(_requests, body)


def decode_answer(body: bytes) -> Answer:
    """Raises msgspec.MsgspecError on anything else."""
    return _decode(_answers, body)


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None


class Connection:
    """A blocking connection to one worker, for the agent's threads.  Not for two threads at once."""

    def __init__(self, index: int, *, timeout: float = 30.0, greet: bool = True) -> None:
        """Connect and exchange greetings; `timeout` is for each step, in seconds.

        Without a greeting, one of another version can be asked what all versions understand: `Drain` and `Stop`.

        Raises:
            ControlError: nobody is there, somebody else is, or it speaks another version.
        """
        self.index = index
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(control_name(index))
            answer = self._greet(greet) if is_ours(peer(self._socket)[1]) else Failed("its user is another")
        except OSError as error:
            self._socket.close()
            raise ControlError(f"worker {index} is not there: {error}") from error
        if not isinstance(answer, Welcome):
            self._socket.close()
            raise ControlError(f"worker {index} is not for us: {answer}")
        self.welcome: Welcome = answer

    def _greet(self, greet: bool) -> Answer:
        return self.ask(Hello()) if greet else Welcome(version=0, pid=0, index=self.index)

    def ask(self, request: Request) -> Answer:
        """The worker's answer; `Failed` is one.

        Raises:
            ControlError: the connection ended or timed out; it is of no more use.
        """
        try:
            self._socket.sendall(frame(request))
            return decode_answer(self._read(body_length(self._read(HEAD_BYTES))))
        except ControlError:
            raise
        except (OSError, msgspec.MsgspecError) as error:
            raise ControlError(f"worker {self.index} gave no answer: {error or type(error).__name__}") from error

    def fileno(self) -> int:
        """The descriptor: readable when the worker has ended, as it says nothing unasked."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._socket.recv(min(length, 1 << 20))
            if not part:
                raise ControlError(f"worker {self.index} ended the connection")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
