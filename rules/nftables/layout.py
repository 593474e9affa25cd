"""The static part of the nftables dataplane: the table, its sets, chains and rules, for one family, as values.

Theory of operation
-------------------
Services are elements; what is here only says which set is asked when.  A packet of a new connection goes through

    pre-dnat     drop sources that a load balancer address does not admit
    services     look its frontend up: a list of backends and their count, into the scratch register
    dispatch     go to the chain of that count, which draws an index below it
    pick-N       look list and index up, and translate
    after-dnat   remember the client's slot under affinity, give the scratch register back
    filter       reject or drop what found no backend; closed ports and unallocated ClusterIPs

and at last through nat-postrouting, which masquerades.

The scratch register is the packet's priority: nft has no words for a lookup with the result of a lookup, but it can
set the priority from a map, and ask the next map for the priority.  Its value is a list's number above 13 bits that
hold a count (from the frontend) or a slot (under affinity).  It is set only in nat chains, hence only by the first
packet of a Service's connection.

Every rule is what nft 1.0.6 itself compiles from text: other rules it could not print, and `nft list ruleset` must
never fail because of us.

What changes with the node and what with Services in use stands in chains of their own, which bind no map: a rule that
does makes the kernel walk the whole map (tens of milliseconds at 50,000 Services).  Who depends on what:

    facts       mark-for-masquerade, masquerade-marked, internal, external-policy-local, node-port-gate,
                node-ports-policy-local, node-port-refusal-gate, refuse-cluster-ips, guard-loopback
    timeouts    remember, and a set each (names.affinity)
    lengths     source-ranges, and a set each (names.source_ranges)
    counts      one chain pick-N each, and an element of the map pick

All others are the same on every node.  `DEPENDS` has this as data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from rules.forwarding import (
    Family,
    NodeFacts,
    Protocol,
)
from rules.nftables import names
from rules.nftables.chains import (
    AFTER_DNAT,
    DISPATCH,
    DNAT_DONE_OUTPUT,
    DNAT_DONE_PREROUTING,
    EXTERNAL_ALL,
    EXTERNAL_ALL_MASQUERADED,
    EXTERNAL_HERE,
    EXTERNAL_POLICY_LOCAL,
    FILTER_FORWARD,
    FILTER_INPUT,
    FILTER_OUTPUT,
    GUARD_LOOPBACK,
    INTERNAL,
    MARK_FOR_MASQUERADE,
    MASQUERADE_MARKED,
    NAT_OUTPUT,
    NAT_POSTROUTING,
    NAT_PREROUTING,
    NODE_PORT_ALL,
    NODE_PORT_ALL_MASQUERADED,
    NODE_PORT_GATE,
    NODE_PORT_HERE,
    NODE_PORT_REFUSAL_GATE,
    NODE_PORTS,
    NODE_PORTS_POLICY_LOCAL,
    PRE_DNAT_OUTPUT,
    PRE_DNAT_PREROUTING,
    REFUSE_CLUSTER_IPS,
    REFUSE_FRONTENDS,
    REFUSE_NODE_PORTS,
    REMEMBER,
    SERVICES,
    SOURCE_CHECK,
    SOURCE_RANGES,
    STICKY_READ,
    TO_SLOT,
    pick_chain,
    pick_element,
)
from rules.nftables.expressions import (
    CT_ESTABLISHED,
    CT_RELATED,
    CT_STATE,
    DELETE,
    DROP,
    EQUAL,
    FIB_DESTINATION,
    FIB_SOURCE,
    FULLY_RANDOM,
    META_MARK,
    META_PRIORITY,
    NOT_EQUAL,
    RETURN,
    UPDATE,
    Bitwise,
    Cmp,
    Ct,
    Decide,
    DynamicSet,
    Immediate,
    Lookup,
    LookupMap,
    Masquerade,
    Meta,
    MetaSet,
    Number,
    Verdict,
    register,
)
from rules.nftables.messages import Element
from rules.nftables.objects import (
    FORWARD,
    INPUT,
    OUTPUT,
    POSTROUTING,
    PREROUTING,
    ChainSpec,
    Hook,
    SetSpec,
    TableSpec,
)
from rules.nftables.phrases import (
    CLEAR_SLOT,
    FIRST,
    IS_NEW,
    IS_TRANSLATED,
    LIST_MASK,
    SCRATCH,
    SECOND,
    SECOND_WIDE,
    Header,
    Phrase,
    any_bit,
    chain,
    from_pods,
    go,
    is_local,
    is_protocol,
    jump,
    masked,
    port_key,
    to_scratch,
)
from rules.nftables.sets import PICK, build_sets

TABLE = "sluice"
TABLE_COMMENT = "sluice layout=1"
"""The number is that of the layout: a table with another one is made anew."""

COMMON_COUNTS = range(1, 65)
"""Counts that always have a chain: making one later walks every map."""
COUNT_MASK = 0x00001FFF


class Layout(NamedTuple):
    """The static part of one family's table."""

    family: Family
    table: TableSpec
    sets: tuple[SetSpec, ...]
    chains: tuple[ChainSpec, ...]
    picks: tuple[Element, ...]
    """The elements of the map `pick`."""


