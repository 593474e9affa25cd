"""The iptables dataplane against the kernel, by both kinds of programs: what is written is what is read."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.dataplane import DataplaneError
from rules.forwarding import (
    Delta,
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
from rules.iptables.dataplane import IptablesDataplane
from rules.iptables.programs import BACKENDS, available
from rules.iptables.programs import Backend as Programs
from tests.iptables_tables import tables
from tests.netns.isolation import own_network_namespace
from tests.one_of_each import BALANCER, DNS, WEB, backend, one_of_each

pytestmark = pytest.mark.netns

Open = Callable[..., IptablesDataplane]


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

        def open_one(family: Family = Family.IPV4) -> IptablesDataplane:
            return stack.enter_context(contextlib.closing(IptablesDataplane(family, programs)))

        yield open_one


@pytest.fixture
def dataplane(opened: Open) -> IptablesDataplane:
    """The IPv4 dataplane in a namespace of the test's own."""
    return opened()


@pytest.fixture
def iptables(programs: Programs) -> Callable[..., str]:
    """Runs the program iptables of the kind in question."""

    def run(*arguments: str, program: str = "iptables", text: str | None = None) -> str:
        name = program.replace("iptables", f"iptables-{programs}")
        done = subprocess.run([name, *arguments], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("family", list(Family))
def test_what_is_applied_is_what_is_read(family: Family, opened: Open) -> None:
    dataplane = opened(family)

    @settings(max_examples=25)
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        dataplane.sync(table)
        assert dataplane.read() == table
        assert dataplane.sync(table).operations == 0, "a second sync writes something"

    check()


@pytest.mark.parametrize("family", list(Family))
def test_a_table_reached_by_deltas_is_the_table_applied_at_once(family: Family, opened: Open) -> None:
    dataplane = opened(family)

    @settings(max_examples=10)
    @given(st.lists(tables(family), min_size=2, max_size=4))
    def check(steps: list[ForwardingTable]) -> None:
        dataplane.sync(steps[0])
        for before, after in itertools.pairwise(steps):
            dataplane.apply(difference(before, after))
        assert dataplane.read() == steps[-1]

    check()


EVERYTHING = one_of_each(
    NodeFacts(
        detector=SourcePrefix(Prefix(bytes([10, 244, 0, 0]), 16)),
        loopback_node_ports=True,
        service_cidrs=(Prefix(bytes([10, 96, 0, 0]), 16),),
    )
)

FOREIGN_EDITS = {
    "nat flushed": ["-t", "nat", "-F"],
    "filter flushed": ["-F"],
    "a jump less": ["-t", "nat", "-D", "PREROUTING", "1"],
    "a jump more": ["-A", "INPUT", "-j", "SLUICE-INPUT"],
    "a rule less": ["-t", "nat", "-D", "SLUICE-POSTROUTING", "1"],
    "a rule more": ["-I", "SLUICE-FORWARD", "-j", "DROP"],
    "a Service's rule less": ["-t", "nat", "-D", "SLUICE-S", "1"],
    "a refusal less": ["-F", "SLUICE-R"],
    "a hairpin less": ["-t", "nat", "-F", "SLUICE-H"],
    "the guard": ["-F", "SLUICE-GUARD"],
    "a chain more": ["-N", "SLUICE-INTRUDER"],
}


@pytest.mark.parametrize("edit", FOREIGN_EDITS)
def test_another_process_edits_and_read_shows_it_and_sync_repairs_it(
    edit: str, dataplane: IptablesDataplane, iptables: Callable[..., str]
) -> None:
    dataplane.sync(EVERYTHING)
    assert dataplane.read() == EVERYTHING
    iptables(*FOREIGN_EDITS[edit])
    assert dataplane.read() != EVERYTHING
    assert dataplane.sync(EVERYTHING).operations
    assert dataplane.read() == EVERYTHING
    assert not dataplane.sync(EVERYTHING).operations


FOREIGN = """*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m comment --comment "not ours" -j KUBE-FIREWALL
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""


def foreign_rules(listing: str) -> list[str]:
    return sorted(line for line in listing.splitlines() if line.startswith((":", "-A")) and "SLUICE" not in line)


def test_foreign_rules_stay_as_they_are_and_cleanup_removes_ours_alone(
    dataplane: IptablesDataplane, iptables: Callable[..., str]
) -> None:
    assert dataplane.read() is None
    iptables(program="iptables-restore", text=FOREIGN)
    before = foreign_rules(iptables(program="iptables-save"))
    dataplane.sync(EVERYTHING)
    dataplane.apply(Delta(removed=frozenset([DNS])))
    assert foreign_rules(iptables(program="iptables-save")) == before
    assert dataplane.cleanup()
    assert foreign_rules(iptables(program="iptables-save")) == before
    assert "SLUICE" not in iptables(program="iptables-save")
    assert dataplane.read() is None
    assert not dataplane.cleanup()


def test_a_restart_adopts_what_is_there_and_goes_on(opened: Open) -> None:
    opened().sync(EVERYTHING)
    successor = opened()
    assert successor.sync(EVERYTHING).operations == 0
    web = msgspec.structs.replace(EVERYTHING.routes[WEB], backends=frozenset([backend(9)]))
    successor.apply(Delta(changed={WEB: web}))
    assert successor.read() == msgspec.structs.replace(EVERYTHING, routes={**EVERYTHING.routes, WEB: web})


def test_an_apply_on_rules_that_were_removed_meanwhile_is_mended_by_the_next_sync(
    dataplane: IptablesDataplane, iptables: Callable[..., str]
) -> None:
    dataplane.sync(EVERYTHING)
    iptables("-t", "nat", "-F")
    iptables("-t", "nat", "-X")
    with pytest.raises(DataplaneError):
        dataplane.apply(
            Delta(changed={WEB: msgspec.structs.replace(EVERYTHING.routes[BALANCER], kind=Kind.CLUSTER_IP)})
        )
    with pytest.raises(DataplaneError, match="sync must come first"):
        dataplane.apply(Delta(removed=frozenset([DNS])))
    dataplane.sync(EVERYTHING)
    assert dataplane.read() == EVERYTHING


def test_a_route_that_cannot_be_written_is_left_out_and_the_others_work(dataplane: IptablesDataplane) -> None:
    beyond = {
        Frontend(bytes([10, 96, 0, host]), Protocol.TCP, 80): Route(
            kind=Kind.CLUSTER_IP, backends=frozenset([backend(1)]), affinity=1 << 32, label=f"default/bad-{host}"
        )
        for host in (21, 22)
    }
    wanted = msgspec.structs.replace(EVERYTHING, routes={**EVERYTHING.routes, **beyond})
    applied = dataplane.sync(wanted)
    assert applied.refused == {"default/bad-21", "default/bad-22"}
    assert dataplane.read() == EVERYTHING
    dataplane.apply(Delta(removed=frozenset(beyond) | {DNS}))
    table = dataplane.read()
    assert table is not None
    assert table.routes.keys() == EVERYTHING.routes.keys() - {DNS}


def test_the_watch_notices_a_flush_by_others_and_not_ourselves(
    dataplane: IptablesDataplane, iptables: Callable[..., str]
) -> None:
    assert not dataplane.disturbed(), "it starts to watch with the first call"
    dataplane.sync(EVERYTHING)
    dataplane.apply(Delta(removed=frozenset([DNS])))
    assert not dataplane.disturbed()
    assert not dataplane.disturbed()
    iptables("-t", "nat", "-F")
    assert dataplane.disturbed()
    assert not dataplane.disturbed()
    dataplane.sync(EVERYTHING)
    assert not dataplane.disturbed()
    iptables("-D", "FORWARD", "1")
    assert dataplane.disturbed()
