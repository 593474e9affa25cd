"""The iptables programs: where they are, which of the two kinds this node uses, and running them.

`iptables-legacy` and `iptables-nft` keep rules in different places of the kernel, which both act: so whoever writes
with the wrong one is not seen by the others.  The one in use is where rules already are: ours, else kubelet's hint
chains, else kube-proxy's and others' (`detect`).

A program runs in the network namespace of the thread that starts it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, Frontend
from rules.iptables.text import PREFIX

Backend = Literal["legacy", "nft"]
BACKENDS: tuple[Backend, ...] = ("nft", "legacy")

_NAMES = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
_LINE = re.compile(r"(?:occurred at line: |^line |: line )(\d+)", re.MULTILINE)
_LOCK_WAIT = "5"
"""Seconds to wait for others who write with iptables-legacy."""
_BUSY = re.compile(
    r"xtables lock|Resource temporarily unavailable|Out of memory|memory|Permission denied|not permitted"
)
_HINTS = (":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY ")


class RestoreError(DataplaneError):
    """iptables-restore refused its input; nothing of the table in question was changed."""

    def __init__(self, reason: str, line: int | None, *, ours: bool) -> None:
        super().__init__(reason)
        self.line = line
        """The number of the refused line, from 1; None where the program gave none."""
        self.ours = ours
        """Whether the input may be at fault, rather than the node."""
        self.owners: frozenset[Frontend] = frozenset()
        """For whom that line was written, as far as it is known."""


class Programs(NamedTuple):
    """The programs of one family and kind."""

    family: Family
    backend: Backend
    save: str
    restore: str

    def saved(self) -> str:
        """All rules of the family that the kernel holds; it leaves everything as it is.

        Raises:
            DataplaneError: they cannot be read.
        """
        done = _run([self.save])
        if done.returncode:
            raise DataplaneError(f"{self.save} failed: {_reason(done)}")
        return done.stdout.decode(errors="replace")

    def apply(self, text: str) -> None:
        """Have iptables-restore make the changes of `text`, one transaction per table; others' rules stay.

        Raises:
            RestoreError: it refused; tables before the one in question are changed.
        """
        done = _run([self.restore, "--noflush", "-w", _LOCK_WAIT], text)
        if not done.returncode:
            return
        reason = _reason(done)
        found = _LINE.search(done.stderr.decode(errors="replace"))
        raise RestoreError(
            f"{self.restore} failed: {reason}", int(found[1]) if found else None, ours=not _BUSY.search(reason)
        )


def available(family: Family, environment: Mapping[str, str] = os.environ) -> dict[Backend, Programs]:
    """The programs of a family that this node has, by kind."""
    found: dict[Backend, Programs] = {}
    for backend in BACKENDS:
        if paths := _pair(f"{_NAMES[family]}-{backend}", environment):
            found[backend] = Programs(family, backend, *paths)
    # Before 1.8 there was one kind, which had no name of its own.
    if not found and (paths := _pair(_NAMES[family], environment)):
        backend = _kind(paths[1])
        found[backend] = Programs(family, backend, *paths)
    return found


def choose(family: Family, backend: Backend | None = None) -> Programs:
    """The programs to use: those asked for, else those in use on this node.

    Raises:
        UnavailableError: this node has none; the message says what to install.
    """
    found = available(family)
    if backend is not None:
        if backend not in found:
            raise UnavailableError(
                f"iptables-{backend} is not there for {family.label}: install the package iptables, or choose "
                f"{' or '.join(found) or 'another mode'}"
            )
        return found[backend]
    if not found:
        raise UnavailableError(
            f"mode iptables needs {_NAMES[family]}-save and {_NAMES[family]}-restore: install the package iptables"
        )
    return found[detect(found, family)]


def detect(found: Mapping[Backend, Programs], family: Family, environment: Mapping[str, str] = os.environ) -> Backend:
    """Which of several kinds this node uses, by where rules are: ours, kubelet's hints, kube-proxy's, or most."""
    if len(found) == 1:
        return next(iter(found))
    held = {backend: found[backend].saved() for backend in BACKENDS if backend in found}
    for marks in ((f":{PREFIX}",), _HINTS, (":KUBE-",)):
        for backend, text in held.items():
            if any(mark in text for mark in marks):
                return backend
    counts = {backend: text.count("\n-A ") for backend, text in held.items()}
    if any(counts.values()):
        return max(counts, key=lambda backend: counts[backend])
    default = _which(f"{_NAMES[family]}-restore", environment)
    chosen = _kind(default) if default else BACKENDS[0]
    return chosen if chosen in found else next(iter(found))


FEATURES = {
    "statistic": "-m statistic --mode random --probability 0.5 -j RETURN",
    "recent": f"-m recent --set --name {PREFIX}PROBE --rsource -j RETURN",
    "comment": '-m comment --comment "probe" -j RETURN',
    "addrtype": "-m addrtype --dst-type LOCAL -j RETURN",
    "conntrack": "-m conntrack --ctstate NEW -j RETURN",
    "mark": "-m mark --mark 0x1/0x1 -j RETURN",
    "MARK": "-j MARK --set-xmark 0x1/0x1",
    "MASQUERADE": "-j MASQUERADE",
    "random-fully": "-j MASQUERADE --random-fully",
    "DNAT": "-p tcp -j DNAT --to-destination {backend}",
    "sctp": "-p sctp -m sctp --dport 1 -j RETURN",
}
"""What our rules ask of iptables and of the kernel, in the nat table."""
OPTIONAL = frozenset({"recent", "comment", "random-fully", "sctp"})
"""What a node can do without, with a loss."""
_PROBE = f"{PREFIX}PROBE"


def missing_features(programs: Programs) -> frozenset[str]:
    """What this node lacks of FEATURES, tried with a chain that nothing leads to.

    Raises:
        DataplaneError: it could not be tried.
    """
    try:
        return frozenset(_refused(programs, list(FEATURES)))
    finally:
        programs.apply(f"*nat\n:{_PROBE} - [0:0]\n-X {_PROBE}\nCOMMIT\n")


def _refused(programs: Programs, features: list[str]) -> Iterator[str]:
    backend = "192.0.2.1:1" if programs.family is Family.IPV4 else "[2001:db8::1]:1"
    rules = [f"-A {_PROBE} {FEATURES[each].format(backend=backend)}" for each in features]
    try:
        programs.apply("\n".join(["*nat", f":{_PROBE} - [0:0]", *rules, "COMMIT", ""]))
    except RestoreError as error:
        if not error.ours:
            raise
        if len(features) == 1:
            yield features[0]
            return
        for each in features:
            yield from _refused(programs, [each])


def _kind(program: str) -> Backend:
    """The kind of a program by what it says of itself."""
    try:
        return "nft" if b"(nf_tables)" in _run([program, "--version"]).stdout else "legacy"
    except DataplaneError:
        return "legacy"


def _pair(name: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The programs that save and restore."""
    save, restore = (_which(f"{name}-{verb}", environment) for verb in ("save", "restore"))
    return (save, restore) if save and restore else None


def _which(name: str, environment: Mapping[str, str]) -> str | None:
    # A service's or a container's PATH may lack the directories of root's programs.
    return shutil.which(name, path=f"{environment.get('PATH', '')}:/usr/sbin:/sbin")


def _run(command: Iterable[str], text: str = "") -> subprocess.CompletedProcess[bytes]:
    words = list(command)
    try:
        return subprocess.run(words, input=text.encode(), capture_output=True, check=False)  # noqa: S603  # found by name
    except OSError as error:
        raise DataplaneError(f"{words[0]} cannot be run: {error.strerror}") from error


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines()]
    useful = [line for line in lines if line and not line.startswith(("Try `", "# Warning"))]
    return "; ".join(useful[:4]) or f"exit code {done.returncode}"
