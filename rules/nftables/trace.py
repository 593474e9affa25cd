"""Traces of packets: the table that asks the kernel for them, and the events that it answers with.

Theory of operation
-------------------
A rule that sets `nftrace` on a packet has the kernel tell, to whom listens, every rule and policy that the packet
meets from there on, in all tables, with the packet's headers at the start of every base chain.  Our rules stand in a
table of their own that the kernel deletes when the socket that made it is closed: tracing ends with its process,
however that ends.  Its chains are

    first-*     before everything: first packets of TCP and SCTP connections, by SYN and INIT
    new-*       behind connection tracking, before any translation: first packets of UDP flows
    wanted      those that are asked for
    sample      sets `nftrace`, on so many packets and no more: the bound holds in the kernel
    behind-*    behind destination NAT: no rules, but its policy tells the headers of the packet
    leaving     the same behind everything in postrouting, as the packet goes out
    entering    the same in input

What comes back over the loopback interface is traced on its way out already.

Rules of iptables-nft are told as rules of its tables.  Legacy iptables looks at the same mark on the packet, and tells
its own rules another way: see `rules.iptables.trace`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from rules.forwarding import Address, Family, Frontend, Protocol
from rules.netlink.attributes import (
    DecodeError,
    attributes,
    be32,
    be32_of,
    be64,
    messages,
    parse_be64,
    parse_text,
    text_of,
)
from rules.netlink.headers import Headers, headers_of
from rules.netlink.listening import Listening
from rules.netlink.transaction import SUBSYSTEM_NFTABLES, attributes_of, family_of
from rules.nftables import names
from rules.nftables.elements import frontend_key
from rules.nftables.expressions import (
    ACCEPT,
    EQUAL,
    FIB_DESTINATION,
    META_IIFNAME,
    NOT_EQUAL,
    TRANSPORT_HEADER,
    Bitwise,
    Cmp,
    Immediate,
    Lookup,
    Meta,
    MetaSet,
    Payload,
    Unknown,
)
from rules.nftables.messages import Element, add_elements
from rules.nftables.objects import (
    INPUT,
    OUTPUT,
    POSTROUTING,
    PREROUTING,
    ChainSpec,
    Hook,
    TableSpec,
    add_chain,
    add_rule,
    add_set,
    add_table,
)
from rules.nftables.phrases import FIRST, IS_NEW, Header, Phrase, chain, go, is_local, is_protocol, port_key
from rules.nftables.sets import build_sets

OWNER = 0x2
"""A table's flag: it belongs to the socket that makes it, and is deleted with it.  Since Linux 5.12."""
SAMPLE, LEAVING, ENTERING = "sample", "leaving", "entering"
"""Chains of the trace's own table: where a trace begins, and where it ends."""

_META_NFTRACE = 12
_FRONTENDS, _NODE_PORTS = "frontends", "node-ports"
_WANTED = "wanted"
_BEFORE_ALL, _BEFORE_TRANSLATION, _BEHIND_TRANSLATION, _BEHIND_ALL = -350, -199, -99, 300
_WEEK = 7 * 24 * 3600
_SYN, _SYN_ACK_FIN_RST = 0x02, 0x17
_SCTP_INIT = 1

_GROUP_TRACE = 9
_ROOM = 32 << 20
"""Bytes for what waits: a thousand packets, which meet some forty rules and policies each."""
_TRACE = SUBSYSTEM_NFTABLES << 8 | 17

_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID = 1, 2, 3, 4, 5, 6
_NETWORK, _TRANSPORT, _IN, _OUT, _POLICY = 8, 9, 10, 12, 16
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
POLICY, RULE = 1, 3
"""What an event is about: the policy of a base chain, a rule.  2 is a return at a chain's end."""


# --- asking ----------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Which connections are traced: to these frontends, or to an address, a port or both."""

    frontends: frozenset[Frontend] | None
    """None: whatever has the address and the port."""
    address: Address = b""
    port: int = 0
    source: Address = b""
    """From whom; empty: from anybody."""


def trace_table(family: Family, name: str, wanted: Wanted, most: int) -> list[bytes]:
    """The messages that make the table `name`, which traces the `most` next packets that are wanted.

    They are to be committed by a socket that stays open as long as the trace runs.
    """
    header = Header(family)
    sets = {spec.name: spec for spec in build_sets(family, (), ())}
    frontends = wanted.frontends or frozenset()
    chains = _chains(header, wanted, most)
    return [
        add_table(family, TableSpec(name, flags=OWNER)),
        add_set(family, name, sets[names.EXTERNAL_POLICY_LOCAL]._replace(name=_FRONTENDS)),
        add_set(family, name, sets[names.NODE_PORT_POLICY_LOCAL]._replace(name=_NODE_PORTS)),
        *add_elements(family, name, _FRONTENDS, _keys(frontends, node_ports=False)),
        *add_elements(family, name, _NODE_PORTS, _keys(frontends, node_ports=True)),
        *(add_chain(family, name, each) for each in chains),
        *(add_rule(family, name, each.name, rule) for each in chains for rule in each.rules),
    ]


def _keys(frontends: Iterable[Frontend], *, node_ports: bool) -> list[Element]:
    return [Element(frontend_key(each)) for each in frontends if each.is_node_port == node_ports]


