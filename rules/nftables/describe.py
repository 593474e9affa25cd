"""Messages and keys in words, for errors and for what `read` finds wrong; any bytes will do."""

from __future__ import annotations

from rules.forwarding import Family, format_address
from rules.netlink.attributes import HEADER, DecodeError
from rules.nftables import names
from rules.nftables.elements import MalformedError, unpack_frontend, unpack_hairpin, unpack_range
from rules.nftables.objects import decode_chain, decode_rule, decode_set


def describe_message(message: bytes) -> str:
    """Which object of the static part a message is about."""
    payload = message[HEADER.size :]
    try:
        kind = HEADER.unpack_from(message)[1] & 0xFF
        if kind in _RULES:
            rule = decode_rule(payload)[1]
            steps = ", ".join(type(step).__name__.lower() for step in rule.rule.expressions)
            return f"a rule of chain {rule.chain} ({steps})"
        if kind in _CHAINS:
            return f"chain {decode_chain(payload)[1].name}"
        if kind in _SETS:
            return f"set {decode_set(payload)[1].name}"
    except DecodeError:
        pass
    return "the table"


_CHAINS, _RULES, _SETS = frozenset({3, 5}), frozenset({6, 8}), frozenset({9, 11})
"""Numbers of the messages that add and delete them."""


def describe_key(set_name: str, key: bytes, family: Family) -> str:
    """The key of an element."""
    size = family.address_bytes
    try:
        if set_name == names.CLUSTER_IPS and len(key) == size:
            return format_address(key)
        if set_name == names.LOCAL_ENDPOINT_PAIRS:
            return str(unpack_hairpin(key, family))
        length = names.source_ranges_length(set_name)
        if length is not None:
            frontend, prefix = unpack_range(key, length, family)
            return f"{prefix} for {frontend}"
        return str(unpack_frontend(key, len(key) - 8))
    except (MalformedError, ValueError):
        return f"0x{key.hex()}"
