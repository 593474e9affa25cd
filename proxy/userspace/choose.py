"""Which backend a new connection gets.

Theory of operation
-------------------
`random` takes any backend of the list with the same probability (TRF-3).  `round-robin` takes one after the other, in
the order of their addresses, and `least-connections` the one with the fewest connections through this frontend.  Each
worker counts for itself and starts its round somewhere else: the kernel spreads connections over the workers, so
that their sum is as even as the parts.

Affinity (TRF-24) must hold across workers, which share nothing.  The first backend of a client is the one with the
greatest hash of client and backend (rendezvous hashing): all workers find the same, and one that was restarted finds
it again.  What that cannot do is remember when the list changes: a new backend takes some clients over.  So a worker
remembers each client's backend until the timeout since its last connection, by service port rather than frontend, as
clients may come by ClusterIP and by node port.  What is left: a client that the other worker has never seen may change
its backend when one is added.  That is rare because the kernel hands a client to one worker by its address where
workers are several (see `listeners`).  The memory is bounded; the client that came longest ago is forgotten first, and
finds its backend again by the hash.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from rules.forwarding import Address, Backend, format_address

RANDOM, ROUND_ROBIN, LEAST_CONNECTIONS = "random", "round-robin", "least-connections"

MAX_CLIENTS = 100_000
"""Clients whose backend one worker remembers."""


class Target(NamedTuple):
    """A backend, and its address as sockets take it."""

    backend: Backend
    address: tuple[str, int]


class Memory:
    """The backends of clients with affinity."""

    def __init__(self, limit: int = MAX_CLIENTS) -> None:
        self._limit = limit
        self._known: OrderedDict[tuple[object, Address], tuple[Backend, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def recall(self, owner: object, client: Address, now: float) -> Backend | None:
        """The backend that a client of a service port had, unless its time is over."""
        backend, until = self._known.get((owner, client), (None, 0.0))
        return backend if until > now else None

    def remember(self, owner: object, client: Address, backend: Backend, until: float) -> None:
        """Keep a client's backend until a time."""
        key = owner, client
        self._known[key] = backend, until
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)


class Pool:
    """One list of backends, and whose turn it is."""

    def __init__(self, backends: Iterable[Backend], chance: random.Random) -> None:
        self.targets = tuple(Target(each, (format_address(each.address), each.port)) for each in sorted(backends))
        self._by_backend = {target.backend: target for target in self.targets}
        self._chance = chance
        self._turn = chance.randrange(len(self.targets) or 1)

    def __contains__(self, backend: object) -> bool:
        return backend in self._by_backend

    def find(self, backend: Backend | None) -> Target | None:
        """The target of a backend, if it is in the list."""
        return self._by_backend.get(backend) if backend is not None else None

    def at_random(self) -> Target:
        return self.targets[int(self._chance.random() * len(self.targets))]

    def next(self) -> Target:
        """Round robin."""
        self._turn = (self._turn + 1) % len(self.targets)
        return self.targets[self._turn]

    def idlest(self, load: dict[Backend, int]) -> Target:
        """The one with the fewest connections by `load`; one of them, if several."""
        least = min(load.get(target.backend, 0) for target in self.targets)
        return self._chance.choice([target for target in self.targets if load.get(target.backend, 0) == least])

    def of_client(self, client: Address) -> Target:
        """The one that all workers give a client."""
        return max(self.targets, key=lambda target: rank(client, target.backend))

    def another(self, tried: Iterable[Target]) -> Target | None:
        """One that was not tried, at random."""
        left = set(self.targets).difference(tried)
        return self._chance.choice(sorted(left)) if left else None


def rank(client: Address, backend: Backend) -> bytes:
    """A number, as bytes, by which a client prefers backends: the greatest is its first."""
    return blake2b(client + backend.address + backend.port.to_bytes(2), digest_size=8).digest()


class Chooser:
    """The choice for one frontend."""

    def __init__(
        self, owner: object, pool: Pool, *, scheduler: str, affinity: int, memory: Memory, load: dict[Backend, int]
    ) -> None:
        """`owner` is the service port, `load` the open connections by backend, kept by the caller."""
        self.pool = pool
        self._owner = owner
        self._scheduler = scheduler
        self._affinity = affinity
        self._memory = memory
        self._load = load

    def choose(self, client: Address, now: float) -> Target:
        """The backend for a new connection; the list is not empty."""
        if self._affinity:
            known = self.pool.find(self._memory.recall(self._owner, client, now))
            target = known or self.pool.of_client(client)
            self.settle(client, target, now)
            return target
        if self._scheduler == ROUND_ROBIN:
            return self.pool.next()
        if self._scheduler == LEAST_CONNECTIONS:
            return self.pool.idlest(self._load)
        return self.pool.at_random()

    def settle(self, client: Address, target: Target, now: float) -> None:
        """The client has got this backend."""
        if self._affinity:
            self._memory.remember(self._owner, client, target.backend, now + self._affinity)