def _chains(header: Header, wanted: Wanted, most: int) -> tuple[ChainSpec, ...]:
    from_outside = (Meta(FIRST, META_IIFNAME), Cmp(FIRST, NOT_EQUAL, b"lo".ljust(16, b"\0")))
    syn: Phrase = (
        *is_protocol(Protocol.TCP),
        Payload(FIRST, TRANSPORT_HEADER, 13, 1),
        Bitwise(FIRST, FIRST, 1, bytes((_SYN_ACK_FIN_RST,)), b"\0"),
        Cmp(FIRST, EQUAL, bytes((_SYN,))),
        go(_WANTED),
    )
    init: Phrase = (
        *is_protocol(Protocol.SCTP),
        Payload(FIRST, TRANSPORT_HEADER, 12, 1),
        Cmp(FIRST, EQUAL, bytes((_SCTP_INIT,))),
        go(_WANTED),
    )
    new: Phrase = (*is_protocol(Protocol.UDP), *IS_NEW, go(_WANTED))
    # So many a week with as many at once: the bucket does not fill again while a trace runs.
    limit = be64(1, most) + be64(2, _WEEK) + be32(3, most) + be32(4, 0) + be32(5, 0)
    sample: Phrase = (Unknown("limit", limit), Immediate(FIRST, b"\1"), MetaSet(FIRST, _META_NFTRACE))
    return (
        chain(SAMPLE, sample),
        chain(_WANTED, *_wanted(header, wanted)),
        chain(
            "first-prerouting",
            (*from_outside, *syn),
            (*from_outside, *init),
            hook=Hook("filter", PREROUTING, _BEFORE_ALL),
        ),
        chain("first-output", syn, init, hook=Hook("filter", OUTPUT, _BEFORE_ALL)),
        chain("new-prerouting", (*from_outside, *new), hook=Hook("filter", PREROUTING, _BEFORE_TRANSLATION)),
        chain("new-output", new, hook=Hook("filter", OUTPUT, _BEFORE_TRANSLATION)),
        chain("behind-prerouting", hook=Hook("filter", PREROUTING, _BEHIND_TRANSLATION)),
        chain("behind-output", hook=Hook("filter", OUTPUT, _BEHIND_TRANSLATION)),
        chain(LEAVING, hook=Hook("filter", POSTROUTING, _BEHIND_ALL)),
        chain(ENTERING, hook=Hook("filter", INPUT, _BEHIND_ALL)),
    )


def _wanted(header: Header, wanted: Wanted) -> list[Phrase]:
    client: Phrase = (header.source(), Cmp(FIRST, EQUAL, wanted.source)) if wanted.source else ()
    if wanted.frontends is not None:
        return [
            (*client, *header.frontend_key(), Lookup(_FRONTENDS, FIRST), go(SAMPLE)),
            (*client, *is_local(FIB_DESTINATION), *port_key(), Lookup(_NODE_PORTS, FIRST), go(SAMPLE)),
        ]
    address: Phrase = (header.destination(), Cmp(FIRST, EQUAL, wanted.address)) if wanted.address else ()
    port: Phrase = ()
    if wanted.port:
        port = Payload(FIRST, TRANSPORT_HEADER, 2, 2), Cmp(FIRST, EQUAL, wanted.port.to_bytes(2))
    return [(*client, *address, *port, go(SAMPLE))]


# --- listening -------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One thing that happened to a traced packet."""

    id: int
    family: int
    """The AF_ number of the table's family, or another of nftables."""
    table: str
    chain: str
    kind: int
    handle: int
    """The rule's; 0: it is about no rule."""
    verdict: int
    """Of the rule, or the policy of the chain."""
    target: str
    """The chain of a jump or goto."""
    headers: Headers | None
    """At the start of a base chain; None also for a packet without ports."""
    input: int
    """The index of the interface; 0: it came in by none."""
    output: int


def decode_event(payload: bytes) -> Event:
    """One event; raises DecodeError on bytes that are none."""
    found = attributes(attributes_of(payload))
    kind = be32_of(found, _TYPE)
    verdict, target = be32_of(found, _POLICY, ACCEPT), ""
    if kind != POLICY:
        inner = attributes(found.get(_VERDICT, b""))
        verdict, target = be32_of(inner, _VERDICT_CODE), text_of(inner, _VERDICT_CHAIN, "")
    return Event(
        id=be32_of(found, _ID),
        family=family_of(payload),
        table=parse_text(found.get(_TABLE, b"")),
        chain=parse_text(found.get(_CHAIN, b"")),
        kind=kind,
        handle=parse_be64(found[_HANDLE]) if _HANDLE in found else 0,
        verdict=verdict - (1 << 32) if verdict >> 31 else verdict,
        target=target,
        headers=headers_of(found.get(_NETWORK, b""), found.get(_TRANSPORT, b"")),
        input=be32_of(found, _IN, 0),
        output=be32_of(found, _OUT, 0),
    )


def listen() -> Listening:
    """A socket that hears the trace events of the network namespace of the calling thread, for `decode_events`.

    Raises:
        OSError: the kernel refuses it; EPERM without CAP_NET_ADMIN.
    """
    return Listening(_ROOM, _GROUP_TRACE)


def decode_events(datagram: bytes) -> list[Event]:
    """The events of one datagram; what is malformed, or no event, is left out."""
    found: list[Event] = []
    with contextlib.suppress(DecodeError):
        found += (decode_event(each.payload) for each in messages(datagram) if each.kind == _TRACE)
    return found
