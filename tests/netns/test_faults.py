"""The nftables dataplane on the kernel's bad days: retried, repaired or reported; never half a table."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import (
    Backend,
    Delta,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    difference,
)
from rules.nftables import names
from rules.nftables.dataplane import NftablesDataplane
from rules.nftables.elements import backend_data, frontend_key, hairpin_key
from tests.fakes.netlink_faults import (
    NEW_CHAIN,
    Fate,
    FaultySocket,
    Lost,
    Meddle,
    Refused,
    Stale,
    Unsent,
    refuse_backends,
    refuse_elements,
    refuse_expression,
    refuse_kind,
    refuse_set,
)
from tests.netns.isolation import own_network_namespace

pytestmark = pytest.mark.netns


class Rig:
    """A dataplane whose socket misbehaves, and one beside it that does not and only reads."""

    def __init__(self, family: Family) -> None:
        self.dataplane = NftablesDataplane(family)
        self.socket = FaultySocket()
        self.socket.take_over(self.dataplane)
        self.witness = NftablesDataplane(family)

    def holds(self, table: ForwardingTable) -> bool:
        return self.witness.read() == table

    def close(self) -> None:
        self.dataplane.close()
        self.witness.close()


Open = Callable[[Family], Rig]


@pytest.fixture
def opened(root: None) -> Iterator[Open]:
    with own_network_namespace(), contextlib.ExitStack() as stack:
        yield lambda family: stack.enter_context(contextlib.closing(Rig(family)))


@pytest.fixture
def rig(opened: Open) -> Rig:
    return opened(Family.IPV4)


def nft(*arguments: str) -> None:
    subprocess.run(["nft", *arguments], check=True, capture_output=True)


def backend(number: int) -> Backend:
    return Backend(bytes([10, 244, *divmod(number, 250)]), 8080)


def frontend(number: int) -> Frontend:
    return Frontend(bytes([10, 96 + number // 62500, *divmod(number % 62500, 250)]), Protocol.TCP, 80)


def services(count: int, each: int = 4) -> ForwardingTable:
    return ForwardingTable(
        family=Family.IPV4,
        node=NodeFacts(service_cidrs=(Prefix(bytes([10, 96, 0, 0]), 16),)),
        routes={
            frontend(number): Route(
                kind=Kind.CLUSTER_IP,
                backends=frozenset(backend(number * each + place) for place in range(each)),
                label=f"default/s{number}:http",
            )
            for number in range(count)
        },
    )


def without(table: ForwardingTable, *numbers: int) -> ForwardingTable:
    gone = set(map(frontend, numbers))
    return msgspec.structs.replace(table, routes={key: route for key, route in table.routes.items() if key not in gone})


FIVE, SIX = services(5), services(6)


# --- what passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fates",
    [
        [Lost(applied=True)],
        [Lost(applied=False)],
        [Lost(applied=False), Lost(applied=True)],
        [Stale()],
        [Stale(), Lost(applied=False), Stale()],
        [Refused(errno.EEXIST, 3)],
        [Refused(errno.ENOENT, 3)],
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [None, FIVE], ids=["from nothing", "from five"])
def test_a_sync_gets_over_it_at_once(rig: Rig, before: ForwardingTable | None, fates: list[Fate]) -> None:
    if before is not None:
        rig.dataplane.sync(before)
    rig.socket.commits[:] = fates
    applied = rig.dataplane.sync(SIX)
    assert rig.holds(SIX)
    assert applied.operations
    assert applied.found == before
    assert not applied.refused
    assert not rig.socket.commits
    rig.dataplane.apply(difference(SIX, FIVE))
    assert rig.holds(FIVE)


@pytest.mark.parametrize("times", [4, 8, 50])
def test_neighbours_who_change_their_rules_all_the_time_do_not_keep_us_from_writing(rig: Rig, times: int) -> None:
    rig.dataplane.sync(FIVE)
    rig.socket.commits[:] = [Stale()] * times
    rig.dataplane.sync(SIX)
    assert rig.holds(SIX)


def test_who_insists_still_does_not_write_over_what_others_did_to_our_table(rig: Rig) -> None:
    rig.dataplane.sync(FIVE)
    rig.socket.commits[:] = [Stale()] * 3 + [Meddle(lambda: nft("delete", "table", "ip", "sluice"))]
    rig.dataplane.sync(SIX)
    assert rig.holds(SIX)


@pytest.mark.parametrize("code", [errno.EINTR, errno.ENOBUFS])
def test_a_reading_that_is_disturbed_is_taken_again(rig: Rig, code: int) -> None:
    rig.dataplane.sync(FIVE)
    real, disturbed = rig.socket._socket, []

    class Disturbed:
        """The first answer to each of some requests is lost."""

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def recv(self, size: int, flags: int = 0) -> bytes:
            data = real.recv(size, flags)
            if not flags and len(disturbed) < 4 and len(data) > 100:
                disturbed.append(data)
                raise OSError(code, os.strerror(code))
            return data

    rig.socket._socket = Disturbed()
    try:
        rig.dataplane.sync(SIX)
    finally:
        rig.socket._socket = real
    assert len(disturbed) == 4
    assert rig.holds(SIX)


# --- what is reported, and over when the kernel feels better ----------------------------------------------------


@pytest.mark.parametrize(
    "fate",
    [
        Refused(errno.ENOMEM, 3),
        Refused(errno.ENOMEM),
        Refused(errno.ENOBUFS, 3),
        Refused(errno.EPERM),
        Refused(errno.ENFILE, 3),
        Unsent(errno.EMSGSIZE),
        Unsent(errno.ENOBUFS),
        Unsent(errno.ENOMEM),
        Unsent(errno.EPERM),
    ],
    ids=str,
)
def test_what_the_node_cannot_do_is_reported_once_and_nothing_is_bisected_or_made_anew(rig: Rig, fate: Fate) -> None:
    rig.dataplane.sync(FIVE)
    nft("add", "element", "ip", "sluice", "drop-frontends", "{ 10.9.9.9 . tcp . 1 }")  # damage, which is to be repaired
    held = rig.witness.read()
    rig.socket.attempts.clear()
    rig.socket.commits[:] = [fate]
    with pytest.raises(DataplaneError, match="nftables") as raised:
        rig.dataplane.sync(SIX)
    assert "\n" not in str(raised.value)
    assert len(rig.socket.attempts) == 1
    assert rig.witness.read() == held
    rig.dataplane.sync(SIX)
    assert rig.holds(SIX)


@pytest.mark.parametrize(
    "fate",
    [Lost(applied=True), Lost(applied=False), Stale(), Refused(errno.ENOENT, 0), Unsent(errno.ENOBUFS)],
    ids=str,
)
def test_a_delta_that_fails_asks_for_a_sync_which_ends_with_the_wanted_table(rig: Rig, fate: Fate) -> None:
    rig.dataplane.sync(FIVE)
    rig.socket.commits[:] = [fate]
    with contextlib.suppress(DataplaneError):
        rig.dataplane.apply(difference(FIVE, SIX))
        assert fate == Stale(), "a delta rests on no generation"
        return
    with pytest.raises(DataplaneError, match="a sync must come first"):
        rig.dataplane.apply(Delta())
    rig.dataplane.sync(SIX)
    assert rig.holds(SIX)
    assert rig.dataplane.sync(SIX).operations == 0


def test_a_change_of_something_else_costs_no_second_plan(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[object] = []
    plan = rig.dataplane._plan

    def counted(*arguments: Any) -> Any:
        plans.append(plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(rig.dataplane, "_plan", counted)
    rig.socket.commits[:] = [Stale()]
    rig.dataplane.sync(FIVE)
    assert rig.holds(FIVE)
    assert len(plans) == 1
    rig.socket.commits[:] = [Meddle(lambda: nft("flush", "set", "ip", "sluice", "cluster-ips"))]
    rig.dataplane.sync(SIX)
    assert rig.holds(SIX)
    assert len(plans) == 3, "a change of ours needs a plan of its own"


def test_answers_that_are_always_lost_are_told_as_such(rig: Rig) -> None:
    rig.socket.commits[:] = [Lost(applied=False)] * 100
    with pytest.raises(DataplaneError, match="answers are lost again and again"):
        rig.dataplane.sync(FIVE)
    assert len(rig.socket.attempts) <= 10


@pytest.mark.parametrize(
    "act",
    [
        lambda: nft("delete", "table", "ip", "sluice"),
        lambda: nft("flush", "set", "ip", "sluice", "cluster-ips"),
        lambda: nft("flush", "map", "ip", "sluice", "cluster-ip"),
        lambda: nft("flush", "ruleset"),
    ],
)
@pytest.mark.parametrize("when", ["commits", "dumps", "requests"])
def test_what_others_do_between_reading_and_writing_is_repaired_in_the_same_sync(
    rig: Rig, when: str, act: Callable[[], None]
) -> None:
    rig.dataplane.sync(FIVE)
    getattr(rig.socket, when)[:] = [None] * (when == "requests") + [Meddle(act)]
    rig.dataplane.sync(SIX)
    assert rig.holds(SIX)


def test_a_strange_set_goes_with_all_that_it_holds_and_nothing_else_is_made_anew(rig: Rig) -> None:
    rig.dataplane.sync(MIXED)
    for name in ("intruder", "affinity-0600", "source-ranges-024"):
        nft("add", "set", "ip", "sluice", name, "{ type inet_service; flags interval; elements = { 5-9, 80 }; }")
    assert not rig.holds(MIXED)
    applied = rig.dataplane.sync(MIXED)
    assert applied.operations == 3
    assert rig.holds(MIXED)


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("affinity-600", "1:5"),
        ("cluster-ip", "10.9.9.9 . 99 . 7 : 1:5"),
        ("members", "1:5 . 7 : 2:6"),
        ("endpoints-tcp", "1:5 . 0 : 10.9.9.9 . 7"),
        ("source-ranges-24", "10.9.9.9 . tcp . 7 . 10.9.9.9"),
        ("local-endpoint-pairs", "10.9.9.9 . 10.9.9.8 . tcp . 7"),
        ("external-policy-local", "10.9.9.9 . tcp . 7"),
        ("source-ranged", "10.9.9.9 . tcp . 7"),
    ],
)
def test_an_element_that_nobody_could_have_written_shows_and_goes_alone(rig: Rig, name: str, element: str) -> None:
    rig.dataplane.sync(MIXED)
    nft("add", "element", "ip", "sluice", name, f"{{ {element} }}")
    held = rig.witness.read()
    assert held is not None
    assert len(held.damage) == 1
    assert rig.dataplane.sync(MIXED).operations == 1
    assert rig.holds(MIXED)


# --- one Service --------------------------------------------------------------------------------------------------


def test_one_refused_element_of_ten_thousand_Services_leaves_out_its_Service_and_no_other(rig: Rig) -> None:
    table = services(10_000)
    bad = 6789
    rig.socket.refuse = refuse_backends({backend_data(backend(bad * 4 + 2))}, errno.EINVAL)
    applied = rig.dataplane.sync(table)
    assert applied.refused == {f"default/s{bad}:http"}
    assert "Invalid argument" in applied.why_refused[f"default/s{bad}:http"]
    assert rig.holds(without(table, bad))
    assert len(rig.socket.attempts) <= 3
    # Deltas go on without it, one that brings it again is refused, and the kernel may change its mind.
    rig.dataplane.apply(Delta(removed=frozenset([frontend(1)])))
    with pytest.raises(DataplaneError, match="endpoints-tcp: Invalid argument"):
        rig.dataplane.apply(Delta(changed={frontend(bad): table.routes[frontend(bad)]}))
    assert rig.dataplane.sync(table).refused == {f"default/s{bad}:http"}
    assert rig.holds(without(table, bad))
    rig.socket.refuse = None
    applied = rig.dataplane.sync(table)
    assert not applied.refused
    assert rig.holds(table)


NODE_PORT = Frontend(b"", Protocol.TCP, 30080)
BALANCER = Frontend(bytes([203, 0, 113, 1]), Protocol.TCP, 80)
DNS = Frontend(bytes([10, 96, 0, 3]), Protocol.UDP, 53)
LOCAL = Endpoint(*backend(12)[:1], Protocol.TCP, 8080)

MIXED = msgspec.structs.replace(
    FIVE,
    routes={
        **FIVE.routes,
        NODE_PORT: Route(kind=Kind.NODE_PORT, backends=FIVE.routes[frontend(3)].backends, label="default/s3:http"),
        BALANCER: Route(
            kind=Kind.LOAD_BALANCER,
            backends=FIVE.routes[frontend(4)].backends,
            affinity=600,
            source_ranges=(Prefix(bytes([192, 168, 0, 0]), 24),),
            label="default/balanced:http",
        ),
        DNS: Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="kube-system/dns:dns"),
    },
    hairpins=frozenset([LOCAL]),
)

ELEMENTS = {
    "a frontend": (names.CLUSTER_IP, frontend_key(frontend(2)), {frontend(2)}),
    "a ClusterIP of two Services": (names.CLUSTER_IPS, frontend(3).address, {frontend(3), DNS}),
    "a node port": (names.NODE_PORT, frontend_key(NODE_PORT)[-8:], {NODE_PORT}),
    "a source range": (
        names.source_ranges(24),
        frontend_key(BALANCER) + bytes([192, 168, 0, 0]),
        {BALANCER},
    ),
    "a refusal": (names.REJECT_FRONTENDS, frontend_key(DNS), {DNS}),
    "a hairpin": (names.LOCAL_ENDPOINT_PAIRS, hairpin_key(LOCAL), {frontend(3), NODE_PORT}),
}


@pytest.mark.parametrize("offsets", [True, False], ids=["named by its offset", "not named"])
@pytest.mark.parametrize("which", ELEMENTS)
def test_whatever_kind_of_element_is_refused_only_those_who_need_it_are_left_out(
    rig: Rig, which: str, offsets: bool
) -> None:
    name, key, owners = ELEMENTS[which]
    refuse = refuse_elements({key}, errno.EINVAL, name=name)

    def refuse_it(message: bytes):
        failure = refuse(message)
        return failure and failure._replace(offset=failure.offset if offsets else 0)

    rig.socket.refuse = refuse_it
    applied = rig.dataplane.sync(MIXED)
    assert applied.refused == {MIXED.routes[owner].label for owner in owners}
    left = {frontend: route for frontend, route in MIXED.routes.items() if frontend not in owners}
    hairpins = frozenset() if which == "a hairpin" else MIXED.hairpins
    assert rig.holds(msgspec.structs.replace(MIXED, routes=left, hairpins=hairpins))
    rig.socket.refuse = None
    assert not rig.dataplane.sync(MIXED).refused
    assert rig.holds(MIXED)


def test_many_refused_Services_of_one_message_are_found_in_three_tries(rig: Rig) -> None:
    table = services(500)
    bad = range(100, 400, 7)
    rig.socket.refuse = refuse_elements({frontend_key(frontend(number)) for number in bad}, errno.EINVAL)
    applied = rig.dataplane.sync(table)
    assert applied.refused == {f"default/s{number}:http" for number in bad}
    assert rig.holds(without(table, *bad))
    assert len(rig.socket.attempts) == 3


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ENOENT])
def test_an_element_that_is_said_to_be_there_or_not_is_read_again_before_its_Service_is_left_out(
    rig: Rig, code: int
) -> None:
    rig.socket.refuse = refuse_elements({frontend_key(frontend(2))}, code, name=names.CLUSTER_IP)
    applied = rig.dataplane.sync(FIVE)
    assert applied.refused == {"default/s2:http"}
    assert len(rig.socket.attempts) == 3
    assert rig.holds(without(FIVE, 2))


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENFILE])
def test_a_set_without_room_is_no_Services_fault(rig: Rig, code: int) -> None:
    rig.dataplane.sync(FIVE)
    rig.socket.attempts.clear()
    rig.socket.refuse = refuse_set(names.ENDPOINTS_TCP, code)
    with pytest.raises(DataplaneError, match=f"endpoints-tcp: {os.strerror(code)}"):
        rig.dataplane.sync(SIX)
    assert len(rig.socket.attempts) == 1
    assert rig.holds(FIVE)


# --- what the kernel lacks ------------------------------------------------------------------------------------------

FEATURES = {
    "fib": "the expression fib (CONFIG_NFT_FIB_IPV4)",
    "numgen": "the expression numgen (CONFIG_NFT_NUMGEN)",
    "hash": "the expression hash (CONFIG_NFT_HASH)",
    "dynset": "the expression dynset (CONFIG_NF_TABLES)",
    "ct": "the expression ct (CONFIG_NFT_CT)",
    "nat": "the expression nat (CONFIG_NFT_NAT)",
    "masq": "the expression masq (CONFIG_NFT_MASQ)",
    "reject": "the expression reject (CONFIG_NFT_REJECT_IPV4)",
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("code", [errno.ENOENT, errno.EOPNOTSUPP])
def test_a_feature_that_the_kernel_lacks_is_named_before_anything_is_written(rig: Rig, feature: str, code: int) -> None:
    rig.socket.refuse = refuse_expression(feature, code)
    with pytest.raises(UnavailableError) as raised:
        rig.dataplane.check()
    assert FEATURES[feature] in str(raised.value)
    table = msgspec.structs.replace(MIXED, node=NodeFacts(node_port_addresses=frozenset(), loopback_node_ports=True))
    with pytest.raises(UnavailableError) as raised:
        rig.dataplane.sync(table)
    assert FEATURES[feature] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert rig.witness.read() is None
    assert len(rig.socket.attempts) <= 3


def test_without_an_offset_the_candidates_are_named(rig: Rig) -> None:
    rig.socket.refuse = refuse_expression("numgen", offsets=False)
    with pytest.raises(UnavailableError, match=r"numgen \(CONFIG_NFT_NUMGEN\)"):
        rig.dataplane.check()


def test_chains_that_the_kernel_does_not_know_are_named(rig: Rig) -> None:
    rig.socket.refuse = refuse_kind(NEW_CHAIN, errno.ENOENT)
    with pytest.raises(UnavailableError, match="lacks IPv4 chains of type "):
        rig.dataplane.check()


def test_asking_for_features_changes_nothing_and_tells_nobody(rig: Rig) -> None:
    before = rig.socket.generation()
    with subprocess.Popen(["nft", "monitor"], stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        rig.dataplane.check()
        assert rig.socket.attempts, "nothing was tried"
        assert rig.witness.read() is None
        assert rig.socket.generation() == before
        rig.dataplane.sync(FIVE)
        rig.socket.attempts.clear()
        rig.dataplane.check()
        assert not rig.socket.attempts, "where our table is, nothing needs to be tried"
        monitor.terminate()


def test_IPv6_that_the_kernel_refuses_does_not_keep_IPv4_from_being_served(opened: Open) -> None:
    four, six = opened(Family.IPV4), opened(Family.IPV6)
    six.socket.refuse = refuse_expression("fib", family=Family.IPV6.af)
    four.dataplane.check()
    with pytest.raises(UnavailableError, match="fib \\(CONFIG_NFT_FIB_IPV6\\)"):
        six.dataplane.check()
    with pytest.raises(UnavailableError, match="IPv6"):
        six.dataplane.sync(ForwardingTable(family=Family.IPV6))
    four.dataplane.sync(FIVE)
    assert four.holds(FIVE)
    assert six.witness.read() is None


# --- buffers ------------------------------------------------------------------------------------------------------


def test_without_the_right_to_large_buffers_a_large_transaction_is_refused_with_what_to_do_and_a_small_one_works(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 << 16  # what net.core.wmem_max allows; the kernel doubles it

    def refused(*_: int) -> None:
        rig.socket._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limit)

    rig.dataplane.sync(FIVE)
    monkeypatch.setattr(rig.socket, "_set_buffer", refused)
    refused()
    large = services(5000)
    with pytest.raises(DataplaneError, match=r"more than the socket may send: set the sysctl net.core.wmem_max to \d+"):
        rig.dataplane.sync(large)
    assert rig.holds(FIVE)
    rig.dataplane.sync(SIX)
    rig.dataplane.apply(difference(SIX, FIVE))
    assert rig.holds(FIVE)
    monkeypatch.undo()  # the limit was raised
    rig.dataplane.sync(large)
    assert rig.holds(large)


def test_without_the_right_to_force_a_buffer_the_plain_option_is_used(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = rig.socket._socket, []

    class Restricted:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def setsockopt(self, level: int, option: int, value: int) -> None:
            asked.append(option)
            if option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
                raise PermissionError(errno.EPERM, "no")
            real.setsockopt(level, option, value)

    monkeypatch.setattr(rig.socket, "_socket", Restricted())
    rig.socket._send_buffer = rig.socket._receive_buffer = 0
    rig.dataplane.sync(FIVE)
    assert {socket.SO_SNDBUF, socket.SO_RCVBUF} <= set(asked)
    assert rig.holds(FIVE)


def test_the_dataplane_gives_back_its_socket_when_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []

    class Broken:
        def generation(self) -> int:
            raise PermissionError(errno.EPERM, "no")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("rules.nftables.dataplane.NetfilterSocket", Broken)
    with pytest.raises(UnavailableError, match="CAP_NET_ADMIN"):
        NftablesDataplane(Family.IPV4)
    assert len(closed) == 1
