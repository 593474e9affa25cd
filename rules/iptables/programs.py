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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family, Frontend
from rules.iptables.text import PREFIX, TABLES, Saved, TextError, parse

Backend = Literal["legacy", "nft"]
BACKENDS: tuple[Backend, ...] = ("nft", "legacy")

_NAMES = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
_LINE = re.compile(r"(?:occurred at line: |^line |: line )(\d+)", re.MULTILINE)
LOCK_WAIT = 5
"""Seconds to wait for others who write with iptables-legacy, as kube-proxy does (IPT-23)."""
_PATIENCE = 1.0
"""Seconds after which it is worth looking who holds the lock."""
_LOCK = "/run/xtables.lock"
_BUSY = re.compile(
    r"xtables lock|Resource temporarily unavailable|Out of memory|memory|Permission denied|not permitted"
)
_LACKING = re.compile(r"initiali[sz]e|must be root|Protocol not supported|do you need to insmod", re.IGNORECASE)
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
            UnavailableError: the kernel has none for these programs, or not for this process.
            DataplaneError: they cannot be read.
        """
        done = _run([self.save])
        if done.returncode:
            error = DataplaneError(f"{self.save} failed: {_reason(done)}")
            raise self.lacking(error) or error
        return done.stdout.decode(errors="replace")

    def listed(self, chain: str) -> str:
        """The rules of one chain of the filter table, each with its counters; none where there is no such chain.

        Raises:
            DataplaneError: they cannot be read.
        """
        done = _run([self.save.removesuffix("-save"), "-w", str(LOCK_WAIT), "-t", "filter", "-v", "-S", chain])
        return "" if done.returncode else done.stdout.decode(errors="replace")

    def lacking(self, error: DataplaneError) -> UnavailableError | None:
        """What it means that the programs failed, where it means that they never will do anything here."""
        if not _LACKING.search(str(error)):
            return None
        modules = "nf_tables" if self.backend == "nft" else "ip_tables, ip6_tables"
        return UnavailableError(
            f"iptables-{self.backend} is not available on this host: give the process CAP_NET_ADMIN and CAP_NET_RAW, "
            f"or load the kernel's modules ({modules}): {error}"
        )

    def apply(self, text: str) -> str:
        """Have iptables-restore make the changes of `text`, one transaction per table; others' rules stay.

        Returns what it had to wait for, in a sentence for the log; mostly nothing.

        Raises:
            RestoreError: it refused; tables before the one in question are changed.
        """
        start = time.monotonic()
        done, holder = _run_under_lock([self.restore, "--noflush", "-w", str(LOCK_WAIT)], text)
        if not done.returncode:
            return holder and f"waited {time.monotonic() - start:.1f} s for the xtables lock, which {holder} held"
        reason = _reason(done)
        if "xtables lock" in reason:
            who = holder or "another process"
            raise RestoreError(f"{who} has held the xtables lock ({_lock_file()}) for {LOCK_WAIT} s", None, ours=False)
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
    """Which of several kinds this node uses, by where rules are: ours, kubelet's hints, kube-proxy's, or most.

    Raises:
        UnavailableError: this kernel can do with none of them.
    """
    if len(found) == 1:
        return next(iter(found))
    held = dict(_held(found.values()))
    for marks in ((f":{PREFIX}",), _HINTS, (":KUBE-",)):
        for backend, text in held.items():
            if any(mark in text for mark in marks):
                return backend
    counts = {backend: text.count("\n-A ") for backend, text in held.items()}
    if any(counts.values()):
        return max(counts, key=lambda backend: counts[backend])
    default = _which(f"{_NAMES[family]}-restore", environment)
    chosen = _kind(default) if default else BACKENDS[0]
    return chosen if chosen in held else next(iter(held))


def read_ours(programs: Programs, prefix: str = PREFIX, tables: Sequence[str] = TABLES) -> Saved:
    """What the kernel holds of ours; the other arguments as of `rules.iptables.text.parse`.

    Raises:
        UnavailableError: as of `Programs.saved`.
        DataplaneError: likewise, or what was printed makes no sense.
    """
    try:
        return parse(programs.saved(), prefix, tables)
    except TextError as error:
        raise DataplaneError(f"{programs.save} printed what makes no sense: {error}") from error


def remove(
    kinds: Iterable[Programs], removal: Callable[[Saved], str], prefix: str = PREFIX, tables: Sequence[str] = TABLES
) -> bool:
    """Remove what is ours of several kinds; whether there was anything.

    Args:
        kinds: the programs of each.
        removal: the input by which they remove it.
        prefix: how the names of the chains begin.
        tables: where they are.

    Raises:
        UnavailableError: this kernel, or this process, can do with none of them.
        DataplaneError: it could not be read or removed.
    """
    removed = []
    lacking = None
    for programs in kinds:
        try:
            saved = read_ours(programs, prefix, tables)
            if saved:
                programs.apply(removal(saved))
            removed.append(bool(saved))
        except UnavailableError as error:
            lacking = error
    if lacking is not None and not removed:
        raise lacking
    return any(removed)


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


def _held(programs: Iterable[Programs]) -> Iterator[tuple[Backend, str]]:
    """The rules of each kind that this kernel can do with.

    Raises:
        UnavailableError: it can do with none.
    """
    lacking = []
    for each in programs:
        try:
            yield each.backend, each.saved()
        except UnavailableError as error:
            lacking.append(str(error))
    if len(lacking) == len(BACKENDS):
        raise UnavailableError("; ".join(lacking))


def missing_features(programs: Programs) -> frozenset[str]:
    """What this node lacks of FEATURES, tried with a chain that nothing leads to.

    Raises:
        DataplaneError: it could not be tried.
    """
    # Not tidied up after a failure: who has no lock would wait for it once more, and take the end that he is told to
    # come to meanwhile (SystemExit) for another failure.  A chain that is left goes with the next sync.
    missing = frozenset(_refused(programs, list(FEATURES)))
    programs.apply(f"*nat\n:{_PROBE} - [0:0]\n-X {_PROBE}\nCOMMIT\n")
    return missing


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


def _run_under_lock(command: list[str], text: str) -> tuple[subprocess.CompletedProcess[bytes], str]:
    """Run a program that may have to wait for the lock; what came of it, and who held the lock if it took long."""
    holder = ""
    try:
        # A file, as `communicate` forgets the rest of its input when it is interrupted.
        with open(os.memfd_create("rules"), "w+b") as rules:  # noqa: PTH123  # it has no path
            rules.write(text.encode())
            rules.seek(0)
            process = subprocess.Popen(  # noqa: S603  # found by name
                command, stdin=rules, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
    except OSError as error:
        raise DataplaneError(f"{command[0]} cannot be run: {error.strerror}") from error
    with process:
        while True:
            try:
                output, errors = process.communicate(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                holder = _lock_holder(process.pid) or holder
            else:
                return subprocess.CompletedProcess(command, process.returncode, output, errors), holder


def _lock_file() -> str:
    return os.environ.get("XTABLES_LOCKFILE", _LOCK)


def _lock_holder(own: int) -> str:
    """Who holds the xtables lock, unless it is the process `own` or nobody."""
    try:
        inode = Path(_lock_file()).stat().st_ino
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    # 1: FLOCK  ADVISORY  WRITE 4711 00:1a:815 0 EOF; those who wait have "->" behind the number.
    for words in map(str.split, locks):
        if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{inode}") and words[4] != str(own):
            try:
                name = Path(f"/proc/{words[4]}/comm").read_text(errors="replace").strip()
            except OSError:  # it ended, and one of its children holds the lock
                return "another process"
            return f"{name} (process {words[4]})"
    return ""


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines()]
    useful = [line for line in lines if line and not line.startswith(("Try `", "# Warning"))]
    return "; ".join(useful[:4]) or f"exit code {done.returncode}"
