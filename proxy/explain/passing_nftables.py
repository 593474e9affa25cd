"""Rules of others in nftables as conditions and an action (`proxy.explain.passing`).  Pure.

A rule's expressions are run over names of fields in place of a packet.  What nft compiles in a way that is not
followed here (sets, maps, marks, limits) becomes a condition that only a packet shows.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from proxy.explain.passing import FAMILY_NAMES, Action, Condition, ForeignRule, What
from proxy.explain.xtables import PROTOCOLS, SYN, match_of, target_of
from rules.forwarding import Prefix
from rules.netlink.attributes import DecodeError, attributes, be32_of, parse_be32, text_of
from rules.nftables.expression_codec import parse_value
from rules.nftables.expressions import (
    ACCEPT,
    CT_STATE,
    CT_STATUS,
    CT_STATUS_DNAT,
    DROP,
    EQUAL,
    GOTO,
    JUMP,
    META_IIFNAME,
    META_L4PROTO,
    NETWORK_HEADER,
    NOT_EQUAL,
    RETURN,
    TRANSPORT_HEADER,
    VERDICT_REGISTER,
    Bitwise,
    Cmp,
    Ct,
    Decide,
    Fib,
    Hash,
    Lookup,
    LookupMap,
    Meta,
    Number,
    Payload,
    Reject,
    Unknown,
)
from rules.nftables.messages import INTERVAL_END, Element
from rules.nftables.objects import INTERVAL, ListedRule, SetSpec

_META_PROTOCOL, _META_OIFNAME, _META_NFPROTO = 1, 7, 15
_ETHER_TYPES = {0x0800: 2, 0x86DD: 10}
_WITHOUT_EFFECT = frozenset({"counter", "log", "objref", "last", "notrack", "immediate", "bitwise", "byteorder"})
_STATES = {1: "invalid", 2: "established", 4: "related", 8: "new", 64: "untracked"}
_ACTIONS: dict[int, Action] = {DROP: "drop", ACCEPT: "accept", JUMP: "jump", GOTO: "goto", RETURN: "return"}

_FIELDS: dict[tuple[int, int], tuple[tuple[int, int, What], ...]] = {
    (NETWORK_HEADER, 4): ((9, 1, "protocol"), (12, 4, "source"), (16, 4, "destination")),
    (NETWORK_HEADER, 16): ((6, 1, "protocol"), (8, 16, "source"), (24, 16, "destination")),
}
_TCP_FLAGS = (TRANSPORT_HEADER, 13, 1)
_TRANSPORT: tuple[tuple[int, int, What], ...] = ((0, 2, "source port"), (2, 2, "port"))
_PORT_PLACES: dict[tuple[int, int, int], What] = {
    (TRANSPORT_HEADER, 0, 2): "source port",
    (TRANSPORT_HEADER, 2, 2): "port",
}
_AT_MOST, _AT_LEAST = 3, 5
_BOUNDS = (_AT_MOST, _AT_LEAST)


Sets = Mapping[str, Sequence[tuple[bytes, bytes]]]
"""What is in sets: the first and the last key of each range; a set that is missing was not read."""


class _Loaded(NamedTuple):
    """What a register holds."""

    name: str
    place: tuple[int, int, int] = (0, 0, 0)
    """Of a packet's bytes: the header, the offset, the length."""
    mask: bytes = b""


def decode(listed: ListedRule, sets: Sets) -> ForeignRule:  # noqa: C901, PLR0912  # a line for each kind of expression
    """A rule of any table of the families ip, ip6 and inet, with what is in sets that it looks into."""
    registers: dict[int, _Loaded] = {}
    conditions: list[Condition] = []
    action: Action = "next"
    target = ""
    for step in listed.rule.expressions:
        match step:
            case Payload(register, base, offset, length):
                registers[register] = _Loaded("payload", (base, offset, length))
            case Meta(register, key):
                registers[register] = _Loaded(f"meta {key}")
            case Ct(register, key):
                registers[register] = _Loaded(f"ct {key}")
            case Fib(register) | Number(register) | Hash(register=register):
                registers[register] = _Loaded(type(step).__name__.lower())
            case Bitwise(source, register, _, mask, flip):
                loaded = registers.get(source, _Loaded("something"))
                plain = not loaded.mask and not any(flip)
                registers[register] = loaded._replace(mask=mask) if plain else _Loaded("something")
            case Cmp(register, operator, value):
                loaded = registers.get(register, _Loaded("something"))
                if operator in _BOUNDS and loaded.place in _PORT_PLACES and not loaded.mask:
                    conditions.append(_bound(loaded, operator, value))
                    continue
                if operator not in (EQUAL, NOT_EQUAL):
                    loaded = _Loaded(f"more or less of {_said(loaded.name)}")
                conditions += _compared(loaded, value, _network(conditions, loaded), inverse=operator != EQUAL)
            case Lookup(name, register, flags):
                loaded = registers.get(register, _Loaded("something"))
                conditions.append(_looked_up(loaded, name, sets, _network(conditions, loaded), inverse=bool(flags & 1)))
            case LookupMap():
                conditions.append(Condition("other", (f"set {step.set}",)))
                if step.register == VERDICT_REGISTER:
                    action = "perhaps"
                registers[step.register] = _Loaded("something")
            case Decide(verdict):
                action, target = _ACTIONS.get(verdict.code, "perhaps"), verdict.chain
            case Reject():
                action = "reject"
            case Unknown(name, raw):
                action, more = _unknown(name, raw, registers, action)
                conditions += more
    return ForeignRule(listed.handle, action, tuple(_named(conditions)), target)


