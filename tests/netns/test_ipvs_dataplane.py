"""The ipvs dataplane against the kernel: what is written is what is read, by both kinds of iptables programs.

It needs a kernel with IPVS, such as the one of `make test-vm`.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.sysctls import ensure
from rules.dataplane import DataplaneError, UnavailableError
from rules.diff import compare, lines
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
    Route,
    SourcePrefix,
    difference,
)
from rules.iptables.programs import BACKENDS, available
from rules.iptables.programs import Backend as Programs
from rules.ipvs import sets
from rules.ipvs.dataplane import IpvsDataplane, Options
from rules.ipvs.device import Device
from rules.ipvs.messages import (
    Key,
    Target,
    Timeouts,
    VirtualServer,
    add_real,
    add_server,
    delete_real,
    delete_server,
    set_real,
    set_server,
)
from rules.ipvs.services import Ipvs
from rules.ipvs.sets import Set
from rules.netlink.ipset import Element, Extra, Ipsets
from tests.ipvs_model import tables
from tests.netns.isolation import own_network_namespace
from tests.netns.patience import TIME_SCALE
from tests.one_of_each import BALANCER, DNS, NODE_PORT, WEB, backend, one_of_each

pytestmark = pytest.mark.netns

Open = Callable[..., IpvsDataplane]
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Each is some hundred conversations with a kernel that is emulated."""


@pytest.fixture(params=BACKENDS)
def programs(request: pytest.FixtureRequest, root: None) -> Programs:
    """Each kind of programs that is installed."""
    kind: Programs = request.param
    if kind not in available(Family.IPV4):
        pytest.skip(f"iptables-{kind} is not installed")
    return kind


@pytest.fixture
def opened(programs: Programs) -> Iterator[Open]:
    """Opens dataplanes in a network namespace of the test's own."""
    with own_network_namespace(), contextlib.ExitStack() as stack:
        # Where there is no address at all, the kernel has no table to look real servers up in, and refuses them.
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

        def open_one(family: Family = Family.IPV4, **options: object) -> IpvsDataplane:
            try:
                dataplane = IpvsDataplane(family, Options(**options), programs)  # type: ignore[arg-type]
            except UnavailableError as error:
                pytest.skip(str(error))
            return stack.enter_context(contextlib.closing(dataplane))

        yield open_one


@pytest.fixture
def dataplane(opened: Open) -> IpvsDataplane:
    """The IPv4 dataplane in a namespace of the test's own."""
    return opened()


def apart(dataplane: IpvsDataplane, table: ForwardingTable) -> list[str]:
    """How what the kernel holds differs from a table, a line each."""
    held = dataplane.read()
    told = list(lines(compare(table, held, dataplane.capabilities)))
    return told or ([] if held == table else [f"{held} is not {table}"])


EVERYTHING = one_of_each(
    NodeFacts(
        detector=SourcePrefix(Prefix(bytes([10, 244, 0, 0]), 16)),
        service_cidrs=(Prefix(bytes([10, 96, 0, 0]), 16),),
        health_check_ports=frozenset({30000}),
        bound=True,
    )
)


@pytest.mark.parametrize("family", list(Family))
def test_what_is_applied_is_what_is_read(family: Family, opened: Open) -> None:
    dataplane = opened(family)

    @FEW
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        dataplane.sync(table)
        assert not apart(dataplane, table)
        assert dataplane.sync(table).operations == 0, "a second sync writes something"

    check()


@pytest.mark.parametrize("family", list(Family))
def test_a_table_reached_by_deltas_is_the_table_applied_at_once(family: Family, opened: Open) -> None:
    dataplane = opened(family)

    @FEW
    @given(st.lists(tables(family), min_size=2, max_size=3))
    def check(steps: list[ForwardingTable]) -> None:
        dataplane.sync(steps[0])
        for before, after in itertools.pairwise(steps):
            dataplane.apply(difference(before, after))
        assert not apart(dataplane, steps[-1])
        dataplane.sync(steps[-1])  # takes away what drained
        assert dataplane.sync(steps[-1]).operations == 0

    check()


WEB_KEY = Key(Family.IPV4, Protocol.TCP, WEB.address, 80)
ONE = Target(*backend(1))


def sent(*requests: bytes) -> None:
    with Ipvs() as ipvs:
        assert not ipvs.send(list(requests))


def without(which: Set, element: Element) -> None:
    with Ipsets() as ipsets:
        assert not ipsets.delete(sets.spec(Family.IPV4, which), [element])


def more(which: Set, element: Element) -> None:
    with Ipsets() as ipsets:
        assert not ipsets.add(sets.spec(Family.IPV4, which), {element: Extra()})


def unbound() -> None:
    with Device() as device:
        assert not device.remove([WEB.address])


