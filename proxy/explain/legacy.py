"""The tables of legacy iptables as the kernel hands them out: which chains there are, and what they do with packets.

nftables does not show them, and starting `iptables-legacy-save` would create tables that were not there.  The kernel is
asked by getsockopt, as that program asks it, and only for tables that /proc says exist.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Mapping
from typing import NamedTuple

from proxy.explain.passing import Action, Condition, ForeignRule, What
from proxy.explain.xtables import PROTOCOLS, match_of, target_of
from rules.forwarding import Family, Prefix

_GET_INFO, _GET_ENTRIES = 64, 65
_NAME = 32
_INFO = struct.Struct(f"={_NAME}s I 5I 5I 2I")
"""Name, hooks, their first entries, their policies' entries, number of entries, size of all."""
_HEAD = 40
"""Before the entries: name and size, aligned."""
_LEVELS = {Family.IPV4: socket.SOL_IP, Family.IPV6: 41}
_OFFSETS = {Family.IPV4: 88, Family.IPV6: 140}
"""Where an entry says at which offset its target is and the next entry: behind the match on addresses."""
_MATCHES = {Family.IPV4: 112, Family.IPV6: 168}
"""Where an entry's matches begin."""
_TARGET = struct.Struct("=H29sB")
"""Of a match or a target: its size, its name, its revision."""
_ADDRESSED = {
    Family.IPV4: struct.Struct("=4s4s4s4s16s16s16s16sHBB"),
    Family.IPV6: struct.Struct("=16s16s16s16s16s16s16s16sHxBB"),
}
"""Addresses and their masks, interfaces and theirs, protocol, flags, what is inverse."""
_GOTO = {Family.IPV4: 0x02, Family.IPV6: 0x04}
_NOT_IN, _NOT_OUT, _NOT_SOURCE, _NOT_DESTINATION, _FRAGMENTS, _NOT_PROTOCOL = 0x01, 0x02, 0x08, 0x10, 0x20, 0x40
_RETURN = -5
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT")
"""Built-in chains by the numbers of their hooks; of the last, POSTROUTING, nothing is asked."""
_DROP, _ACCEPT = -1, -2
"""Verdicts as a rule has them: -NF_DROP - 1."""


class LegacyTable(NamedTuple):
    """One table."""

    chains: tuple[str, ...]
    """Those that somebody made."""
    policies: Mapping[str, bool]
    """Of the built-in chains that it has, whether their policy is DROP; but for POSTROUTING."""
    rules: Mapping[str, tuple[ForeignRule, ...]] = {}
    """By chain; of built-in chains those that have a policy here."""

    @property
    def forward_drops(self) -> bool:
        """Whether it has a chain FORWARD with the policy DROP."""
        return self.policies.get("FORWARD", False)


