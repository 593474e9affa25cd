"""Dispatch trees: which chain a packet is led to by its destination, so that it meets few rules.

Theory of operation
-------------------
iptables walks rules one after the other.  A tree leads a packet to a leaf, a chain of at most `LEAF` rules, by some
rules per level: a node asks for the next bits of the destination and goes to the child that has them.  What a leaf
holds is not known here, but for each key's number of rules (its weight).

A key is an address, a protocol and a port, as one number of so many bits.  It is cut at fixed places: every `_STEP`
bits of the address, behind the address, behind the protocol, every `_STEP` bits of the port; rules can ask for these.
Levels on which all keys agree are skipped, so that a tree is as deep as its keys need, and 16 bits of service network
cost nothing.

The tree is a function of its keys and weights alone, however they came: what is read back from a kernel can be compared
with the tree that its keys make.  A change touches the chains on the way to its key.  Where a key comes that stands
apart from all that share some bits, those go down by a level as they are; where it goes, they come up again.
"""

from __future__ import annotations

import hashlib
from base64 import b32encode
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from rules.forwarding import Address, Protocol, format_address

LEAF = 48
"""Rules that a leaf may have, where there is a way to split it."""
MAX_DEPTH = 10
"""Levels of a tree: nftables, which iptables-nft writes to, lets 16 chains follow each other."""
_STEP = 3
_PORT_BITS = 16
_PROTOCOL_BITS = 2
_BEHIND_ADDRESS = _PROTOCOL_BITS + _PORT_BITS
_PROTOCOLS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
_CODES = {protocol: code for code, protocol in enumerate(_PROTOCOLS)}
PROTOCOL_NAMES = {protocol: protocol.name.lower() for protocol in Protocol}

_CHAIN_NAME = 16
"""Letters of a prefix in a chain's name: iptables has room for 28 in all."""


class Key(NamedTuple):
    """What a packet is dispatched by."""

    address: Address
    """Empty in a tree of ports alone."""
    protocol: Protocol
    port: int


