"""What decodes bytes that others wrote raises its own error on arbitrary ones, and nothing else.

`make fuzz` looks longer.  Objects, manifests and the API's lines have such tests beside their other ones.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import Family, ForwardingTable, NodeFacts
from rules.netlink.attributes import HEADER, DecodeError, attribute, nested
from rules.netlink.errors import Failure, NetlinkError, TransactionError
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import adopt, names
from rules.nftables.chains import pick_count
from rules.nftables.decode import decode
from rules.nftables.describe import describe_message
from rules.nftables.elements import Batch, Elements
from rules.nftables.layout import build
from rules.nftables.messages import Element, add_elements, key_at
from rules.nftables.model import GRACE, Model
from rules.nftables.monitor import Monitor
from rules.nftables.objects import add_rule
from rules.nftables.refusals import Step, explain, lacking
from rules.nftables.repair import plan_repair
from rules.nftables.state import state_of
from tests.strategies import from_nothing, tables

FAMILIES = st.sampled_from(list(Family))
_LAYOUT = build(NodeFacts(), Family.IPV4, counts={1}, timeouts={600}, lengths={24})
_SETS = sorted(
    {each.name for each in _LAYOUT.sets} - {names.SERVICE_CIDRS, names.NODE_PORT_ADDRESSES, "pick", "sticky"}
)
_NAMES = st.sampled_from(
    [*_SETS, "intruder", "affinity-", "affinity-99999999999", "source-ranges-129", "source-ranges-x"]
)

# Few bytes, so that references, keys and data of different elements meet.
_BYTES = st.one_of(
    st.binary(max_size=48),
    st.lists(
        st.sampled_from([bytes(4), b"\0\x20\0\0", b"\1\x20\0\0", b"\x06\0\0\0", b"\0\x50\0\0", b"\x0a\x60\0\1"])
    ).map(b"".join),
)


@st.composite
def strange_elements(draw: st.DrawFn) -> Elements:
    found: dict[str, dict[bytes, Element]] = {}
    for _ in range(draw(st.integers(0, 12))):
        element = Element(
            draw(_BYTES), draw(_BYTES), draw(st.text(max_size=3)), flags=draw(st.sampled_from([0, 0, 1, 2]))
        )
        found.setdefault(draw(_NAMES), {})[element.key] = element
    return found


class Kernel:
    """Sets as dictionaries, as strict as the kernel."""

    def __init__(self, elements: Elements) -> None:
        self.sets = {name: dict(members) for name, members in elements.items()}

    def commit(self, batch: Batch) -> None:
        for name, keys in batch.deleted.items():
            for key in keys:
                del self.sets[name][key]
        for name, elements in batch.added.items():
            for key, element in elements.items():
                assert key not in self.sets.setdefault(name, {}), f"{key.hex()} is in {name} already"
                self.sets[name][key] = element

    def ours(self) -> dict[str, dict[bytes, Element]]:
        """Without sets that are none of ours, which the dataplane deletes as a whole."""
        return {
            name: members
            for name, members in self.sets.items()
            if name in _SETS or names.affinity_timeout(name) is not None or names.source_ranges_length(name) is not None
        }


@given(FAMILIES, strange_elements())
def test_arbitrary_elements_are_a_table_and_its_damage(family: Family, elements: Elements) -> None:
    reading = decode(family, elements, NodeFacts())
    for route in reading.table.routes.values():
        assert len(route.backends) >= len(route.local_backends or ()) or route.local_backends


@given(FAMILIES, st.data())
def test_arbitrary_elements_beside_ours_are_repaired_to_what_is_wanted(family: Family, data: st.DataObject) -> None:
    table = data.draw(tables(family, with_node=False))
    wanted = data.draw(tables(family, with_node=False))
    kernel = Kernel({})
    kernel.commit(Model(family).plan(from_nothing(table), 0.0))
    for name, members in data.draw(strange_elements()).items():
        if name in kernel.ours() or name in _SETS:
            kernel.sets.setdefault(name, {}).update(members)
    for _ in range(3):
        reading = decode(family, kernel.ours(), NodeFacts())
        if reading.table == wanted:
            break
        plan = plan_repair(reading, wanted, 1.0)
        kernel.commit(plan.batch)
    reading = decode(family, kernel.ours(), NodeFacts())
    assert reading.table == wanted
    assert not len(reading.repair)


@given(FAMILIES, st.data())
def test_a_table_that_was_mutilated_at_random_is_repaired_and_leaves_no_garbage(
    family: Family, data: st.DataObject
) -> None:
    table = data.draw(tables(family, with_node=False))
    kernel = Kernel({})
    kernel.commit(Model(family).plan(from_nothing(table), 0.0))
    present = sorted((name, key) for name, members in kernel.sets.items() for key in members)
    for name, key in data.draw(st.lists(st.sampled_from(present), max_size=8)) if present else ():
        element = kernel.sets[name].pop(key, None)
        if element is None or data.draw(st.booleans()):
            continue
        other = data.draw(st.sampled_from(sorted(table for table in kernel.sets[name].values()) or [element]))
        mixed = Element(data.draw(st.sampled_from([element.key, other.key])), other.data, other.comment)
        kernel.sets[name][mixed.key] = mixed
    reading = decode(family, kernel.ours(), NodeFacts())
    plan = plan_repair(reading, table, 1.0)
    kernel.commit(plan.batch)
    reading = decode(family, kernel.ours(), NodeFacts())
    assert reading.table == table
    empty = ForwardingTable(family=family)
    plan = plan_repair(reading, empty, 2.0)
    kernel.commit(plan.batch)
    kernel.commit(plan.model.plan(from_nothing(empty), 2.0 + 2 * GRACE))
    assert not any(kernel.sets.values()), "garbage stays behind"


@given(st.data())
def test_a_static_part_that_was_mutilated_at_random_is_facts_and_damage(data: st.DataObject) -> None:
    static = state_of(_LAYOUT)
    chains = dict(static.chains)
    for name in data.draw(st.lists(st.sampled_from(sorted(chains)), min_size=1, max_size=4)):
        others = [rule for chain in static.chains.values() for rule in chain.rules]
        chains[name] = chains[name]._replace(rules=tuple(data.draw(st.lists(st.sampled_from(others), max_size=3))))
    sets = {name: spec for name, spec in static.sets.items() if data.draw(st.integers(0, 9))}
    found = adopt.facts_of(
        static._replace(chains=chains, sets=sets),
        [Element(data.draw(_BYTES), flags=data.draw(st.integers(0, 3)))],
        [Element(data.draw(_BYTES))],
    )
    assert found.damage


@given(st.text(max_size=30))
def test_any_name_of_a_chain_or_a_set_can_be_asked_about(name: str) -> None:
    for each in (name, f"pick-{name}", f"affinity-{name}", f"source-ranges-{name}"):
        for asked in (pick_count, names.affinity_timeout, names.source_ranges_length):
            found = asked(each)
            assert found is None or found >= 0


# --- errors of the kernel ------------------------------------------------------------------------------------


def mutated(data: st.DataObject, message: bytes) -> bytes:
    raw = bytearray(message)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    return bytes(raw[: data.draw(st.integers(HEADER.size, len(raw)))])


_RULES = [add_rule(Family.IPV4, "sluice", chain.name, rule) for chain in _LAYOUT.chains for rule in chain.rules]


@given(st.data())
def test_any_message_and_offset_of_an_error_is_put_into_words(data: st.DataObject) -> None:
    whole = data.draw(
        st.sampled_from([*_RULES, *add_elements(Family.IPV4, "sluice", "slots", [Element(b"abcd", b"12345678")] * 3)])
    )
    message = mutated(data, whole)
    code = data.draw(st.sampled_from([errno.ENOENT, errno.EINVAL]))
    failure = Failure(
        0, code, data.draw(st.text(max_size=5)), data.draw(st.integers(0, 2**32 - 1) | st.integers(0, 400))
    )
    for steps in ([Step(message)], [Step(message, "slots")], []):
        assert "\n" not in explain(failure._replace(text=""), steps)
        lacking(failure, steps, Family.IPV4)
    key_at(message, failure.offset)
    describe_message(message)


# --- sockets -------------------------------------------------------------------------------------------------


class Answers:
    """The kernel's end of a socket, which says anything."""

    def __init__(self, frame: Callable[[int], list[bytes]]) -> None:
        self._frame = frame
        self._queue: list[bytes] = []

    def sendto(self, data: bytes, _address: object) -> None:
        self._queue += self._frame(HEADER.unpack_from(data)[3])

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self._queue:
            raise BlockingIOError
        return self._queue.pop(0)

    def recv_into(self, buffer: bytearray, _size: int = 0, flags: int = 0) -> int:
        data = self.recv(0, flags)
        buffer[: len(data)] = data
        return len(data)

    def setsockopt(self, *_: object) -> None: ...

    def bind(self, _address: object) -> None: ...

    def close(self) -> None: ...