def build(
    facts: NodeFacts,
    family: Family,
    *,
    counts: Collection[int] = (),
    timeouts: Collection[int] = (),
    lengths: Collection[int] = (),
) -> Layout:
    """The static part for a node.

    Args:
        facts: the node's own; `loopback_node_ports` counts for IPv4 only (TRF-21), and of `service_cidrs` and
            `node_port_addresses` only that the latter are given: their values are elements.
        family: the family of the table.
        counts: how many backends the lists in use have, beside COMMON_COUNTS.
        timeouts: the seconds of affinity in use.
        lengths: the prefix lengths of the source ranges in use.

    Raises:
        ValueError: a detector that no packet could match, or a number out of range; the message names it.
    """
    wanted = sorted({*COMMON_COUNTS, *counts})
    if wanted[0] < 1 or wanted[-1] > COUNT_MASK:
        raise ValueError(f"a list of {wanted[0] if wanted[0] < 1 else wanted[-1]} backends cannot be picked from")
    sets = build_sets(family, timeouts, lengths)
    header = Header(family)
    chains = (
        *(_pick(header, count) for count in wanted),
        *_sticky_chains(header, sorted(timeouts)),
        *_service_chains(header, facts),
        *_policy_chains(header, facts),
        *_masquerade_chains(header, facts),
        *_source_chains(header, sorted(lengths, reverse=True)),
        *_refusal_chains(header, facts),
        *_base_chains(),
    )
    return Layout(
        family=family,
        table=TableSpec(TABLE, TABLE_COMMENT),
        sets=sets,
        chains=chains,
        picks=tuple(pick_element(count) for count in wanted),
    )


# --- the chains ------------------------------------------------------------------------------------------------


def _pick(header: Header, count: int) -> ChainSpec:
    draw = (SCRATCH, Number(SECOND, count))
    endpoints = (
        (Protocol.TCP, names.ENDPOINTS_TCP),
        (Protocol.UDP, names.ENDPOINTS_UDP),
        (Protocol.SCTP, names.ENDPOINTS_SCTP),
    )
    return chain(
        pick_chain(count),
        CLEAR_SLOT,
        *((*is_protocol(each), *draw, LookupMap(name, FIRST, FIRST), header.translate()) for each, name in endpoints),
        # Here are only lists with affinity, whose backends are slots.
        (jump(STICKY_READ),),
        (*to_scratch(*draw, mapping=names.MEMBERS), go(TO_SLOT)),
    )


