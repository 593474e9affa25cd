"""The chains of all tables of nftables but ours, those of iptables-nft among them.

Rules are read of tables that may drop what goes through Services, and with them the sets that they look into: to an
extent, as there are lists of a million addresses that somebody blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from proxy.explain.passing import Condition, ForeignRule
from proxy.explain.passing_nftables import Sets, decode, members
from proxy.explain.surroundings import OUR_TABLE, ForeignChain, Hook
from rules.netlink.attributes import DecodeError, attribute_list, attributes, text
from rules.netlink.transaction import AF_UNSPEC, NetfilterSocket, attributes_of, family_of, netfilter_message
from rules.nftables.expressions import Lookup
from rules.nftables.messages import decode_elements
from rules.nftables.objects import (
    EVALUATED,
    FORWARD,
    INPUT,
    OUTPUT,
    POSTROUTING,
    PREROUTING,
    TIMEOUT,
    ListedRule,
    decode_chain,
    decode_rule,
    decode_set,
)

_GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS = 4, 7, 10, 13
_TABLE, _NAME = 1, 2
_DROP = 0
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_ROUTED = frozenset({"inet", "ip", "ip6"})
_HOOKS: dict[int, Hook] = {PREROUTING: "prerouting", INPUT: "input", OUTPUT: "output"}
_EDGES: dict[str, dict[int, Hook]] = {
    "inet": {5: "ingress"},
    "netdev": {0: "ingress", 1: "egress"},
    "bridge": {PREROUTING: "ingress", INPUT: "ingress", OUTPUT: "egress", POSTROUTING: "egress"},
}
"""By the kernel's numbers.  What is bridged from port to port goes to no Service."""
_CHAIN_HOOK, _HOOK_DEVICE, _HOOK_DEVICES = 4, 3, 4
_TRANSLATES = "nat"
"""The type of chains that are not meant to drop: a proxy has 100,000 rules in such tables."""
_NOT_READ = frozenset({"kube-proxy"})
"""Tables that decide about Services by themselves, with hundreds of thousands of rules."""
_MOST_SETS, _MOST_ELEMENTS = 256, 4096
"""How many sets of a table are read, and how many elements one may have."""
_ELEMENT_BYTES = 40
"""About what an element takes."""


def read_chains() -> Iterator[ForeignChain]:
    """All chains; none where nftables cannot be read."""
    found: list[tuple[int, ForeignChain]] = []
    rules: dict[tuple[int, str], dict[str, list[ForeignRule]] | None] = {}
    with contextlib.suppress(OSError, DecodeError), NetfilterSocket() as socket:
        for payload in socket.dump(netfilter_message(_GET_CHAIN, 0, AF_UNSPEC, b"")):
            with contextlib.suppress(DecodeError):
                found.append((family_of(payload), _decoded(payload)))
        tables = [
            (number, each.table)
            for number, each in found
            if (each.forwards or each.hook) and each.table not in (OUR_TABLE, *_NOT_READ)
        ]
        rules = {table: _rules(socket, *table) for table in dict.fromkeys(tables)}
    for number, each in found:
        held = rules.get((number, each.table))
        if each.table != OUR_TABLE:
            yield each._replace(rules=None if held is None else (*(each.rules or ()), *held.get(each.name, ())))


def _decoded(payload: bytes) -> ForeignChain:
    """A chain, without its rules; raises DecodeError."""
    table, chain = decode_chain(payload)
    family, hook = _FAMILIES.get(family_of(payload), "?"), chain.hook
    one = ForeignChain(family, table, chain.name, forwards=False, drops=False)
    if hook is None:
        return one
    one = one._replace(drops=hook.policy == _DROP)
    if family in _ROUTED and hook.number == FORWARD:
        return one._replace(forwards=True)
    if hook.type == _TRANSLATES:
        return one
    if edge := _EDGES.get(family, {}).get(hook.number):
        gate = _gate(edge, () if family == "bridge" else _devices(payload))
        return one._replace(hook=edge, priority=hook.priority, rules=(gate,))
    if family in _ROUTED and hook.number in _HOOKS:
        return one._replace(hook=_HOOKS[hook.number], priority=hook.priority)
    return one


def _gate(edge: Hook, devices: tuple[str, ...]) -> ForeignRule:
    """What a chain of devices, or of a bridge, begins with: what does not come by one of them may come by it yet.

    For what routes tell is the bridge, the bond or the VLAN above a device.
    """
    other = Condition("in" if edge == "ingress" else "out", devices, inverse=True) if devices else Condition("other")
    return ForeignRule(0, "perhaps", (other,))


def _devices(chain: bytes) -> tuple[str, ...]:
    """The devices that a base chain is of."""
    place = attributes(attributes(attributes_of(chain))[_CHAIN_HOOK])
    names = [place[_HOOK_DEVICE]] if _HOOK_DEVICE in place else []
    names += [name for _, name in attribute_list(place.get(_HOOK_DEVICES, b""))]
    return tuple(dict.fromkeys(each.partition(b"\0")[0].decode(errors="replace") for each in names))


def _rules(netlink: NetfilterSocket, family: int, table: str) -> dict[str, list[ForeignRule]] | None:
    """The rules of a table by chain; None: they could not be read."""
    try:
        payloads = netlink.dump(netfilter_message(_GET_RULE, 0, family, text(_TABLE, table)))
        listed = [decode_rule(each)[1] for each in payloads]
        sets = _sets(netlink, family, table, listed)
    except (OSError, DecodeError):
        return None
    found: dict[str, list[ForeignRule]] = {}
    for each in listed:
        rule = decode(each, sets)
        found.setdefault(each.chain, []).append(_of_ports(rule) if _FAMILIES.get(family) == "bridge" else rule)
    return found


def _of_ports(rule: ForeignRule) -> ForeignRule:
    """A bridge's rule: its interfaces are ports, which routes don't tell."""
    return msgspec.structs.replace(
        rule,
        conditions=tuple(
            Condition("other", (f"port {each.what}",)) if each.what in ("in", "out") else each
            for each in rule.conditions
        ),
    )


def _sets(netlink: NetfilterSocket, family: int, table: str, listed: list[ListedRule]) -> Sets:
    """What is in the sets that rules look into: those that stay as they are, and that are small."""
    asked = {step.set for each in listed for step in each.rule.expressions if isinstance(step, Lookup)}
    if not asked:
        return {}
    found: dict[str, tuple[tuple[bytes, bytes], ...]] = {}
    for payload in netlink.dump(netfilter_message(_GET_SET, 0, family, text(_TABLE, table))):
        spec = decode_set(payload)[1]
        if spec.name not in asked or spec.flags & (EVALUATED | TIMEOUT) or spec.fields or len(found) == _MOST_SETS:
            continue
        if (elements := _elements(family, table, spec.name)) is not None:
            found[spec.name] = members(decode_elements(elements), spec)
    return found


def _elements(family: int, table: str, name: str) -> list[bytes] | None:
    """A set's elements as they come; None: they are too many, or could not be read."""
    question = netfilter_message(_GET_ELEMENTS, 0, family, text(_TABLE, table) + text(_NAME, name))
    found: list[bytes] = []
    try:
        # A socket of its own, as the rest of what is not wanted waits in it.
        with NetfilterSocket() as own:
            for data, spans in own.stream(question):
                found += (data[start:end] for start, end in spans)
                if sum(map(len, found)) > _MOST_ELEMENTS * _ELEMENT_BYTES:
                    return None
    except (OSError, DecodeError):
        return None
    return found
