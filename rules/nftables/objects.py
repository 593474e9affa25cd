"""nftables objects as netlink messages: tables, chains, rules, and sets without their elements, to bytes and back.

What is encoded here is a message for `NetfilterSocket.commit`, what is decoded a payload from `NetfilterSocket.dump`.
Decoding raises `DecodeError` on bytes that are no such object, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

from rules.forwarding import Family
from rules.netlink.attributes import (
    APPEND,
    CREATE,
    attribute,
    attribute_list,
    attributes,
    be32,
    be32_of,
    be64,
    nested,
    parse_be64,
    text,
    text_of,
)
from rules.netlink.transaction import attributes_of, netfilter_message
from rules.nftables import userdata
from rules.nftables.expression_codec import decode, encode
from rules.nftables.expressions import ACCEPT, Expression

_NEW_TABLE, _GET_TABLE, _DELETE_TABLE = 0, 1, 2
_NEW_CHAIN, _GET_CHAIN, _DELETE_CHAIN = 3, 4, 5
_NEW_RULE, _GET_RULE, _DELETE_RULE = 6, 7, 8
_NEW_SET, _GET_SET, _DELETE_SET = 9, 10, 11

_TABLE = 1
"""The attribute that names the table, in messages about all objects in it."""

# --- tables --------------------------------------------------------------------------------------------------

_TABLE_FLAGS = 2
_TABLE_USERDATA = 6


class TableSpec(NamedTuple):
    """A table's own properties."""

    name: str
    comment: str = ""
    flags: int = 0
    """1: dormant, nothing in it is at work."""


def add_table(family: Family, table: TableSpec) -> bytes:
    """Create the table if it isn't there, and set its flags."""
    note = attribute(_TABLE_USERDATA, userdata.encode_comment(table.comment)) if table.comment else b""
    return _message(family, _NEW_TABLE, CREATE, text(_TABLE, table.name), be32(_TABLE_FLAGS, table.flags), note)


def delete_table(family: Family, table: str) -> bytes:
    """Delete a table and all in it; ENOENT if it isn't there."""
    return _message(family, _DELETE_TABLE, 0, text(_TABLE, table))


def get_table(family: Family, table: str) -> bytes:
    """Ask for one table, with `NetfilterSocket.request`; ENOENT if it isn't there."""
    return _message(family, _GET_TABLE, 0, text(_TABLE, table))


def decode_table(payload: bytes) -> TableSpec:
    """A table; raises DecodeError."""
    found = attributes(attributes_of(payload))
    comment = userdata.parse_comment(found.get(_TABLE_USERDATA, b""))
    return TableSpec(text_of(found, _TABLE), comment, be32_of(found, _TABLE_FLAGS, 0))


# --- chains --------------------------------------------------------------------------------------------------

_CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE, _CHAIN_FLAGS, _CHAIN_USERDATA = 3, 4, 5, 7, 10, 12
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2

PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)


class Hook(NamedTuple):
    """Where a base chain stands in a packet's way."""

    type: str
    number: int
    priority: int
    policy: int = ACCEPT


class ChainSpec(NamedTuple):
    """A chain; `rules` stays empty in what `decode_chain` returns."""

    name: str
    rules: tuple[RuleSpec, ...] = ()
    hook: Hook | None = None
    comment: str = ""


def add_chain(family: Family, table: str, chain: ChainSpec) -> bytes:
    """Create a chain if it isn't there, without its rules."""
    parts = [text(_TABLE, table), text(_CHAIN_NAME, chain.name)]
    if chain.hook is not None:
        hook = chain.hook
        place = be32(_HOOK_NUMBER, hook.number), be32(_HOOK_PRIORITY, hook.priority)
        parts += [nested(_CHAIN_HOOK, *place), be32(_CHAIN_POLICY, hook.policy), text(_CHAIN_TYPE, hook.type)]
    if chain.comment:
        parts.append(attribute(_CHAIN_USERDATA, userdata.encode_comment(chain.comment)))
    return _message(family, _NEW_CHAIN, CREATE, *parts)


def set_policy(family: Family, table: str, chain: str, policy: int) -> bytes:
    """Change the policy of a base chain that is there."""
    return _message(family, _NEW_CHAIN, 0, text(_TABLE, table), text(_CHAIN_NAME, chain), be32(_CHAIN_POLICY, policy))