def members(elements: Iterable[Element], spec: SetSpec) -> tuple[tuple[bytes, bytes], ...]:
    """What is in a set, as the first and the last key of each range."""
    if not spec.flags & INTERVAL:
        return tuple((each.key, each.key) for each in elements)
    found: list[tuple[bytes, bytes]] = []
    begun: bytes | None = None
    # Where one range ends the next may begin: the end comes first.
    for each in sorted(elements, key=lambda each: (each.key, not each.flags & INTERVAL_END)):
        if each.flags & INTERVAL_END:
            if begun is not None and len(begun) == len(each.key):
                found.append((begun, (int.from_bytes(each.key) - 1).to_bytes(len(each.key))))
            begun = None
        else:
            begun = each.key
    if begun is not None:
        found.append((begun, b"\xff" * len(begun)))
    return tuple(found)


def _looked_up(loaded: _Loaded, name: str, sets: Sets, size: int, *, inverse: bool) -> Condition:
    """What it asks to be in a set."""
    found = sets.get(name)
    if found is None or loaded.mask:
        return Condition("other", (f"set {name}",))
    base, offset, length = loaded.place
    fields = _TRANSPORT if base == TRANSPORT_HEADER else _FIELDS.get((base, size), ())
    what: What | None = next((each for start, width, each in fields if (start, width) == (offset, length)), None)
    if loaded.name == f"meta {META_L4PROTO}":
        what, length = "protocol", 1
    elif loaded.name == f"ct {CT_STATE}":
        bits = tuple(_STATES.get(struct.unpack("=I", first)[0], "?") for first, _ in found if len(first) == 4)
        return Condition("state", bits, inverse)
    values: list[str] = []
    for first, last in found:
        numbers = int.from_bytes(first[:length]), int.from_bytes(last[:length])
        if what in ("source", "destination") and len(first) == length:
            values += _networks(first, last)
        elif what in ("port", "source port"):
            values.append(str(numbers[0]) if first == last else f"{numbers[0]}-{numbers[1]}")
        elif what == "protocol" and first == last:
            values.append(PROTOCOLS.get(numbers[0], str(numbers[0])))
        else:
            return Condition("other", (f"set {name}",))
    return Condition(what or "other", tuple(values) if what else (f"set {name}",), inverse and bool(what))


def _networks(first: bytes, last: bytes) -> list[str]:
    """The networks from one address to another."""
    if first == last:
        return [str(Prefix(first, len(first) * 8))]
    ends = ipaddress.ip_address(first), ipaddress.ip_address(last)
    return [str(each) for each in ipaddress.summarize_address_range(*ends)]


def _bound(loaded: _Loaded, operator: int, value: bytes) -> Condition:
    port = int.from_bytes(value)
    ports = f"0-{port}" if operator == _AT_MOST else f"{port}-65535"
    return Condition(_PORT_PLACES[loaded.place], (ports,))


def _named(conditions: Iterable[Condition]) -> Iterable[Condition]:
    """Without what is said twice, in the order in which it was said."""
    return dict.fromkeys(conditions)


def _network(conditions: Iterable[Condition], loaded: _Loaded) -> int:
    """Bytes of an address in the header that a rule looks at, by what it asked of it before or by its place."""
    for each in conditions:
        if each.what == "family" and not each.inverse:
            return 16 if "IPv6" in each.values else 4
    _, offset, length = loaded.place
    # In a table of one family nft does not ask: only IPv6 has addresses of more than 8 bytes, or at 8 and 24.
    return 16 if offset in (8, 24) or length > 8 else 4


def _compared(loaded: _Loaded, value: bytes, size: int, *, inverse: bool) -> list[Condition]:
    """What a comparison asks."""
    if loaded.name == "payload":
        return _of_packet(loaded, value, size, inverse=inverse)
    if loaded.name.startswith("ct ") and loaded.mask:
        return _of_connection(loaded, value, inverse=inverse)
    if not loaded.mask and loaded.name.startswith("meta "):
        key = int(loaded.name[5:])
        if key in (META_IIFNAME, _META_OIFNAME):
            name = value.partition(b"\0")[0].decode(errors="replace")
            whole = b"\0" in value or len(value) == 16  # IFNAMSIZ
            return [Condition("in" if key == META_IIFNAME else "out", (name if whole else f"{name}*",), inverse)]
        if key == META_L4PROTO and len(value) == 1:
            return [Condition("protocol", (PROTOCOLS.get(value[0], str(value[0])),), inverse)]
        if (key, len(value)) in ((_META_NFPROTO, 1), (_META_PROTOCOL, 2)):
            number = value[0] if key == _META_NFPROTO else _ETHER_TYPES.get(int.from_bytes(value), 0)
            return [Condition("family", (FAMILY_NAMES.get(number, "none"),), inverse)]
    return [Condition("other", (_said(loaded.name),))]