def device_gone() -> None:
    with Device() as device:
        assert device.delete()


def iptables(*arguments: str) -> Callable[[Programs], None]:
    def run(programs: Programs) -> None:
        subprocess.run([f"iptables-{programs}", *arguments], check=True)

    return run


EDITS: dict[str, Callable[[Programs], None]] = {
    "a backend less": lambda _: sent(delete_real(WEB_KEY, ONE)),
    "a backend more": lambda _: sent(add_real(WEB_KEY, Target(bytes([10, 244, 1, 99]), 1))),
    "another weight": lambda _: sent(set_real(WEB_KEY, ONE, 7)),
    "a server less": lambda _: sent(delete_server(WEB_KEY)),
    "another scheduler": lambda _: sent(set_server(VirtualServer(WEB_KEY, "lc"))),
    "an element less": lambda _: without(Set.CLUSTER_IP, Element(*WEB)),
    "an open port less": lambda _: without(Set.OPEN, Element(*WEB)),
    "a mark less": lambda _: without(Set.LOCAL, Element(*BALANCER)),
    "source ranges off": lambda _: without(Set.RANGED, Element(*BALANCER)),
    "a network more": lambda _: more(Set.SOURCES, Element(*BALANCER, bytes([9, 0, 0, 0]), 8)),
    "an open port more": lambda _: more(Set.OPEN, Element(WEB.address, Protocol.TCP, 22)),
    "an address less": lambda _: unbound(),
    "the device": lambda _: device_gone(),
    "mangle flushed": iptables("-t", "mangle", "-F"),
    "nat flushed": iptables("-t", "nat", "-F"),
    "a jump less": iptables("-t", "mangle", "-D", "OUTPUT", "1"),
    "a rule less": iptables("-t", "mangle", "-D", "SLUICE-IPVS-SERVICES", "3"),
    "a rule more": iptables("-I", "SLUICE-IPVS-FORWARD", "-j", "DROP"),
    "a chain more": iptables("-N", "SLUICE-IPVS-INTRUDER"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_another_process_edits_and_read_shows_it_and_sync_repairs_it(
    edit: str, dataplane: IpvsDataplane, programs: Programs
) -> None:
    dataplane.sync(EVERYTHING)
    assert not apart(dataplane, EVERYTHING)
    EDITS[edit](programs)
    assert apart(dataplane, EVERYTHING)
    assert dataplane.sync(EVERYTHING).operations
    assert not apart(dataplane, EVERYTHING)
    assert not dataplane.sync(EVERYTHING).operations


# --- others' virtual servers -----------------------------------------------------------------------------------------

FOREIGN = [
    VirtualServer(Key(Family.IPV4, Protocol.TCP, bytes([192, 0, 2, 1]), 80), "wlc"),
    VirtualServer(Key(Family.IPV4, Protocol.TCP, WEB.address, 8443), "rr"),
    VirtualServer(Key(Family.IPV4, mark=7), "rr"),
    VirtualServer(Key(Family.IPV6, Protocol.UDP, bytes([0xFD]) + bytes(15), 53), "rr"),
]


def servers() -> set[VirtualServer]:
    with Ipvs() as ipvs:
        return set(ipvs.servers())


def test_foreign_servers_stay_as_they_are_and_cleanup_removes_ours_alone(dataplane: IpvsDataplane) -> None:
    assert dataplane.read() is None
    sent(*map(add_server, FOREIGN), add_real(FOREIGN[0].key, ONE))
    dataplane.sync(EVERYTHING)
    assert not apart(dataplane, EVERYTHING)
    dataplane.apply(Delta(removed=frozenset([DNS])))
    dataplane.sync(EVERYTHING)
    assert servers() > set(FOREIGN)
    assert dataplane.cleanup()
    assert servers() == set(FOREIGN)
    assert dataplane.read() is None
    assert not dataplane.cleanup()
    with Ipvs() as ipvs:
        assert ipvs.reals(FOREIGN[0].key).keys() == {ONE}


def test_cleanup_leaves_no_sets_device_chains(dataplane: IpvsDataplane, opened: Open, programs: Programs) -> None:
    """kube-proxy leaves the sets of IPv6 behind (IPVS-30)."""
    other = opened(Family.IPV6)
    six = ForwardingTable(
        family=Family.IPV6,
        routes={
            Frontend(bytes([0xFD] + [0] * 15), Protocol.TCP, 80): Route(
                kind=Kind.CLUSTER_IP, backends=frozenset([Backend(bytes([0xFD] + [1] * 15), 80)])
            )
        },
    )
    dataplane.sync(EVERYTHING)
    other.sync(six)
    assert dataplane.cleanup()
    assert not apart(other, msgspec.structs.replace(six, node=NodeFacts(bound=True)))
    assert other.cleanup()
    with Ipsets() as ipsets, Device() as device:
        assert not ipsets.names()
        assert not device.exists()
    for program in ("iptables", "ip6tables"):
        saved = subprocess.run([f"{program}-{programs}-save"], capture_output=True, text=True, check=True).stdout
        assert "SLUICE" not in saved


def test_a_server_of_somebody_else_at_a_frontend_is_taken_over(dataplane: IpvsDataplane) -> None:
    """As those of kube-proxy's ipvs mode are."""
    sent(add_server(VirtualServer(WEB_KEY, "wlc", 60, 1)), add_real(WEB_KEY, Target(bytes([10, 244, 1, 99]), 1)))
    dataplane.sync(EVERYTHING)
    assert not apart(dataplane, EVERYTHING)


def test_servers_in_excluded_networks_are_never_removed(opened: Open) -> None:
    """IPVS-24, B-215."""
    network = Prefix(WEB.address, 32)
    dataplane = opened(excluded=(network,))
    dataplane.sync(EVERYTHING)
    without(Set.CLUSTER_IP, Element(*WEB))
    without(Set.OPEN, Element(*WEB))
    rest = {frontend: route for frontend, route in EVERYTHING.routes.items() if frontend != WEB}
    dataplane.sync(msgspec.structs.replace(EVERYTHING, routes=rest))
    assert WEB_KEY in {server.key for server in servers()}


# --- starting, failing -----------------------------------------------------------------------------------------------


def test_a_restart_adopts_what_is_there_and_goes_on(opened: Open) -> None:
    opened().sync(EVERYTHING)
    successor = opened()
    assert successor.sync(EVERYTHING).operations == 0
    web = msgspec.structs.replace(EVERYTHING.routes[WEB], backends=frozenset([backend(9)]))
    successor.apply(Delta(changed={WEB: web}))
    assert not apart(successor, msgspec.structs.replace(EVERYTHING, routes={**EVERYTHING.routes, WEB: web}))


def test_a_change_of_one_endpoint_is_two_operations(dataplane: IpvsDataplane) -> None:
    dataplane.sync(EVERYTHING)
    web = EVERYTHING.routes[WEB]
    moved = msgspec.structs.replace(web, backends=(web.backends - {backend(3)}) | {backend(4)})
    assert dataplane.apply(Delta(changed={WEB: moved})).operations == 2


def test_an_apply_on_what_was_removed_meanwhile_is_mended_by_the_next_sync(dataplane: IpvsDataplane) -> None:
    dataplane.sync(EVERYTHING)
    sent(delete_server(WEB_KEY))
    web = msgspec.structs.replace(EVERYTHING.routes[WEB], backends=frozenset([backend(9)]))
    with pytest.raises(DataplaneError, match=r"10\.96\.0\.1:80/TCP"):
        dataplane.apply(Delta(changed={WEB: web}))
    with pytest.raises(DataplaneError, match="sync must come first"):
        dataplane.apply(Delta(removed=frozenset([DNS])))
    dataplane.sync(EVERYTHING)
    assert not apart(dataplane, EVERYTHING)


def test_a_route_that_the_kernel_refuses_is_left_out_and_the_others_work(dataplane: IpvsDataplane) -> None:
    odd = Frontend(bytes([10, 96, 0, 21]), Protocol.TCP, 80)
    everyone = Backend(bytes([255] * 4), 80)  # which no real server can be
    beyond = {odd: Route(kind=Kind.CLUSTER_IP, backends=frozenset([everyone]), label="default/bad")}
    applied = dataplane.sync(msgspec.structs.replace(EVERYTHING, routes={**EVERYTHING.routes, **beyond}))
    assert applied.refused == {"default/bad"}
    assert not apart(dataplane, EVERYTHING)
    assert not dataplane.sync(EVERYTHING).operations


def test_the_watch_notices_others_and_not_ourselves(dataplane: IpvsDataplane, programs: Programs) -> None:
    assert not dataplane.disturbed(), "it starts to watch with the first call"
    dataplane.sync(EVERYTHING)
    dataplane.apply(Delta(removed=frozenset([DNS])))
    assert not dataplane.disturbed()
    assert not dataplane.disturbed()
    for edit in ("mangle flushed", "a mark less"):
        EDITS[edit](programs)
        assert dataplane.disturbed()
        assert not dataplane.disturbed()


def test_check_asks_for_the_scheduler(opened: Open) -> None:
    """IPVS-1."""
    opened().check()
    opened(scheduler="wlc").check()
    with pytest.raises(UnavailableError, match="fastest"):
        opened(scheduler="fastest").check()
    assert not servers()


def test_schedulers_are_the_services_or_the_configured_one(opened: Open) -> None:
    """IPVS-5."""
    dataplane = opened(scheduler="wlc")
    asked = msgspec.structs.replace(EVERYTHING.routes[WEB], scheduler="least-connections")
    table = msgspec.structs.replace(EVERYTHING, routes={**EVERYTHING.routes, WEB: asked})
    dataplane.sync(table)
    assert not apart(dataplane, table)
    found = {server.key: server.scheduler for server in servers()}
    assert found[WEB_KEY] == "lc"
    assert found[Key(Family.IPV4, Protocol.UDP, DNS.address, 53)] == "wlc"


def test_a_reader_takes_the_most_frequent_scheduler_for_the_usual_one_unless_it_is_told(opened: Open) -> None:
    """Where most Services ask for another one, it would see drift that is none."""
    writer = opened()
    routes = dict(EVERYTHING.routes)
    for frontend in (NODE_PORT, BALANCER):
        routes[frontend] = msgspec.structs.replace(routes[frontend], scheduler="least-connections", affinity=0)
    table = msgspec.structs.replace(EVERYTHING, routes=routes)
    writer.sync(table)
    reader = opened(scheduler=None)
    assert compare(table, reader.read(), writer.capabilities)
    reader.read_as(writer.capabilities)
    assert not compare(table, reader.read(), writer.capabilities)


def test_raw_shows_everything_with_its_service(dataplane: IpvsDataplane) -> None:
    assert dataplane.raw() is None
    dataplane.sync(EVERYTHING)
    raw = dataplane.raw()
    assert raw is not None
    assert raw.table == EVERYTHING
    served = {frontend for item in raw.items for frontend in item.frontends}
    assert served == {WEB, BALANCER, DNS, NODE_PORT}
    assert any(item.text.startswith("virtual server 10.96.0.1:80/TCP rr") for item in raw.items)


# --- draining, on the wire -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(address: bytes, port: int) -> Iterator[socket.socket]:
    with socket.create_server((socket.inet_ntoa(address), port), backlog=16) as server:
        server.settimeout(5 * TIME_SCALE)
        yield server


def test_open_connections_go_on_when_their_backend_goes_and_it_is_removed_after_them(opened: Open) -> None:
    """IPVS-22, IPVS-23, B-220."""
    dataplane = opened(timeouts=Timeouts(900, 1, 300))
    assert not ensure("net/ipv4/vs/conntrack", 1)
    for host in (1, 2):
        subprocess.run(["ip", "addr", "add", f"10.244.1.{host}/32", "dev", "lo"], check=True)
    both = Route(kind=Kind.CLUSTER_IP, backends=frozenset([backend(1), backend(2)]))
    one = msgspec.structs.replace(both, backends=frozenset([backend(2)]))
    hairpins = frozenset([Endpoint(backend(1).address, Protocol.TCP, 8080)])
    table = ForwardingTable(family=Family.IPV4, node=NodeFacts(bound=True), routes={WEB: both}, hairpins=hairpins)
    dataplane.sync(table)
    with listening(backend(1).address, 8080) as first, listening(backend(2).address, 8080) as second:
        clients = [socket.create_connection((socket.inet_ntoa(WEB.address), 80)) for _ in range(2)]
        for number, client in enumerate(clients):
            client.sendall(bytes([number]))
        served, _ = first.accept()
        second.accept()[0].close()
        open_one = clients.pop(served.recv(1)[0])
        clients.pop().close()
        dataplane.apply(Delta(changed={WEB: one}))
        after = msgspec.structs.replace(table, routes={WEB: one})
        assert held_weights() == {ONE: 0, Target(*backend(2)): 1}
        for _ in range(4):
            with socket.create_connection((socket.inet_ntoa(WEB.address), 80)):
                second.accept()[0].close()
        dataplane.sync(after)
        assert held_weights() == {ONE: 0, Target(*backend(2)): 1}
        served.sendall(b"still here")
        assert open_one.recv(20) == b"still here"
        dataplane.apply(Delta(changed={WEB: both}))
        assert held_weights() == {ONE: 1, Target(*backend(2)): 1}
        dataplane.apply(Delta(changed={WEB: one}))
        # A reset closes it for IPVS within seconds.
        open_one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        open_one.close()
        deadline = time.monotonic() + 60 * TIME_SCALE
        while ONE in held_weights():
            assert time.monotonic() < deadline, "a backend without connections is never removed"
            time.sleep(0.5)
            dataplane.sync(after)
        served.close()


def held_weights() -> dict[Target, int]:
    with Ipvs() as ipvs:
        return {target: real.weight for target, real in ipvs.reals(WEB_KEY).items()}
