"""What legacy iptables tells of traced packets: which of its rules they met.

Theory of operation
-------------------
A packet that nftables marked for tracing (`rules.nftables.trace`) is looked at by legacy iptables too: for each rule
that it matches, and each policy, the kernel writes a line by the logger of the packet's family.  That is the kernel log
mostly; here it is nfnetlink_log, whose group 0 is read by a socket.  So nothing is added to the tables of iptables, and
no packet is marked any more when the table of the trace goes, with its socket.

What logs is a setting of the network namespace (net.netfilter.nf_log.2 and .10), which only traces and reports of
invalid packets follow, not the targets LOG and NFLOG.  It is given back at the end, by a process of its own that waits
for the end of this one, however it comes.  Where both are killed the setting stays: then lines go to nobody, as there
are none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from rules.forwarding import Family
from rules.netlink.attributes import ACK, DecodeError, attribute, attributes, be32, messages, parse_text, u8
from rules.netlink.headers import Headers, headers_of_packet
from rules.netlink.listening import Listening
from rules.netlink.transaction import attributes_of, netfilter_message

LOGGER = "nfnetlink_log"
_SYSCTL = Path("/proc/sys/net/netfilter/nf_log")

_ROOM = 4 << 20
_SUBSYSTEM, _PACKET, _CONFIGURE = 4, 0, 1
_COMMAND, _MODE, _THRESHOLD = 1, 2, 5
_BIND, _COPY_PACKET = 1, 2
_SHOWN = 128
"""Bytes of a packet that are told: its headers."""
_MODE_VALUE = struct.Struct("!IBx")
_PAYLOAD, _PREFIX = 9, 10

_LINE = re.compile(r"TRACE: ([^:]*):([^:]*):(rule|return|policy):(\d{1,9}) ?")
_ENDS = re.compile(r"(?:^| )-j (DROP|REJECT)(?: |$)")


class Line(NamedTuple):
    """A rule that a packet met, or the policy or the end of a chain."""

    table: str
    chain: str
    kind: str
    """`rule`; `policy` or `return` at the end of a chain, and for rules that match everything."""
    number: int
    """The rule's place in its chain, from 1; the end has the next one."""
    headers: Headers
    """As they were there."""


class Chain(NamedTuple):
    """A chain as iptables-save prints it."""

    policy: str
    """`-`: it has none, as somebody made it."""
    rules: tuple[str, ...]


Chains = Mapping[tuple[str, str], Chain]
"""By table and name."""


def chains_of(saved: str) -> dict[tuple[str, str], Chain]:
    """All chains in the output of iptables-save, whosoever they are; what makes no sense is passed over."""
    policies: dict[tuple[str, str], str] = {}
    rules: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in saved.split("\n"):
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            name, _, rest = line[1:].partition(" ")
            policies[table, name] = rest.partition(" ")[0]
        elif line.startswith("-A "):
            name, _, rest = line[3:].partition(" ")
            rules.setdefault((table, name), []).append(rest)
    return {place: Chain(policy, tuple(rules.get(place, ()))) for place, policy in policies.items()}


def end_of(line: Line, chains: Chains) -> tuple[str, int]:
    """`DROP` or `REJECT` where the packet ended there, else nothing; and the number of the rule, 0 for the policy.

    The kernel calls it the policy or the return of a chain too, where a rule asks for nothing: the number tells.
    """
    chain = chains.get((line.table, line.chain))
    if chain is None:
        return "", line.number
    if 0 < line.number <= len(chain.rules):
        found = _ENDS.search(chain.rules[line.number - 1])
        return found[1] if found else "", line.number
    return chain.policy if line.kind == "policy" and chain.policy == "DROP" else "", 0


def decode_line(payload: bytes) -> Line | None:
    """What a message of nfnetlink_log says; None: it is about something else than a trace.

    Raises:
        DecodeError: it is no such message.
    """
    found = attributes(attributes_of(payload))
    told = _LINE.fullmatch(parse_text(found.get(_PREFIX, b"")))
    headers = headers_of_packet(found.get(_PAYLOAD, b""))
    if told is None or headers is None:
        return None
    table, chain, kind, number = told.groups()
    return Line(table, chain, kind, int(number), headers)


def listen() -> Listening:
    """A socket that hears what the kernel logs to group 0, in the network namespace of the calling thread.

    It is for `decode_lines`.

    Raises:
        OSError: the kernel refuses it; EBUSY: another process (ulogd) hears it.
    """
    log = Listening(_ROOM)
    # One by one, as they come: by default the kernel waits for a hundred, or a second.
    mode = attribute(_MODE, _MODE_VALUE.pack(_SHOWN, _COPY_PACKET)) + be32(_THRESHOLD, 1)
    try:
        for payload in (u8(_COMMAND, _BIND), mode):
            log.ask(netfilter_message(_CONFIGURE, ACK, socket.AF_UNSPEC, payload, _SUBSYSTEM))
    except (OSError, DecodeError) as error:
        log.close()
        raise error if isinstance(error, OSError) else OSError(errno.EPROTO, str(error)) from None
    return log


def decode_lines(datagram: bytes) -> list[Line]:
    """The lines of one datagram; what is malformed is left out."""
    found: list[Line] = []
    kind = _SUBSYSTEM << 8 | _PACKET
    with contextlib.suppress(DecodeError):
        told = (decode_line(each.payload) for each in messages(datagram) if each.kind == kind)
        found.extend(line for line in told if line is not None)
    return found


# --- the logger ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to_sockets(families: Iterable[Family], directory: Path = _SYSCTL) -> Iterator[None]:
    """Have the kernel log packets of these families to nfnetlink_log; what was set before is set again at the end.

    It is to be entered before any socket of the trace is opened, as a process is forked that must hold none of them.

    Raises:
        OSError: the setting cannot be read or written.
    """
    before: dict[Path, str] = {}
    for family in families:
        path = directory / str(family.af)
        name = path.read_text().strip()
        if name != LOGGER:
            before[path] = name
    if not before:
        yield
        return
    reading, writing = os.pipe()
    guardian = os.fork()
    if not guardian:
        _guard(reading, before)
    os.close(reading)
    try:
        for path in before:
            path.write_text(LOGGER)
        yield
    finally:
        os.close(writing)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(guardian, 0)


def _guard(reading: int, before: Mapping[Path, str]) -> NoReturn:
    """Wait until nobody holds the other end of a pipe, then set what was set before."""
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # The pipe's other end, and whatever the caller has open.
        os.closerange(0, reading)
        os.closerange(reading + 1, os.sysconf("SC_OPEN_MAX"))
        os.read(reading, 1)
        for path, name in before.items():
            with contextlib.suppress(OSError):
                if path.read_text().strip() == LOGGER:
                    path.write_text(name)
    finally:
        os._exit(0)
