"""What the dataplane keeps of one family's tables: the routes and the trees that they stand in.

A `Model` turns a `Delta` into the chains that change, and nothing else is looked at: the chains on the way to a changed
frontend, and chains of its own.  It is a function of the table alone: made at once or by deltas, it comes to the same
chains, which is what `read` compares the kernel with.  It does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from rules.forwarding import (
    Address,
    Delta,
    Endpoint,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Protocol,
    Route,
    format_address,
)
from rules.iptables import layout
from rules.iptables.encode import (
    Placed,
    encode_filter,
    encode_nat,
    filter_weight,
    hairpin_rule,
    has_chains,
    nat_weight,
)
from rules.iptables.layout import Options
from rules.iptables.text import FILTER, NAT, Changes, Rule, Rules, Ruleset
from rules.iptables.tree import Branch, Key, Tree

Keys = Mapping[Frontend, str]
"""What affinity is kept under, where it is not what the route's label makes."""


class Model:
    """The routes, hairpins and trees of one family.  See the head of this module."""

    def __init__(self, table: ForwardingTable, options: Options, keys: Keys = {}) -> None:  # noqa: B006  # not written
        """Of a table.

        Raises:
            ValueError: the node's facts cannot be said in iptables' words.
        """
        self.family = table.family
        self.facts = table.node
        self.options = options
        self._keys = keys
        self._routes = dict(table.routes)
        self._static = layout.build(table.node, table.family, options)
        self._cluster_ips = layout.cluster_ip_rules(table.node, table.family)
        self._tenants: dict[Address, int] = {}
        bits = table.family.address_bytes * 8
        self._services = Tree(layout.BY_ADDRESS, bits)
        self._node_ports = Tree(layout.BY_NODE_PORT, 0)
        self._hairpins = Tree(layout.HAIRPINS, bits)
        self._refusals = Tree(layout.REFUSALS, bits)
        self._port_refusals = Tree(layout.NODE_PORT_REFUSALS, 0)
        self._addresses = Tree(layout.CLUSTER_IPS, bits)
        self._health_checks = Tree(layout.HEALTH_CHECKS, 0)
        self._trees: tuple[tuple[str, Tree, Callable[[Key], Iterable[Rule]]], ...] = (
            (NAT, self._services, self._nat_leaf),
            (NAT, self._node_ports, self._nat_leaf),
            (NAT, self._hairpins, self._hairpin_leaf),
            (FILTER, self._refusals, self._filter_leaf),
            (FILTER, self._port_refusals, self._filter_leaf),
            (FILTER, self._addresses, self._address_leaf),
            (FILTER, self._health_checks, self._health_check_leaf),
        )
        self._fill(table.hairpins)

    @property
    def routes(self) -> Mapping[Frontend, Route]:
        return self._routes

    def chains(self) -> Ruleset:
        """All chains, the static ones too."""
        chains = {table: dict(static) for table, static in self._static.items()}
        for table, tree, rules in self._trees:
            tree.take_changes()
            for name in tree.chains():
                chains[table][name] = self._chain_rules(tree, name, rules)
        for frontend, route in self._routes.items():
            for table, own in self._own_chains(frontend, route):
                chains[table].update(own)
        return chains

    def stands(self, facts: NodeFacts | None) -> bool:
        """Whether the static part and all routes stay as they are under other facts of the node."""
        return facts is None or self.facts == msgspec.structs.replace(
            facts, health_check_ports=self.facts.health_check_ports
        )

    def plan(self, delta: Delta) -> Changes:
        """The chains that change with a delta whose facts of the node let the rest stand, and what becomes of them.

        The model is changed at once.  If the change then fails in the kernel, the model is void.
        """
        changes: dict[str, dict[str, Rules | None]] = {NAT: {}, FILTER: {}}
        held = {each.address: each.address in self._tenants for each in (*delta.removed, *delta.changed)}
        for frontend in (*delta.removed, *delta.changed):
            for table, chains in self._take_out(frontend):
                changes[table].update(dict.fromkeys(chains))
        for frontend in delta.removed:
            self._weigh(frontend, 0, 0)
        for frontend, route in delta.changed.items():
            for table, chains in self._put_in(frontend, route):
                changes[table].update(chains)
        self._move_addresses(held)
        for endpoint in delta.hairpins_removed:
            self._hairpins.put(Key(*endpoint), 0)
        for endpoint in delta.hairpins_added:
            self._hairpins.put(Key(*endpoint), 1)
        if delta.node is not None:
            self._let_in(delta.node)
        self._add_trees(changes)
        return changes

    def _let_in(self, facts: NodeFacts) -> None:
        for port in self.facts.health_check_ports ^ facts.health_check_ports:
            self._health_checks.put(_port_key(port), int(port in facts.health_check_ports))
        self.facts = facts

    def _move_addresses(self, held: Mapping[Address, bool]) -> None:
        """Put ClusterIPs into their tree, or take them out, where that changed; `held`: what was there."""
        for address, was_held in held.items() if self._cluster_ips is not None else ():
            if (address in self._tenants) != was_held:
                self._addresses.put(_address_key(address), int(not was_held))

    def _add_trees(self, changes: dict[str, dict[str, Rules | None]]) -> None:
        for table, tree, rules in self._trees:
            for name, there in tree.take_changes().items():
                changes[table][name] = self._chain_rules(tree, name, rules) if there else None

    def _take_out(self, frontend: Frontend) -> Iterable[tuple[str, dict[str, Rules]]]:
        """Forget a frontend; the chains that were its own, by table."""
        route = self._routes.pop(frontend, None)
        if route is None:
            return ()
        if route.kind is Kind.CLUSTER_IP:
            self._count(frontend.address, -1)
        return self._own_chains(frontend, route)

    def _put_in(self, frontend: Frontend, route: Route) -> Iterable[tuple[str, dict[str, Rules]]]:
        """Place a frontend; the chains that are its own, by table."""
        self._routes[frontend] = route
        self._weigh(frontend, nat_weight(route), filter_weight(route))
        if route.kind is Kind.CLUSTER_IP:
            self._count(frontend.address, 1)
        return self._own_chains(frontend, route)

    def table(self) -> ForwardingTable:
        """The table that the model holds."""
        hairpins = frozenset(Endpoint(*key) for key in self._hairpins.held())
        return ForwardingTable(family=self.family, node=self.facts, routes=self._routes, hairpins=hairpins)

    def served(self) -> dict[tuple[str, str, str], tuple[Frontend, ...]]:
        """Whom rules serve, by table, chain and text; with an empty text, whom a whole chain serves."""
        served: dict[tuple[str, str, str], tuple[Frontend, ...]] = {}
        for table, tree, _ in self._trees[:2] + self._trees[3:5]:
            encode = self._encode_nat if table == NAT else self._encode_filter
            for name in tree.chains():
                content = tree.content(name)
                for key in () if isinstance(content, Branch) else content.keys:
                    for rule in encode(Frontend(*key)).leaf:
                        served[table, name, rule.text] = (Frontend(*key),)
        for frontend, route in self._routes.items():
            for table, chains in self._own_chains(frontend, route):
                for name in chains:
                    served[table, name, ""] = (frontend,)
        return served

    def owners(self, chain: str, rule: str) -> frozenset[Frontend]:
        """The frontends that a rule is written for; it walks all of them."""
        found = set()
        for frontend in self._routes:
            for placed in (self._encode_nat(frontend), self._encode_filter(frontend)):
                if any(rule == own.line(chain) for own in placed.leaf) or any(
                    name == chain for name, _ in placed.chains
                ):
                    found.add(frontend)
        return frozenset(found)

    def _own_chains(self, frontend: Frontend, route: Route) -> Iterable[tuple[str, dict[str, Rules]]]:
        if has_chains(route):
            nat = encode_nat(self.family, self.facts, frontend, route, self._keys.get(frontend))
            yield NAT, dict(nat.chains)
        if route.source_ranges:
            yield FILTER, dict(encode_filter(self.family, frontend, route).chains)

    def _encode_nat(self, frontend: Frontend) -> Placed:
        return encode_nat(self.family, self.facts, frontend, self._routes[frontend], self._keys.get(frontend))

    def _encode_filter(self, frontend: Frontend) -> Placed:
        return encode_filter(self.family, frontend, self._routes[frontend])

    # --- trees -------------------------------------------------------------------------------------------------

    def _fill(self, hairpins: Iterable[Endpoint]) -> None:
        nat: tuple[dict[Key, int], dict[Key, int]] = ({}, {})
        refusals: tuple[dict[Key, int], dict[Key, int]] = ({}, {})
        for frontend, route in self._routes.items():
            key, which = Key(*frontend), frontend.is_node_port
            if weight := nat_weight(route):
                nat[which][key] = weight
            if weight := filter_weight(route):
                refusals[which][key] = weight
            if route.kind is Kind.CLUSTER_IP:
                self._count(frontend.address, 1)
        self._services.build(nat[False])
        self._node_ports.build(nat[True])
        self._refusals.build(refusals[False])
        self._port_refusals.build(refusals[True])
        self._hairpins.build({Key(*endpoint): 1 for endpoint in hairpins})
        self._health_checks.build({_port_key(port): 1 for port in self.facts.health_check_ports})
        if self._cluster_ips is not None:
            self._addresses.build({_address_key(address): 1 for address in self._tenants})

    def _weigh(self, frontend: Frontend, nat: int, refusal: int) -> None:
        (self._node_ports if frontend.is_node_port else self._services).put(Key(*frontend), nat)
        (self._port_refusals if frontend.is_node_port else self._refusals).put(Key(*frontend), refusal)

    def _count(self, address: Address, by: int) -> None:
        """Count the frontends of a ClusterIP."""
        count = self._tenants.get(address, 0) + by
        if count:
            self._tenants[address] = count
        else:
            self._tenants.pop(address, None)

    # --- what stands in a tree's chains --------------------------------------------------------------------------

    def _chain_rules(self, tree: Tree, name: str, leaf: Callable[[Key], Iterable[Rule]]) -> Rules:
        tail = self._cluster_ips.tail if tree is self._addresses and self._cluster_ips is not None else ()
        content = tree.content(name)
        if isinstance(content, Branch):
            return (*(Rule(f"{match} -g {chain}") for match, chain in content.ways), *tail)
        return (*(rule for key in content.keys for rule in leaf(key)), *tail)

    def _nat_leaf(self, key: Key) -> Iterable[Rule]:
        return self._encode_nat(Frontend(*key)).leaf

    def _filter_leaf(self, key: Key) -> Iterable[Rule]:
        return self._encode_filter(Frontend(*key)).leaf

    def _hairpin_leaf(self, key: Key) -> Iterable[Rule]:
        return (hairpin_rule(Endpoint(*key), self.family),)

    def _health_check_leaf(self, key: Key) -> Iterable[Rule]:
        return (Rule(f"-p tcp -m tcp --dport {key.port} -j ACCEPT"),)

    def _address_leaf(self, key: Key) -> Iterable[Rule]:
        assert self._cluster_ips is not None
        bits = self.family.address_bytes * 8
        return (Rule(f"-d {format_address(key.address)}/{bits} {self._cluster_ips.target}"),)


def _port_key(port: int) -> Key:
    """The key of a TCP port alone."""
    return Key(b"", Protocol.TCP, port)


def _address_key(address: Address) -> Key:
    """The key of an address alone."""
    return Key(address, Protocol.TCP, 0)
