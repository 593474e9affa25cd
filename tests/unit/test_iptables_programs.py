"""Which iptables a node uses, told by programs that stand in for the real ones."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family
from rules.iptables import programs as module
from rules.iptables.programs import (
    FEATURES,
    Backend,
    Programs,
    RestoreError,
    detect,
    missing_features,
    read_ours,
    remove,
)

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Puts a program into a directory: a shell script."""

    def write(name: str, script: str) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    return write


def pair(install: Install, backend: Backend, saved: str = "", tmp_path: Path = Path()) -> Programs:
    """Programs of a kind that hold what iptables-save is to print."""
    save, restore = f"iptables-{backend}-save", f"iptables-{backend}-restore"
    install(save, f"cat <<'END'\n{saved}\nEND")
    install(restore, "exit 0")
    return Programs(Family.IPV4, backend, str(tmp_path / save), str(tmp_path / restore))


HINT = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT"
KUBE = "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\nCOMMIT"
OURS = "*nat\n:SLUICE-SERVICES - [0:0]\nCOMMIT"
MANY = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A INPUT -j DROP\nCOMMIT"
ONE = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\nCOMMIT"


@pytest.mark.parametrize(
    ("nft", "legacy", "wanted"),
    [
        ("", OURS, "legacy"),
        (OURS, HINT, "nft"),
        (HINT, OURS, "legacy"),
        (MANY, HINT, "legacy"),
        (HINT, KUBE, "nft"),
        (MANY, KUBE, "legacy"),
        (ONE, MANY, "legacy"),
        (MANY, ONE, "nft"),
    ],
)
def test_the_kind_in_use_is_where_rules_are(
    nft: str, legacy: str, wanted: Backend, install: Install, tmp_path: Path
) -> None:
    found: dict[Backend, Programs] = {
        "nft": pair(install, "nft", nft, tmp_path),
        "legacy": pair(install, "legacy", legacy, tmp_path),
    }
    assert detect(found, Family.IPV4) == wanted


@pytest.mark.parametrize(("says", "wanted"), [("v1.8.9 (nf_tables)", "nft"), ("v1.8.9 (legacy)", "legacy")])
def test_without_rules_the_default_of_the_system_counts(
    says: str, wanted: Backend, install: Install, tmp_path: Path
) -> None:
    found: dict[Backend, Programs] = {
        "nft": pair(install, "nft", "", tmp_path),
        "legacy": pair(install, "legacy", "", tmp_path),
    }
    install("iptables-restore", f"echo 'iptables-restore {says}'")
    assert detect(found, Family.IPV4, {"PATH": str(tmp_path)}) == wanted


def test_a_line_that_is_refused_is_told_and_a_busy_lock_is_nobodys_fault(install: Install, tmp_path: Path) -> None:
    programs = pair(install, "nft", "", tmp_path)
    install("iptables-nft-restore", "echo 'line 4: RULE_APPEND failed (Invalid argument): rule in chain X' >&2; exit 4")
    with pytest.raises(RestoreError, match="RULE_APPEND failed") as refused:
        programs.apply("*nat\nCOMMIT\n")
    assert (refused.value.line, refused.value.ours) == (4, True)
    install("iptables-nft-restore", "echo 'Another app is currently holding the xtables lock' >&2; exit 4")
    with pytest.raises(RestoreError) as refused:
        programs.apply("*nat\nCOMMIT\n")
    assert not refused.value.ours


def test_rules_arrive_whole_however_long_the_program_takes_to_begin(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds, to a program that reads none of it until somebody looks who holds it up."""
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    programs = pair(install, "nft", "", tmp_path)
    install("iptables-nft-restore", f"sleep 0.5; cat > {tmp_path}/taken")
    rules = "*nat\n" + "-A SLUICE-S -j RETURN\n" * 20_000 + "COMMIT\n"
    assert not programs.apply(rules)
    assert (tmp_path / "taken").read_text() == rules


def test_a_lock_that_nobody_known_holds_is_told_in_one_line(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    programs = pair(install, "legacy", "", tmp_path)
    install(
        "iptables-legacy-restore",
        'echo "Can\'t lock /run/xtables.lock: Resource temporarily unavailable" >&2; '
        "echo 'Another app is currently holding the xtables lock. Stopped waiting after 5s.' >&2; exit 4",
    )
    with pytest.raises(RestoreError) as refused:
        programs.apply("*nat\nCOMMIT\n")
    assert str(refused.value) == f"another process has held the xtables lock ({tmp_path}/lock) for 5 s"
    assert not refused.value.ours


def test_programs_that_cannot_be_run_are_an_error_of_the_dataplane(tmp_path: Path) -> None:
    programs = Programs(Family.IPV4, "nft", str(tmp_path / "none"), str(tmp_path / "none"))
    with pytest.raises(DataplaneError, match="cannot be run"):
        programs.saved()


def test_features_that_are_missing_are_found_one_by_one(install: Install, tmp_path: Path) -> None:
    programs = pair(install, "nft", "", tmp_path)
    install(
        "iptables-nft-restore",
        "if grep -qe '-m recent' -e '--random-fully'; then echo 'line 3: RULE_APPEND failed' >&2; exit 4; fi",
    )
    assert missing_features(programs) == {"recent", "random-fully"}
    install("iptables-nft-restore", "exit 0")
    assert missing_features(programs) == frozenset()
    assert "statistic" in FEATURES


def test_whoever_does_not_get_the_lock_waits_for_it_once_and_ends_when_he_is_told_to(
    install: Install, tmp_path: Path
) -> None:
    programs = pair(install, "legacy", "", tmp_path)
    calls = tmp_path / "calls"
    busy = f"echo >> {calls}; echo 'Another app is currently holding the xtables lock' >&2; exit 4"
    install("iptables-legacy-restore", busy)
    with pytest.raises(RestoreError, match="has held the xtables lock"):
        missing_features(programs)
    assert len(calls.read_text()) == 1
    # SIGTERM, which comes while the program waits.
    install("iptables-legacy-restore", f"[ -s {calls}2 ] || {{ echo >> {calls}2; kill -TERM $PPID; sleep 1; }}; {busy}")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with pytest.raises(SystemExit):
            missing_features(programs)
    finally:
        signal.signal(signal.SIGTERM, before)


NO_LEGACY = "iptables-legacy-save v1.8.9 (legacy): Cannot initialize: iptables who? (do you need to insmod?)"


def test_what_is_ours_is_removed_where_the_kernel_knows_only_one_kind(install: Install, tmp_path: Path) -> None:
    nft = pair(install, "nft", OURS, tmp_path)
    legacy = pair(install, "legacy", "", tmp_path)
    install("iptables-legacy-save", f"echo '{NO_LEGACY}' >&2; exit 1")
    install("iptables-nft-restore", f"cat >>{tmp_path / 'given'}")
    for kinds in ((legacy, nft), (nft, legacy)):
        assert remove(kinds, lambda saved: f"# {sorted(saved.chains['nat'])}\n")
    assert (tmp_path / "given").read_text() == "# ['SLUICE-SERVICES']\n" * 2
    with pytest.raises(UnavailableError, match="insmod"):
        remove([legacy], str)
    assert not remove([pair(install, "nft", ONE, tmp_path), legacy], str), "there is nothing of ours"


def test_what_makes_no_sense_is_told(install: Install, tmp_path: Path) -> None:
    with pytest.raises(DataplaneError, match="iptables-nft-save printed what makes no sense: the table nat has no end"):
        read_ours(pair(install, "nft", "*nat", tmp_path))
