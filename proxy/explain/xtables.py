"""Matches and targets of iptables in the kernel's own form, which its legacy kind and iptables-nft share.  Pure."""

from __future__ import annotations

import struct

from proxy.explain.passing import Action, Condition

_STATES = {1: "invalid", 2: "established", 4: "related", 8: "new", 0x40: "snat", 0x80: "dnat", 0x100: "untracked"}
_MATCH_STATE = 1
_CONNTRACK = struct.Struct("=146x 3H")
"""Of its revisions 2 and 3: which fields count, which are inverse, the mask of states."""
_MASK = struct.Struct("=I")
_PORTS = struct.Struct("=4H")
_TCP = struct.Struct("=8x B B B B")
_MULTIPORT = struct.Struct("=B B 15H 15B B")
SYN = 0x02
"""The flags of a connection's first packet."""
_DESTINATION = 1
PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp", 1: "icmp", 58: "icmpv6"}

_SILENT = frozenset({"LOG", "NFLOG", "MARK", "CONNMARK", "TRACE", "CT", "NOTRACK", "TCPMSS", "CLASSIFY", "SET", "DSCP"})
"""Targets behind which a packet goes on."""


def match_of(name: str, revision: int, data: bytes) -> list[Condition]:  # noqa: PLR0911  # a line for each of them
    """What a match asks; one that is not understood is a condition of its own."""
    try:
        match name:
            case "comment":
                return []
            case "conntrack" if revision >= 2:  # before, another form
                return _conntrack(data)
            case "state":
                return [_states(_MASK.unpack_from(data)[0], inverse=False)]
            case "tcp":
                return _tcp(data)
            case "udp":
                return _ports(data, data[8])
            case "multiport" if revision == 1:
                return _multiport(data)
    except (struct.error, IndexError):
        pass
    return [Condition("other", (name,))]


def target_of(name: str) -> Action:
    """What a target by this name does."""
    if name == "REJECT":
        return "reject"
    return "next" if name in _SILENT else "perhaps"


def _conntrack(data: bytes) -> list[Condition]:
    counts, inverse, states = _CONNTRACK.unpack_from(data)
    if counts != _MATCH_STATE:
        return [Condition("other", ("conntrack",))]
    return [_states(states, inverse=bool(inverse & _MATCH_STATE))]


def _states(mask: int, *, inverse: bool) -> Condition:
    names = tuple(name for bit, name in _STATES.items() if mask & bit)
    if "dnat" in names:
        return Condition("translated", (), inverse)
    return Condition("state", names, inverse)


def _ports(data: bytes, inverse: int) -> list[Condition]:
    from_first, from_last, first, last = _PORTS.unpack_from(data)
    found = []
    if (from_first, from_last) != (0, 0xFFFF) or inverse & 1:
        found.append(Condition("source port", (_range(from_first, from_last),), bool(inverse & 1)))
    if (first, last) != (0, 0xFFFF) or inverse & 2:
        found.append(Condition("port", (_range(first, last),), bool(inverse & 2)))
    return found


def _tcp(data: bytes) -> list[Condition]:
    option, mask, wanted, inverse = _TCP.unpack_from(data)
    found = _ports(data, inverse)
    if option:
        found.append(Condition("other", ("TCP options",)))
    if mask and (SYN & mask == wanted) == bool(inverse & 4):
        found.append(Condition("state", ("established",)))  # no first packet
    return found


def _multiport(data: bytes) -> list[Condition]:
    which, count, *rest = _MULTIPORT.unpack_from(data)
    if which != _DESTINATION or count > len(rest) // 2:
        return [Condition("other", ("multiport",))]
    ports, begins, inverse = rest[:15], rest[15:30], rest[30]
    values: list[str] = []
    place = 0
    while place < count:
        if begins[place] and place + 1 < count:
            values.append(_range(ports[place], ports[place + 1]))
            place += 1
        else:
            values.append(str(ports[place]))
        place += 1
    return [Condition("port", tuple(values), bool(inverse))]


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
