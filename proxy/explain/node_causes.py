"""What of the node beside our rules keeps a connection from its backends: settings, routes, rules of others.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec

from proxy.explain.cause import Cause
from proxy.explain.crossing import Journey, bases_of, carried_by, met
from proxy.explain.obstacles import (
    Obstacle,
    backends_in,
    listeners_command,
    lost_ways,
    obstacles,
    passing,
    some,
    unheard,
    unheard_words,
)
from proxy.explain.passing import Passing
from proxy.explain.surroundings import Surroundings
from rules.explanation import Explanation, Origin, Reaches
from rules.forwarding import Address, Backend, Family, NodeFacts, family_of, format_address

NEARLY_FULL = 0.95
"""The part of the conntrack table from which it is worth a word."""


def unjudged(node: Surroundings) -> Surroundings:
    """The node without others' rules about what is forwarded, but for policies.

    IPVS sends packets itself, and answers alone are forwarded.
    """
    chains = tuple(each._replace(rules=None) if each.forwards else each for each in node.chains)
    return msgspec.structs.replace(node, chains=chains)


def of_the_node(
    explanation: Explanation, node: Surroundings, local: Collection[str], facts: NodeFacts
) -> Iterator[Cause]:
    packet, outcome = explanation.packet, explanation.outcome
    family = family_of(packet.destination)
    if proxies := node.other_proxies:
        words = f"another service proxy has rules here ({', '.join(proxies)}), which may come first"
        yield Cause(kind="other-proxy", words=words, next="sluice cleanup --of kube-proxy")
    if node.conntrack is not None:
        tracked, most = node.conntrack
        if tracked >= most * NEARLY_FULL:
            words = f"the conntrack table holds {tracked} of {most} connections: while it is full, new ones are dropped"
            next_ = "sysctl net.netfilter.nf_conntrack_max"
            yield Cause(kind="conntrack-full", words=words, next=next_, certain=tracked >= most)
    if not isinstance(outcome, Reaches):
        return
    if packet.destination[:1] == b"\x7f" and len(packet.destination) == 4 and node.route_localnet is False:
        words = "net.ipv4.conf.all.route_localnet is 0, so what goes to loopback never leaves it"
        next_ = "sysctl -w net.ipv4.conf.all.route_localnet=1"
        yield Cause(kind="route-localnet", words=words, next=next_, certain=True)
    backends = [share.backend for share in outcome.shares]
    away = [each for each in backends if each.address not in node.addresses]
    every = len(away) == len(backends)
    if away:
        here = {each.address for each in away if str(each) in local}
        yield from _of_routes(away, node, here, every=every)
    if deaf := unheard(backends, packet.protocol, node):
        yield Cause(
            kind="no-listener",
            words=unheard_words(deaf, packet.protocol),
            next=listeners_command(packet.protocol, deaf[0].port),
            certain=len(deaf) == len(backends),
        )
    if away and explanation.origin is not Origin.NODE and not facts.relayed:
        yield from _of_forwarding(family, node, every=every)
    yield from _of_chains(explanation, outcome, facts, node)


def _of_chains(explanation: Explanation, outcome: Reaches, facts: NodeFacts, node: Surroundings) -> Iterator[Cause]:
    """What rules of others do with the packet, in the order of the hooks that it passes."""
    packet = explanation.packet
    by_node = explanation.origin is Origin.NODE
    back = node.ways.get(packet.source) if packet.source is not None and not by_node else None
    incoming = packet.interface or (back.interface if back is not None else "")
    frontend = Passing(packet.destination, packet.protocol, packet.port, packet.source, incoming, masqueraded=None)
    carried = carried_by(facts)
    journeys, onwards = [], []
    for share in outcome.shares:
        # Who gets itself is masqueraded behind all that, and bears no mark yet.
        marked = None if share.backend.address == packet.source else share.masqueraded
        to = passing(share.backend, packet.protocol, node, masqueraded=marked)
        stays = share.backend.address in node.addresses
        sent = to._replace(source=packet.source, incoming=incoming)
        journeys.append(Journey(frontend, sent, carried, by_node, stays))
        if facts.relayed:
            onwards.append(Journey(to, to, "plain", by_node=True, stays=stays))
    stopped: set[str] = set()
    family = family_of(packet.destination)
    for (hook, stage), bases in bases_of(node, family).items():
        for these in (journeys, onwards):
            packets = [seen for _, seen in met(hook, stage, these)]
            if packets:
                found = obstacles(bases, packets).obstacles
                stopped.update(each.place for each in found if each.surely)
                yield from _of_others(found, packets, every=len(packets) == len(outcome.shares))
    if packet.source is not None and back is not None:
        answers = [_answer(each, back.interface) for each in journeys if _is_forwarded(each)]
        bases = tuple(each for those in bases_of(node, family, ["forward"]).values() for each in those)
        for each in obstacles(bases, answers).obstacles:
            if each.surely and each.place not in stopped:
                certain = len(each.surely) == len(outcome.shares)
                yield Cause(kind=kind_of(each), words=_answer_words(each), next=each.listing, certain=certain)


def _is_forwarded(each: Journey) -> bool:
    """Whether packets and answers of a connection pass through the node, translated on their way in."""
    goes = each.carried == "translated" and not (each.by_node or each.stays)
    return goes and each.backend.destination != each.backend.source


def _answer(each: Journey, outgoing: str) -> Passing:
    """What comes back from a backend, as chains of forward see it; `outgoing`: by which interface it leaves."""
    to = each.backend
    assert to.source is not None
    return Passing(to.source, to.protocol, to.port, to.destination, to.outgoing, outgoing, answers=True)


def _answer_words(each: Obstacle) -> str:
    """What an obstacle does to answers."""
    whose = some(Backend(answer.source or b"", answer.port) for answer in each.surely)
    answers = f"the answers of {whose} to {format_address(each.surely[0].destination)}"
    if each.rule is None:
        return f"{each.place} is DROP, and no rule there accepts {answers}, as `{each.remedy}` would"
    return f"{each.place} {each.does} {answers} ({each.rule.words})"


def _of_others(found: Sequence[Obstacle], packets: Sequence[Passing], *, every: bool) -> Iterator[Cause]:
    """Others' rules that stand in the way; of those that only may, one cause for each table."""
    perhaps: dict[str, list[Obstacle]] = {}
    for each in found:
        certain = every and len(each.surely) == len(packets)
        if each.surely:
            yield Cause(kind=kind_of(each), words=words_of(each), next=each.listing, certain=certain)
        elif each.rule is None:
            yield Cause(kind=kind_of(each), words=words_of(each), next=each.listing)
        else:
            perhaps.setdefault(each.base.place, []).append(each)
    for those in perhaps.values():
        yield Cause(kind=f"{kind_of(those[0])}-perhaps", words=perhaps_words(those), next=those[0].listing)