def _sticky_chains(header: Header, timeouts: Iterable[int]) -> tuple[ChainSpec, ...]:
    # nft puts an operand that needs no place in the key behind the registers that the key may take, except in
    # a statement that updates a map.
    wide = register(6)
    slot = (LookupMap(names.SLOTS, FIRST, FIRST), header.translate())

    def remember(timeout: int) -> Phrase:
        of_list = (SCRATCH, masked(LIST_MASK))
        return (
            *of_list,
            Lookup(names.affinity(timeout), FIRST),
            *of_list,
            *header.client_hash(SECOND_WIDE),
            Meta(SECOND_WIDE, META_PRIORITY),
            DynamicSet(names.STICKY, UPDATE, FIRST, SECOND_WIDE, timeout * 1000),
        )

    return (
        chain(DISPATCH, (SCRATCH, masked(COUNT_MASK), LookupMap(PICK, FIRST, 0))),
        chain(
            STICKY_READ,
            (*to_scratch(SCRATCH, *header.client_hash(wide), mapping=names.STICKY), jump(TO_SLOT)),
            # A remembered slot that is gone falls through; its list is still right.
            CLEAR_SLOT,
            # It has to be forgotten first: the kernel's `update` leaves the data of a key that exists as it is.
            (
                SCRATCH,
                *header.client_hash(SECOND_WIDE),
                Meta(SECOND_WIDE, META_PRIORITY),
                DynamicSet(names.STICKY, DELETE, FIRST, SECOND_WIDE, 0),
            ),
        ),
        chain(TO_SLOT, *((*is_protocol(protocol), SCRATCH, *slot) for protocol in Protocol)),
        chain(REMEMBER, *(remember(timeout) for timeout in timeouts)),
        chain(AFTER_DNAT, (jump(REMEMBER),), (Immediate(FIRST, bytes(4)), MetaSet(FIRST, META_PRIORITY))),
    )


def _service_chains(header: Header, facts: NodeFacts) -> tuple[ChainSpec, ...]:
    frontend = header.frontend_key()
    if facts.masquerade_all:
        internal: list[Phrase] = [(go(MARK_FOR_MASQUERADE),)]
    elif facts.detector is not None:
        internal = [(*from_pods(header, facts.detector, NOT_EQUAL), go(MARK_FOR_MASQUERADE)), (go(DISPATCH),)]
    else:
        internal = [(go(DISPATCH),)]
    return (
        chain(
            SERVICES,
            (*to_scratch(*frontend, mapping=names.CLUSTER_IP), go(INTERNAL)),
            (*frontend, Lookup(names.EXTERNAL_POLICY_LOCAL, FIRST), go(EXTERNAL_POLICY_LOCAL)),
            (*to_scratch(*frontend, mapping=names.EXTERNAL), go(MARK_FOR_MASQUERADE)),
            (go(NODE_PORT_GATE),),
        ),
        chain(INTERNAL, *internal),
        chain(NODE_PORT_GATE, *_node_port_gate(header, facts, go(NODE_PORTS), is_local(FIB_DESTINATION))),
        chain(
            NODE_PORTS,
            (*port_key(), Lookup(names.NODE_PORT_POLICY_LOCAL, FIRST), go(NODE_PORTS_POLICY_LOCAL)),
            (*to_scratch(*port_key(), mapping=names.NODE_PORT), go(MARK_FOR_MASQUERADE)),
        ),
    )


def _node_port_gate(header: Header, facts: NodeFacts, decide: Decide, local: Phrase) -> list[Phrase]:
    """Rules that let through what is addressed to a node-port address (TRF-20, TRF-21)."""
    loopback = _loopback_answers(header, facts)
    if facts.node_port_addresses is None:
        return [(*local, *(() if loopback else header.is_loopback(header.destination(), NOT_EQUAL)), decide)]
    rules: list[Phrase] = [(header.destination(), Lookup(names.NODE_PORT_ADDRESSES, FIRST), decide)]
    if loopback:
        rules.append((*header.is_loopback(header.destination(), EQUAL), decide))
    return rules