class Space(NamedTuple):
    """Keys with addresses of so many bits, as numbers."""

    address_bits: int

    @property
    def bits(self) -> int:
        return self.address_bits + _BEHIND_ADDRESS

    def pack(self, key: Key) -> int:
        return (int.from_bytes(key.address) << _PROTOCOL_BITS | _CODES[key.protocol]) << _PORT_BITS | key.port

    def unpack(self, number: int) -> Key:
        port = number & (1 << _PORT_BITS) - 1
        number >>= _PORT_BITS
        protocol = _PROTOCOLS[number & (1 << _PROTOCOL_BITS) - 1]
        return Key((number >> _PROTOCOL_BITS).to_bytes(self.address_bits // 8), protocol, port)

    def cut_before(self, bits: int) -> int:
        """The last place at or before `bits` where keys can be cut."""
        if bits < self.address_bits:
            return bits - bits % _STEP
        behind = bits - self.address_bits
        if behind < _PROTOCOL_BITS:
            return self.address_bits
        return bits - (behind - _PROTOCOL_BITS) % _STEP

    def cut_after(self, bits: int) -> int:
        """The next place behind `bits`, which is such a place."""
        if bits < self.address_bits:
            return min(bits + _STEP, self.address_bits)
        if bits == self.address_bits:
            return bits + _PROTOCOL_BITS
        return min(bits + _STEP, self.bits)

    def match(self, prefix: int, length: int) -> str:
        """What a rule asks for, to let through the keys that begin with the `length` bits of `prefix`."""
        low = prefix << self.bits - length
        address, protocol, port = self.unpack(low)
        words = f"-d {format_address(address)}/{min(length, self.address_bits)}" if self.address_bits else ""
        if length <= self.address_bits:
            return words
        name = PROTOCOL_NAMES[protocol]
        words = f"{words} -p {name}" if words else f"-p {name}"
        if length == self.address_bits + _PROTOCOL_BITS:
            return words
        last = port | (1 << self.bits - length) - 1
        return f"{words} -m {name} --dport {port}" + (f":{last}" if last != port else "")

    def chain(self, root: str, prefix: int, length: int) -> str:
        """The name of the chain for the keys that begin so, in the tree of a root."""
        if not length:
            return root
        digits = (length + 3) // 4
        place = f"{prefix << digits * 4 - length:0{digits}X}-{length}"
        if len(place) > _CHAIN_NAME:
            place = short_hash(place, _CHAIN_NAME)
        return f"{root}-{place}"


def short_hash(text: str, letters: int) -> str:
    """Letters and digits that stand for a text, in a name that has little room."""
    return b32encode(hashlib.sha256(text.encode()).digest())[:letters].decode()


class _Node:
    """One chain: a leaf with keys, or a node with children by their prefixes (`cut` bits of which all keys share)."""

    __slots__ = ("children", "cut", "height", "keys", "length", "prefix", "weight")

    def __init__(self, prefix: int, length: int) -> None:
        self.prefix = prefix
        self.length = length
        self.cut = 0
        self.height = 0
        """Levels below: none below a leaf."""
        self.weight = 0
        self.keys: dict[int, int] | None = {}
        self.children: dict[int, _Node] = {}

    def measure(self) -> None:
        """Take the height from the children's."""
        self.height = 1 + max(child.height for child in self.children.values()) if self.keys is None else 0


class _Run(NamedTuple):
    """Some of many keys in order, with their weights."""

    keys: Sequence[tuple[int, int]]
    sums: Sequence[int]
    """Of the weights of all keys before each."""
    first: int
    end: int


class Leaf(NamedTuple):
    """A chain that holds the rules of keys, in this order."""

    keys: tuple[Key, ...]


class Branch(NamedTuple):
    """A chain that leads on: what to ask for, and where to go."""

    ways: tuple[tuple[str, str], ...]


class Tree:
    """One dispatch tree.  See the head of this module."""

    def __init__(self, root: str, address_bits: int) -> None:
        """Of a root chain's name; `address_bits` 0 dispatches by protocol and port alone."""
        self.root = root
        self._space = Space(address_bits)
        self._top = _Node(0, 0)
        self._nodes: dict[str, _Node] = {root: self._top}
        self._touched: set[str] = {root}

    def build(self, weights: Mapping[Key, int]) -> None:
        """Hold exactly these keys."""
        self._replace(self._top, {self._space.pack(key): weight for key, weight in weights.items()}, 0)

    def put(self, key: Key, weight: int) -> None:
        """Add a key, give it another weight, or just have its leaf written again; weight 0 removes it."""
        if weight:
            self._put(self._space.pack(key), weight)
        else:
            self._remove(self._space.pack(key))

    def take_changes(self) -> dict[str, bool]:
        """The names of chains that changed since the last call, and whether they are still there."""
        touched, self._touched = self._touched, set()
        return {name: name in self._nodes for name in touched}

    def chains(self) -> Iterator[str]:
        """The names of all chains."""
        return iter(self._nodes)

    def held(self) -> Iterator[Key]:
        """All keys."""
        return (self._space.unpack(key) for key, _ in self._keys(self._top))

    def content(self, name: str) -> Leaf | Branch:
        """What stands in a chain of the tree."""
        node = self._nodes[name]
        if node.keys is not None:
            return Leaf(tuple(self._space.unpack(key) for key in sorted(node.keys)))
        return Branch(
            tuple(
                (self._space.match(child.prefix, child.length), self._name(child))
                for _, child in sorted(node.children.items())
            )
        )

    def _name(self, node: _Node) -> str:
        return self._space.chain(self.root, node.prefix, node.length)

    def _put(self, key: int, weight: int) -> None:
        old = self._weight(key)
        node = self._top
        path: list[_Node] = []
        while node.keys is None:
            depth = len(path)
            if key >> self._space.bits - node.cut != self._shared(node):
                self._part(node, key, weight, depth)
                break
            node.weight += weight - old
            if node.weight <= LEAF:
                self._replace(node, {**dict(self._keys(node)), key: weight}, depth)
                break
            length = self._space.cut_after(node.cut)
            prefix = key >> self._space.bits - length
            child = node.children.get(prefix)
            if child is None:
                child = node.children[prefix] = self._make(prefix, length)
                self._touched.add(self._name(node))
            path.append(node)
            node = child
        else:
            node.keys[key] = weight
            node.weight += weight - old
            self._touched.add(self._name(node))
            if self._splits(len(node.keys), node.weight, len(path)):
                self._replace(node, node.keys, len(path))
        for each in reversed(path):
            each.measure()

    def _part(self, node: _Node, key: int, weight: int, depth: int) -> None:
        """Take in a key that stands apart from all below a node: they go one level down, unchanged."""
        if depth + 1 + node.height > MAX_DEPTH:
            self._replace(node, {**dict(self._keys(node)), key: weight}, depth)
            return
        bits = self._space.bits
        some = self._shared(node) << bits - node.cut
        cut = self._space.cut_before(bits - (some ^ key).bit_length())
        length = self._space.cut_after(cut)
        old = self._make(some >> bits - length, length)
        old.cut, old.height, old.weight = node.cut, node.height, node.weight
        old.keys, old.children = None, node.children
        new = self._make(key >> bits - length, length)
        self._replace(new, {key: weight}, depth + 1)
        node.cut = cut
        node.children = {old.prefix: old, new.prefix: new}
        node.weight += weight
        node.measure()
        self._touched |= {self._name(node), self._name(old)}

    def _remove(self, key: int) -> None:
        old = self._weight(key)
        if not old:
            return
        node = self._top
        path: list[_Node] = []
        while node.keys is None:
            depth = len(path)
            node.weight -= old
            child = node.children[key >> self._space.bits - self._space.cut_after(node.cut)]
            if node.weight <= LEAF:
                self._replace(node, {each: weight for each, weight in self._keys(node) if each != key}, depth)
                break
            if child.weight == old:
                del node.children[child.prefix]
                self._forget(child)
                self._touched.add(self._name(node))
                if len(node.children) == 1:
                    self._join(node, depth)
                node.measure()
                break
            path.append(node)
            node = child
        else:
            del node.keys[key]
            node.weight -= old
            self._touched.add(self._name(node))
        for each in reversed(path):
            each.measure()

    def _join(self, node: _Node, depth: int) -> None:
        """Take the place of the only child of a node: what is below goes one level up, unchanged."""
        [child] = node.children.values()
        if child.keys is not None or depth + 1 + child.height == MAX_DEPTH:
            # A leaf as deep as may be could be split, now that there is a level more.
            self._replace(node, dict(self._keys(child)), depth)
            return
        self._touched.add(self._name(child))
        del self._nodes[self._name(child)]
        node.cut, node.children = child.cut, child.children

    def _weight(self, key: int) -> int:
        """The weight of a key; 0 if it isn't here."""
        node: _Node | None = self._top
        while node is not None and node.keys is None:
            node = node.children.get(key >> self._space.bits - self._space.cut_after(node.cut))
        return node.keys.get(key, 0) if node is not None and node.keys is not None else 0

    def _shared(self, node: _Node) -> int:
        """The first `cut` bits of all keys below a node with children."""
        child = next(iter(node.children.values()))
        return child.prefix >> child.length - node.cut

    @staticmethod
    def _splits(count: int, weight: int, depth: int) -> bool:
        return weight > LEAF and count > 1 and depth < MAX_DEPTH

    def _replace(self, node: _Node, keys: Mapping[int, int], depth: int) -> None:
        """Make what stands at a node anew, of these keys."""
        for child in node.children.values():
            self._forget(child)
        node.children = {}
        ordered = sorted(keys.items())
        self._fill(node, _Run(ordered, [0, *accumulate(keys[key] for key, _ in ordered)], 0, len(ordered)), depth)

    def _make(self, prefix: int, length: int) -> _Node:
        node = _Node(prefix, length)
        self._nodes[self._name(node)] = node
        return node

    def _fill(self, node: _Node, run: _Run, depth: int) -> None:
        self._touched.add(self._name(node))
        keys, sums, at, end = run
        node.weight = sums[end] - sums[at]
        if not self._splits(end - at, node.weight, depth):
            node.keys = dict(keys[at:end])
            node.height = 0
            return
        node.keys = None
        bits = self._space.bits
        node.cut = self._space.cut_before(bits - (keys[at][0] ^ keys[end - 1][0]).bit_length())
        length = self._space.cut_after(node.cut)
        while at < end:
            prefix = keys[at][0] >> bits - length
            behind = bisect_left(keys, (prefix + 1 << bits - length,), at, end)
            child = node.children[prefix] = self._make(prefix, length)
            self._fill(child, _Run(keys, sums, at, behind), depth + 1)
            at = behind
        node.measure()

    def _forget(self, node: _Node) -> None:
        self._touched.add(self._name(node))
        del self._nodes[self._name(node)]
        for child in node.children.values():
            self._forget(child)

    def _keys(self, node: _Node) -> Iterable[tuple[int, int]]:
        if node.keys is not None:
            yield from node.keys.items()
        for child in node.children.values():
            yield from self._keys(child)
