"""Which iptables is used: what the configuration says, then the environment, then what the node uses."""

from __future__ import annotations

from pathlib import Path

import pytest

import proxy.dump  # noqa: F401  # loaded before `open_dataplane` is replaced, which its functions take as a default
from proxy import cli, modes
from proxy.config.schema import OWN_GROUP_VERSION, OWN_KIND
from rules.dataplane import Dataplane, UnavailableError
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


@pytest.mark.parametrize("how", ["flag", "file"])
@pytest.mark.parametrize(
    "verb", ["dump", "dump -o raw", "explain --live 10.96.0.1:80 -f {m}", "verify -f {m}", "doctor -f {m}"]
)
def test_every_verb_that_reads_the_kernel_goes_by_the_configuration(
    verb: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: set[str | None] = set()

    def opened(_name: str, _family: Family, iptables: str | None = None, *_: object) -> Dataplane:
        asked.add(iptables)
        raise UnavailableError("nothing is read here")

    monkeypatch.setattr(modes, "open_dataplane", opened)
    monkeypatch.setattr(modes, "present", lambda: ("iptables",))
    (tmp_path / "m.yaml").write_text("kind: Service\napiVersion: v1\nmetadata: {name: a}\nspec: {}\n")
    config = tmp_path / "config"
    config.write_text(f"apiVersion: {OWN_GROUP_VERSION}\nkind: {OWN_KIND}\niptablesBackend: legacy\n")
    given = ["--iptables-backend", "legacy"] if how == "flag" else ["--config", str(config)]
    mode = ["--proxy-mode", "iptables"] if how == "flag" and "-f" in verb else []
    cli.main([*verb.format(m=tmp_path / "m.yaml").split(), *given, *mode], name="sluice")
    assert asked <= {"legacy"}, "it reads as nobody has configured"
    assert asked
