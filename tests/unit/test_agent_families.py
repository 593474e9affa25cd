"""Which families an agent serves: both, unless the kernel lacks something for one of them (CFG-60 to CFG-62)."""

from __future__ import annotations

import pytest

from proxy import modes, opening
from proxy.config.settings import Settings
from rules.dataplane import UnavailableError
from rules.forwarding import Family
from tests.fakes.memory_dataplane import FlakyMemory


class Kernel:
    """Opens dataplanes, of which those of some families lack something."""

    def __init__(self, *lacking: Family) -> None:
        self.lacking = lacking
        self.open: list[Family] = []

    def open_dataplane(self, name: str, family: Family, *_: object) -> FlakyMemory:
        kernel = self

        class Opened(FlakyMemory):
            def check(self) -> None:
                if self.family in kernel.lacking:
                    raise UnavailableError("this kernel lacks the expression fib (CONFIG_NFT_FIB_IPV6)")

            def close(self) -> None:
                kernel.open.remove(self.family)

        self.open.append(family)
        return Opened(family)


def opened(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, *, supported: tuple[Family, ...] = tuple(Family)
) -> tuple[list[Family], dict[str, str]]:
    """The families that are served, and why the others are not."""
    monkeypatch.setattr(modes, "open_dataplane", kernel.open_dataplane)
    monkeypatch.setattr(modes, "supported_families", lambda: supported)
    dataplanes, unserved = opening.open_dataplanes(Settings(mode="nftables"))
    return [each.family for each in dataplanes], {each.family: each.reason for each in unserved}


def test_cfg_60_both_families_are_served_whatever_the_configuration_speaks_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(Kernel(), monkeypatch) == (list(Family), {})


def test_cfg_61_a_node_that_carries_the_second_family_alone_serves_that(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(Family.IPV4)
    served, unserved = opened(kernel, monkeypatch)
    assert (served, unserved.keys()) == ([Family.IPV6], {"IPv4"})
    assert kernel.open == [Family.IPV6]


def test_a_family_that_the_kernel_cannot_serve_is_left_out_with_a_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = Kernel(Family.IPV6)
    served, unserved = opened(kernel, monkeypatch)
    assert served == [Family.IPV4]
    assert unserved == {"IPv6": "this kernel lacks the expression fib (CONFIG_NFT_FIB_IPV6)"}
    assert kernel.open == [Family.IPV4], "what is not used stays open"
    shown = capsys.readouterr()
    [line] = [each for each in (shown.out + shown.err).splitlines() if "family not served" in each]
    assert "CONFIG_NFT_FIB_IPV6" in line


def test_cfg_62_a_family_that_is_switched_off_on_the_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    served, unserved = opened(Kernel(), monkeypatch, supported=(Family.IPV4,))
    assert served == [Family.IPV4]
    assert unserved.keys() == {"IPv6"}
    assert "switched off" in unserved["IPv6"]


def test_cfg_61_a_kernel_that_can_serve_none_ends_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(*Family)
    with pytest.raises(UnavailableError, match="lacks the expression fib"):
        opened(kernel, monkeypatch)
    assert not kernel.open
