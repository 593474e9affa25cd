"""From the static part that a kernel holds back to the node's facts, and what is wrong with it.

The facts are read from the chains that depend on them; then the layout for these facts is built again and compared
with the whole.  So every rule counts: one that is missing, one too many, one that was changed or moved is damage,
named by its chain.  Comments don't count.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rules.forwarding import (
    Detector,
    Family,
    InputInterface,
    InputInterfacePrefix,
    NodeFacts,
    Prefix,
    SourcePrefix,
)
from rules.nftables import names
from rules.nftables.chains import (
    EXTERNAL_ALL,
    EXTERNAL_POLICY_LOCAL,
    GUARD_LOOPBACK,
    INTERNAL,
    MARK_FOR_MASQUERADE,
    MASQUERADE_MARKED,
    NODE_PORT_ALL,
    NODE_PORT_GATE,
    NODE_PORTS_POLICY_LOCAL,
    REFUSE_CLUSTER_IPS,
    pick_count,
)
from rules.nftables.expressions import (
    EQUAL,
    META_IIFNAME,
    NOT_EQUAL,
    Bitwise,
    Cmp,
    Lookup,
    Meta,
    Payload,
    Reject,
)
from rules.nftables.layout import Layout, build
from rules.nftables.messages import Element
from rules.nftables.phrases import Header, Phrase, from_pods, go
from rules.nftables.replace import same_set
from rules.nftables.sets import PICK, element_prefixes
from rules.nftables.state import StaticState


class Adopted(NamedTuple):
    """What a kernel's static part says."""

    facts: NodeFacts
    counts: frozenset[int]
    """All counts that have a chain."""
    timeouts: frozenset[int]
    lengths: frozenset[int]
    damage: frozenset[str]
    """What is not as it should be for these facts, one sentence each."""


def facts_of(
    static: StaticState, service_cidr_elements: Iterable[Element], node_port_address_elements: Iterable[Element]
) -> Adopted:
    """The facts that a static part was made for, and what is wrong with it.

    Args:
        static: what `read_static` returned.
        service_cidr_elements: the elements of the set `service-cidrs`.
        node_port_address_elements: the elements of the set `node-port-addresses`.
    """
    family = static.family
    damage: set[str] = set()
    cidrs = element_prefixes(service_cidr_elements, family)
    if cidrs is None:
        damage.add(f"set {names.SERVICE_CIDRS} holds half an interval")
    gate = _rules(static, NODE_PORT_GATE)
    by_address = any(
        isinstance(step, Lookup) and step.set == names.NODE_PORT_ADDRESSES for rule in gate for step in rule
    )
    addresses = frozenset(element.key for element in node_port_address_elements)
    if addresses and not by_address:
        damage.add(f"set {names.NODE_PORT_ADDRESSES} holds addresses that no rule asks for")
    closed = _rules(static, REFUSE_CLUSTER_IPS)
    facts = NodeFacts(
        mark=_mark(static),
        masquerade_all=_rules(static, INTERNAL)[:1] == [(go(MARK_FOR_MASQUERADE),)],
        detector=_detector(static),
        node_port_addresses=addresses if by_address else None,
        loopback_node_ports=family is Family.IPV4 and bool(_rules(static, GUARD_LOOPBACK)),
        reject_closed_ports=not closed or any(isinstance(step, Reject) for rule in closed for step in rule),
        service_cidrs=cidrs or (),
    )
    counts = frozenset(count for count in map(pick_count, static.chains) if count is not None)
    timeouts = frozenset(
        timeout
        for name in static.sets
        if (timeout := names.affinity_timeout(name)) is not None
        and names.affinity(timeout) == name
        and 0 < timeout < 1 << 32
    )
    lengths = frozenset(
        length
        for name in static.sets
        if (length := names.source_ranges_length(name)) is not None
        and names.source_ranges(length) == name
        and length <= family.address_bytes * 8
    )
    layout = build(facts, family, counts=counts, timeouts=timeouts, lengths=lengths)
    damage.update(compare(static, layout))
    return Adopted(facts, counts, timeouts, lengths, frozenset(damage))


def compare(static: StaticState, layout: Layout) -> list[str]:
    """How a static part differs from a layout, one sentence for each difference."""
    damage = []
    if static.table.flags != layout.table.flags:
        damage.append("the table is switched off (dormant)" if static.table.flags & 1 else "the table has an owner")
    wanted_sets = {each.name: each for each in layout.sets}
    for name, spec in wanted_sets.items():
        if name not in static.sets:
            damage.append(f"set {name} is missing")
        elif not same_set(static.sets[name], spec):
            damage.append(f"set {name} is of another kind than it should be")
    damage += [f"set {name} should not be there" for name in static.sets if name not in wanted_sets]
    wanted = {each.name: each for each in layout.chains}
    for name, chain in wanted.items():
        there = static.chains.get(name)
        if there is None:
            damage.append(f"chain {name} is missing")
            continue
        if (there.hook and there.hook[:3]) != (chain.hook and chain.hook[:3]):
            damage.append(f"chain {name} hangs on another hook than it should")
        elif there.hook != chain.hook:
            damage.append(f"chain {name} has another policy than it should")
        damage += _compare_rules(name, _rules(static, name), [rule.expressions for rule in chain.rules])
    damage += [f"chain {name} should not be there" for name in static.chains if name not in wanted]
    return damage + _compare_picks(static.picks, layout.picks)


