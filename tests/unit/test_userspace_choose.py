"""Schedulers, affinity and its memory."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy.userspace.choose import Chooser, Memory, Pool
from rules.forwarding import Backend

BACKENDS = [Backend(bytes([10, 244, 1, n]), 8080) for n in range(1, 7)]
CLIENT = bytes([10, 0, 0, 1])
CLIENTS = [bytes([10, 0, n // 256, n % 256]) for n in range(600)]


def chooser(
    backends: list[Backend],
    *,
    scheduler: str = "",
    affinity: int = 0,
    memory: Memory | None = None,
    load: dict[Backend, int] | None = None,
    seed: int = 1,
) -> Chooser:
    pool = Pool(backends, random.Random(seed))
    kept = Memory() if memory is None else memory
    return Chooser(
        "a/b:c", pool, scheduler=scheduler, affinity=affinity, memory=kept, load={} if load is None else load
    )


def test_without_a_scheduler_every_backend_is_as_likely() -> None:
    some = chooser(BACKENDS)
    seen = Counter(some.choose(CLIENT, 0.0).backend for _ in range(6000))
    assert set(seen) == set(BACKENDS)
    assert min(seen.values()) > 800


def test_round_robin_gives_each_its_turn_wherever_it_begins() -> None:
    for seed in range(10):
        some = chooser(BACKENDS, scheduler="round-robin", seed=seed)
        turns = [some.choose(CLIENT, 0.0).backend for _ in range(12)]
        assert set(turns[:6]) == set(BACKENDS)
        assert turns[6:] == turns[:6]
    firsts = {chooser(BACKENDS, scheduler="round-robin", seed=seed).choose(CLIENT, 0.0) for seed in range(30)}
    assert len(firsts) > 2


def test_least_connections_gives_the_one_with_the_fewest() -> None:
    load = dict.fromkeys(BACKENDS, 3)
    some = chooser(BACKENDS, scheduler="least-connections", load=load)
    load[BACKENDS[2]] = 1
    assert some.choose(CLIENT, 0.0).backend == BACKENDS[2]
    del load[BACKENDS[4]]
    assert some.choose(CLIENT, 0.0).backend == BACKENDS[4]


@given(st.permutations(BACKENDS), st.binary(min_size=4, max_size=4))
def test_all_workers_give_a_client_the_same_backend(order: list[Backend], client: bytes) -> None:
    one, other = chooser(BACKENDS, affinity=10), chooser(order, affinity=10, seed=7)
    assert one.choose(client, 0.0) == other.choose(client, 0.0)


def test_clients_with_affinity_are_spread_and_few_move_when_a_backend_goes() -> None:
    whole, less = chooser(BACKENDS, affinity=10), chooser(BACKENDS[1:], affinity=10)
    before = {client: whole.choose(client, 0.0).backend for client in CLIENTS}
    assert min(Counter(before.values()).values()) > 60
    for client, backend in before.items():
        if backend != BACKENDS[0]:
            assert less.choose(client, 0.0).backend == backend


def test_a_client_keeps_its_backend_until_its_time_is_over() -> None:
    memory = Memory()
    few, many = chooser(BACKENDS[:1], affinity=10, memory=memory), chooser(BACKENDS, affinity=10, memory=memory)
    moved = next(each for each in CLIENTS if Pool(BACKENDS, random.Random(1)).of_client(each).backend != BACKENDS[0])
    assert few.choose(moved, 0.0).backend == BACKENDS[0]
    # Every connection begins the time anew (TRF-24).
    assert many.choose(moved, 9.0).backend == BACKENDS[0]
    assert many.choose(moved, 18.0).backend == BACKENDS[0]
    assert many.choose(moved, 28.0).backend != BACKENDS[0]


def test_a_backend_that_is_not_in_the_list_is_not_remembered() -> None:
    memory = Memory()
    first = chooser(BACKENDS[:1], affinity=10, memory=memory).choose(CLIENT, 0.0)
    assert first.backend == BACKENDS[0]
    assert chooser(BACKENDS[1:], affinity=10, memory=memory).choose(CLIENT, 1.0).backend in BACKENDS[1:]


def test_who_had_to_take_another_backend_keeps_that_one() -> None:
    some = chooser(BACKENDS, affinity=10)
    first = some.choose(CLIENT, 0.0)
    other = some.pool.another([first])
    assert other is not None
    some.settle(CLIENT, other, 0.0)
    assert some.choose(CLIENT, 1.0) == other


def test_another_backend_is_one_that_was_not_tried() -> None:
    pool = Pool(BACKENDS, random.Random(1))
    tried = list(pool.targets[:-1])
    assert pool.another(tried) == pool.targets[-1]
    assert pool.another(pool.targets) is None


def test_the_memory_is_bounded_and_forgets_who_came_longest_ago() -> None:
    memory = Memory(limit=3)
    for client in CLIENTS[:3]:
        memory.remember("a", client, BACKENDS[0], 10.0)
    memory.remember("a", CLIENTS[0], BACKENDS[1], 20.0)
    memory.remember("a", CLIENTS[3], BACKENDS[0], 20.0)
    assert len(memory) == 3
    assert memory.recall("a", CLIENTS[1], 0.0) is None
    assert memory.recall("a", CLIENTS[0], 0.0) == BACKENDS[1]
    assert memory.recall("b", CLIENTS[0], 0.0) is None