def _of_connection(loaded: _Loaded, value: bytes, *, inverse: bool) -> list[Condition]:
    mask = struct.unpack("=I", loaded.mask)[0] if len(loaded.mask) == 4 else 0
    if any(value):
        return [Condition("other", (_said(loaded.name),))]
    # `ct state new` is: the state masked is not 0.
    if loaded.name == f"ct {CT_STATE}":
        return [Condition("state", tuple(name for bit, name in _STATES.items() if mask & bit), not inverse)]
    if loaded.name == f"ct {CT_STATUS}" and mask == CT_STATUS_DNAT:
        return [Condition("translated", (), not inverse)]
    return [Condition("other", (_said(loaded.name),))]


def _of_packet(loaded: _Loaded, value: bytes, size: int, *, inverse: bool) -> list[Condition]:
    """What a comparison asks of a packet's bytes, which may be several fields at once."""
    base, offset, length = loaded.place
    mask = loaded.mask or b"\xff" * length
    if loaded.place == _TCP_FLAGS and len(value) == len(mask) == 1:
        meant = (SYN & mask[0] == value[0]) != inverse
        return [] if meant else [Condition("state", ("established",))]
    fields = _TRANSPORT if base == TRANSPORT_HEADER else _FIELDS.get((base, size), ())
    found: list[Condition] = []
    covered = 0
    for start, width, what in fields:
        first, last = max(start, offset), min(start + width, offset + length)
        if first >= last:
            continue
        covered += last - first
        within = slice(first - offset, last - offset)
        padding = bytes(first - start), bytes(start + width - last)
        part = padding[0] + mask[within] + padding[1]
        if not any(part):
            continue
        bits = f"{int.from_bytes(part):0{width * 8}b}"
        content = padding[0] + value[within].ljust(last - first, b"\0") + padding[1]
        if "01" in bits:
            return [Condition("other", (f"{what} with a mask",))]
        found.append(_field(what, content, bits.count("1"), inverse=inverse))
    if covered != length or (inverse and len(found) > 1):
        return [Condition("other", ("bytes of the packet",))]
    return found


def _field(what: What, content: bytes, length: int, *, inverse: bool) -> Condition:
    if what in ("source", "destination"):
        return Condition(what, (str(Prefix(content, length)),), inverse)
    if length < len(content) * 8:
        return Condition("other", (f"{what} with a mask",))
    number = int.from_bytes(content)
    return Condition(what, (PROTOCOLS.get(number, str(number)) if what == "protocol" else str(number),), inverse)


def _unknown(  # noqa: C901, PLR0911  # a line for each of them
    name: str, raw: bytes, registers: dict[int, _Loaded], action: Action
) -> tuple[Action, list[Condition]]:
    """What an expression does that is none of ours: the action so far or its own, and what it asks."""
    if name in _WITHOUT_EFFECT:
        return action, []
    try:
        found = attributes(raw)
        if name == "range":
            return action, _range(found, registers)
        if name == "match":
            revision = parse_be32(found.get(2, b"\0\0\0\0"))
            return action, match_of(text_of(found, 1), revision, found.get(3, b""))
        if name == "target":
            return target_of(text_of(found, 1)), []
        if name in ("meta", "ct") and 3 in found and 1 not in found:
            return action, []  # it sets something
        if name == "lookup":
            return action, [Condition("other", (f"set {text_of(found, 1)}",))]
        if name == "reject":
            return "reject", []
        if name in ("queue", "tproxy", "fwd", "synproxy"):
            return "perhaps", []
        if 1 in found and len(found[1]) == 4:  # most that load something say so here
            registers[parse_be32(found[1])] = _Loaded(name)
    except (DecodeError, ValueError, KeyError):
        pass
    return action, [] if name in ("exthdr", "rt", "socket", "osf", "hash", "numgen") else [Condition("other", (name,))]


def _range(found: dict[int, bytes], registers: dict[int, _Loaded]) -> list[Condition]:
    loaded = registers.get(be32_of(found, 1), _Loaded("something"))
    first, last = parse_value(found[3]), parse_value(found[4])
    inverse = be32_of(found, 2) == 1
    if loaded.place[0] == TRANSPORT_HEADER and not loaded.mask and loaded.place[2] == 2:
        what: What = "port" if loaded.place[1] == 2 else "source port"
        return [Condition(what, (f"{int.from_bytes(first)}-{int.from_bytes(last)}",), inverse)]
    return [Condition("other", (f"a range of {_said(loaded.name)}",))]


_SAID = {"meta 3": "mark", "payload": "bytes of the packet", "meta 4": "interface", "meta 5": "interface"}


def _said(name: str) -> str:
    return _SAID.get(name, name)