def delete_chain(family: Family, table: str, chain: str) -> bytes:
    """Delete a chain with its rules; EBUSY while another rule or element leads to it."""
    return _message(family, _DELETE_CHAIN, 0, text(_TABLE, table), text(_CHAIN_NAME, chain))


def list_chains(family: Family) -> bytes:
    """Ask for all chains of the family, in every table."""
    return _message(family, _GET_CHAIN, 0)


def decode_chain(payload: bytes) -> tuple[str, ChainSpec]:
    """A chain and the name of its table; raises DecodeError."""
    found = attributes(attributes_of(payload))
    hook = None
    if _CHAIN_HOOK in found:
        place = attributes(found[_CHAIN_HOOK])
        priority = be32_of(place, _HOOK_PRIORITY)
        hook = Hook(
            text_of(found, _CHAIN_TYPE),
            be32_of(place, _HOOK_NUMBER),
            priority - (1 << 32) if priority >> 31 else priority,
            be32_of(found, _CHAIN_POLICY, ACCEPT),
        )
    comment = userdata.parse_comment(found.get(_CHAIN_USERDATA, b""))
    return text_of(found, _TABLE), ChainSpec(text_of(found, _CHAIN_NAME), (), hook, comment)


# --- rules ---------------------------------------------------------------------------------------------------

_RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_USERDATA = 2, 3, 4, 7


class RuleSpec(NamedTuple):
    """What a rule does, and a comment for people."""

    expressions: tuple[Expression, ...]
    comment: str = ""


class ListedRule(NamedTuple):
    """A rule where the kernel has it."""

    chain: str
    handle: int
    rule: RuleSpec


def add_rule(family: Family, table: str, chain: str, rule: RuleSpec) -> bytes:
    """Append a rule to a chain."""
    parts = [text(_TABLE, table), text(_RULE_CHAIN, chain), nested(_RULE_EXPRESSIONS, encode(rule.expressions))]
    if rule.comment:
        parts.append(attribute(_RULE_USERDATA, userdata.encode_comment(rule.comment)))
    return _message(family, _NEW_RULE, CREATE | APPEND, *parts)


def delete_rule(family: Family, table: str, chain: str, handle: int) -> bytes:
    """Delete one rule."""
    return _message(family, _DELETE_RULE, 0, text(_TABLE, table), text(_RULE_CHAIN, chain), be64(_RULE_HANDLE, handle))


def flush_chain(family: Family, table: str, chain: str) -> bytes:
    """Delete all rules of a chain."""
    return _message(family, _DELETE_RULE, 0, text(_TABLE, table), text(_RULE_CHAIN, chain))


def list_rules(family: Family, table: str) -> bytes:
    """Ask for all rules of a table: chain by chain, each in its order."""
    return _message(family, _GET_RULE, 0, text(_TABLE, table))


def decode_rule(payload: bytes) -> tuple[str, ListedRule]:
    """A rule and the name of its table; raises DecodeError."""
    found = attributes(attributes_of(payload))
    comment = userdata.parse_comment(found.get(_RULE_USERDATA, b""))
    rule = RuleSpec(decode(found.get(_RULE_EXPRESSIONS, b"")), comment)
    return text_of(found, _TABLE), ListedRule(
        text_of(found, _RULE_CHAIN), parse_be64(found.get(_RULE_HANDLE, b"")), rule
    )


# --- sets and maps -------------------------------------------------------------------------------------------

ANONYMOUS = 0x1
INTERVAL = 0x4
MAP = 0x8
TIMEOUT = 0x10
EVALUATED = 0x20
"""Written by rules: `dynamic` in nft's words."""

VERDICT_TYPE = 0xFFFFFF00
VERDICT_LENGTH = 16

_SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LENGTH, _SET_DATA_TYPE, _SET_DATA_LENGTH = 2, 3, 4, 5, 6, 7
_SET_POLICY, _SET_DESCRIPTION, _SET_ID, _SET_TIMEOUT, _SET_USERDATA = 8, 9, 10, 11, 13
_SET_OBJECT_TYPE, _SET_EXPRESSION, _SET_EXPRESSIONS = 15, 17, 18
_DESCRIPTION_SIZE, _DESCRIPTION_FIELDS = 1, 2
_ELEMENT, _FIELD_LENGTH = 1, 1