@st.composite
def datagrams(draw: st.DrawFn) -> Callable[[int], list[bytes]]:
    """Datagrams for a sequence number: right ones, cut ones, and none at all."""
    shapes = draw(
        st.lists(
            st.tuples(
                st.sampled_from([2, 3, 2563, 2575, 0]),
                st.sampled_from([0, 2, 0x10, 0x100, 0x200, 0x300]),
                st.integers(-1, 4),
                st.binary(max_size=40) | st.just(struct.pack("=i", -errno.ENOENT) + bytes(16)) | st.just(bytes(20)),
                st.integers(0, 60),
            ),
            max_size=4,
        )
    )

    def frame(sequence: int) -> list[bytes]:
        return [
            (struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence + shift, 0) + payload)[: 16 + cut]
            for kind, flags, shift, payload, cut in shapes
        ]

    return frame


@given(datagrams() | st.lists(st.binary(max_size=60), max_size=3).map(lambda raw: lambda _sequence: raw))
def test_any_answers_of_the_kernel_are_an_error_of_the_socket(frame: Callable[[int], list[bytes]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", lambda *_: Answers(frame))
        netfilter = NetfilterSocket()
    message = struct.pack("=IHHII", 20, 10 << 8, 1, 0, 0) + bytes(4)
    for call in (
        lambda: netfilter.commit([message, message]),
        lambda: netfilter.dump(message),
        lambda: netfilter.request(message),
        netfilter.generation,
    ):
        with contextlib.suppress(TransactionError, NetlinkError, DecodeError):
            call()


@given(st.lists(st.binary(max_size=60), max_size=4) | datagrams().map(lambda frame: frame(1)))
def test_any_notification_is_a_touch_or_nothing(received: list[bytes]) -> None:
    wrapped = [struct.pack("=IHHII", 16 + len(raw), 10 << 8 | 15, 0, 0, 0) + raw for raw in received]
    named = [raw + nested(1, attribute(1, b"sluice\0")) for raw in received]
    queue = [*received, *wrapped, *named]

    class Ear(Answers):
        def recv(self, _size: int, _flags: int = 0) -> bytes:
            if not queue:
                raise BlockingIOError
            return queue.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", lambda *_: Ear(lambda _: []))
        monitor = Monitor("sluice", [1, 2])
    for touch in monitor.touched():
        assert touch.family in Family