def _loopback_answers(header: Header, facts: NodeFacts) -> bool:
    return facts.loopback_node_ports and header.family is Family.IPV4


def _policy_chains(header: Header, facts: NodeFacts) -> tuple[ChainSpec, ...]:
    """External policy Local: by source, to the list of policy Cluster (TRF-4) or to that of policy Local (TRF-5)."""

    def by_source(name: str, everything: str, masqueraded: str, here: str) -> ChainSpec:
        short_circuit: list[Phrase] = []
        if facts.detector is not None:
            short_circuit = [(*from_pods(header, facts.detector, EQUAL), go(everything))]
        return chain(name, *short_circuit, (*is_local(FIB_SOURCE), go(masqueraded)), (go(here),))

    def to_list(name: str, key: Phrase, mapping: str, target: str) -> ChainSpec:
        return chain(name, (*to_scratch(*key, mapping=mapping), go(target)))

    frontend, port = header.frontend_key(), port_key()
    return (
        by_source(EXTERNAL_POLICY_LOCAL, EXTERNAL_ALL, EXTERNAL_ALL_MASQUERADED, EXTERNAL_HERE),
        to_list(EXTERNAL_ALL, frontend, names.EXTERNAL, DISPATCH),
        to_list(EXTERNAL_ALL_MASQUERADED, frontend, names.EXTERNAL, MARK_FOR_MASQUERADE),
        to_list(EXTERNAL_HERE, frontend, names.EXTERNAL_LOCAL, DISPATCH),
        by_source(NODE_PORTS_POLICY_LOCAL, NODE_PORT_ALL, NODE_PORT_ALL_MASQUERADED, NODE_PORT_HERE),
        to_list(NODE_PORT_ALL, port, names.NODE_PORT, DISPATCH),
        to_list(NODE_PORT_ALL_MASQUERADED, port, names.NODE_PORT, MARK_FOR_MASQUERADE),
        to_list(NODE_PORT_HERE, port, names.NODE_PORT_LOCAL, DISPATCH),
    )


def _masquerade_chains(header: Header, facts: NodeFacts) -> tuple[ChainSpec, ...]:
    mark, keep = facts.mark, facts.mark ^ 0xFFFFFFFF
    if not 0 < mark <= 0xFFFFFFFF:
        raise ValueError(f"{mark:#x} is no mask of a bit of the packet mark")
    load, store = Meta(FIRST, META_MARK), MetaSet(FIRST, META_MARK)
    at_random = Masquerade(FULLY_RANDOM)
    # Source and destination in the key: only what reaches itself is in the set with both.
    destination = header.after_address
    pair = (header.source(), header.destination(destination), *port_key(2 * header.after_address))
    return (
        chain(MARK_FOR_MASQUERADE, (load, masked(keep, mark), store), (go(DISPATCH),)),
        chain(MASQUERADE_MARKED, (*any_bit(load, mark), load, masked(0xFFFFFFFF, mark), store, at_random)),
        chain(
            NAT_POSTROUTING,
            (jump(MASQUERADE_MARKED),),
            (*IS_TRANSLATED, *pair, Lookup(names.LOCAL_ENDPOINT_PAIRS, FIRST), at_random),
            hook=Hook("nat", POSTROUTING, 100),
        ),
    )


def _source_chains(header: Header, lengths: Iterable[int]) -> tuple[ChainSpec, ...]:
    size = header.address_bytes
    behind = header.after_address + 2

    def admitted(length: int) -> Phrase:
        mask = ((1 << length) - 1 << size * 8 - length).to_bytes(size)
        # nft prints a mask of all bits as none, and would load none from that.
        masked_source = [Bitwise(register(behind), register(behind), size, mask, bytes(size))]
        return (
            *header.frontend_key(),
            header.source(behind),
            *(masked_source if length < size * 8 else ()),
            Lookup(names.source_ranges(length), FIRST),
            Decide(Verdict(RETURN)),
        )

    return (
        chain(SOURCE_CHECK, (*header.frontend_key(), Lookup(names.SOURCE_RANGED, FIRST), go(SOURCE_RANGES))),
        chain(SOURCE_RANGES, *(admitted(length) for length in lengths), (Decide(Verdict(DROP)),)),
    )