def _compare_rules(chain: str, there: Sequence[Phrase], wanted: Sequence[Phrase]) -> list[str]:
    if there == wanted:
        return []
    missing, extra = Counter(wanted) - Counter(there), Counter(there) - Counter(wanted)
    if not missing and not extra:
        return [f"the rules of chain {chain} are in another order than they should be"]
    if len(there) == len(wanted):
        places = [place for place, pair in enumerate(zip(there, wanted, strict=True), 1) if pair[0] != pair[1]]
        if len(places) == missing.total():
            return [f"rule {place} of chain {chain} is another than it should be" for place in places]
    found = []
    for place, rule in enumerate(wanted, 1):
        if missing[rule]:
            missing[rule] -= 1
            found.append(f"chain {chain} lacks its rule {place}")
    for place, rule in enumerate(there, 1):
        if extra[rule]:
            extra[rule] -= 1
            found.append(f"rule {place} of chain {chain} should not be there")
    return found


def _compare_picks(there: Iterable[Element], wanted: Iterable[Element]) -> list[str]:
    found = {element.key: element for element in there}
    expected = {element.key: element for element in wanted}

    def count(key: bytes) -> str:
        return str(int.from_bytes(key, sys.byteorder)) if key else "all others"

    damage = [f"map {PICK} has nothing for {count(key)}" for key in expected if key not in found]
    for key, element in found.items():
        if key not in expected:
            damage.append(f"map {PICK} should have nothing for {count(key)}")
        elif (element.verdict, element.flags) != (expected[key].verdict, expected[key].flags):
            damage.append(f"map {PICK} leads {count(key)} elsewhere than it should")
    return damage


def _rules(static: StaticState, chain: str) -> list[Phrase]:
    found = static.chains.get(chain)
    return [rule.expressions for rule in found.rules] if found is not None else []


# --- what the small chains say -----------------------------------------------------------------------------------


def _mark(static: StaticState) -> int:
    """The mark by which the rules that set and ask it work; the usual one when neither can be read."""
    for chain, part in ((MARK_FOR_MASQUERADE, "flip"), (MASQUERADE_MARKED, "mask")):
        for rule in _rules(static, chain):
            for step in rule:
                value = getattr(step, part) if isinstance(step, Bitwise) else b""
                mark = int.from_bytes(value, sys.byteorder)
                if len(value) == 4 and mark:
                    return mark
    return NodeFacts().mark


def _detector(static: StaticState) -> Detector | None:
    """What most of the rules that tell pods from others go by."""
    header = Header(static.family)
    found: list[Detector | None] = []
    for chain, operator, target in (
        (EXTERNAL_POLICY_LOCAL, EQUAL, EXTERNAL_ALL),
        (NODE_PORTS_POLICY_LOCAL, EQUAL, NODE_PORT_ALL),
        (INTERNAL, NOT_EQUAL, MARK_FOR_MASQUERADE),
    ):
        rules = (rule for rule in _rules(static, chain) if len(rule) > 1 and rule[-1] == go(target))
        found += [_parse_detector(header, rule[:-1], operator) for rule in rules]
    votes = Counter(detector for detector in found if detector is not None)
    return votes.most_common(1)[0][0] if votes else None


def _parse_detector(header: Header, steps: Phrase, operator: int) -> Detector | None:
    """The detector that `from_pods` makes `steps` of; None: there is none."""
    load, compare_with = steps[0], steps[-1]
    if not isinstance(compare_with, Cmp):
        return None
    value = compare_with.value
    detector: Detector
    try:
        if isinstance(load, Meta) and load.key == META_IIFNAME:
            name = value.rstrip(b"\0").decode()
            detector = InputInterface(name) if len(value) == 16 else InputInterfacePrefix(name)
        elif isinstance(load, Payload):
            masks = [step.mask for step in steps if isinstance(step, Bitwise)]
            length = int.from_bytes(masks[0]).bit_count() if masks else load.length * 8
            detector = SourcePrefix(Prefix(value.ljust(header.address_bytes, b"\0"), length))
        else:
            return None
        return detector if from_pods(header, detector, operator) == steps else None
    except ValueError:
        return None