def kind_of(each: Obstacle) -> str:
    """The kind of the cause that an obstacle is: where it stands, and whether it is a rule or a policy."""
    return f"{each.base.hook or 'forward'}-{'drop' if each.rule is None else 'rule'}"


def words_of(each: Obstacle) -> str:
    """What an obstacle does to packets."""
    own = " from the node itself" if each.base.hook == "output" else ""
    if each.rule is None:
        if each.surely:
            return (
                f"{each.place} is DROP, and no rule there accepts what goes to {backends_in(each.surely)}{own}, as "
                f"`{each.remedy}` would"
            )
        what = f"what goes to {backends_in(each.perhaps)}" if each.base.hook else "what is forwarded"
        return (
            f"{each.place} is DROP: {what} is dropped unless a rule there accepts it (Docker and ufw set such a policy)"
        )
    return f"{each.place} {each.does} what goes to {backends_in(each.surely)}{own} ({each.rule.words})"


def perhaps_words(those: Sequence[Obstacle]) -> str:
    """What rules of one table may do, where a packet alone can tell."""
    first = those[0]
    assert first.rule is not None
    where = (
        first.place
        if len(those) == 1
        else f"{len(those)} rules in the table {first.base.place}, such as {first.place},"
    )
    verb = "may drop" if len(those) > 1 or first.does == "drops" else "may refuse"
    what = backends_in(packet for each in those for packet in each.perhaps)
    return f"{where} {verb} some of what goes to {what} ({first.rule.words})"


def _of_routes(
    away: Sequence[Backend], node: Surroundings, here: Collection[Address], *, every: bool
) -> Iterator[Cause]:
    """Backends to which the node sends nothing."""
    reasons = lost_ways([each.address for each in away], node, here)
    lost = [each for each in away if each.address in reasons]
    for why in dict.fromkeys(reasons.values()):
        those = [each for each in lost if reasons[each.address] == why]
        yield Cause(
            kind="no-route",
            words=f"the node has no way to {some(those)}: {why} (routes to pods are the CNI's)",
            next=f"ip route get {format_address(those[0].address)}",
            certain=every and len(lost) == len(away),
        )


def _of_forwarding(family: Family, node: Surroundings, *, every: bool) -> Iterator[Cause]:
    """What may stop a packet that passes through; `every`: whichever backend it gets."""
    if node.forwarding.get(family) is False:
        name = "net.ipv4.ip_forward" if family is Family.IPV4 else "net.ipv6.conf.all.forwarding"
        words = f"{name} is 0: the node does not forward packets to its pods or to other nodes"
        yield Cause(kind="ip-forward", words=words, next=f"sysctl -w {name}=1", certain=every)
    kinds = ("inet", "ip") if family is Family.IPV4 else ("inet", "ip6")
    for chain in node.forward_drops:
        if chain.family in kinds and chain.rules is None:
            # Its rules could not be read.
            unread = Obstacle(base=chain, chain=chain.name, rule=None, surely=(), perhaps=())
            yield Cause(kind="forward-drop", words=words_of(unread), next=chain.listing)
    if "filter" in node.legacy_tables:
        program = "iptables-legacy" if family is Family.IPV4 else "ip6tables-legacy"
        words = "legacy iptables has a filter table, which could not be read: its FORWARD policy may be DROP"
        yield Cause(kind="legacy-forward", words=words, next=f"{program} -S FORWARD")
    if family is Family.IPV4 and node.strict_rp_filter:
        shown = ", ".join(node.strict_rp_filter[:4]) + (", ..." if len(node.strict_rp_filter) > 4 else "")
        words = f"rp_filter is strict on {shown}: what comes in by another interface than answers leave by is dropped"
        yield Cause(kind="rp-filter", words=words, next="sysctl -a -r 'ipv4.conf..*.rp_filter'")