def _refusal_chains(header: Header, facts: NodeFacts) -> tuple[ChainSpec, ...]:
    drop, back = Decide(Verdict(DROP)), Decide(Verdict(RETURN))
    frontend, port = header.frontend_key(), port_key()
    # Left alone, closed ports must not fall to the rule for unallocated addresses either.
    closed = header.reject() if facts.reject_closed_ports else back
    guard: list[Phrase] = []
    if _loopback_answers(header, facts):
        guard = [
            (*header.is_loopback(header.destination(), NOT_EQUAL), back),
            (*header.is_loopback(header.source(), EQUAL), back),
            (*any_bit(Ct(FIRST, CT_STATE), CT_ESTABLISHED | CT_RELATED), back),
            (*IS_TRANSLATED, back),
            (drop,),
        ]
    return (
        chain(
            REFUSE_FRONTENDS,
            (*frontend, Lookup(names.REJECT_FRONTENDS, FIRST), header.reject()),
            (*frontend, Lookup(names.DROP_FRONTENDS, FIRST), drop),
        ),
        # A packet that is here has a local destination: that needs no look at the routing table.
        chain(NODE_PORT_REFUSAL_GATE, *_node_port_gate(header, facts, jump(REFUSE_NODE_PORTS), ())),
        chain(
            REFUSE_NODE_PORTS,
            (*port, Lookup(names.REJECT_NODE_PORTS, FIRST), header.reject()),
            (*port, Lookup(names.DROP_NODE_PORTS, FIRST), drop),
        ),
        chain(
            REFUSE_CLUSTER_IPS,
            (header.destination(), Lookup(names.CLUSTER_IPS, FIRST), closed),
            (header.destination(), Lookup(names.SERVICE_CIDRS, FIRST), drop),
        ),
        chain(GUARD_LOOPBACK, *guard),
    )


def _base_chains() -> tuple[ChainSpec, ...]:
    behind = (*IS_NEW, *IS_TRANSLATED, SCRATCH, Cmp(FIRST, NOT_EQUAL, bytes(4)), jump(AFTER_DNAT))
    services = (jump(SERVICES),)
    check = (*IS_NEW, jump(SOURCE_CHECK))
    refuse_frontends = (*IS_NEW, jump(REFUSE_FRONTENDS))
    refuse_cluster_ips = (*IS_NEW, jump(REFUSE_CLUSTER_IPS))
    refuse_node_ports = (*IS_NEW, jump(NODE_PORT_REFUSAL_GATE))
    guard = (jump(GUARD_LOOPBACK),)
    # Translation stands at -100 in both hooks, the rest around it.
    return (
        chain(NAT_PREROUTING, services, hook=Hook("nat", PREROUTING, -100)),
        chain(NAT_OUTPUT, services, hook=Hook("nat", OUTPUT, -100)),
        chain(DNAT_DONE_PREROUTING, behind, hook=Hook("filter", PREROUTING, -99)),
        chain(DNAT_DONE_OUTPUT, behind, hook=Hook("filter", OUTPUT, -99)),
        chain(PRE_DNAT_PREROUTING, check, hook=Hook("filter", PREROUTING, -110)),
        chain(PRE_DNAT_OUTPUT, check, hook=Hook("filter", OUTPUT, -110)),
        chain(FILTER_INPUT, guard, refuse_frontends, refuse_node_ports, hook=Hook("filter", INPUT, 0)),
        chain(FILTER_FORWARD, refuse_frontends, refuse_cluster_ips, hook=Hook("filter", FORWARD, 0)),
        chain(FILTER_OUTPUT, guard, refuse_frontends, refuse_cluster_ips, hook=Hook("filter", OUTPUT, 0)),
    )
