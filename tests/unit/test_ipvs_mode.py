"""Mode ipvs in the agent: how it is configured and chosen, and what it means for the node."""

from __future__ import annotations

import pytest

from proxy import modes
from proxy.config.load import load
from proxy.config.settings import IpvsSettings, Settings
from proxy.node import node_facts
from rules.dataplane import UnavailableError
from rules.diff import fit
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Prefix, Protocol, Route
from rules.ipvs import kernel
from rules.ipvs.layout import capabilities
from rules.ipvs.marks import ALL_BITS, Numbers, Role, scheme

WEB = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80)


def test_fields_reach_the_settings() -> None:
    """IPVS-3, IPVS-4, IPVS-5, IPVS-25."""
    flags = {
        "proxy-mode": "ipvs",
        "ipvs-scheduler": "wlc",
        "ipvs-exclude-cidrs": "192.0.2.0/24,fd00::/8",
        "ipvs-strict-arp": "true",
        "ipvs-tcp-timeout": "15m",
        "ipvs-tcpfin-timeout": "30s",
        "ipvs-udp-timeout": "5m",
        "ipvs-sync-period": "20s",
    }
    loaded = load(list(flags.items()))
    assert loaded.warnings == ()
    assert loaded.settings.sync_period == 20
    assert loaded.settings.ipvs == IpvsSettings(
        scheduler="wlc",
        excluded=(Prefix(bytes([192, 0, 2, 0]), 24), Prefix(bytes([0xFD] + [0] * 15), 8)),
        strict_arp=True,
        tcp_timeout=900,
        tcp_fin_timeout=30,
        udp_timeout=300,
    )


def lacking(*_: object) -> None:
    raise UnavailableError("this kernel has no IPVS")


def test_a_kernel_without_ipvs_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "choose", lambda *_: None)
    monkeypatch.setattr(kernel, "Ipvs", lacking)
    with pytest.raises(UnavailableError, match=r"^this kernel has no IPVS$"):
        modes.open_dataplane("ipvs", Family.IPV4)


@pytest.mark.parametrize(("able", "chosen"), [(("ipvs", "userspace"), "ipvs"), (("userspace",), "userspace")])
def test_without_a_mode_the_first_that_works_is_chosen(
    able: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Some:
        check = close = staticmethod(lambda: None)

    def opening(name: str, *_: object) -> Some:
        return Some() if name in able else lacking()  # type: ignore[return-value]  # it raises

    monkeypatch.setattr(modes, "open_dataplane", opening)
    assert modes.choose("") == chosen
    assert modes.choose("ipvs") == "ipvs"


def test_ipvs_refuses_closed_ports_and_has_no_node_ports_on_loopback() -> None:
    """IPVS-27, IPVS-29."""
    facts = node_facts(Settings(mode="ipvs"), None, {})[Family.IPV4]
    assert (facts.reject_closed_ports, facts.loopback_node_ports) == (True, False)
    # Chosen where no mode is configured, it can do no other.
    unset = ForwardingTable(family=Family.IPV4, node=node_facts(Settings(), None, {})[Family.IPV4])
    assert fit(unset, capabilities("rr")).node == facts


@pytest.mark.parametrize(
    ("usual", "asked", "affinity", "kept"),
    [
        ("rr", "round-robin", 0, ""),
        ("rr", "wlc", 0, "wlc"),
        ("lc", "least-connections", 0, ""),
        ("lc", "round-robin", 0, "round-robin"),
        ("rr", "wlc", 600, ""),
    ],
)
def test_what_a_service_asks_for_beside_the_usual_is_kept(usual: str, asked: str, affinity: int, kept: str) -> None:
    route = Route(
        kind=Kind.CLUSTER_IP,
        backends=frozenset([Backend(bytes([10, 0, 0, 1]), 80)]),
        scheduler=asked,
        affinity=affinity,
    )
    table = ForwardingTable(family=Family.IPV4, routes={WEB: route})
    assert fit(table, capabilities(usual)).routes[WEB].scheduler == kept


# --- marks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(32))
def test_marks_leave_the_masquerade_bit_alone_and_are_told_apart(bit: int) -> None:
    """TRF-9."""
    marks = scheme(1 << bit)
    numbers = (1, 2, 3, 1 << 14, 1 << 15, (1 << 23) - 1)
    made = {marks.mark(number, role): (number, role) for number in numbers for role in (Role.EVERYBODY, Role.INSIDE)}
    assert len(made) == 2 * len(numbers)
    for mark, (number, role) in made.items():
        assert 0 < mark <= ALL_BITS
        assert not mark >> bit & 1
        assert marks.is_ours(mark)
        assert marks.number(mark) == number
        assert bool(mark & marks.always) == (role is Role.EVERYBODY)
        assert not marks.is_ours(mark | 1 << bit)
    assert marks.is_ours(marks.drop)
    assert marks.number(marks.drop) == 0
    for foreign in (0, 1, 7, 100, 0x4000, 0x8000, 0xC000):
        assert not marks.is_ours(foreign)


@pytest.mark.parametrize("mask", [0, 3, 1 << 32])
def test_a_mark_of_other_than_one_bit_is_none(mask: int) -> None:
    with pytest.raises(ValueError, match="one bit"):
        scheme(mask)


def test_numbers_are_given_out_the_lowest_first_and_never_somebody_elses() -> None:
    one, two, three = ((WEB._replace(port=port), Role.INSIDE) for port in (1, 2, 3))
    numbers = Numbers({one: 2}, used={1, 4})
    assert numbers[one] == 2
    assert numbers[two] == 3
    assert numbers[three] == 5
    numbers.give_back(two)
    assert numbers[WEB, Role.OUTSIDE] == 3
    numbers.keep({one})
    assert numbers[two] == 3