class SetSpec(NamedTuple):
    """A set, or a map if it has data; lengths in bytes, timeout in milliseconds."""

    name: str
    key_type: int
    """nft's number of the key's type; a concatenation has those of its fields, six bits each."""
    key_length: int
    data_type: int = 0
    data_length: int = 0
    flags: int = 0
    size: int = 0
    """The most elements; 0: no limit, save that what rules write is then limited to 65,535."""
    timeout: int = 0
    fields: tuple[int, ...] = ()
    """Lengths of a concatenation's fields: only for sets of intervals of concatenations."""
    userdata: bytes = b""
    """How nft prints it (`rules.nftables.userdata`)."""
    other: tuple[int, ...] = ()
    """Attributes that change what the set does and that no set of ours has; they are not encoded."""


def add_set(family: Family, table: str, spec: SetSpec) -> bytes:
    """Create a set or map, without elements."""
    parts = [
        text(_TABLE, table),
        text(_SET_NAME, spec.name),
        be32(_SET_FLAGS, spec.flags),
        be32(_SET_KEY_TYPE, spec.key_type),
        be32(_SET_KEY_LENGTH, spec.key_length),
        # The kernel wants a number by which rules of this transaction could mean the set; ours use its name.
        be32(_SET_ID, 1),
    ]
    if spec.flags & MAP:
        parts += [be32(_SET_DATA_TYPE, spec.data_type), be32(_SET_DATA_LENGTH, spec.data_length)]
    described = [be32(_DESCRIPTION_SIZE, spec.size)] if spec.size else []
    if spec.fields:
        lengths = (nested(_ELEMENT, be32(_FIELD_LENGTH, length)) for length in spec.fields)
        described.append(nested(_DESCRIPTION_FIELDS, *lengths))
    if described:
        parts.append(nested(_SET_DESCRIPTION, *described))
    if spec.timeout:
        parts.append(be64(_SET_TIMEOUT, spec.timeout))
    if spec.userdata:
        parts.append(attribute(_SET_USERDATA, spec.userdata))
    return _message(family, _NEW_SET, CREATE, *parts)


def delete_set(family: Family, table: str, name: str) -> bytes:
    """Delete a set with its elements; EBUSY while a rule uses it."""
    return _message(family, _DELETE_SET, 0, text(_TABLE, table), text(_SET_NAME, name))


def list_sets(family: Family, table: str) -> bytes:
    """Ask for all sets and maps of a table, without elements."""
    return _message(family, _GET_SET, 0, text(_TABLE, table))


def decode_set(payload: bytes) -> tuple[str, SetSpec]:
    """A set and the name of its table; raises DecodeError."""
    found = attributes(attributes_of(payload))
    description = attributes(found.get(_SET_DESCRIPTION, b""))
    lengths = [
        be32_of(attributes(content), _FIELD_LENGTH)
        for kind, content in attribute_list(description.get(_DESCRIPTION_FIELDS, b""))
        if kind == _ELEMENT
    ]
    strange = (_SET_POLICY, _SET_OBJECT_TYPE, _SET_EXPRESSION, _SET_EXPRESSIONS)
    return text_of(found, _TABLE), SetSpec(
        name=text_of(found, _SET_NAME),
        key_type=be32_of(found, _SET_KEY_TYPE, 0),
        key_length=be32_of(found, _SET_KEY_LENGTH, 0),
        data_type=be32_of(found, _SET_DATA_TYPE, 0),
        data_length=be32_of(found, _SET_DATA_LENGTH, 0),
        flags=be32_of(found, _SET_FLAGS, 0),
        size=be32_of(description, _DESCRIPTION_SIZE, 0),
        timeout=parse_be64(found[_SET_TIMEOUT]) if _SET_TIMEOUT in found else 0,
        fields=tuple(lengths),
        userdata=found.get(_SET_USERDATA, b""),
        other=tuple(kind for kind in strange if kind in found),
    )


def _message(family: Family, kind: int, flags: int, *parts: bytes) -> bytes:
    return netfilter_message(kind, flags, family.af, b"".join(parts))
