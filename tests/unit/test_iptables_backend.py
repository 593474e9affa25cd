"""Which iptables is used: what the configuration says, then the environment, then what the node uses."""

from __future__ import annotations

import pytest

from proxy import modes
from rules.dataplane import UnavailableError
from rules.forwarding import Family
from rules.iptables import dataplane as module
from rules.iptables.programs import Backend, Programs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Backend | None]:
    """What the dataplane is asked for."""
    seen: list[Backend | None] = []

    def choose(family: Family, backend: Backend | None) -> Programs:
        seen.append(backend)
        return Programs(family, backend or "nft", "save", "restore")

    monkeypatch.setattr(module, "choose", choose)
    return seen


@pytest.mark.parametrize(
    ("configured", "variable", "wanted"),
    [
        ("legacy", "", "legacy"),
        ("legacy", "nft", "legacy"),
        ("", "nft", "nft"),
        (None, "legacy", "legacy"),
        (None, "", None),
        ("", "", None),
    ],
)
def test_the_configuration_comes_before_the_environment(
    configured: str | None, variable: str, wanted: str | None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(modes.IPTABLES, variable)
    modes.open_dataplane("iptables", Family.IPV4, configured)
    assert asked == [wanted]


def test_another_word_is_an_error_that_names_where_it_stands(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(modes.IPTABLES, raising=False)
    with pytest.raises(UnavailableError, match="iptablesBackend=nf: must be nft or legacy"):
        modes.open_dataplane("iptables", Family.IPV4, "nf")
    monkeypatch.setenv(modes.IPTABLES, "old")
    with pytest.raises(UnavailableError, match="SLUICE_IPTABLES=old"):
        modes.open_dataplane("iptables", Family.IPV4)
    assert not asked
