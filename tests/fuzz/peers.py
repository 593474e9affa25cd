"""What the agent reads of others than the kernel's rules: manifests in pieces, archives, sockets and their peers.

Each is a function of bytes that may raise nothing but its own error; `targets` has the others.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import tarfile
from typing import Any

import msgspec

from proxy import agent_socket, interfaces
from proxy.bundle import reading as bundle_reading
from proxy.config import document
from proxy.config.errors import ConfigError
from proxy.config.load import load
from proxy.report import EndpointReport, Status, Trouble
from proxy.serving import agent_server
from proxy.serving import messages as http
from proxy.sources.yaml_json import YamlError, outlined, to_json
from proxy.sources.yaml_pieces import Made, cut, joined
from proxy.userspace import anyip, control, sockdiag, sockets
from proxy.userspace.choose import Memory
from proxy.userspace.table import Table
from rules.forwarding import Family, Protocol
from rules.netlink import errors
from rules.netlink.attributes import DecodeError, message, messages
from rules.netlink.headers import headers_of_packet


def manifest_pieces(data: bytes) -> None:
    """A manifest that is YAML, in pieces: what comes of them is what comes of the whole, or nothing."""
    size, text = data[:1], data[1:]
    with contextlib.suppress(UnicodeDecodeError, YamlError):
        made = []
        for piece in cut(text, 8 + sum(size)):
            part = text[piece.start : piece.end].decode()
            made.append(Made(piece, *outlined(f"items:\n{part}" if piece.continues else part)))
        if len(made) > 1 and (found := joined(made)) is not None:
            assert found == to_json(text.decode())


def configuration(data: bytes) -> None:
    """A configuration file, up to the settings that it makes."""
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        document.parse(data.decode(), "fuzz.yaml")
        load([("config", file_with(data))])


class _Answers:
    """A netlink socket that has been asked: it gives some bytes, and then the end of a dump."""

    def __init__(self, data: bytes) -> None:
        self._left = [message(3, 0, bytes(4)), data]

    def send(self, _: bytes) -> None:
        """Nothing: the answer stands."""

    def recv(self, _: int) -> bytes:
        return self._left.pop() if len(self._left) > 1 else self._left[0]


def netlink_sockets(data: bytes) -> None:
    """What sock_diag and rtnetlink tell, and errors: sockets, local routes, interfaces, refusals."""
    for family in Family:
        answers: Any = _Answers(data)
        with contextlib.suppress(DecodeError, OSError):
            list(sockdiag._answers(answers, family, Protocol.TCP))
        with contextlib.suppress(DecodeError):
            anyip._decode(data, family)
    with contextlib.suppress(DecodeError, OSError, interfaces._ChangedError):
        interfaces._read(_Answers(data))  # type: ignore[arg-type]  # it is asked for no more
    with contextlib.suppress(DecodeError):
        for each in messages(data):
            errors.failure(0, each)
            with contextlib.suppress(errors.NetlinkError):
                errors.raise_refusal(each)


def packets(data: bytes) -> None:
    """The beginning of a packet."""
    headers_of_packet(data)


def http_requests(data: bytes) -> None:
    """What comes to the ports of health and metrics."""
    with contextlib.suppress(http.RequestError):
        http.parse(data, 64)


def agent_requests(data: bytes) -> None:
    """What verbs ask the agent."""
    with contextlib.suppress(agent_server.RefusedError):
        agent_server.decode_request(data)


def agent_answers(data: bytes) -> None:
    """What an agent answers to verbs."""
    with contextlib.suppress(agent_socket.AgentError, *agent_socket.UNREADABLE):
        agent_socket._collect(iter(data.split(b"\n")))
    kinds: tuple[Any, ...] = (
        *(Status, agent_socket.TableHead, agent_socket.TablePart, list[Any]),
        *(tuple[EndpointReport, ...], tuple[Trouble, ...]),
    )
    for kind in kinds:
        with contextlib.suppress(agent_socket.AgentError):
            agent_socket._decode(kind, msgspec.Raw(data))


def worker_frames(data: bytes) -> None:
    """What the agent and userspace workers say to one another, at a handover too."""
    with contextlib.suppress(control.ControlError):
        control.body_length(data[:4].ljust(4, b"\0"))
    for decode in (control.decode_request, control.decode_answer):
        with contextlib.suppress(msgspec.MsgspecError):
            decode(data)


def worker_tables(data: bytes) -> None:
    """What an agent has a worker serve, and what a worker answers of it."""
    with contextlib.suppress(msgspec.MsgspecError):
        request = control.decode_request(data)
        if isinstance(request, control.Apply) and request.fault() is None:
            chance = random.Random(1)
            table = Table(request.family, memory=Memory(), chance=chance, interfaces=dict)
            list(table.change(request))
            control.frame(table.answer([]))


def datagrams(data: bytes) -> None:
    """By which interface a datagram came in, as the kernel says."""
    for family in Family:
        found = sockets.input_interface_of_datagram(family.af, [(0, 0, data)] if data else [])
        assert found is None or isinstance(found, str)


SEPARATOR = b"\0\0"


def bundles(data: bytes) -> None:
    """An archive of `sluice bundle`: these bytes, and one whose files they are."""
    for archive in (data, archive_of(data.split(SEPARATOR))):
        with contextlib.suppress(bundle_reading.BundleError):
            for table in bundle_reading.read(file_with(archive)).tables:
                _ = table.table


def archive_of(contents: list[bytes]) -> bytes:
    """An archive with these as its first files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, content in zip(bundle_reading._READ, contents, strict=False):
            member = tarfile.TarInfo(f"{bundle_reading.TOP}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@functools.cache
def _memory() -> int:
    return os.memfd_create("bundle")


def file_with(data: bytes) -> str:
    """The path of a file in memory that holds these bytes."""
    os.ftruncate(_memory(), 0)
    os.pwrite(_memory(), data, 0)
    return f"/proc/self/fd/{_memory()}"


TARGETS = (
    *(manifest_pieces, configuration, bundles, agent_requests, agent_answers, worker_frames, http_requests),
    *(netlink_sockets, packets, datagrams, worker_tables),
)