def read(family: Family, table: str, *, with_rules: bool = True) -> LegacyTable:
    """A table of the network namespace of the calling thread; its rules cost time where a proxy has 100,000 of them.

    Raises:
        OSError: it cannot be read, or is not there.
    """
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    name = table.encode()
    with socket.socket(kind, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as asking:
        info = _get(asking, _LEVELS[family], _GET_INFO, _INFO.pack(name, *[0] * 13))
        size = _INFO.unpack(info)[-1]
        head = struct.pack(f"={_NAME}sI", name, size).ljust(_HEAD, b"\0")
        entries = _get(asking, _LEVELS[family], _GET_ENTRIES, head + bytes(size))
    return decode(family, info, entries[_HEAD:], with_rules=with_rules)


def decode(family: Family, info: bytes, entries: bytes, *, with_rules: bool = True) -> LegacyTable:
    """A table from the kernel's two answers.

    Raises:
        OSError: they make no sense.
    """
    _, hooks, *numbers = _INFO.unpack(info)
    begins, ends = numbers[:5], numbers[5:10]
    built_in = {begins[number]: name for number, name in enumerate(_HOOKS) if hooks & 1 << number}
    policy_of = {ends[number]: name for number, name in enumerate(_HOOKS) if hooks & 1 << number}
    policies: dict[str, bool] = {}
    chain = ""
    names: dict[int, str] = {}
    held: dict[str, list[bytes]] = {}
    place = 0
    try:
        while place < len(entries):
            target, following = struct.unpack_from("=2H", entries, place + _OFFSETS[family])
            following = max(following, _TARGET.size)
            _, name, _ = _TARGET.unpack_from(entries, place + target)
            data = place + target + _TARGET.size
            if hooks and place in begins:
                chain = built_in.get(place, "")
            if name.startswith(b"ERROR\0"):
                # What ends a table is an entry of the same kind, with this as its name.
                chain = entries[data : data + _NAME].partition(b"\0")[0].decode()
                names[place + following] = chain
            elif place in policy_of:
                policies[policy_of[place]] = struct.unpack_from("=i", entries, data)[0] == _DROP
            elif chain and with_rules:
                held.setdefault(chain, []).append(entries[place : place + following])
            place += following
        rules = {
            each: tuple(_rule(family, number, entry, names) for number, entry in enumerate(every, 1))
            for each, every in held.items()
        }
    except (struct.error, UnicodeDecodeError) as error:
        raise OSError(f"a table of legacy iptables cannot be understood: {error}") from None
    # The last entry of every chain is its end, which returns.
    return LegacyTable(tuple(each for each in names.values() if each != "ERROR"), policies, rules)


def _rule(family: Family, number: int, entry: bytes, names: Mapping[int, str]) -> ForeignRule:
    """One entry: its addresses, its matches, its target."""
    fields = _ADDRESSED[family].unpack_from(entry)
    source, destination, from_mask, to_mask, into, out, into_mask, out_mask, protocol, flags, inverse = fields
    conditions: list[Condition] = [
        *_network("source", source, from_mask, inverse & _NOT_SOURCE),
        *_network("destination", destination, to_mask, inverse & _NOT_DESTINATION),
        *_interface("in", into, into_mask, inverse & _NOT_IN),
        *_interface("out", out, out_mask, inverse & _NOT_OUT),
    ]
    if protocol:
        name = PROTOCOLS.get(protocol, str(protocol))
        conditions.append(Condition("protocol", (name,), bool(inverse & _NOT_PROTOCOL)))
    if inverse & _FRAGMENTS or (family is Family.IPV4 and flags & 0x01):
        conditions.append(Condition("other", ("fragments",)))
    target = struct.unpack_from("=H", entry, _OFFSETS[family])[0]
    place = _MATCHES[family]
    while place < target:
        size, name_, revision = _TARGET.unpack_from(entry, place)
        data = entry[place + _TARGET.size : place + size]
        conditions += match_of(name_.partition(b"\0")[0].decode(), revision, data)
        place += max(size, _TARGET.size)
    _, name_, _ = _TARGET.unpack_from(entry, target)
    action, to = target_of(name_.partition(b"\0")[0].decode()), ""
    if not name_.strip(b"\0"):
        action, to = _verdict(struct.unpack_from("=i", entry, target + _TARGET.size)[0], names)
        if action == "jump" and flags & _GOTO[family]:
            action = "goto"
    return ForeignRule(number, action, tuple(dict.fromkeys(conditions)), to)


def _verdict(code: int, names: Mapping[int, str]) -> tuple[Action, str]:
    if code >= 0:
        # A jump to where no chain begins is that of a rule without a target, to the one behind it.
        return ("jump", names[code]) if code in names else ("next", "")
    known: dict[int, Action] = {_DROP: "drop", _ACCEPT: "accept", _RETURN: "return"}
    return known.get(code, "perhaps"), ""


def _network(what: What, address: bytes, mask: bytes, inverse: int) -> list[Condition]:
    if not any(mask):
        return []
    bits = f"{int.from_bytes(mask):0{len(mask) * 8}b}"
    if "01" in bits:
        return [Condition("other", (f"{what} with a mask",))]
    return [Condition(what, (str(Prefix(address, bits.count("1"))),), bool(inverse))]


def _interface(what: What, name: bytes, mask: bytes, inverse: int) -> list[Condition]:
    if not any(mask):
        return []
    # The name in the kernel has its `+` still; the mask says how much of it counts.
    text, end, _ = name[: mask.count(b"\xff")].partition(b"\0")
    return [Condition(what, (f"{text.decode()}{'' if end else '*'}",), bool(inverse))]


def _get(asking: socket.socket, level: int, option: int, question: bytes) -> bytes:
    """Ask by getsockopt with a question in the buffer, which `socket.getsockopt` cannot ask."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(question, len(question))
    length = ctypes.c_uint32(len(question))
    if library.getsockopt(asking.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
